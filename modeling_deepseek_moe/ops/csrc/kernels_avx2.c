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
#include "kernels_vector.h"
DSM_TARGET_END
#endif
