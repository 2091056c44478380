/* y = x W^T + bias for a weight in FP8, four bits or bf16; and RMSNorm. */
#include "work_queue.h"

#define TOKENS 512 /* tokens of a task while they are many: their packed block columns stay in the second cache */

typedef struct {
    const Kernels *kernels;
    const Matrix *w;
    const float *bias;
    char *packed;
    size_t stride;
    int64_t tokens;
    int64_t columns; /* weight rows of a task */
    void *y;
    int dtype;
} Job;

/* tokens t .. of one group */
static void pack(const Job *job, const void *x, int64_t t) {
    const Kernels *k = job->kernels;
    const size_t row = job->w->cols * dsm_itemsize(job->dtype);
    const int64_t tokens = dsm_min(k->panel_tokens, job->tokens - t);
    const void *rows[DSM_GROUP_TOKENS];
    for (int64_t i = 0; i < tokens; i++) rows[i] = (const char *)x + (t + i) * row;
    dsm_pack(k, dsm_are_many(k, job->tokens, job->w->dtype), rows, tokens, job->dtype, job->w->cols, job->w->dtype,
             job->packed, job->stride, t);
}

static void write(const Job *job, const float *from, int64_t ldf, int64_t t0, int64_t tokens, int64_t r0,
                  int64_t rows) {
    const size_t size = dsm_itemsize(job->dtype);
    for (int64_t t = 0; t < tokens; t++)
        job->kernels->write(from + t * ldf, job->bias ? job->bias + r0 : NULL, rows,
                            (char *)job->y + ((t0 + t) * job->w->rows + r0) * size, job->dtype);
}

static void few_tokens(const Job *job, int64_t task) {
    float out[16 * DSM_MOST_GEMV_ROWS]; /* no set of kernels calls more than 16 tokens few */
    int64_t r0 = task * job->columns, rows = dsm_min(job->columns, job->w->rows - r0);
    job->kernels->gemv(job->packed, job->stride, job->tokens, job->w, r0, rows, out, rows, dsm_row(job->w, r0 + rows));
    write(job, out, rows, 0, job->tokens, r0, rows);
}

static void many_tokens(const Job *job, int64_t task, float *out, void *scratch) {
    PrefetchStream none = {0};
    const int64_t columns = job->columns, parts = (job->w->rows + columns - 1) / columns;
    int64_t t0 = task / parts * TOKENS, tokens = dsm_min(TOKENS, job->tokens - t0);
    int64_t r0 = task % parts * columns, rows = dsm_min(columns, job->w->rows - r0);
    job->kernels->gemm(job->packed + t0 * job->stride, job->stride, tokens, job->w, r0, rows, out, scratch, &none);
    write(job, out, dsm_panels(job->kernels, rows), t0, tokens, r0, rows);
}

/* y [tokens, rows] of `dtype` from x [tokens, cols] of the same, with what w's adapter adds; bias [rows] fp32 or NULL. */
DSM_API int dsm_linear(int isa, int threads, int dtype, const void *x, int64_t tokens, const Matrix *w,
                       const float *bias, void *y) {
    const int64_t rows = w->rows, cols = w->cols;
    const int wanted = threads;
    const Kernels *kernels = dsm_kernels(isa, dtype);
    const size_t stride = dsm_packed_stride(kernels, cols, w->dtype);
    const int few = !dsm_are_many(kernels, tokens, w->dtype);
    const int64_t columns = few ? dsm_gemv_rows(rows, threads) : dsm_panel_rows(kernels, rows, threads);
    int failed = 0;
    if (tokens < 0 || rows < 0 || cols < 0) return DSM_BAD_ARGUMENT;
    if (tokens == 0 || rows == 0) return DSM_OK;
    char *packed = dsm_borrow(dsm_packed_tokens(kernels, tokens) * stride);
    const Job job = {kernels, w, bias, packed, stride, tokens, columns, y, dtype};
    const int64_t tasks = (rows + columns - 1) / columns * (few ? 1 : (tokens + TOKENS - 1) / TOKENS);
    threads = dsm_threads(threads, dsm_bytes(w) * (few ? 1 : 1 + tokens / 16));
    WorkQueue *queues = dsm_work_queues(threads, tasks);
    if (!packed || !queues) {
        dsm_give_back(packed);
        free(queues);
        return DSM_NO_MEMORY;
    }
    const uint64_t caller = dsm_exact_mode();
    for (int64_t t = 0; few && t < tokens; t += kernels->panel_tokens) pack(&job, x, t); /* less work than a barrier */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        float *out = NULL;
        void *scratch = NULL;
        if (!few) {
            out = dsm_alloc(sizeof(float) * TOKENS * columns);
            scratch = dsm_alloc(kernels->scratch_bytes);
            if (!out || !scratch) {
#pragma omp atomic write
                failed = 1;
            }
        }
        if (!few) {
            /* the loop's end is a barrier: every thread sees whether one has failed */
#pragma omp for schedule(static)
            for (int64_t t = 0; t < tokens; t += kernels->panel_tokens) pack(&job, x, t);
        }
        for (int64_t task; (task = dsm_next_task(queues, threads, dsm_thread_id())) >= 0;) {
            if (few) few_tokens(&job, task);
            else if (!failed) many_tokens(&job, task, out, scratch);
        }
        free(out);
        free(scratch);
        dsm_restore_mode(mode);
    }
    dsm_restore_mode(caller);
    dsm_give_back(packed);
    free(queues);
    if (failed) return DSM_NO_MEMORY;
    return w->adapter ? dsm_adapt(wanted, w, dtype, x, tokens, y) : DSM_OK;
}

/* out [tokens, n] = RMSNorm(x), see `Kernels.norm`. */
DSM_API int dsm_rms_norm(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t n, const Norm *norm,
                         void *out) {
    const Kernels *kernels = dsm_kernels(isa, DSM_F32);
    const size_t row = n * dsm_itemsize(dtype);
    threads = dsm_threads(threads, tokens * n);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < tokens; t++)
            kernels->norm((const char *)x + t * row, norm->weight, n, norm->eps, (char *)out + t * row, dtype);
        dsm_restore_mode(mode);
    }
    return DSM_OK;
}
