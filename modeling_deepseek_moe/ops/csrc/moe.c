/* A mixture-of-experts layer for a few tokens: router, routed experts, shared experts, in one call. The steps are those
   of `dsm_linear`, `dsm_route` and `dsm_experts`, with the same bits. */
#include "engine.h"

/* out [tokens, hidden] of `dtype` from x of the same; dims as named in engine.h; gate [experts, hidden] bf16; bias [experts]
   fp32 or NULL; tables as `dsm_experts` takes them, of the experts and of the shared ones (one wide expert; width 0: none). */
DSM_API int dsm_moe(int isa, int threads, int dtype, const void *x, const int64_t *dims, const void *gate,
                    const float *bias, float factor, const int64_t *table, const int64_t *shared, void *out) {
    const int64_t tokens = dims[DSM_TOKENS], hidden = dims[DSM_HIDDEN], experts = dims[DSM_EXPERTS], top_k = dims[DSM_TOP_K];
    const int64_t values = tokens * hidden;
    if (tokens < 1 || hidden < 1 || experts < 1 || top_k < 1) return DSM_BAD_ARGUMENT;
    float *wide = dsm_alloc(sizeof(float) * values), *own = dsm_alloc(sizeof(float) * values);
    float *logits = dsm_alloc(sizeof(float) * tokens * experts), *weights = dsm_alloc(sizeof(float) * tokens * top_k);
    int64_t *indices = dsm_alloc(sizeof(int64_t) * tokens * top_k);
    int result = wide && own && logits && weights && indices ? DSM_OK : DSM_NO_MEMORY;
    const uint64_t caller = dsm_exact_mode();
    if (!result) {
        for (int64_t i = 0; i < values; i++) wide[i] = dsm_load(x, dtype, i);
        result = dsm_linear(isa, threads, DSM_F32, wide, tokens, DSM_BF16, gate, NULL, experts, hidden, NULL, logits);
    }
    if (!result)
        result = dsm_route(isa, threads, logits, tokens, experts, bias, dims[DSM_GROUPS], dims[DSM_KEPT], top_k,
                           (int)dims[DSM_SOFTMAX], (int)dims[DSM_BEST_TWO], (int)dims[DSM_NORMALISE], factor, weights, indices);
    if (!result)
        result = dsm_experts(isa, threads, dtype, x, tokens, hidden, dims[DSM_WIDTH], indices, weights, top_k, table, experts,
                             (int)dims[DSM_DTYPE], NULL, out);
    if (!result && dims[DSM_SHARED_WIDTH]) {
        for (int64_t t = 0; t < tokens; t++) indices[t] = 0, weights[t] = 1.0f;
        result = dsm_experts(isa, threads, dtype, x, tokens, hidden, dims[DSM_SHARED_WIDTH], indices, weights, 1, shared, 1,
                             (int)dims[DSM_SHARED_DTYPE], NULL, own);
        for (int64_t i = 0; i < values; i++) dsm_store(out, dtype, i, dsm_load(out, dtype, i) + dsm_load(own, dtype, i));
    }
    dsm_restore_mode(caller);
    free(wide);
    free(own);
    free(logits);
    free(weights);
    free(indices);
    return result;
}
