/* A few new tokens' latent attention (DeepSeek-V2 report, section 2.1), absorbed: for each of them and each head h,
       q~ = W_UK[h]^T q_nope,   s = (c_kv q~ + k_pe q_pe) * scaling + mask,   o = W_UV[h] (softmax(s) c_kv).
   The queries of all heads and tokens of a sequence meet the same cached latents, so the cache is read once, and scores are
   a product with the cache for weights. W_UK and W_UV are rows of kv_b_proj [heads * (nope + value), rank], used as they lie,
   with what an adapter adds. The cache is cut into chunks by its length alone, whose softmaxes are merged at the end: the
   bits do not depend on the number of threads.

   Sparse attention (DeepSeek-V3.2 report, section 2.1) is the same over the latents that each token's indices name: a step's
   are copied next to one another, once for all heads. Of many tokens some are taken at a time, so that a head's W_UK and
   W_UV are read once for all of them. */
#include "engine.h"

#include <float.h>
#include <math.h>

#define STEP DSM_BLOCK /* keys whose scores are held at a time */
#define CHUNKS 32      /* most pieces of a cache */
#define GROUP DSM_PV_TOKENS
#define QUERIES 16     /* tokens that leave the latent space together */
#define GATHER_AHEAD 4 /* rows */

typedef struct {
    const Kernels *kernels;
    int dtype;
    int64_t heads, length, nope, rope, rank, value;
    int64_t batch, tokens,
        rows; /* runs of tokens that meet the same keys; tokens of a run; with their heads, token by token */
    int64_t first, per_sequence; /* the first run, and runs of a sequence */
    const int32_t *indices;      /* [runs, length], NULL: a token meets all keys before it */
    const Queries *queries;
    const LatentCache *cache;
    const Mask *mask;
    const Matrix *kv_b;
    float scaling;
    char *out;
    /* workspace */
    char *latents, *ropes; /* packed queries of [batch, packed_rows] */
    int64_t packed_rows;
    size_t latent_stride, rope_stride;
    int64_t chunk, chunks, groups, room; /* groups: of rows, one task each; room: rank in whole panels */
    float *partial;                      /* [batch, chunks, rows, room] */
    float *peaks, *norms;                /* [batch, chunks, rows] */
} Attention;

typedef struct {
    float *scores, *panels, *decay;
    float *row, *query, *workspace, *low; /* low: of an adapter, for each of the queries that leave together */
    char *packed, *c_kv, *k_pe;           /* the latter two: a step's latents, gathered */
    void *scratch;
} Buffers;

/* Keys that are next to one another, in the cache or gathered from it. */
typedef struct {
    Matrix c_kv, k_pe;
    int64_t first;
    PrefetchStream ahead[2];
} Keys;

/* the sequence of a run, and the place of its first token there */
DSM_INLINE int64_t sequence_of(const Attention *a, int64_t run) { return (a->first + run) / a->per_sequence; }
DSM_INLINE int64_t place_of(const Attention *a, int64_t run) { return (a->first + run) % a->per_sequence * a->tokens; }

/* where the r-th row of a run, absorbed, waits to be packed: nothing else is there yet */
DSM_INLINE float *absorbed(const Attention *a, int64_t run, int64_t r) {
    return a->partial + (run * a->chunks * a->rows + r) * a->room;
}

static void absorb_query(const Attention *a, int64_t h, Buffers *buffers) {
    const size_t size = dsm_itemsize(a->dtype);
    const Queries *q = a->queries;
    float *query = buffers->query;
    for (int64_t i = 0, first = h * (a->nope + a->value); i < a->batch * a->tokens; i++) {
        const int64_t b = i / a->tokens, s = sequence_of(a, b), t = place_of(a, b) + i % a->tokens;
        const char *nope = (const char *)q->nope + (s * q->nope_batch + t * q->nope_token + h * q->nope_head) * size;
        for (int64_t k = 0; k < a->nope; k++) query[k] = dsm_load(nope, a->dtype, k);
        float *out = absorbed(a, b, i % a->tokens * a->heads + h);
        a->kernels->gemv_transposed(query, a->kv_b, first, a->nope, out, buffers->workspace);
        if (a->kv_b->adapter)
            dsm_adapter_add_transposed(a->kv_b->adapter, query, first, a->nope, a->rank, buffers->low, out);
    }
}

/* The `task`th group of rows, of all runs. Packed one by one, rows of two threads would share the lines they are written
   to. */
static void pack_queries(const Attention *a, int64_t task) {
    const Queries *q = a->queries;
    const int64_t step = a->kernels->panel_tokens, groups = a->packed_rows / step;
    const int64_t b = task / groups, r0 = task % groups * step, rows = dsm_min(step, a->rows - r0);
    const void *latents[DSM_GROUP_TOKENS], *ropes[DSM_GROUP_TOKENS];
    for (int64_t i = 0; i < rows; i++) {
        const int64_t t = place_of(a, b) + (r0 + i) / a->heads, h = (r0 + i) % a->heads;
        latents[i] = absorbed(a, b, r0 + i);
        ropes[i] = (const char *)q->pe +
                   (sequence_of(a, b) * q->pe_batch + t * q->pe_token + h * q->pe_head) * dsm_itemsize(a->dtype);
    }
    dsm_pack(a->kernels, 1, latents, rows, DSM_F32, a->rank, a->dtype,
             a->latents + b * a->packed_rows * a->latent_stride, a->latent_stride, r0);
    dsm_pack(a->kernels, 1, ropes, rows, a->dtype, a->rope, a->dtype, a->ropes + b * a->packed_rows * a->rope_stride,
             a->rope_stride, r0);
}

/* the keys after those of a step */
static PrefetchStream after(const Attention *a, const Matrix *keys, int64_t key) {
    const int64_t pitch = keys->cols * (int64_t)dsm_itemsize(a->dtype);
    const char *data = keys->data;
    return (PrefetchStream){data + dsm_min(key, a->length) * pitch, data + dsm_min(key + STEP, a->length) * pitch};
}

static Matrix rows_of(const Attention *a, const void *data, int64_t rows, int64_t columns) {
    return (Matrix){data, NULL, rows, columns, a->dtype, 0, NULL};
}
static Keys cached(const Attention *a, int64_t run, int64_t key) {
    const size_t size = dsm_itemsize(a->dtype);
    const char *c_kv = (const char *)a->cache->c_kv + sequence_of(a, run) * a->cache->c_kv_batch * size;
    const char *k_pe = (const char *)a->cache->k_pe + sequence_of(a, run) * a->cache->k_pe_batch * size;
    Keys keys = {rows_of(a, c_kv, a->length, a->rank), rows_of(a, k_pe, a->length, a->rope), key, {{0}}};
    keys.ahead[0] = after(a, &keys.c_kv, key + STEP);
    keys.ahead[1] = after(a, &keys.k_pe, key + STEP);
    return keys;
}

/* rows of the cache, copied next to one another; those a few further on are fetched meanwhile */
static void copy_rows(const char *from, const int32_t *rows, int64_t count, size_t bytes, char *to) {
    for (int64_t i = 0; i < count; i++, to += bytes) {
        const char *next = from + rows[dsm_min(i + GATHER_AHEAD, count - 1)] * bytes;
        for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at);
        memcpy(to, from + rows[i] * bytes, bytes);
    }
}
static Keys gathered(const Attention *a, int64_t run, int64_t key, int64_t count, Buffers *buffers) {
    const int32_t *rows = a->indices + (a->first + run) * a->length + key;
    Keys keys = cached(a, run, 0);
    const size_t size = dsm_itemsize(a->dtype);
    copy_rows(keys.c_kv.data, rows, count, a->rank * size, buffers->c_kv);
    copy_rows(keys.k_pe.data, rows, count, a->rope * size, buffers->k_pe);
    return (Keys){rows_of(a, buffers->c_kv, count, a->rank), rows_of(a, buffers->k_pe, count, a->rope), 0, {{0}}};
}

/* how many keys a run of tokens meets: indices end with those of none */
static int64_t keys_of(const Attention *a, int64_t run) {
    int64_t count = a->length;
    if (!a->indices) return count;
    const int32_t *rows = a->indices + (a->first + run) * count;
    while (count > 0 && rows[count - 1] < 0) count--;
    return count;
}

/* the scores of up to STEP keys of `rows` queries from the `query`th packed one on */
static void score(const Attention *a, Keys *keys, int64_t query, int64_t rows, int64_t count, Buffers *buffers) {
    const int64_t columns = a->kernels->panel_columns;
    float *latent = buffers->panels, *rope = latent + GROUP * columns;
    for (int64_t k = 0; k < count; k += columns) {
        const int64_t n = dsm_min(columns, count - k);
        a->kernels->gemm(a->latents + query * a->latent_stride, a->latent_stride, rows, &keys->c_kv, keys->first + k,
                         n, latent, buffers->scratch, keys->ahead);
        a->kernels->gemm(a->ropes + query * a->rope_stride, a->rope_stride, rows, &keys->k_pe, keys->first + k, n,
                         rope, buffers->scratch, keys->ahead + 1);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < n; i++)
                buffers->scores[r * STEP + k + i] = latent[r * columns + i] + rope[r * columns + i];
    }
}

/* one step, from key `first` on, of the running softmax of a group of a run's rows, r0 .. */
static void add_keys(const Attention *a, Keys *keys, int64_t run, int64_t r0, int64_t first, int64_t count, int64_t at,
                     Buffers *buffers) {
    const int64_t rows = dsm_min(GROUP, a->rows - r0);
    score(a, keys, run * a->packed_rows + r0, rows, count, buffers);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t t = (r0 + r) / a->heads;
        const float *mask = a->mask->values;
        if (mask) mask += run * a->mask->batch + t * a->mask->token + first;
        const int64_t after = a->indices || mask ? count : a->length - a->tokens + t + 1 - first;
        const int64_t seen = dsm_min(count, after);
        float *scores = buffers->scores + r * STEP;
        if (seen > 0) {
            buffers->decay[r] =
                a->kernels->online_softmax(scores, seen, STEP, a->scaling, mask, a->peaks + at + r, a->norms + at + r);
        } else {
            buffers->decay[r] = 1.0f;
            memset(scores, 0, sizeof(float) * STEP);
        }
    }
    a->kernels->accumulate_pv(buffers->scores, STEP, rows, &keys->c_kv, keys->first, count, buffers->decay,
                              a->partial + at * a->room, a->room, buffers->scratch, keys->ahead);
}

/* one chunk of one run's keys, for a group of its rows, or for all where keys are gathered */
static void attend(const Attention *a, int64_t task, Buffers *buffers) {
    const int64_t groups = a->indices ? 1 : a->groups;
    const int64_t b = task / (a->chunks * groups), part = task / groups % a->chunks;
    const int64_t r0 = task % groups * GROUP, r1 = a->indices ? a->rows : dsm_min(r0 + GROUP, a->rows);
    const int64_t end = dsm_min(keys_of(a, b), (part + 1) * a->chunk), at = (b * a->chunks + part) * a->rows;
    memset(a->partial + (at + r0) * a->room, 0, sizeof(float) * (r1 - r0) * a->room);
    for (int64_t r = r0; r < r1; r++) a->peaks[at + r] = -FLT_MAX, a->norms[at + r] = 0.0f;
    for (int64_t k = part * a->chunk; k < end; k += STEP) {
        const int64_t count = dsm_min(STEP, end - k);
        Keys keys = a->indices ? gathered(a, b, k, count, buffers) : cached(a, b, k);
        for (int64_t r = r0; r < r1; r += GROUP) add_keys(a, &keys, b, r, k, count, at + r, buffers);
    }
}

/* one row of one run: the chunks' results become one, packed; zeros where it meets no keys */
static void merge_chunks(const Attention *a, int64_t b, int64_t r, float *restrict row, char *packed) {
    const int64_t rank = a->rank; /* a copy, which no store changes: only so do compilers make vectors of the loops */
    float peak = -FLT_MAX, norm = 0.0f;
    for (int64_t part = 0; part < a->chunks; part++) {
        const float own = a->peaks[(b * a->chunks + part) * a->rows + r];
        peak = own > peak ? own : peak;
    }
    memset(row, 0, sizeof(float) * a->rank);
    for (int64_t part = 0; part < a->chunks; part++) {
        const int64_t at = (b * a->chunks + part) * a->rows + r;
        const float share = expf(a->peaks[at] - peak), *from = a->partial + at * a->room;
        norm += share * a->norms[at];
        for (int64_t i = 0; i < rank; i++) row[i] += share * from[i];
    }
    for (int64_t i = 0; norm != 0.0f && i < rank; i++) row[i] /= norm;
    a->kernels->pack(row, DSM_F32, a->rank, a->kv_b->dtype, packed);
}

/* one head leaves the latent space */
static void merge(const Attention *a, int64_t h, Buffers *buffers) {
    const size_t stride = dsm_packed_stride(a->kernels, a->rank, a->kv_b->dtype);
    const int64_t first = h * (a->nope + a->value) + a->nope;
    const Adapter *adapter = a->kv_b->adapter;
    float *row = buffers->row;
    for (int64_t q0 = 0; q0 < a->batch * a->tokens; q0 += QUERIES) {
        const int64_t queries = dsm_min(QUERIES, a->batch * a->tokens - q0);
        for (int64_t q = 0; q < queries; q++) {
            merge_chunks(a, (q0 + q) / a->tokens, (q0 + q) % a->tokens * a->heads + h, row,
                         buffers->packed + q * stride);
            if (adapter) dsm_adapter_low(adapter, row, a->rank, buffers->low + q * adapter->rank);
        }
        a->kernels->gemv(buffers->packed, stride, queries, a->kv_b, first, a->value, row, a->value, NULL);
        for (int64_t q = 0; q < queries; q++) {
            const int64_t to = ((a->first * a->tokens + q0 + q) * a->heads + h) * a->value;
            float *from = row + q * a->value;
            if (adapter) dsm_adapter_add(adapter, first, a->value, buffers->low + q * adapter->rank, from);
            for (int64_t i = 0; i < a->value; i++) dsm_store(a->out, a->dtype, to + i, from[i]);
        }
    }
}

static int make_buffers(const Attention *a, Buffers *buffers) {
    const Kernels *k = a->kernels;
    const int64_t queries = dsm_min(QUERIES, a->batch * a->tokens), row = dsm_max(a->rank, queries * a->value);
    const size_t step = a->indices ? STEP * dsm_itemsize(a->dtype) : 0;
    buffers->scores = dsm_alloc(sizeof(float) * GROUP * STEP);
    buffers->panels = dsm_alloc(sizeof(float) * GROUP * 2 * k->panel_columns);
    buffers->decay = dsm_alloc(sizeof(float) * GROUP);
    buffers->row = dsm_alloc(sizeof(float) * row);
    buffers->query = dsm_alloc(sizeof(float) * a->nope);
    buffers->workspace = dsm_alloc(sizeof(float) * dsm_blocks(a->rank) * DSM_BLOCK);
    buffers->low = dsm_alloc(sizeof(float) * (a->kv_b->adapter ? queries * a->kv_b->adapter->rank : 0));
    buffers->packed = dsm_alloc(queries * dsm_packed_stride(k, a->rank, a->kv_b->dtype));
    buffers->c_kv = dsm_alloc(step * a->rank);
    buffers->k_pe = dsm_alloc(step * a->rope);
    buffers->scratch = dsm_alloc(k->scratch_bytes);
    return buffers->scores && buffers->panels && buffers->decay && buffers->row && buffers->query &&
           buffers->workspace && buffers->low && buffers->packed && buffers->c_kv && buffers->k_pe && buffers->scratch;
}
static void free_buffers(Buffers *buffers) {
    free(buffers->scores);
    free(buffers->panels);
    free(buffers->decay);
    free(buffers->row);
    free(buffers->query);
    free(buffers->workspace);
    free(buffers->low);
    free(buffers->packed);
    free(buffers->c_kv);
    free(buffers->k_pe);
    free(buffers->scratch);
}

/* keys of a chunk: whole steps, half a one for short caches, of which two threads should have something */
static int64_t chunk_of(int64_t length, int64_t chunks) {
    const int64_t even = (length + chunks - 1) / chunks;
    return length <= 2 * STEP ? STEP / 2 : (even + STEP - 1) / STEP * STEP;
}

static int run(Attention *a, int threads) {
    (void)threads; /* unused without OpenMP */
    const int64_t tasks = a->batch * a->chunks * (a->indices ? 1 : a->groups);
    const int64_t packings = a->batch * (a->packed_rows / a->kernels->panel_tokens);
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
#pragma omp for schedule(static)
            for (int64_t task = 0; task < packings; task++) pack_queries(a, task);
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

/* all runs, up to `most` at a time */
static int run_all(Attention *a, int threads, int64_t most) {
    const int64_t all = a->batch, some = dsm_min(most, all);
    int result = DSM_NO_MEMORY;
    a->packed_rows = dsm_packed_tokens(a->kernels, a->rows);
    a->latent_stride = dsm_packed_stride(a->kernels, a->rank, a->dtype);
    a->rope_stride = dsm_packed_stride(a->kernels, a->rope, a->dtype);
    a->room = dsm_panels(a->kernels, a->rank);
    a->groups = (a->rows + GROUP - 1) / GROUP;
    a->chunks = (a->length + a->chunk - 1) / a->chunk;
    a->latents = dsm_borrow(some * a->packed_rows * a->latent_stride);
    a->ropes = dsm_alloc(some * a->packed_rows * a->rope_stride);
    a->partial = dsm_borrow(sizeof(float) * some * a->rows * a->chunks * a->room);
    a->peaks = dsm_alloc(sizeof(float) * some * a->rows * a->chunks);
    a->norms = dsm_alloc(sizeof(float) * some * a->rows * a->chunks);
    if (a->latents && a->ropes && a->partial && a->peaks && a->norms) {
        for (result = DSM_OK; a->first < all && !result; a->first += most) {
            a->batch = dsm_min(most, all - a->first);
            const int64_t cached = a->batch * a->length * (a->rank + a->rope) * (1 + a->rows / 4);
            result = run(a, dsm_threads(threads, dsm_bytes(a->kv_b) + cached));
        }
    }
    dsm_give_back(a->latents);
    free(a->ropes);
    dsm_give_back(a->partial);
    free(a->peaks);
    free(a->norms);
    return result;
}

static Attention attention_of(int isa, int dtype, const MlaShape *shape, const Queries *queries,
                              const LatentCache *cache, const Matrix *kv_b, float softmax_scale, void *out) {
    return (Attention){
        .kernels = dsm_kernels(isa, dtype),
        .dtype = dtype,
        .heads = shape->num_heads,
        .nope = shape->qk_nope_head_dim,
        .rope = shape->qk_rope_head_dim,
        .rank = shape->kv_lora_rank,
        .value = shape->v_head_dim,
        .queries = queries,
        .cache = cache,
        .kv_b = kv_b,
        .scaling = softmax_scale,
        .out = out,
    };
}
static int is_empty(const Attention *a) {
    return a->batch < 1 || a->tokens < 1 || a->per_sequence < 1 || a->length < 1 || a->heads < 1 || a->nope < 1 ||
           a->rope < 1 || a->rank < 1 || a->value < 1;
}

/* out [batch, tokens, heads, value] of `dtype` from the queries of a few new tokens and the first `length` rows of a cache,
   all of `dtype`; kv_b [heads * (nope + value), rank]. */
DSM_API int dsm_mla_decode(int isa, int threads, int dtype, int64_t batch, int64_t tokens, int64_t length,
                           const MlaShape *shape, const Queries *queries, const LatentCache *cache, const Mask *mask,
                           const Matrix *kv_b, float softmax_scale, void *out) {
    Attention a = attention_of(isa, dtype, shape, queries, cache, kv_b, softmax_scale, out);
    a.batch = batch, a.tokens = tokens, a.rows = tokens * a.heads, a.per_sequence = 1, a.length = length,
    a.mask = mask;
    if (is_empty(&a)) return DSM_BAD_ARGUMENT;
    a.chunk = chunk_of(length, CHUNKS / dsm_min((a.heads + GROUP - 1) / GROUP, CHUNKS));
    return run_all(&a, threads, batch);
}

/* out [batch, tokens, heads, value] as above, of many tokens of each sequence, over the rows of a cache of `length` that
   indices [batch, tokens, count] name; those of no row, -1, come last. */
DSM_API int dsm_sparse_attention(int isa, int threads, int dtype, int64_t batch, int64_t tokens, int64_t length,
                                 const MlaShape *shape, const Queries *queries, const LatentCache *cache,
                                 const int32_t *indices, int64_t count, const Matrix *kv_b, float softmax_scale,
                                 void *out) {
    const Mask none = {NULL, 0, 0};
    Attention a = attention_of(isa, dtype, shape, queries, cache, kv_b, softmax_scale, out);
    a.batch = batch * tokens, a.tokens = 1, a.rows = a.heads, a.per_sequence = tokens, a.length = count;
    a.mask = &none, a.indices = indices;
    if (is_empty(&a) || length < 1) return DSM_BAD_ARGUMENT;
    for (int64_t run = 0; run < a.batch; run++) {
        const int32_t *rows = indices + run * count;
        for (int64_t i = keys_of(&a, run) - 1; i >= 0; i--)
            if (rows[i] < 0 || rows[i] >= length) return DSM_BAD_INDEX;
    }
    const int64_t groups = (a.heads + GROUP - 1) / GROUP;
    a.chunk = chunk_of(count, dsm_max(1, CHUNKS / dsm_min(groups * tokens, CHUNKS)));
    return run_all(&a, threads, QUERIES * dsm_max(2, threads / 4));
}
