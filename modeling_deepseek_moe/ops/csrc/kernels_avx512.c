/* The kernels for AVX-512 F, BW, DQ, VL (Skylake-X and later). */
#if defined(__x86_64__)
#include "target.h"

#include <immintrin.h>

DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define WIDTH 16
#define PANEL_VECTORS 4
#define KERNELS dsm_kernels_avx512
#define LABEL "avx512"
#define MULTIPLY_ADD_BYTES(a, b) _mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#define MAX_BYTES(a, b) _mm512_max_epu8((__m512i)(a), (__m512i)(b))
#define LOAD_HALVES(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define LOOK_UP(values, indices) _mm512_permutexvar_ps((__m512i)(indices), values)
#include "kernels_vector.h"

#define INTEGER_GROUP 256 /* bytes of 64 activations: as many as in fp32, which many tokens are packed in */
#define ADD_PAIRS(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)) /* vpdpwssd is VNNI's */
#include "few_tokens_four_bit.h"

#include "bf16_by_integers.h"
DSM_TARGET_END
#endif
