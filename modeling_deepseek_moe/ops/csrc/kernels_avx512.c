/* The kernels for AVX-512 F, BW, DQ, VL (Skylake-X and later). */
#if defined(__x86_64__)
#include "target.h"
DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define WIDTH 16
#define PANEL_VECTORS 4
#define KERNELS dsm_kernels_avx512
#define LABEL "avx512"
#include "kernels_vector.h"
DSM_TARGET_END
#endif
