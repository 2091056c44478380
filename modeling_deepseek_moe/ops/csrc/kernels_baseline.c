/* The kernels for any CPU: SSE2 on x86-64, NEON on aarch64, whatever the compiler makes of 4 lanes elsewhere. */
#define WIDTH 4
#if defined(__aarch64__)
#define PANEL_VECTORS 4 /* 6 x 4 accumulators of 32 registers */
#define LABEL "neon"
#else
#define PANEL_VECTORS 2
#define LABEL "baseline"
#endif
#define KERNELS dsm_kernels_baseline
#include "kernels_vector.h"
