/* One decoding step of a decoder: a run of its layers, for one new token of each sequence, in one call.

   Between two calls an interpreter finds its own code and data gone from the caches through which the weights went, and
   takes longer over a call than a layer's smaller operations do: hence one. Each step rounds where the layers that it
   stands for do, so the bits are theirs. */
#include "engine.h"

typedef struct {
    int64_t data, scale, rows, cols, dtype;
} Weight;

/* `ops/decode_step/cpu.py` has the same, field by field; addresses are int64. */
typedef struct {
    Weight q_a, q_b, kv_a, kv_b, o; /* no rows of q_a: q_b is q_proj */
    int64_t input_norm, post_norm, q_norm, kv_norm;
    double input_eps, post_eps, q_eps, kv_eps;
    int64_t gate, bias;    /* no gate: a dense layer, whose weights are the shared experts' */
    int64_t table;         /* of the routed experts */
    int64_t dims[13];      /* as `dsm_moe` takes them, the tokens left out */
    double factor;
    int64_t shared[6];
} Layer;

typedef struct {
    int64_t c_kv, k_pe, c_kv_batch, k_pe_batch; /* buffers, and elements from one sequence to the next */
} CacheRows;

typedef struct {
    int64_t batch, hidden, heads, nope, rope, rank, value, past, interleaved;
} Shape;

typedef struct {
    char *x, *y, *q, *c_kv, *k_pe, *o;
} Buffers;

static void add(int dtype, char *to, const char *from, int64_t n) {
    for (int64_t i = 0; i < n; i++) dsm_store(to, dtype, i, dsm_load(to, dtype, i) + dsm_load(from, dtype, i));
}

static int attention(int isa, int threads, int dtype, const Layer *l, const CacheRows *cache, const Shape *s,
                     const float *cosine, const float *sine, const float *mask, int64_t mask_batch, double scaling,
                     const Buffers *b) {
    const size_t size = dsm_itemsize(dtype);
    const int64_t head = s->nope + s->rope, query = s->heads * head;
    const int64_t project[] = {s->batch, s->heads, s->nope, s->rope, s->rank, s->interleaved};
    Weight matrices[] = {l->q_a, l->q_b, l->kv_a};
    int result = dsm_mla_project(isa, threads, dtype, b->x, project, (const int64_t *)matrices,
                                 (const void *)(intptr_t)l->q_norm, (float)l->q_eps,
                                 (const void *)(intptr_t)l->kv_norm, (float)l->kv_eps, cosine, sine, b->q, b->c_kv,
                                 b->k_pe);
    if (result) return result;
    char *latents = (char *)(intptr_t)cache->c_kv, *ropes = (char *)(intptr_t)cache->k_pe;
    for (int64_t i = 0; i < s->batch; i++) {
        memcpy(latents + (i * cache->c_kv_batch + s->past * s->rank) * size, b->c_kv + i * s->rank * size,
               s->rank * size);
        memcpy(ropes + (i * cache->k_pe_batch + s->past * s->rope) * size, b->k_pe + i * s->rope * size,
               s->rope * size);
    }
    const int64_t dims[] = {s->batch, s->heads, s->past + 1, s->nope, s->rope, s->rank, s->value};
    const int64_t strides[] = {query, head, query, head, cache->c_kv_batch, cache->k_pe_batch, mask_batch};
    result = dsm_mla_decode(isa, threads, dtype, dims, b->q, b->q + s->nope * size, latents, ropes, strides, mask,
                            (int)l->kv_b.dtype, (const void *)(intptr_t)l->kv_b.data,
                            (const float *)(intptr_t)l->kv_b.scale, (float)scaling, b->o);
    return result;
}

static int mlp(int isa, int threads, int dtype, const Layer *l, const Shape *s, const Buffers *b) {
    if (l->gate) {
        int64_t dims[13];
        memcpy(dims, l->dims, sizeof dims);
        dims[0] = s->batch;
        return dsm_moe(isa, threads, dtype, b->x, dims, (const void *)(intptr_t)l->gate,
                       (const float *)(intptr_t)l->bias, (float)l->factor, (const int64_t *)(intptr_t)l->table,
                       l->shared, b->y);
    }
    int64_t indices[DSM_STEP_TOKENS] = {0};
    float weights[DSM_STEP_TOKENS];
    for (int64_t i = 0; i < s->batch; i++) weights[i] = 1.0f;
    return dsm_experts(isa, threads, dtype, b->x, s->batch, s->hidden, l->dims[DSM_SHARED_WIDTH], indices, weights, 1,
                       l->shared, 1, (int)l->dims[DSM_SHARED_DTYPE], NULL, b->y);
}

/* A layer is three stages: norm, projections and attention; the output projection; norm and experts. Stage 3 i + k is the
   k-th of layer i. states [batch, hidden] of `dtype` become those after the stages [first, last), and the caches of the
   layers that attend get row `past`. attended [batch, heads, value]: what attention yields, where the output projection
   is not of the same run; else NULL. shape: see Shape; cosine and sine [batch, rope / 2] fp32; mask: fp32, over past + 1
   keys, added to the scores of every layer, or NULL. */
DSM_API int dsm_step(int isa, int threads, int dtype, void *states, const int64_t *shape, int64_t first, int64_t last,
                     void *attended, const Layer *layers, const CacheRows *caches, const float *cosine,
                     const float *sine, const float *mask, int64_t mask_batch, double scaling) {
    const Shape *s = (const Shape *)shape;
    const size_t size = dsm_itemsize(dtype);
    const int64_t values = s->batch * s->hidden;
    int result = DSM_NO_MEMORY;
    if (s->batch < 1 || s->batch > DSM_STEP_TOKENS || s->past < 0 || first < 0) return DSM_BAD_ARGUMENT;
    char *o = attended ? NULL : dsm_alloc(s->batch * s->heads * s->value * size);
    Buffers b = {
        .x = dsm_alloc(values * size),
        .y = dsm_alloc(values * size),
        .q = dsm_alloc(s->batch * s->heads * (s->nope + s->rope) * size),
        .c_kv = dsm_alloc(s->batch * s->rank * size),
        .k_pe = dsm_alloc(s->batch * s->rope * size),
        .o = attended ? attended : o,
    };
    if (b.x && b.y && b.q && b.c_kv && b.k_pe && b.o) result = DSM_OK;
    for (int64_t stage = first; stage < last && !result; stage++) {
        const Layer *l = layers + stage / 3;
        switch (stage % 3) {
        case 0:
            dsm_rms_norm(isa, threads, dtype, states, (const void *)(intptr_t)l->input_norm, s->batch, s->hidden,
                         (float)l->input_eps, b.x);
            result = attention(isa, threads, dtype, l, caches + stage / 3, s, cosine, sine, mask, mask_batch, scaling, &b);
            continue;
        case 1:
            result = dsm_linear(isa, threads, dtype, b.o, s->batch, (int)l->o.dtype, (const void *)(intptr_t)l->o.data,
                                (const float *)(intptr_t)l->o.scale, l->o.rows, l->o.cols, NULL, b.y);
            break;
        default:
            dsm_rms_norm(isa, threads, dtype, states, (const void *)(intptr_t)l->post_norm, s->batch, s->hidden,
                         (float)l->post_eps, b.x);
            result = mlp(isa, threads, dtype, l, s, &b);
        }
        if (!result) add(dtype, states, b.y, values);
    }
    free(b.x);
    free(b.y);
    free(b.q);
    free(b.c_kv);
    free(b.k_pe);
    free(o);
    return result;
}
