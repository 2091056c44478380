/* Codes of four bits for bf16 activations with AVX2; part of `kernels_avx2.c`.

   Without instructions for bf16, fp32 products wait for the decoding of weights to fp32. Here 64 activations become
   integers of 16 bits and a scale, their largest / 32767, and a weight an integer of up to 14: exactly, but for NF4's, which
   are off by less than 1 / 16382 of the largest. vpmaddwd sums 64 columns without overflow, 8 * 32767 * 8191 in a lane. What
   is rounded is 2^-16 of the largest of 64 activations, where bf16 rounds 2^-9 of each.

       32 bytes of codes         low halves | high halves
       by pshufb, unpacked       bytes 0-7 and 16-23, bytes 8-15 and 24-31 of the low halves, the same of the high
       a packed 64 activations   64 integers in that order, the scale: 132 of 256 bytes

   The columns of a 128-bit lane are those of a group, or of half a one. */

#define INTEGER_SCALE 128 /* bytes before the scale */
#define INTEGER_LIFT                                                                                                  \
    0x1p24f /* of scales, so that those of denormal activations are none; taken back before a weight's scale */

DSM_INLINE float integer_gain(int dtype) {
    return dtype == DSM_NF4 ? 8191.0f : dtype == DSM_FP4 ? 192.0f : dtype == DSM_MXFP4 ? 2.0f : 1.0f;
}

/* 64 activations at a time, zeros after n */
static void pack_integers(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    const int swapped = dsm_column_of(weight_dtype, 0);
    char *to = out;
    for (int64_t k = 0; k < dsm_blocks(n) * DSM_BLOCK; k += 64, to += 64 * sizeof(float)) {
        float natural[64] __attribute__((aligned(64))) = {0};
        int16_t *integers = (int16_t *)to;
        F most = zeros();
        if (n - k >= 64)
            for (int i = 0; i < 64; i += WIDTH) *(F *)(natural + i) = load_any(x, dtype, k + i);
        else
            for (int64_t i = 0; i < n - k; i++) natural[i] = dsm_load(x, dtype, k + i);
        for (int i = 0; i < 64; i += WIDTH) { /* magnitudes compare as integers do, NaN above infinity */
            const I magnitude = *(const I *)(natural + i) & 0x7fffffff;
            most = (F)choose(magnitude > (I)most, magnitude, (I)most);
        }
        float top = 0.0f;
        for (int l = 0; l < WIDTH; l++) top = most[l] > top || most[l] != most[l] ? most[l] : top;
        const int finite = top <= 3e38f && top == top;
        /* the inverse of what is next to nothing would be infinite */
        const float lift = top < 0x1p-100f ? 0x1p100f : 1.0f;
        const float scale = finite ? top * (INTEGER_LIFT / 32767.0f) : NAN;
        const float inverse = finite && top > 0.0f ? 32767.0f / (top * lift) : 0.0f;
        for (int i = 0; i < 64; i += WIDTH) {
            const F moved = *(const F *)(natural + i) * lift * inverse + 0x1.8p23f; /* an integer in the low bits */
            *(F *)(natural + i) = inverse ? moved : spread(0x1.8p23f);
        }
        for (int half = 0; half < 2; half++)
            for (int w = 0; w < 32; w++) {
                const int byte = w / 8 % 2 * 16 + w / 16 * 8 + w % 8, column = 2 * byte + (half ^ swapped);
                int32_t bits;
                memcpy(&bits, natural + column, 4);
                integers[half * 32 + w] = (int16_t)bits;
            }
        memcpy(to + INTEGER_SCALE, &scale, sizeof scale);
    }
}

typedef struct {
    __m256i low, high; /* bytes of the 16 integers, twice */
    __m256 drop;       /* what takes gain and lift back */
} IntegerTable;

DSM_INLINE IntegerTable integer_table(int dtype) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        const int value = (int)lrintf(dsm_values(dtype)[i] * integer_gain(dtype));
        low[i] = (uint8_t)value;
        high[i] = (uint8_t)(value >> 8);
    }
    return (IntegerTable){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                          _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high)),
                          _mm256_set1_ps(1.0f / (INTEGER_LIFT * integer_gain(dtype)))};
}

/* the scales of 64 columns from k on, of which `rest` exist, a group in each 128-bit lane */
DSM_INLINE __m256 integer_scales(const Matrix *w, int64_t row, int64_t k, int64_t rest, const int kind) {
    const int64_t group = dsm_group_of(kind), at = row * (w->cols / group) + k / group;
    if (kind == DSM_BF16 && rest >= 64) { /* both are one load, and move to the upper half of their lanes */
        int32_t both;
        memcpy(&both, (const uint16_t *)w->scale + at, 4);
        const __m256i place = _mm256_setr_epi32(0x01008080, 0x01008080, 0x01008080, 0x01008080, 0x03028080, 0x03028080,
                                                0x03028080, 0x03028080);
        return (__m256)_mm256_shuffle_epi8(_mm256_set1_epi32(both), place);
    }
    const __m128 first = _mm_set1_ps(dsm_group_scale(w->scale, at, kind));
    if (group == 64) return _mm256_set_m128(first, first);
    return _mm256_set_m128(rest > 32 ? _mm_set1_ps(dsm_group_scale(w->scale, at + 1, kind)) : _mm_setzero_ps(), first);
}

/* 64 columns from k on, of which `rest` exist */
DSM_INLINE void add_integers(IntegerTable table, const char *x, size_t stride, const Matrix *w, int64_t row, int64_t k,
                             int64_t rest, __m256 *total, const int tokens, const int kind) {
    const uint8_t *from = (const uint8_t *)dsm_row(w, row) + k / 2;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i codes, value[4];
    if (rest >= 64) codes = _mm256_loadu_si256((const __m256i *)from);
    else
        codes = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)from)),
        codes = _mm256_inserti128_si256(codes, _mm_setzero_si128(), 1);
    if (k % 128 == 0) _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T1);
    if (k % 512 == 0)
        _mm_prefetch(
            dsm_scale_place(w->scale, (row + 1) * (w->cols / dsm_group_of(kind)) + k / dsm_group_of(kind), kind),
            _MM_HINT_T0);
    UNROLL for (int half = 0; half < 2; half++) {
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
        value[2 * half] = _mm256_unpacklo_epi8(low, high);
        value[2 * half + 1] = _mm256_unpackhi_epi8(low, high);
    }
    const __m256 scales = integer_scales(w, row, k, rest, kind);
    UNROLL for (int t = 0; t < tokens; t++) {
        const __m256i *xt = (const __m256i *)(x + t * stride + k * sizeof(float));
        __m256i sum[4];
        UNROLL for (int i = 0; i < 4; i++) sum[i] = _mm256_madd_epi16(value[i], _mm256_loadu_si256(xt + i));
        sum[0] = _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
        const __m256 own = _mm256_broadcast_ss((const float *)((const char *)xt + INTEGER_SCALE));
        total[t] = _mm256_fmadd_ps(scales, _mm256_mul_ps(table.drop, _mm256_mul_ps(own, _mm256_cvtepi32_ps(sum[0]))),
                                   total[t]);
    }
}
DSM_INLINE void integer_rows(const char *x, size_t stride, const Matrix *w, int64_t first, int64_t count, float *out,
                             int64_t ldo, const int tokens, const int kind) {
    const IntegerTable table = integer_table(w->dtype);
    F sums[ROWS * TOKENS_AT_ONCE];
    for (int64_t r = 0; r < count; r++) {
        __m256 total[TOKENS_AT_ONCE];
        int64_t k = 0;
        UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
        for (; k + 64 <= w->cols; k += 64) add_integers(table, x, stride, w, first + r, k, 64, total, tokens, kind);
        if (k < w->cols) add_integers(table, x, stride, w, first + r, k, w->cols - k, total, tokens, kind);
        UNROLL for (int t = 0; t < tokens; t++) sums[r * tokens + t] = (F)total[t];
    }
    add_lanes(sums, count, 1.0f, out, ldo, tokens);
}
#define INTEGER_ROWS(NAME, TOKENS)                                                                                    \
    static __attribute__((noinline)) void NAME(const char *x, size_t stride, const Matrix *w, int64_t first,          \
                                               int64_t count, float *out, int64_t ldo) {                              \
        DSM_BY_KIND(w, integer_rows, x, stride, w, first, count, out, ldo, TOKENS)                                    \
    }
INTEGER_ROWS(integer_rows_1, 1)
INTEGER_ROWS(integer_rows_2, 2)
INTEGER_ROWS(integer_rows_4, 4)

static void gemv_integers(const void *given, size_t stride, int64_t tokens, const Matrix *w, int64_t first,
                          int64_t count, float *out, int64_t ldo, const void *next) {
    const char *x = given;
    if (!dsm_is_four_bit(w->dtype)) {
        gemv(x, stride, tokens, w, first, count, out, ldo, next);
        return;
    }
    for (int64_t r = 0; r < count; r += ROWS) {
        const int64_t n = dsm_min(ROWS, count - r);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            integer_rows_4(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
        if (t + 2 <= tokens) integer_rows_2(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo), t += 2;
        if (t < tokens) integer_rows_1(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
    }
}

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

/* as `dsm_kernels_avx2`, for bf16 activations */
const Kernels dsm_kernels_avx2_bf16 = {
    VECTOR_KERNELS,
    .pack = pack_for_gemv,
    .pack_interleaved = pack_for_gemm,
    .gemv = gemv_integers,
};
