/* Four-bit codes for up to four tokens; part of `few_tokens_avx512_bf16.h`, whose rows are read in the same turns. */

#define MOST_TOKENS 4
#define SCALE_STEP 512 /* columns, whose scales are half a line or less */

/* scales of 128 columns from k on, of which `rest` exist, in the lanes of their columns: 8 to a lane */
DSM_INLINE __m512 scales_of_128(const void *scale, int64_t i, int64_t rest, const int kind) {
    if (dsm_group_of(kind) == 64) {
        const __m512 first = _mm512_set1_ps(dsm_group_scale(scale, i, kind));
        return rest <= 64 ? first
                          : _mm512_mask_broadcastss_ps(first, 0xff00, _mm_set_ss(dsm_group_scale(scale, i + 1, kind)));
    }
    uint64_t four = 0;
    if (kind == DSM_BF16) {
        if (rest >= 128) memcpy(&four, (const uint16_t *)scale + i, 8);
        else memcpy(&four, (const uint16_t *)scale + i, rest / 32 * 2);
        const __m512i place = _mm512_setr_epi64(0, 0, 0x0001000100010001, 0x0001000100010001, 0x0002000200020002,
                                                0x0002000200020002, 0x0003000300030003, 0x0003000300030003);
        return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, place, _mm512_set1_epi64((int64_t)four));
    }
    if (rest >= 128) memcpy(&four, (const uint8_t *)scale + i, 4);
    else memcpy(&four, (const uint8_t *)scale + i, rest / 32);
    const __m512i byte = _mm512_setr_epi64(0, 0, 0x0000000100000001, 0x0000000100000001, 0x0000000200000002,
                                           0x0000000200000002, 0x0000000300000003, 0x0000000300000003);
    const __m512i e = _mm512_maskz_shuffle_epi8(0x1111111111111111, _mm512_set1_epi32((int)four), byte);
    /* 0 is 2^-127 and 255 NaN, as `dsm_group_scale` has it: one more has no bit but the lowest */
    const __mmask16 ends = _mm512_testn_epi32_mask(_mm512_add_epi32(e, _mm512_set1_epi32(1)), _mm512_set1_epi32(0xfe));
    const __m512i bits = _mm512_slli_epi32(e, 23);
    return (__m512)_mm512_mask_or_epi32(bits, ends, bits, _mm512_set1_epi32(0x400000));
}

/* 128 columns from k on, of which `rest` exist, of `readers` rows: vector j of codes j of their 32 words. */
DSM_INLINE void add_four_bit(__m512i values, const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart,
                             int64_t k, int64_t rest, int64_t ahead, __m512 *total, const int readers,
                             const int tokens, const int kind) {
    const int64_t groups = w->cols / dsm_group_of(kind), pitch = apart * (w->cols / 2);
    const uint8_t *from = (const uint8_t *)w->data + (row * w->cols + k) / 2;
    __m512i xs[MOST_TOKENS][4];
    __m512 steps[MOST_TOKENS];
    UNROLL for (int m = 0; m < tokens; m++) { /* both halves of the columns, which were packed one after the other */
        const char *xm = x + m * stride + k / 64 * INTEGER_GROUP;
        UNROLL for (int j = 0; j < 4; j++) {
            const __m512i low = _mm512_castsi256_si512(_mm256_load_si256((const __m256i *)xm + j));
            xs[m][j] =
                _mm512_mask_broadcast_i64x4(low, 0xf0, _mm256_load_si256((const __m256i *)(xm + INTEGER_GROUP) + j));
        }
        steps[m] = _mm512_mask_broadcastss_ps(_mm512_set1_ps(*(const float *)(xm + 128)), 0xff00,
                                              _mm_load_ss((const float *)(xm + INTEGER_GROUP + 128)));
    }
    if (k % SCALE_STEP == 0) /* the next turn's scales: each reader waits for a line of them at the same time */
        UNROLL for (int r = 0; r < readers; r++) {
            const int64_t at = (row + r * apart + 1) * groups + (k + SCALE_STEP) / dsm_group_of(kind);
            _mm_prefetch(dsm_scale_place(w->scale, at - 1, kind), _MM_HINT_T0);
        }
    UNROLL for (int r = 0; r < readers; r++) {
        const int64_t at = (row + r * apart) * groups + k / dsm_group_of(kind);
        const uint8_t *p = from + r * pitch;
        const __m512i codes =
            rest >= 128 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(((__mmask64)1 << rest / 2) - 1, p);
        __m512i weights[4];
        _mm_prefetch((const char *)p + ahead, _MM_HINT_T1);
        UNROLL for (int j = 0; j < 4; j++) weights[j] =
            _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(codes, 4 * j) : codes, values);
        const __m512 scales = scales_of_128(w->scale, at, rest, kind);
        UNROLL for (int m = 0; m < tokens; m++) {
            __m512i dot = _mm512_setzero_si512();
            UNROLL for (int j = 0; j < 4; j++) dot = _mm512_dpwssd_epi32(dot, weights[j], xs[m][j]);
            total[r * tokens + m] =
                _mm512_fmadd_ps(scales, _mm512_mul_ps(steps[m], _mm512_cvtepi32_ps(dot)), total[r * tokens + m]);
        }
    }
}
DSM_INLINE void turn_four_bit(const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                              __m512 *total, const int readers, const int tokens, const int kind) {
    const __m512i values = integer_values(w->dtype);
    const int64_t cols = w->cols, ahead = dsm_min(FAR_AHEAD / 2, cols / 2), near = cols - 2 * ahead;
    int64_t k = 0;
    for (; k + 128 <= near; k += 128)
        add_four_bit(values, x, stride, w, row, apart, k, 128, ahead, total, readers, tokens, kind);
    for (; k + 128 <= cols; k += 128)
        add_four_bit(values, x, stride, w, row, apart, k, 128, ahead + jump, total, readers, tokens, kind);
    if (k < cols)
        add_four_bit(values, x, stride, w, row, apart, k, cols - k, ahead + jump, total, readers, tokens, kind);
}

DSM_INLINE void read_four_bit(const void *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                              float *out, int64_t ldo, const int readers, const int tokens, const int kind) {
    __m512 total[16];
    float sums[16];
    UNROLL for (int i = 0; i < 16; i++) total[i] = _mm512_setzero_ps();
    turn_four_bit(x, stride, w, row, apart, jump, total, readers, tokens, kind);
    UNROLL for (int i = 0; i < readers * tokens; i += 8) sum8(total + i, sums + i);
    UNROLL for (int r = 0; r < readers; r++) UNROLL for (int m = 0; m < tokens; m++) out[m * ldo + r * apart] =
        sums[r * tokens + m];
}
/* the scales of the first turn: all are waited for at once */
DSM_INLINE void fetch_scales(const Matrix *w, int64_t first, int64_t apart, int64_t readers, const int kind) {
    const int64_t groups = w->cols / dsm_group_of(kind), step = SCALE_STEP / dsm_group_of(kind);
    for (int64_t i = 0; i < groups; i += step)
        for (int64_t r = 0; r < readers; r++)
            _mm_prefetch(dsm_scale_place(w->scale, (first + r * apart) * groups + i, kind), _MM_HINT_T0);
}
static void fetch_first_scales(const Matrix *w, int64_t first, int64_t apart,
                               int64_t readers){DSM_BY_KIND(w, fetch_scales, w, first, apart, readers)}

#define READ_FOUR_BIT(name, readers, tokens)                                                                          \
    static __attribute__((noinline)) void name(const void *x, size_t stride, const Matrix *w, int64_t row,            \
                                               int64_t apart, int64_t jump, float *out, int64_t ldo) {                \
        DSM_BY_KIND(w, read_four_bit, x, stride, w, row, apart, jump, out, ldo, readers, tokens)                      \
    }
READ_FOUR_BIT(read_8_1_four_bit, 8, 1) READ_FOUR_BIT(read_1_1_four_bit, 1, 1) READ_FOUR_BIT(read_4_2_four_bit, 4, 2)
    READ_FOUR_BIT(read_1_2_four_bit, 1, 2) READ_FOUR_BIT(read_4_3_four_bit, 4, 3)
        READ_FOUR_BIT(read_1_3_four_bit, 1, 3) READ_FOUR_BIT(read_4_4_four_bit, 4, 4)
            READ_FOUR_BIT(read_1_4_four_bit, 1, 4)
