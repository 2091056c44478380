/* The table for bf16 activations where no instructions multiply bf16: they meet codes of four bits as integers while tokens
   are few. Part of `kernels_avx2.c` and `kernels_avx512.c`, each of which has a `pack_integers` and a `gemv_integers`. */
static void pack_for_gemv(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    (dsm_is_four_bit(weight_dtype) ? pack_integers : pack)(x, dtype, n, weight_dtype, out);
}
/* one token in fp32; whole groups of 64 are written, and not what another thread packs after them */
static void pack_for_gemm(const void *const *x, int64_t tokens, int dtype, int64_t n, int weight_dtype, char *group,
                          int64_t lane, int64_t first) {
    char *to = group + first * sizeof(float);
    (void)tokens, (void)lane; /* a group is one token */
    for (int64_t k = 0; k < n; k += 64) {
        const char *from = (const char *)*x + k * dsm_itemsize(dtype);
        float packed[DSM_BLOCK] __attribute__((aligned(64)));
        if (n - k >= DSM_BLOCK && first % DSM_BLOCK == 0 && k % DSM_BLOCK == 0) {
            pack(from, dtype, DSM_BLOCK, weight_dtype, to + k * sizeof(float));
            k += 64;
        } else {
            pack(from, dtype, dsm_min(64, n - k), weight_dtype, packed);
            memcpy(to + k * sizeof(float), packed, 64 * sizeof(float));
        }
    }
}

static void gemv_of_bf16(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                         float *out, int64_t ldo, const void *next) {
    if (dsm_is_four_bit(w->dtype)) gemv_integers(x, stride, tokens, w, first, count, out, ldo, next);
    else gemv(x, stride, tokens, w, first, count, out, ldo, next);
}

const Kernels SHARED(by_integers) = {
    VECTOR_KERNELS,
    .pack = pack_for_gemv,
    .pack_interleaved = pack_for_gemm,
    .gemv = gemv_of_bf16,
};
