/* Latent attention in bf16; part of `kernels_avx512_bf16.c`. */

#define ABSORB_AHEAD 8192 /* bytes: the rows after next of those that are taken at once */

/* Two weight rows times a pair of factors are added to the sums of 64 columns: lane 4g + i of the j-th vector holds
   column 16g + 4j + i. `even` and `odd` are
   the rows' columns in bf16, in the order of `decode64`. */
DSM_INLINE void transposed_pair(const __m512i *even, const __m512i *odd, int32_t pair, __m512 *acc) {
    const __m512bh factors = (__m512bh)_mm512_set1_epi32(pair);
    UNROLL for (int j = 0; j < 2; j++) {
        acc[2 * j] = _mm512_dpbf16_ps(acc[2 * j], (__m512bh)_mm512_unpacklo_epi16(even[j], odd[j]), factors);
        acc[2 * j + 1] = _mm512_dpbf16_ps(acc[2 * j + 1], (__m512bh)_mm512_unpackhi_epi16(even[j], odd[j]), factors);
    }
}
DSM_INLINE void load_words(Tables t, const char *p, int64_t rest, __m512i *words, const int fp8) {
    if (fp8) {
        __m512bh first, second;
        _mm_prefetch(p + ABSORB_AHEAD, _MM_HINT_T1);
        decode64(t, load_codes((const uint8_t *)p, rest), &first, &second);
        words[0] = (__m512i)first;
        words[1] = (__m512i)second;
    } else { /* as the bytes of FP8 come apart: 16-byte pieces 0 2 4 6, then 1 3 5 7 */
        const __mmask64 mask = rest >= 64 ? ~0ull : (1ull << rest) - 1;
        __m512i a = _mm512_maskz_loadu_epi16((__mmask32)mask, p);
        __m512i b = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), p + 64);
        words[0] = _mm512_shuffle_i64x2(a, b, 0x88);
        words[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    }
}
/* `gemv` rows, a constant, of 64 columns, of which `rest` exist */
DSM_INLINE void transposed_strip(Tables t, const char *p, size_t pitch, int64_t rest, const int32_t *pair, float *sums,
                                 const int rows, const int fp8) {
    __m512 acc[4];
    UNROLL for (int j = 0; j < 4; j++) acc[j] = _mm512_load_ps(sums + 16 * j);
    UNROLL for (int i = 0; i < rows; i += 2) {
        __m512i even[2], odd[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        load_words(t, p + i * pitch, rest, even, fp8);
        if (i + 1 < rows) load_words(t, p + (i + 1) * pitch, rest, odd, fp8);
        transposed_pair(even, odd, pair[i / 2], acc);
    }
    UNROLL for (int j = 0; j < 4; j++) _mm512_store_ps(sums + 16 * j, acc[j]);
}
#define ABSORB(NAME, ROWS, FP8)                                                                                       \
    static __attribute__((noinline)) void NAME(const Matrix *w, int64_t r, const int32_t *pair, float *sums) {        \
        const Tables t = tables();                                                                                    \
        const size_t pitch = (size_t)w->cols * (FP8 ? 1 : 2);                                                         \
        const char *p = (const char *)w->data + r * pitch;                                                            \
        int64_t k = 0;                                                                                                \
        for (; k + 64 <= w->cols; k += 64, p += FP8 ? 64 : 128)                                                       \
            transposed_strip(t, p, pitch, 64, pair, sums + k, ROWS, FP8);                                             \
        if (k < w->cols) transposed_strip(t, p, pitch, w->cols - k, pair, sums + k, ROWS, FP8);                       \
    }
ABSORB(absorb_8_fp8, 8, 1)
ABSORB(absorb_1_fp8, 1, 1)
ABSORB(absorb_8_bf16, 8, 0)
ABSORB(absorb_1_bf16, 1, 0)

void dsm_bf16_gemv_transposed(const float *q, const Matrix *w, int64_t first, int64_t count, float *out, float *sums) {
    const int64_t room = dsm_blocks(w->cols) * DSM_BLOCK;
    if (dsm_is_four_bit(w->dtype)) {
        dsm_kernels_avx512_gemv_transposed(q, w, first, count, out, sums);
        return;
    }
    const int fp8 = w->dtype == DSM_FP8;
    for (int64_t c = 0; c < w->cols; c++) out[c] = 0.0f;
    for (int64_t i = 0; i < count;) { /* a row of blocks at a time: it has scales of its own */
        const int64_t r = first + i;
        const int64_t end = fp8 ? dsm_min(count, i + DSM_BLOCK - r % DSM_BLOCK) : count;
        const float *scale = dsm_block_scale(w, r, 0);
        memset(sums, 0, sizeof(float) * room);
        for (; i + 8 <= end; i += 8) {
            int32_t pair[4];
            for (int j = 0; j < 4; j++)
                pair[j] = (int32_t)(dsm_to_bf16(q[i + 2 * j]) | (uint32_t)dsm_to_bf16(q[i + 2 * j + 1]) << 16);
            (fp8 ? absorb_8_fp8 : absorb_8_bf16)(w, first + i, pair, sums);
        }
        for (; i < end; i++) {
            const int32_t pair = dsm_to_bf16(q[i]);
            (fp8 ? absorb_1_fp8 : absorb_1_bf16)(w, first + i, &pair, sums);
        }
        for (int64_t k = 0; k < w->cols; k += 64) {
            const float factor = fp8 ? scale[k / DSM_BLOCK] : 1.0f;
            for (int64_t at = 0; at < 64 && k + at < w->cols; at += 4)
                for (int64_t l = 0; l < 4 && k + at + l < w->cols; l++)
                    out[k + at + l] += factor * sums[k + at / 4 % 4 * 16 + at / 16 * 4 + l];
        }
    }
}

/* columns 0..15 of two rows in pairs; + 16: the other half */
static const uint16_t PAIRS_OF_ROWS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

/* weights of up to 128 keys, rounded to pairs of bf16 next to the values' panel */
static void accumulate_pv(const float *p, int64_t ldp, int64_t tokens, const Matrix *v, int64_t first, int64_t count,
                          const float *decay, float *out, int64_t ldo, void *scratch, PrefetchStream *ahead) {
    uint32_t *values = scratch;
    uint16_t *weights = (uint16_t *)(values + DSM_BLOCK / 2 * PANEL);
    const int64_t pairs = (count + 1) / 2, room = (count + 15) / 16 * 16;
    const __m512i left = _mm512_loadu_si512(PAIRS_OF_ROWS), right = _mm512_add_epi16(left, _mm512_set1_epi16(16));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < room; k += 16)
            _mm256_store_si256((__m256i *)(weights + t * DSM_BLOCK + k),
                               (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p + t * ldp + k)));
    for (int64_t c = 0; c < v->cols; c += PANEL) {
        for (int64_t k = 0; k < pairs; k++) {
            const uint16_t *row = (const uint16_t *)v->data + (first + 2 * k) * v->cols + c;
            const int two = 2 * k + 1 < count;
            UNROLL for (int j = 0; j < PANEL; j += 32) {
                const int64_t rest = v->cols - c - j;
                const __mmask32 mask = rest >= 32 ? ~0u : rest <= 0 ? 0 : (1u << rest) - 1;
                const __m512i a = _mm512_maskz_loadu_epi16(mask, row + j);
                const __m512i b = _mm512_maskz_loadu_epi16(two ? mask : 0, row + v->cols + j);
                _mm512_store_si512(values + k * PANEL + j, _mm512_permutex2var_epi16(a, left, b));
                _mm512_store_si512(values + k * PANEL + j + 16, _mm512_permutex2var_epi16(a, right, b));
            }
        }
        fma_tokens(weights, DSM_BLOCK * sizeof *weights, tokens, values, pairs, 1.0f, decay, out + c, ldo, ahead);
    }
}
