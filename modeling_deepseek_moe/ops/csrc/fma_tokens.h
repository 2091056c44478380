/* All tokens for one panel, 6, 4 and 1 at a time: what a file makes of its micro-kernel `fma_tile`, whose last argument,
   the tokens, is constant. PANEL_OF is what a panel consists of. */

/* not inlined, so that each one's accumulators stay in registers */
#define FMA_TILE(N)                                                                                                   \
    static __attribute__((noinline)) void fma_tile_##N(const char *x, size_t stride, const PANEL_OF *panel,           \
                                                       int64_t deep, float scale, const float *decay, float *out,     \
                                                       int64_t ldo, PrefetchStream *ahead) {                          \
        fma_tile(x, stride, panel, deep, scale, decay, out, ldo, ahead, N);                                           \
    }
FMA_TILE(6)
FMA_TILE(4)
FMA_TILE(1)

static void fma_tokens(const void *x, size_t stride, int64_t tokens, const PANEL_OF *panel, int64_t deep, float scale,
                       const float *decay, float *out, int64_t ldo, PrefetchStream *ahead) {
    int64_t t = 0;
#define TOKENS(N)                                                                                                     \
    for (; t + N <= tokens; t += N)                                                                                   \
        fma_tile_##N((const char *)x + t * stride, stride, panel, deep, scale, decay ? decay + t : NULL,              \
                     out + t * ldo, ldo, ahead);
    TOKENS(6)
    TOKENS(4)
    TOKENS(1)
#undef TOKENS
}
