/* What latent attention needs of a few new tokens, in one call (DeepSeek-V2 report, section 2.1): queries, rotated, and
   the latents and rotated keys that the cache keeps. Each step rounds to the activations' dtype where the layers that it
   stands for do, so the bits are theirs. */
#include "work_queue.h"

#define TOKENS DSM_STEP_TOKENS

typedef struct {
    const Kernels *kernels, *norms;
    const MlaShape *shape;
    const MlaProjections *w;
    int dtype, threads;
    int many; /* for one of the products */
    int64_t tokens, rope, rank;
    const float *cosine, *sine; /* [tokens, rope / 2] */
    const void *given;          /* x as it came */
    char *q, *c_kv, *k_pe;
    char *x, *query;            /* packed */
    char *q_latent, *kv_latent; /* q_a's and kv_a's results */
    float *low;                 /* of adapters */
    size_t x_stride, query_stride;
} Projection;

static int are_many(const Projection *p, int weight_dtype) {
    return dsm_are_many(p->kernels, p->tokens, weight_dtype);
}
static int64_t rows_of_task(const Projection *p, const Matrix *w) {
    return are_many(p, w->dtype) ? p->kernels->panel_columns : dsm_gemv_rows(w->rows, p->threads);
}
static int64_t tasks_of(const Projection *p, const Matrix *w) {
    return (w->rows + rows_of_task(p, w) - 1) / rows_of_task(p, w);
}

static void multiply(const Projection *p, const char *x, size_t stride, const Matrix *w, int64_t task, char *y,
                     void *scratch) {
    float out[TOKENS * DSM_MOST_GEMV_ROWS] __attribute__((aligned(64)));
    PrefetchStream none = {0};
    const int64_t step = rows_of_task(p, w), first = task * step, rows = dsm_min(step, w->rows - first);
    if (are_many(p, w->dtype)) p->kernels->gemm(x, stride, p->tokens, w, first, rows, out, scratch, &none);
    else p->kernels->gemv(x, stride, p->tokens, w, first, rows, out, step, dsm_row(w, first + rows));
    for (int64_t t = 0; t < p->tokens; t++)
        p->kernels->write(out + t * step, NULL, rows, y + (t * w->rows + first) * dsm_itemsize(p->dtype), p->dtype);
}

static void pack(const Projection *p, const char *x, int64_t n, int weight_dtype, char *packed, size_t stride) {
    const void *rows[TOKENS];
    const int64_t step = p->kernels->panel_tokens;
    for (int64_t t = 0; t < p->tokens; t += step) {
        const int64_t tokens = dsm_min(step, p->tokens - t);
        for (int64_t i = 0; i < tokens; i++) rows[i] = x + (t + i) * n * dsm_itemsize(p->dtype);
        dsm_pack(p->kernels, are_many(p, weight_dtype), rows, tokens, p->dtype, n, weight_dtype, packed, stride, t);
    }
}

/* pairs are neighbours, or an element of each half */
static void rotate(const Projection *p, int64_t t, const char *from, char *to) {
    const int64_t half = p->rope / 2;
    const float *cosine = p->cosine + t * half, *sine = p->sine + t * half;
    for (int64_t i = 0; i < half; i++) {
        const int64_t a = p->shape->rope_interleave ? 2 * i : i, b = p->shape->rope_interleave ? 2 * i + 1 : half + i;
        const float even = dsm_load(from, p->dtype, a), odd = dsm_load(from, p->dtype, b);
        dsm_store(to, p->dtype, a, even * cosine[i] - odd * sine[i]);
        dsm_store(to, p->dtype, b, even * sine[i] + odd * cosine[i]);
    }
}

/* called by all threads: queries' rotations, and the rows that the cache keeps */
static void finish(const Projection *p) {
    const size_t size = dsm_itemsize(p->dtype);
    const int64_t heads = p->shape->num_heads, nope = p->shape->qk_nope_head_dim, head = nope + p->rope;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < p->tokens * (heads + 1); i++) {
        const int64_t t = i / (heads + 1), h = i % (heads + 1);
        if (h < heads) {
            char *at = p->q + ((t * heads + h) * head + nope) * size;
            rotate(p, t, at, at);
        } else {
            const char *row = p->kv_latent + t * (p->rank + p->rope) * size;
            p->norms->norm(row, p->w->kv_a_norm.weight, p->rank, p->w->kv_a_norm.eps, p->c_kv + t * p->rank * size,
                           p->dtype);
            rotate(p, t, row + p->rank * size, p->k_pe + t * p->rope * size);
        }
    }
}

static int run(const Projection *p) {
    const int threads = p->threads;
    const size_t size = dsm_itemsize(p->dtype);
    const Matrix *q_a = &p->w->q_a, *q_b = &p->w->q_b, *kv_a = &p->w->kv_a, *query = q_a->rows ? q_a : q_b;
    const int64_t query_tasks = tasks_of(p, query), up_tasks = tasks_of(p, q_b), latent_tasks = tasks_of(p, kv_a);
    int failed = 0;
    char *first = q_a->rows ? p->q_latent : p->q;
    WorkQueue *queues = dsm_work_queues(threads, query_tasks + latent_tasks),
              *up_queues = dsm_work_queues(threads, up_tasks);
    if (!queues || !up_queues) {
        free(queues);
        free(up_queues);
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
        for (int64_t task; (task = dsm_next_task(queues, threads, dsm_thread_id())) >= 0;) {
            if (p->many && !scratch) continue; /* other threads' work is lost too: the call fails */
            if (task < query_tasks) multiply(p, p->x, p->x_stride, query, task, first, scratch);
            else multiply(p, p->x, p->x_stride, kv_a, task - query_tasks, p->kv_latent, scratch);
        }
#pragma omp barrier
        if (query->adapter) dsm_adapt_in_team(query, p->dtype, p->given, p->tokens, p->low, first);
        if (kv_a->adapter) dsm_adapt_in_team(kv_a, p->dtype, p->given, p->tokens, p->low, p->kv_latent);
        if (q_a->rows) {
#pragma omp single
            for (int64_t t = 0; t < p->tokens; t++) {
                char *row = p->q_latent + t * q_a->rows * size;
                p->norms->norm(row, p->w->q_a_norm.weight, q_a->rows, p->w->q_a_norm.eps, row, p->dtype);
                if (t + 1 == p->tokens) pack(p, p->q_latent, q_a->rows, q_b->dtype, p->query, p->query_stride);
            }
            for (int64_t task; (task = dsm_next_task(up_queues, threads, dsm_thread_id())) >= 0;)
                if (!p->many || scratch) multiply(p, p->query, p->query_stride, q_b, task, p->q, scratch);
#pragma omp barrier
            if (q_b->adapter) dsm_adapt_in_team(q_b, p->dtype, p->q_latent, p->tokens, p->low, p->q);
        }
        finish(p);
        free(scratch);
        dsm_restore_mode(mode);
    }
    free(queues);
    free(up_queues);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}

static int64_t rank_of(const Matrix *w) { return w->adapter ? w->adapter->rank : 0; }
static int64_t most_ranks(const MlaProjections *w) {
    return dsm_max(dsm_max(rank_of(&w->q_a), rank_of(&w->q_b)), rank_of(&w->kv_a));
}

/* x [tokens, hidden] of `dtype`; cosine and sine [tokens, rope / 2]; q [tokens, heads * (nope + rope)], c_kv [tokens, rank]
   and k_pe [tokens, rope] are written. */
DSM_API int dsm_mla_project(int isa, int threads, int dtype, const void *x, int64_t tokens, const MlaShape *shape,
                            const MlaProjections *w, const float *cosine, const float *sine, void *q, void *c_kv,
                            void *k_pe) {
    Projection p = {
        .kernels = dsm_kernels(isa, dtype),
        .norms = dsm_kernels(isa, DSM_F32),
        .shape = shape,
        .w = w,
        .dtype = dtype,
        .tokens = tokens,
        .rope = shape->qk_rope_head_dim,
        .rank = shape->kv_lora_rank,
        .cosine = cosine,
        .sine = sine,
        .given = x,
        .q = q,
        .c_kv = c_kv,
        .k_pe = k_pe,
    };
    const size_t size = dsm_itemsize(dtype);
    const int64_t hidden = w->kv_a.cols;
    int result = DSM_NO_MEMORY;
    if (tokens < 1 || tokens > TOKENS || hidden < 1) return DSM_BAD_ARGUMENT;
    /* one packing serves both of the first products: their weights have one dtype */
    const int first = w->q_a.rows ? w->q_a.dtype : w->q_b.dtype;
    if (first != w->kv_a.dtype) return DSM_BAD_ARGUMENT;
    p.x_stride = dsm_packed_stride(p.kernels, hidden, first);
    p.query_stride = dsm_packed_stride(p.kernels, w->q_a.rows, w->q_b.dtype);
    p.many = are_many(&p, first) || are_many(&p, w->q_b.dtype);
    p.x = dsm_alloc(dsm_packed_tokens(p.kernels, tokens) * p.x_stride);
    p.query = dsm_alloc(dsm_packed_tokens(p.kernels, tokens) * p.query_stride);
    p.q_latent = dsm_alloc(tokens * w->q_a.rows * size);
    p.kv_latent = dsm_alloc(tokens * w->kv_a.rows * size);
    p.low = dsm_alloc(sizeof(float) * tokens * most_ranks(w));
    if (p.x && p.query && p.q_latent && p.kv_latent && p.low) {
        const uint64_t caller = dsm_exact_mode();
        pack(&p, x, hidden, first, p.x, p.x_stride);
        p.threads = dsm_threads(threads, dsm_bytes(&w->q_a) + dsm_bytes(&w->q_b) + dsm_bytes(&w->kv_a));
        result = run(&p);
        dsm_restore_mode(caller);
    }
    free(p.x);
    free(p.query);
    free(p.q_latent);
    free(p.kv_latent);
    free(p.low);
    return result;
}
