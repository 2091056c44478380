/* Three or four tokens and FP8 or bf16; part of `few_tokens_avx512_bf16.h`, whose rows are read in the same turns.

   Weights are decoded to bf16 64 columns at a time, in registers, for all of the tokens; what is multiplied and added, and
   in which order, is as `gemv_slab` has it for more of them. */

/* 64 columns of a row from column k on, of which `rest` exist, in the order of packed activations */
DSM_INLINE void decode_columns(Tables t, const Matrix *w, int64_t row, int64_t k, int64_t rest, __m512bh *first,
                               __m512bh *second, const int fp8) {
    const int64_t at = row * w->cols + k;
    if (fp8) {
        decode64(t, load_codes((const uint8_t *)w->data + at, rest), first, second);
    } else {
        const uint16_t *from = (const uint16_t *)w->data + at;
        const uint64_t mask = rest >= 64 ? ~0ull : (1ull << rest) - 1;
        *first = (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)mask, from);
        *second = (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), from + 32);
    }
}

/* 128 columns from column k on, of which `rest` exist, of `readers` rows: total [tokens][4] */
DSM_INLINE void add_decoded(Tables t, const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart,
                            int64_t k, int64_t rest, int64_t ahead, __m512 *total, const int readers, const int tokens,
                            const int fp8) {
    const int bytes = fp8 ? 128 : 256;
    __m512 part[16];
    UNROLL for (int i = 0; i < 4 * tokens; i++) part[i] = _mm512_setzero_ps();
    UNROLL for (int r = 0; r < readers; r++) {
        const char *from = dsm_row(w, row + r * apart) + k * bytes / DSM_BLOCK;
        UNROLL for (int line = 0; line < bytes; line += 64) _mm_prefetch(from + ahead + line, _MM_HINT_T1);
        UNROLL for (int half = 0; half < DSM_BLOCK; half += 64) {
            __m512bh first, second;
            if (rest <= half) continue;
            decode_columns(t, w, row + r * apart, k + half, rest - half, &first, &second, fp8);
            UNROLL for (int m = 0; m < tokens; m++) {
                const uint16_t *xm = (const uint16_t *)(x + m * stride) + k + half;
                part[4 * m + r] = _mm512_dpbf16_ps(part[4 * m + r], load_pairs(xm), first);
                part[4 * m + r] = _mm512_dpbf16_ps(part[4 * m + r], load_pairs(xm + 32), second);
            }
        }
    }
    const float scale = fp8 ? *dsm_block_scale(w, row, k) : 1.0f;
    UNROLL for (int m = 0; m < tokens; m++) UNROLL for (int r = 0; r < readers; r++) total[4 * m + r] =
        _mm512_fmadd_ps(_mm512_set1_ps(scale), part[4 * m + r], total[4 * m + r]);
}
DSM_INLINE void read_decoded(const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                             float *out, int64_t ldo, const int readers, const int tokens, const int fp8) {
    const Tables t = tables();
    const int64_t cols = w->cols, ahead = dsm_min(FAR_AHEAD, dsm_row_bytes(w->dtype, cols));
    const int64_t near = cols - (fp8 ? ahead : ahead / 2);
    __m512 total[16];
    UNROLL for (int i = 0; i < 4 * tokens; i++) total[i] = _mm512_setzero_ps();
    for (int64_t k = 0; k < cols; k += DSM_BLOCK)
        add_decoded(t, x, stride, w, row, apart, k, cols - k, k < near ? ahead : ahead + jump, total, readers, tokens,
                    fp8);
    UNROLL for (int m = 0; m < tokens; m++) {
        float four[4];
        _mm_storeu_ps(four, sum4((const float *)(total + 4 * m)));
        UNROLL for (int r = 0; r < readers; r++) out[m * ldo + r * apart] = four[r];
    }
}
#define READ_DECODED(name, readers, tokens)                                                                           \
    static __attribute__((noinline)) void name(const void *x, size_t stride, const Matrix *w, int64_t row,            \
                                               int64_t apart, int64_t jump, float *out, int64_t ldo) {                \
        if (w->dtype == DSM_FP8) read_decoded(x, stride, w, row, apart, jump, out, ldo, readers, tokens, 1);          \
        else read_decoded(x, stride, w, row, apart, jump, out, ldo, readers, tokens, 0);                              \
    }
READ_DECODED(read_4_3, 4, 3)
READ_DECODED(read_1_3, 1, 3)
READ_DECODED(read_4_4, 4, 4)
READ_DECODED(read_1_4, 1, 4)
