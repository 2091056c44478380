/* The kernels for AVX2 and FMA (Haswell, Zen and later). */
#if defined(__x86_64__)
#include "target.h"

#include <immintrin.h>

DSM_TARGET_BEGIN("avx2,fma,f16c")
#define WIDTH 8
#define PANEL_VECTORS 2
#define KERNELS dsm_kernels_avx2
#define LABEL "avx2"
#define MULTIPLY_ADD_BYTES(a, b) _mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#define MAX_BYTES(a, b) _mm256_max_epu8((__m256i)(a), (__m256i)(b))
#define LOAD_HALVES(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define LOOK_UP_8(values, indices) _mm256_permutevar8x32_ps(values, (__m256i)(indices))
#define CHOOSE_BY_SIGN(choice, yes, no) _mm256_blendv_ps(no, yes, (__m256)(choice))
#include "kernels_vector.h"

#include "four_bit_avx2.h"

#include "bf16_by_integers.h"
DSM_TARGET_END
#endif
