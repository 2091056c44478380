/* Whole matrices to and from FP8, a block row at a time. */
#include "engine.h"

#include <math.h>

/* out [rows, cols] of `dtype` = codes * scale */
DSM_API int dsm_dequantize(int isa, int threads, const uint8_t *codes, const float *scale, int64_t rows, int64_t cols,
                           void *out, int dtype) {
    const Kernels *kernels = dsm_kernels(isa, dtype);
    threads = dsm_threads(threads, rows * cols);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < rows; r++)
            kernels->decode(codes + r * cols, scale + r / DSM_BLOCK * dsm_blocks(cols), cols,
                            (char *)out + r * cols * dsm_itemsize(dtype), dtype);
        dsm_restore_mode(mode);
    }
    return DSM_OK;
}

/* 2^ceil(log2(scale)), no smaller than fp32's least normal number: adding all mantissa bits carries into the exponent
   unless they were all zero */
static float up_to_power_of_two(float scale) {
    uint32_t bits;
    if (!(scale > 0.0f)) return scale;
    memcpy(&bits, &scale, 4);
    bits = bits < 0x00800000u ? 0x00800000u : (bits + 0x007fffffu) & 0x7f800000u;
    memcpy(&scale, &bits, 4);
    return scale;
}

/* scale [row blocks, column blocks] = amax(block) / 448 (1 for a block of zeros), with `power_of_two` rounded up to one,
   and, unless `codes` is NULL, codes = E4M3(x / scale). DSM_NOT_FINITE when x holds NaN or infinity; nothing written is meant then. */
DSM_API int dsm_quantize(int isa, int threads, const void *x, int dtype, int64_t rows, int64_t cols, int power_of_two,
                         uint8_t *codes, float *scale) {
    const Kernels *kernels = dsm_kernels(isa, dtype);
    const int64_t across = dsm_blocks(cols), blocks = dsm_blocks(rows) * across;
    const size_t size = dsm_itemsize(dtype);
    int all_finite = 1;
    threads = dsm_threads(threads, rows * cols);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t r0 = b / across * DSM_BLOCK, r1 = dsm_min(rows, r0 + DSM_BLOCK);
            const int64_t c0 = b % across * DSM_BLOCK, n = dsm_min(DSM_BLOCK, cols - c0);
            float most = 0.0f;
            int finite = 1;
            for (int64_t r = r0; r < r1; r++)
                most = fmaxf(most, kernels->amax((const char *)x + (r * cols + c0) * size, dtype, n, &finite));
            if (!finite) {
#pragma omp atomic write
                all_finite = 0;
                continue;
            }
            most /= 448.0f;
            if (power_of_two) most = up_to_power_of_two(most);
            scale[b] = most > 0.0f ? most : 1.0f;
            if (codes)
                for (int64_t r = r0; r < r1; r++)
                    kernels->encode((const char *)x + (r * cols + c0) * size, dtype, n, scale[b],
                                    codes + r * cols + c0);
        }
        dsm_restore_mode(mode);
    }
    return all_finite ? DSM_OK : DSM_NOT_FINITE;
}
