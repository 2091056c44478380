/* Whole matrices of four-bit codes, decoded. */
#include "four_bit.h"

DSM_INLINE void decode_row(const Matrix *w, int64_t row, float *out, const int kind) {
    const uint8_t *codes = (const uint8_t *)dsm_row(w, row);
    const float *values = dsm_values(w->dtype);
    const int64_t group = dsm_group_of(kind), groups = w->cols / group;
    const int first = group == 64 ? 4 : 0; /* what moves an earlier column's code down */
    for (int64_t g = 0; g < groups; g++) {
        const float scale = dsm_group_scale(w->scale, row * groups + g, kind);
        float scaled[16];
        for (int i = 0; i < 16; i++) scaled[i] = values[i] * scale;
        for (int64_t i = 0; i < group; i += 2, codes++) {
            *out++ = scaled[*codes >> first & 15];
            *out++ = scaled[*codes >> (4 - first) & 15];
        }
    }
}

/* out [rows, cols] of `dtype` = table[code] * scale, in fp32, rounded once */
DSM_API int dsm_dequantize_four_bit(int isa, int threads, const Matrix *w, void *out, int dtype) {
    const Kernels *kernels = dsm_kernels(isa, DSM_F32);
    const size_t size = dsm_itemsize(dtype);
    int failed = 0;
    if (!dsm_is_four_bit(w->dtype) || w->cols % dsm_group(w->dtype)) return DSM_BAD_ARGUMENT;
    threads = dsm_threads(threads, dsm_bytes(w));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        float *row = dsm_alloc(sizeof(float) * w->cols);
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 16)
        for (int64_t r = 0; r < w->rows; r++) {
            if (!row) continue;
            DSM_BY_KIND(w, decode_row, w, r, row)
            kernels->write(row, NULL, w->cols, (char *)out + r * w->cols * size, dtype);
        }
        free(row);
        dsm_restore_mode(mode);
    }
    return failed ? DSM_NO_MEMORY : DSM_OK;
}
