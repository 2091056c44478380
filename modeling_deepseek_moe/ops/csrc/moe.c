/* A mixture-of-experts layer for a few tokens: router, routed experts, shared experts, in one call. The steps are those
   of `dsm_linear`, `dsm_route` and `dsm_experts`, with the same bits. */
#include "engine.h"

/* SwiGLU of gate, up and down, of which some have an adapter: layer by layer, whose results are rounded as torch's are */
static int adapted_swiglu(int isa, int threads, int dtype, const void *x, int64_t tokens, const Matrix *parts,
                          void *out) {
    const Kernels *k = dsm_kernels(isa, dtype);
    const int64_t values = tokens * parts->rows;
    char *gate = dsm_alloc(values * dsm_itemsize(dtype)), *up = dsm_alloc(values * dsm_itemsize(dtype));
    float *wide = dsm_alloc(sizeof(float) * 2 * values);
    int result = gate && up && wide ? DSM_OK : DSM_NO_MEMORY;
    if (!result) result = dsm_linear(isa, threads, dtype, x, tokens, parts, NULL, gate);
    if (!result) result = dsm_linear(isa, threads, dtype, x, tokens, parts + 1, NULL, up);
    if (!result) {
        for (int64_t i = 0; i < values; i++) wide[i] = dsm_load(gate, dtype, i);
        for (int64_t i = 0; i < values; i++) wide[values + i] = dsm_load(up, dtype, i);
        k->swiglu(wide, wide + values, wide, values);
        k->write(wide, NULL, values, gate, dtype);
        result = dsm_linear(isa, threads, dtype, gate, tokens, parts + 2, NULL, out);
    }
    free(gate);
    free(up);
    free(wide);
    return result;
}

/* a dense layer, or the shared experts */
static int shared(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden, const Moe *moe,
                  void *out) {
    const int64_t all[DSM_STEP_TOKENS] = {0}; /* every token goes to the one wide expert, with weight 1 */
    float ones[DSM_STEP_TOKENS];
    if (moe->parts->rows) return adapted_swiglu(isa, threads, dtype, x, tokens, moe->parts, out);
    for (int64_t t = 0; t < tokens; t++) ones[t] = 1.0f;
    return dsm_experts(isa, threads, dtype, x, tokens, hidden, all, ones, 1, &moe->shared, NULL, out);
}

/* out [tokens, hidden] of `dtype` from x of the same. */
DSM_API int dsm_moe(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden, const Moe *moe,
                    void *out) {
    const int64_t experts = moe->gate.rows, top_k = moe->routing.top_k, values = tokens * hidden;
    const int is_dense = experts == 0;
    if (tokens < 1 || tokens > DSM_STEP_TOKENS || hidden < 1) return DSM_BAD_ARGUMENT;
    if (is_dense) return shared(isa, threads, dtype, x, tokens, hidden, moe, out);
    if (top_k < 1) return DSM_BAD_ARGUMENT;
    float *wide = dsm_alloc(sizeof(float) * values), *own = dsm_alloc(sizeof(float) * values);
    float *logits = dsm_alloc(sizeof(float) * tokens * experts), *weights = dsm_alloc(sizeof(float) * tokens * top_k);
    int64_t *indices = dsm_alloc(sizeof(int64_t) * tokens * top_k);
    int result = wide && own && logits && weights && indices ? DSM_OK : DSM_NO_MEMORY;
    const uint64_t caller = dsm_exact_mode();
    if (!result) {
        for (int64_t i = 0; i < values; i++) wide[i] = dsm_load(x, dtype, i);
        result = dsm_linear(isa, threads, DSM_F32, wide, tokens, &moe->gate, NULL, logits);
    }
    if (!result) result = dsm_route(isa, threads, logits, tokens, experts, moe->bias, &moe->routing, weights, indices);
    if (!result && (moe->gate_up.rank || moe->down.rank))
        result = dsm_experts_low_rank(isa, threads, dtype, x, tokens, hidden, indices, weights, top_k, &moe->routed,
                                      &moe->gate_up, &moe->down, out);
    else if (!result)
        result = dsm_experts(isa, threads, dtype, x, tokens, hidden, indices, weights, top_k, &moe->routed, NULL, out);
    if (!result && moe->shared.count) {
        result = shared(isa, threads, dtype, x, tokens, hidden, moe, own);
        dsm_add(dtype, out, own, values);
    }
    dsm_restore_mode(caller);
    free(wide);
    free(own);
    free(logits);
    free(weights);
    free(indices);
    return result;
}
