/* What LoRA adds to a linear layer for a few tokens: y += scale * B (A x). A and B are read where peft keeps them, in their own
   dtype: there is no copy that could be out of date. They come from memory, as weights do, and are small next to these, so that
   vectors of every CPU's own are wide enough. */
#include "engine.h"

#define LANES 8     /* sums at a time */
#define OUTPUTS 256 /* of a task */

DSM_INLINE float dot_of(const int dtype, const int x_dtype, const void *a, int64_t at, const void *x, int64_t n) {
    float sums[LANES] = {0}, rest = 0.0f;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < LANES; i++) sums[i] += dsm_load(a, dtype, at + k + i) * dsm_load(x, x_dtype, k + i);
    for (; k < n; k++) rest += dsm_load(a, dtype, at + k) * dsm_load(x, x_dtype, k);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0] + rest;
}
static float dot(int dtype, int x_dtype, const void *a, int64_t at, const void *x, int64_t n) {
    if (dtype == DSM_F32 && x_dtype == DSM_F32) return dot_of(DSM_F32, DSM_F32, a, at, x, n);
    if (dtype == DSM_F32) return dot_of(DSM_F32, DSM_BF16, a, at, x, n);
    if (x_dtype == DSM_F32) return dot_of(DSM_BF16, DSM_F32, a, at, x, n);
    return dot_of(DSM_BF16, DSM_BF16, a, at, x, n);
}
DSM_INLINE void add_row_of(const int dtype, const void *a, int64_t at, float factor, float *restrict out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] += factor * dsm_load(a, dtype, at + i);
}
static void add_row(int dtype, const void *a, int64_t at, float factor, float *out, int64_t n) {
    if (dtype == DSM_F32) add_row_of(DSM_F32, a, at, factor, out, n);
    else add_row_of(DSM_BF16, a, at, factor, out, n);
}

void dsm_adapter_low(const Adapter *a, const float *x, int64_t inputs, float *low) {
    for (int64_t i = 0; i < a->rank; i++) low[i] = a->scale * dot(a->a_dtype, DSM_F32, a->a, i * inputs, x, inputs);
}
void dsm_adapter_add(const Adapter *a, int64_t first, int64_t count, const float *low, float *out) {
    for (int64_t r = 0; r < count; r++) out[r] += dot(a->b_dtype, DSM_F32, a->b, (first + r) * a->rank, low, a->rank);
}
void dsm_adapter_add_transposed(const Adapter *a, const float *q, int64_t first, int64_t count, int64_t inputs,
                                float *low, float *out) {
    memset(low, 0, sizeof(float) * a->rank);
    for (int64_t r = 0; r < count; r++) add_row(a->b_dtype, a->b, (first + r) * a->rank, q[r], low, a->rank);
    for (int64_t i = 0; i < a->rank; i++) add_row(a->a_dtype, a->a, i * inputs, a->scale * low[i], out, inputs);
}

void dsm_adapt_in_team(const Matrix *w, int dtype, const void *x, int64_t tokens, float *low, void *y) {
    const Adapter *a = w->adapter;
    const int64_t rank = a->rank, inputs = w->cols, outputs = w->rows;
    const int64_t chunks = (outputs + OUTPUTS - 1) / OUTPUTS;
    const size_t size = dsm_itemsize(dtype);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * rank; i++)
        low[i] = a->scale *
                 dot(a->a_dtype, dtype, a->a, i % rank * inputs, (const char *)x + i / rank * inputs * size, inputs);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * chunks; i++) {
        const int64_t t = i / chunks, first = i % chunks * OUTPUTS, count = dsm_min(OUTPUTS, outputs - first);
        float sums[OUTPUTS];
        for (int64_t r = 0; r < count; r++) sums[r] = dsm_load(y, dtype, t * outputs + first + r);
        dsm_adapter_add(a, first, count, low + t * rank, sums);
        for (int64_t r = 0; r < count; r++) dsm_store(y, dtype, t * outputs + first + r, sums[r]);
    }
}

int dsm_adapt(int threads, const Matrix *w, int dtype, const void *x, int64_t tokens, void *y) {
    float *low = dsm_alloc(sizeof(float) * tokens * w->adapter->rank);
    if (!low) return DSM_NO_MEMORY;
    threads = dsm_threads(threads, w->adapter->rank * (w->cols + w->rows) * 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        dsm_adapt_in_team(w, dtype, x, tokens, low, y);
        dsm_restore_mode(mode);
    }
    free(low);
    return DSM_OK;
}
