/* One new token's latent attention (DeepSeek-V2 report, section 2.1), absorbed: for each head h,
       q~ = W_UK[h]^T q_nope,   s = (c_kv q~ + k_pe q_pe) * scaling + mask,   o = W_UV[h] (softmax(s) c_kv).
   The heads' queries all meet the same cached latents, so the cache is read once, and scores are a product with the
   cache for weights. W_UK and W_UV are rows of kv_b_proj [heads * (nope + value), rank] and are used as they lie, FP8 or
   bf16. The cache is cut into chunks by its length alone, whose softmaxes are merged at the end: the bits do not depend
   on the number of threads. */
#include "engine.h"

#include <float.h>
#include <math.h>

#define STEP DSM_BLOCK /* keys whose scores are held at a time */
#define CHUNKS 32      /* most pieces of a cache */
#define GROUP DSM_PV_TOKENS

typedef struct {
    const Kernels *kernels;
    int dtype;
    int64_t batch, heads, length, nope, rope, rank, value;
    const Queries *queries;
    const LatentCache *cache;
    const Mask *mask;
    const Matrix *kv_b;
    float scaling;
    char *out;
    /* workspace */
    char *latents, *ropes; /* packed queries of [batch, packed_heads] */
    int64_t packed_heads;
    size_t latent_stride, rope_stride;
    int64_t chunk, chunks, groups, room; /* room: rank in whole panels */
    float *partial;                      /* [batch, chunks, heads, room] */
    float *peaks, *norms;                /* [batch, chunks, heads] */
} Attention;

typedef struct {
    float *scores, *panels, *decay;
    float *row, *query, *workspace;
    char *packed;
    void *scratch;
} Buffers;

static void absorb_query(const Attention *a, int64_t h, Buffers *buffers) {
    const size_t size = dsm_itemsize(a->dtype);
    const Queries *q = a->queries;
    float *row = buffers->row, *query = buffers->query;
    for (int64_t b = 0; b < a->batch; b++) {
        const char *nope = (const char *)q->nope + (b * q->nope_batch + h * q->nope_head) * size;
        const char *rope = (const char *)q->pe + (b * q->pe_batch + h * q->pe_head) * size;
        char *latents = a->latents + b * a->packed_heads * a->latent_stride;
        char *ropes = a->ropes + b * a->packed_heads * a->rope_stride;
        for (int64_t i = 0; i < a->nope; i++) query[i] = dsm_load(nope, a->dtype, i);
        a->kernels->gemv_transposed(query, a->kv_b, h * (a->nope + a->value), a->nope, row, buffers->workspace);
        const void *const one[] = {row, rope};
        dsm_pack(a->kernels, 1, one, 1, DSM_F32, a->rank, a->dtype, latents, a->latent_stride, h);
        dsm_pack(a->kernels, 1, one + 1, 1, a->dtype, a->rope, a->dtype, ropes, a->rope_stride, h);
    }
}

/* the keys after those of a step */
static PrefetchStream after(const Attention *a, const Matrix *keys, int64_t key) {
    const int64_t pitch = keys->cols * (int64_t)dsm_itemsize(a->dtype);
    const char *data = keys->data;
    return (PrefetchStream){data + dsm_min(key, a->length) * pitch, data + dsm_min(key + STEP, a->length) * pitch};
}

/* the scores of up to STEP keys, first .., of `heads` heads whose first packed query is the `query`th */
static void score(const Attention *a, const Matrix *c_kv, const Matrix *k_pe, int64_t query, int64_t heads,
                  int64_t first, int64_t count, Buffers *buffers, PrefetchStream *ahead) {
    const int64_t columns = a->kernels->panel_columns;
    float *latent = buffers->panels, *rope = latent + GROUP * columns;
    for (int64_t k = 0; k < count; k += columns) {
        const int64_t n = dsm_min(columns, count - k);
        a->kernels->gemm(a->latents + query * a->latent_stride, a->latent_stride, heads, c_kv, first + k, n, latent,
                         buffers->scratch, ahead);
        a->kernels->gemm(a->ropes + query * a->rope_stride, a->rope_stride, heads, k_pe, first + k, n, rope,
                         buffers->scratch, ahead + 1);
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < n; i++)
                buffers->scores[h * STEP + k + i] = latent[h * columns + i] + rope[h * columns + i];
    }
}

static void attend(const Attention *a, int64_t task, Buffers *buffers) {
    const int64_t b = task / (a->chunks * a->groups), part = task / a->groups % a->chunks;
    const int64_t h0 = task % a->groups * GROUP, heads = dsm_min(GROUP, a->heads - h0);
    const int64_t end = dsm_min(a->length, (part + 1) * a->chunk), at = (b * a->chunks + part) * a->heads + h0;
    const size_t size = dsm_itemsize(a->dtype);
    const Matrix c_kv = {
        (const char *)a->cache->c_kv + b * a->cache->c_kv_batch * size, NULL, a->length, a->rank, a->dtype, 0};
    const Matrix k_pe = {
        (const char *)a->cache->k_pe + b * a->cache->k_pe_batch * size, NULL, a->length, a->rope, a->dtype, 0};
    float *out = a->partial + at * a->room, *peaks = a->peaks + at, *norms = a->norms + at;
    memset(out, 0, sizeof(float) * heads * a->room);
    for (int64_t h = 0; h < heads; h++) peaks[h] = -FLT_MAX, norms[h] = 0.0f;
    for (int64_t k = part * a->chunk; k < end; k += STEP) {
        const int64_t count = dsm_min(STEP, end - k);
        const float *mask = a->mask->values ? a->mask->values + b * a->mask->batch + k : NULL;
        PrefetchStream ahead[2] = {after(a, &c_kv, k + STEP), after(a, &k_pe, k + STEP)};
        score(a, &c_kv, &k_pe, b * a->packed_heads + h0, heads, k, count, buffers, ahead);
        for (int64_t h = 0; h < heads; h++)
            buffers->decay[h] = a->kernels->online_softmax(buffers->scores + h * STEP, count, STEP, a->scaling, mask,
                                                           peaks + h, norms + h);
        a->kernels->accumulate_pv(buffers->scores, STEP, heads, &c_kv, k, count, buffers->decay, out, a->room,
                                  buffers->scratch, ahead);
    }
}

/* one head: the chunks' results become one, and leave the latent space */
static void merge(const Attention *a, int64_t h, Buffers *buffers) {
    const size_t stride = dsm_packed_stride(a->kernels, a->rank);
    float *row = buffers->row;
    for (int64_t b = 0; b < a->batch; b++) {
        float peak = -FLT_MAX, norm = 0.0f;
        for (int64_t part = 0; part < a->chunks; part++) {
            const float own = a->peaks[(b * a->chunks + part) * a->heads + h];
            peak = own > peak ? own : peak;
        }
        memset(row, 0, sizeof(float) * a->rank);
        for (int64_t part = 0; part < a->chunks; part++) {
            const int64_t at = (b * a->chunks + part) * a->heads + h;
            const float share = expf(a->peaks[at] - peak), *from = a->partial + at * a->room;
            norm += share * a->norms[at];
            for (int64_t i = 0; i < a->rank; i++) row[i] += share * from[i];
        }
        for (int64_t i = 0; i < a->rank; i++) row[i] /= norm;
        a->kernels->pack(row, DSM_F32, a->rank, a->kv_b->dtype, buffers->packed + b * stride);
    }
    a->kernels->gemv(buffers->packed, stride, a->batch, a->kv_b, h * (a->nope + a->value) + a->nope, a->value, row,
                     a->value, NULL);
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t i = 0; i < a->value; i++)
            dsm_store(a->out, a->dtype, (b * a->heads + h) * a->value + i, row[b * a->value + i]);
}

static int make_buffers(const Attention *a, Buffers *buffers) {
    const Kernels *k = a->kernels;
    const int64_t row = a->rank > a->batch * a->value ? a->rank : a->batch * a->value;
    buffers->scores = dsm_alloc(sizeof(float) * GROUP * STEP);
    buffers->panels = dsm_alloc(sizeof(float) * GROUP * 2 * k->panel_columns);
    buffers->decay = dsm_alloc(sizeof(float) * GROUP);
    buffers->row = dsm_alloc(sizeof(float) * row);
    buffers->query = dsm_alloc(sizeof(float) * a->nope);
    buffers->workspace = dsm_alloc(sizeof(float) * dsm_blocks(a->rank) * DSM_BLOCK);
    buffers->packed = dsm_alloc(a->batch * dsm_packed_stride(k, a->rank));
    buffers->scratch = dsm_alloc(k->scratch_bytes);
    return buffers->scores && buffers->panels && buffers->decay && buffers->row && buffers->query &&
           buffers->workspace && buffers->packed && buffers->scratch;
}
static void free_buffers(Buffers *buffers) {
    free(buffers->scores);
    free(buffers->panels);
    free(buffers->decay);
    free(buffers->row);
    free(buffers->query);
    free(buffers->workspace);
    free(buffers->packed);
    free(buffers->scratch);
}

/* keys of a chunk: whole steps, half a one for short caches, of which two threads should have something */
static int64_t chunk_of(int64_t length, int64_t chunks) {
    const int64_t even = (length + chunks - 1) / chunks;
    return length <= 2 * STEP ? STEP / 2 : (even + STEP - 1) / STEP * STEP;
}

static int run(Attention *a, int threads) {
    (void)threads; /* unused without OpenMP */
    const int64_t tasks = a->batch * a->chunks * a->groups;
    int failed = 0;
    const uint64_t caller = dsm_exact_mode();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint64_t mode = dsm_exact_mode();
        Buffers buffers = {0};
        if (!make_buffers(a, &buffers)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(static)
            for (int64_t h = 0; h < a->heads; h++) absorb_query(a, h, &buffers);
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; task++) attend(a, task, &buffers);
#pragma omp for schedule(static) nowait
            for (int64_t h = 0; h < a->heads; h++) merge(a, h, &buffers);
        }
        free_buffers(&buffers);
        dsm_restore_mode(mode);
    }
    dsm_restore_mode(caller);
    return failed ? DSM_NO_MEMORY : DSM_OK;
}

/* out [batch, heads, value] of `dtype` from the queries of one new token and the first `length` rows of a cache, all of
   `dtype`; kv_b [heads * (nope + value), rank]. */
DSM_API int dsm_mla_decode(int isa, int threads, int dtype, int64_t batch, int64_t length, const MlaShape *shape,
                           const Queries *queries, const LatentCache *cache, const Mask *mask, const Matrix *kv_b,
                           float softmax_scale, void *out) {
    const Kernels *kernels = dsm_kernels(isa, dtype);
    Attention a = {
        .kernels = kernels,
        .dtype = dtype,
        .batch = batch,
        .heads = shape->num_heads,
        .length = length,
        .nope = shape->qk_nope_head_dim,
        .rope = shape->qk_rope_head_dim,
        .rank = shape->kv_lora_rank,
        .value = shape->v_head_dim,
        .queries = queries,
        .cache = cache,
        .mask = mask,
        .kv_b = kv_b,
        .scaling = softmax_scale,
        .out = out,
    };
    int result = DSM_NO_MEMORY;
    if (batch < 1 || length < 1 || a.heads < 1 || a.nope < 1 || a.rope < 1 || a.rank < 1 || a.value < 1)
        return DSM_BAD_ARGUMENT;
    const int64_t rows = batch * a.heads, columns = kernels->panel_columns;
    a.packed_heads = dsm_packed_tokens(kernels, a.heads);
    a.latent_stride = dsm_packed_stride(kernels, a.rank);
    a.rope_stride = dsm_packed_stride(kernels, a.rope);
    a.room = (a.rank + columns - 1) / columns * columns;
    a.groups = (a.heads + GROUP - 1) / GROUP;
    a.chunk = chunk_of(a.length, CHUNKS / dsm_min(a.groups, CHUNKS));
    a.chunks = (a.length + a.chunk - 1) / a.chunk;
    a.latents = dsm_alloc(batch * a.packed_heads * a.latent_stride);
    a.ropes = dsm_alloc(batch * a.packed_heads * a.rope_stride);
    a.partial = dsm_alloc(sizeof(float) * rows * a.chunks * a.room);
    a.peaks = dsm_alloc(sizeof(float) * rows * a.chunks);
    a.norms = dsm_alloc(sizeof(float) * rows * a.chunks);
    if (a.latents && a.ropes && a.partial && a.peaks && a.norms) {
        const int64_t cached = batch * a.length * (a.rank + a.rope) * (1 + a.heads / 4);
        result = run(&a, dsm_threads(threads, dsm_bytes(kv_b) + cached));
    }
    free(a.latents);
    free(a.ropes);
    free(a.partial);
    free(a.peaks);
    free(a.norms);
    return result;
}
