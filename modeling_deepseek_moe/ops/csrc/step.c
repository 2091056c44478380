/* One decoding step of a decoder: a run of its layers, for one new token of each sequence or a few, in one call.

   Between two calls an interpreter finds its own code and data gone from the caches through which the weights went, and
   takes longer over a call than a layer's smaller operations do: hence one. Each step rounds where the layers that it
   stands for do, so the bits are theirs. */
#include "engine.h"

typedef struct {
    char *x, *y, *q, *c_kv, *k_pe, *o;
} Buffers;

/* projections, the cache's new rows, attention: b->x -> b->o */
static int attention(int isa, int threads, int dtype, const DecoderLayer *l, const LatentCache *cache, const Step *s,
                     const Buffers *b) {
    const size_t size = dsm_itemsize(dtype);
    const int64_t nope = s->mla.qk_nope_head_dim, rope = s->mla.qk_rope_head_dim, rank = s->mla.kv_lora_rank;
    const int64_t head = nope + rope, query = s->mla.num_heads * head;
    int result = dsm_mla_project(isa, threads, dtype, b->x, s->batch * s->tokens, &s->mla, &l->projections, s->cosine,
                                 s->sine, b->q, b->c_kv, b->k_pe);
    if (result) return result;
    for (int64_t i = 0; i < s->batch; i++) {
        const int64_t from = i * s->tokens;
        memcpy((char *)cache->c_kv + (i * cache->c_kv_batch + s->past * rank) * size, b->c_kv + from * rank * size,
               s->tokens * rank * size);
        memcpy((char *)cache->k_pe + (i * cache->k_pe_batch + s->past * rope) * size, b->k_pe + from * rope * size,
               s->tokens * rope * size);
    }
    const int64_t sequence = s->tokens * query;
    const Queries queries = {b->q, b->q + nope * size, sequence, query, head, sequence, query, head};
    return dsm_mla_decode(isa, threads, dtype, s->batch, s->tokens, s->past + s->tokens, &s->mla, &queries, cache,
                          &s->mask, &l->kv_b, s->softmax_scale, b->o);
}

/* A layer is three stages: norm, projections and attention; the output projection; norm and experts. Stage 3 i + k is the
   k-th of layer i, and after the last layer's comes the norm. states [batch, tokens, hidden] of `dtype` become those after
   the stages [first, last), and the caches of the layers that attend get rows from `past` on. attended [batch, tokens,
   heads, value]: what attention yields, where the output projection is not of the same run; else NULL. */
DSM_API int dsm_step(int isa, int threads, int dtype, void *states, int64_t first, int64_t last, void *attended,
                     const DecoderLayer *layers, const LatentCache *caches, const Step *s) {
    const size_t size = dsm_itemsize(dtype);
    const int64_t tokens = s->batch * s->tokens, values = tokens * s->hidden, heads = s->mla.num_heads;
    int result = DSM_NO_MEMORY;
    if (s->batch < 1 || s->tokens < 1 || tokens > DSM_STEP_TOKENS || s->past < 0 || first < 0) return DSM_BAD_ARGUMENT;
    char *o = attended ? NULL : dsm_alloc(tokens * heads * s->mla.v_head_dim * size);
    Buffers b = {
        .x = dsm_alloc(values * size),
        .y = dsm_alloc(values * size),
        .q = dsm_alloc(tokens * heads * (s->mla.qk_nope_head_dim + s->mla.qk_rope_head_dim) * size),
        .c_kv = dsm_alloc(tokens * s->mla.kv_lora_rank * size),
        .k_pe = dsm_alloc(tokens * s->mla.qk_rope_head_dim * size),
        .o = attended ? attended : o,
    };
    if (b.x && b.y && b.q && b.c_kv && b.k_pe && b.o) result = DSM_OK;
    for (int64_t stage = first; stage < last && !result; stage++) {
        const DecoderLayer *l = layers + stage / 3;
        if (stage == 3 * s->layers) {
            dsm_rms_norm(isa, threads, dtype, states, tokens, s->hidden, &s->norm, states);
            break;
        }
        switch (stage % 3) {
        case 0:
            dsm_rms_norm(isa, threads, dtype, states, tokens, s->hidden, &l->input_norm, b.x);
            result = attention(isa, threads, dtype, l, caches + stage / 3, s, &b);
            continue;
        case 1: result = dsm_linear(isa, threads, dtype, b.o, tokens, &l->o, NULL, b.y); break;
        default:
            dsm_rms_norm(isa, threads, dtype, states, tokens, s->hidden, &l->post_attention_norm, b.x);
            result = dsm_moe(isa, threads, dtype, b.x, tokens, s->hidden, &l->moe, b.y);
        }
        if (!result) dsm_add(dtype, states, b.y, values);
    }
    free(b.x);
    free(b.y);
    free(b.q);
    free(b.c_kv);
    free(b.k_pe);
    free(o);
    return result;
}

/* The same from ids [batch, tokens] to logits [batch, tokens, head's rows] of `dtype`, where the engine runs every stage. */
DSM_API int dsm_logits(int isa, int threads, int dtype, const int64_t *ids, const Ends *ends,
                       const DecoderLayer *layers, const LatentCache *caches, const Step *s, void *logits) {
    const int64_t tokens = s->batch * s->tokens;
    const size_t row = s->hidden * dsm_itemsize(dtype);
    if (s->batch < 1 || s->tokens < 1 || tokens > DSM_STEP_TOKENS) return DSM_BAD_ARGUMENT;
    for (int64_t t = 0; t < tokens; t++)
        if (ids[t] < 0 || ids[t] >= ends->vocabulary) return DSM_BAD_INDEX;
    char *states = dsm_alloc(tokens * row);
    if (!states) return DSM_NO_MEMORY;
    for (int64_t t = 0; t < tokens; t++) memcpy(states + t * row, (const char *)ends->embedding + ids[t] * row, row);
    int result = dsm_step(isa, threads, dtype, states, 0, 3 * s->layers + 1, NULL, layers, caches, s);
    if (!result) result = dsm_linear(isa, threads, dtype, states, tokens, &ends->head, NULL, logits);
    free(states);
    return result;
}
