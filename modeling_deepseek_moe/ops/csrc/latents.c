/* What latent attention needs of a few new tokens, in one call (DeepSeek-V2 report, section 2.1): queries, rotated, and
   the latents and rotated keys that the cache keeps. Each step rounds to the activations' dtype where the layers that it
   stands for do, so the bits are theirs. */
#include "lanes.h"

#define MOST_ROWS 64 /* of a task: a panel's, or DSM_MOST_FEW_ROWS */
#define TOKENS DSM_STEP_TOKENS

typedef struct {
    const Kernels *kernels, *norms;
    int dtype, interleaved, many, threads;
    int64_t tokens, heads, nope, rope, rank;
    Matrix down, up, latent; /* q_a_proj and q_b_proj, or none and q_proj; kv_a_proj_with_mqa */
    const void *query_norm, *latent_norm;
    float query_eps, latent_eps;
    const float *cosine, *sine; /* [tokens, rope / 2] */
    char *q, *c_kv, *k_pe;
    char *x, *query; /* packed */
    char *low, *wide; /* q_a's and kv_a's results */
    size_t x_stride, query_stride;
} Projection;

static int64_t rows_of_task(const Projection *p, const Matrix *w) {
    return p->many ? p->kernels->panel_columns : dsm_few_rows(p->kernels, w->rows, p->threads);
}
static int64_t tasks_of(const Projection *p, const Matrix *w) {
    return (w->rows + rows_of_task(p, w) - 1) / rows_of_task(p, w);
}

static void multiply(const Projection *p, const char *x, size_t stride, const Matrix *w, int64_t task, char *y,
                     void *scratch) {
    float out[TOKENS * MOST_ROWS] __attribute__((aligned(64)));
    Ahead none = {0};
    const int64_t step = rows_of_task(p, w), first = task * step, rows = dsm_min(step, w->rows - first);
    if (p->many) p->kernels->panel(x, stride, p->tokens, w, first, rows, out, scratch, &none);
    else p->kernels->rows(x, stride, p->tokens, w, first, rows, out, step, dsm_row(w, first + rows));
    for (int64_t t = 0; t < p->tokens; t++)
        p->kernels->write(out + t * step, NULL, rows, y + (t * w->rows + first) * dsm_itemsize(p->dtype), p->dtype);
}

static void pack(const Projection *p, const char *x, int64_t n, int weight_dtype, char *packed, size_t stride) {
    const void *rows[TOKENS];
    const int64_t step = p->kernels->panel_tokens;
    for (int64_t t = 0; t < p->tokens; t += step) {
        const int64_t tokens = dsm_min(step, p->tokens - t);
        for (int64_t i = 0; i < tokens; i++) rows[i] = x + (t + i) * n * dsm_itemsize(p->dtype);
        dsm_pack(p->kernels, p->many, rows, tokens, p->dtype, n, weight_dtype, packed, stride, t);
    }
}

/* pairs are neighbours, or an element of each half */
static void rotate(const Projection *p, int64_t t, const char *from, char *to) {
    const int64_t half = p->rope / 2;
    const float *cosine = p->cosine + t * half, *sine = p->sine + t * half;
    for (int64_t i = 0; i < half; i++) {
        const int64_t a = p->interleaved ? 2 * i : i, b = p->interleaved ? 2 * i + 1 : half + i;
        const float even = dsm_load(from, p->dtype, a), odd = dsm_load(from, p->dtype, b);
        dsm_store(to, p->dtype, a, even * cosine[i] - odd * sine[i]);
        dsm_store(to, p->dtype, b, even * sine[i] + odd * cosine[i]);
    }
}

static int run(const Projection *p) {
    const int threads = p->threads;
    const size_t size = dsm_itemsize(p->dtype);
    const Matrix *query = p->down.rows ? &p->down : &p->up;
    const int64_t query_tasks = tasks_of(p, query), up_tasks = tasks_of(p, &p->up), latent_tasks = tasks_of(p, &p->latent);
    const int64_t head = p->nope + p->rope;
    int failed = 0;
    char *low = p->down.rows ? p->low : p->q;
    Lane *lanes = dsm_lanes(threads, query_tasks + latent_tasks), *up_lanes = dsm_lanes(threads, up_tasks);
    if (!lanes || !up_lanes) {
        free(lanes);
        free(up_lanes);
        return DSM_NO_MEMORY;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        void *scratch = p->many ? dsm_alloc(p->kernels->scratch_bytes) : NULL;
        if (p->many && !scratch) {
#pragma omp atomic write
            failed = 1;
        }
        for (int64_t task; (task = dsm_take(lanes, threads, dsm_me())) >= 0;) {
            if (p->many && !scratch) continue; /* other threads' work is lost too: the call fails */
            if (task < query_tasks) multiply(p, p->x, p->x_stride, query, task, low, scratch);
            else multiply(p, p->x, p->x_stride, &p->latent, task - query_tasks, p->wide, scratch);
        }
#pragma omp barrier
        if (p->down.rows) {
#pragma omp single
            for (int64_t t = 0; t < p->tokens; t++) {
                char *row = p->low + t * p->down.rows * size;
                p->norms->norm(row, p->query_norm, p->down.rows, p->query_eps, row, p->dtype);
                if (t + 1 == p->tokens) pack(p, p->low, p->down.rows, p->up.dtype, p->query, p->query_stride);
            }
            for (int64_t task; (task = dsm_take(up_lanes, threads, dsm_me())) >= 0;)
                if (!p->many || scratch) multiply(p, p->query, p->query_stride, &p->up, task, p->q, scratch);
#pragma omp barrier
        }
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < p->tokens * (p->heads + 1); i++) {
            const int64_t t = i / (p->heads + 1), h = i % (p->heads + 1);
            if (h < p->heads) {
                char *at = p->q + ((t * p->heads + h) * head + p->nope) * size;
                rotate(p, t, at, at);
            } else {
                const char *row = p->wide + t * (p->rank + p->rope) * size;
                p->norms->norm(row, p->latent_norm, p->rank, p->latent_eps, p->c_kv + t * p->rank * size, p->dtype);
                rotate(p, t, row + p->rank * size, p->k_pe + t * p->rope * size);
            }
        }
        free(scratch);
        dsm_restore_mode(mode);
    }
    free(lanes);
    free(up_lanes);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}

static Matrix matrix(const int64_t *fields) {
    return (Matrix){(const void *)(intptr_t)fields[0], (const float *)(intptr_t)fields[1], fields[2], fields[3],
                    (int)fields[4]};
}

/* x [tokens, hidden] of `dtype`; dims: tokens, heads, nope, rope, rank, whether rotary pairs are neighbours; matrices [3]
   of address, address of scales, rows, columns, dtype: q_a_proj (no rows: none), q_b_proj or q_proj,
   kv_a_proj_with_mqa; q [tokens, heads * (nope + rope)], c_kv [tokens, rank] and k_pe [tokens, rope] are written. */
DSM_API int dsm_mla_project(int isa, int threads, int dtype, const void *x, const int64_t *dims,
                            const int64_t *matrices, const void *query_norm, float query_eps, const void *latent_norm,
                            float latent_eps, const float *cosine, const float *sine, void *q, void *c_kv,
                            void *k_pe) {
    Projection p = {
        .kernels = dsm_kernels(isa, dtype),
        .norms = dsm_kernels(isa, DSM_F32),
        .dtype = dtype,
        .tokens = dims[0],
        .heads = dims[1],
        .nope = dims[2],
        .rope = dims[3],
        .rank = dims[4],
        .interleaved = (int)dims[5],
        .down = matrix(matrices),
        .up = matrix(matrices + 5),
        .latent = matrix(matrices + 10),
        .query_norm = query_norm,
        .query_eps = query_eps,
        .latent_norm = latent_norm,
        .latent_eps = latent_eps,
        .cosine = cosine,
        .sine = sine,
        .q = q,
        .c_kv = c_kv,
        .k_pe = k_pe,
    };
    const size_t size = dsm_itemsize(dtype);
    const int64_t hidden = p.latent.cols;
    int result = DSM_NO_MEMORY;
    if (p.tokens < 1 || p.tokens > TOKENS || hidden < 1) return DSM_BAD_ARGUMENT;
    /* one packing serves both of the first products: their weights have one dtype */
    const int first = p.down.rows ? p.down.dtype : p.up.dtype;
    if (first != p.latent.dtype) return DSM_BAD_ARGUMENT;
    p.x_stride = dsm_packed_stride(p.kernels, hidden);
    p.query_stride = dsm_packed_stride(p.kernels, p.down.rows);
    p.many = p.tokens > p.kernels->few_tokens;
    p.x = dsm_alloc(dsm_packed_tokens(p.kernels, p.tokens) * p.x_stride);
    p.query = dsm_alloc(dsm_packed_tokens(p.kernels, p.tokens) * p.query_stride);
    p.low = dsm_alloc(p.tokens * p.down.rows * size);
    p.wide = dsm_alloc(p.tokens * p.latent.rows * size);
    if (p.x && p.query && p.low && p.wide) {
        const uint64_t caller = dsm_exact_mode();
        const int64_t weights = p.down.rows * p.down.cols * (int64_t)dsm_itemsize(p.down.dtype) +
                                p.up.rows * p.up.cols * (int64_t)dsm_itemsize(p.up.dtype) +
                                p.latent.rows * p.latent.cols * (int64_t)dsm_itemsize(p.latent.dtype);
        pack(&p, x, hidden, first, p.x, p.x_stride);
        p.threads = dsm_threads(threads, weights);
        result = run(&p);
        dsm_restore_mode(caller);
    }
    free(p.x);
    free(p.query);
    free(p.low);
    free(p.wide);
    return result;
}
