/* Codes of four bits for bf16 activations with AVX2; part of `kernels_avx2.c`.

   Without instructions for bf16, fp32 products wait for the decoding of weights to fp32. Here 64 activations become
   integers of 16 bits and a scale, their largest / 32767, and a weight an integer of up to 14: exactly, but for NF4's, which
   are off by less than 1 / 16382 of the largest. vpmaddwd sums 64 columns without overflow, 8 * 32767 * 8191 in a lane. What
   is rounded is 2^-16 of the largest of 64 activations, where bf16 rounds 2^-9 of each.

       32 bytes of codes         low halves | high halves
       by pshufb, unpacked       bytes 0-7 and 16-23, bytes 8-15 and 24-31 of the low halves, the same of the high
       64 activations, packed    64 integers in that order, the scale: 132 of 256 bytes

   INT4's codes are integers themselves (`add_offsets`). The columns of a 128-bit lane are those of a group, or of half a
   one. */

#define INTEGER_SCALE 128 /* bytes before the scale */
#define OFFSETS 160       /* bytes before what INT4's codes have too much */
#define INTEGER_LIFT                                                                                                  \
    0x1p24f /* of scales, so that those of denormal activations are none; taken back before a weight's scale */

DSM_INLINE float integer_gain(int dtype) {
    return dtype == DSM_NF4 ? 8191.0f : dtype == DSM_FP4 ? 192.0f : dtype == DSM_MXFP4 ? 2.0f : 1.0f;
}

/* the integer that was rounded by adding 1.5 * 2^23 */
DSM_INLINE int16_t low_integer(float moved) {
    int32_t bits;
    memcpy(&bits, &moved, 4);
    return (int16_t)bits;
}
/* 64 integers for INT4: the low bytes of the even columns and of the odd ones, the high bytes, and what the codes' offset
   of 8 adds to each lane's eight columns. */
DSM_INLINE void store_bytes(const float *moved, char *to) {
    int32_t offset[8] = {0};
    for (int b = 0; b < 64; b++) {
        const int value = low_integer(moved[b]), low = (int8_t)value, at = b % 2 * 32 + b / 2;
        to[at] = (char)low;
        to[64 + at] = (char)((value - low) / 256);
        offset[b / 8] += 8 * value;
    }
    memcpy(to + OFFSETS, offset, sizeof offset);
}

/* 64 activations at a time, zeros after n */
static void pack_integers(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    const int swapped = dsm_column_of(weight_dtype, 0);
    const float largest = weight_dtype == DSM_INT4 ? 127 * 256 + 127 : 32767; /* of two signed bytes, or of 16 bits */
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
        const float scale = finite ? top * (INTEGER_LIFT / largest) : NAN;
        const float inverse = finite && top > 0.0f ? largest / (top * lift) : 0.0f;
        for (int i = 0; i < 64; i += WIDTH) {
            const F moved = *(const F *)(natural + i) * lift * inverse + 0x1.8p23f; /* an integer in the low bits */
            *(F *)(natural + i) = inverse ? moved : spread(0x1.8p23f);
        }
        if (weight_dtype == DSM_INT4) store_bytes(natural, to);
        for (int half = 0; half < 2 && weight_dtype != DSM_INT4; half++)
            for (int w = 0; w < 32; w++) {
                const int byte = w / 8 % 2 * 16 + w / 16 * 8 + w % 8, column = 2 * byte + (half ^ swapped);
                integers[half * 32 + w] = low_integer(natural[column]);
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

/* the scales of 64 columns, of which `rest` exist, from scale `at` on, a group in each 128-bit lane */
DSM_INLINE __m256 integer_scales(const void *scale, int64_t at, int64_t rest, const int kind) {
    const int64_t group = dsm_group_of(kind);
    if (kind == DSM_BF16 && rest >= 64) { /* both are one load, and move to the upper half of their lanes */
        int32_t both;
        memcpy(&both, (const uint16_t *)scale + at, 4);
        const __m256i place = _mm256_setr_epi32(0x01008080, 0x01008080, 0x01008080, 0x01008080, 0x03028080, 0x03028080,
                                                0x03028080, 0x03028080);
        return (__m256)_mm256_shuffle_epi8(_mm256_set1_epi32(both), place);
    }
    const __m128 first = _mm_set1_ps(dsm_group_scale(scale, at, kind));
    if (group == 64) return _mm256_set_m128(first, first);
    return _mm256_set_m128(rest > 32 ? _mm_set1_ps(dsm_group_scale(scale, at + 1, kind)) : _mm_setzero_ps(), first);
}

/* Where a row's codes and scales lie, looked up once for it. */
typedef struct {
    const uint8_t *codes;
    const void *scale;
    int64_t first, groups; /* the row's first scale, and how many it has */
} IntegerRow;
DSM_INLINE IntegerRow integer_row(const Matrix *w, int64_t row, const int kind) {
    const int64_t groups = w->cols / dsm_group_of(kind);
    return (IntegerRow){(const uint8_t *)dsm_row(w, row), w->scale, row * groups, groups};
}
/* 64 codes of a row from column k on, of which `rest` exist; what comes next is fetched ahead */
DSM_INLINE __m256i integer_codes(const IntegerRow *row, int64_t k, int64_t rest, const int kind) {
    const uint8_t *from = row->codes + k / 2;
    const int64_t next = row->first + row->groups + k / dsm_group_of(kind);
    if (k % 128 == 0) _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T1);
    if (k % 512 == 0) _mm_prefetch(dsm_scale_place(row->scale, next, kind), _MM_HINT_T0);
    if (rest >= 64) return _mm256_loadu_si256((const __m256i *)from);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)from)), _mm_setzero_si128(),
                                   1);
}
/* total += scales * the sums of 64 products, which are integers; x: the packed activations that they are of */
DSM_INLINE __m256 scaled(__m256i sums, const char *x, __m256 drop, __m256 scales, __m256 total) {
    const __m256 own = _mm256_broadcast_ss((const float *)(x + INTEGER_SCALE));
    return _mm256_fmadd_ps(scales, _mm256_mul_ps(drop, _mm256_mul_ps(own, _mm256_cvtepi32_ps(sums))), total);
}

/* 64 columns from k on, of which `rest` exist */
DSM_INLINE void add_integers(IntegerTable table, const char *x, size_t stride, const IntegerRow *row, int64_t k,
                             int64_t rest, __m256 *total, const int tokens, const int kind) {
    const __m256i nibble = _mm256_set1_epi8(15), codes = integer_codes(row, k, rest, kind);
    __m256i value[4];
    UNROLL for (int half = 0; half < 2; half++) {
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(codes, 4) : codes, nibble);
        const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
        value[2 * half] = _mm256_unpacklo_epi8(low, high);
        value[2 * half + 1] = _mm256_unpackhi_epi8(low, high);
    }
    const __m256 scales = integer_scales(row->scale, row->first + k / dsm_group_of(kind), rest, kind);
    UNROLL for (int t = 0; t < tokens; t++) {
        const char *xt = x + t * stride + k * sizeof(float);
        __m256i sum[4];
        UNROLL for (int i = 0; i < 4; i++) sum[i] =
            _mm256_madd_epi16(value[i], _mm256_loadu_si256((const __m256i *)xt + i));
        sum[0] = _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
        total[t] = scaled(sum[0], xt, table.drop, scales, total[t]);
    }
}
/* The same of INT4, whose codes are integers but for an offset of 8: they need no table, and are multiplied as bytes with
   both bytes of the activations. Two products of 15 * 128, and two of these, do not overflow 16 bits. */
DSM_INLINE void add_offsets(IntegerTable table, const char *x, size_t stride, const IntegerRow *row, int64_t k,
                            int64_t rest, __m256 *total, const int tokens, const int kind) {
    const __m256i nibble = _mm256_set1_epi8(15), codes = integer_codes(row, k, rest, kind);
    const __m256i even = _mm256_and_si256(codes, nibble), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
    const __m256 scales = integer_scales(row->scale, row->first + k / dsm_group_of(kind), rest, kind);
    UNROLL for (int t = 0; t < tokens; t++) {
        const char *xt = x + t * stride + k * sizeof(float);
        __m256i part[2];
        UNROLL for (int i = 0; i < 2; i++) {
            const __m256i *bytes = (const __m256i *)xt + 2 * i;
            part[i] = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_loadu_si256(bytes)),
                                       _mm256_maddubs_epi16(odd, _mm256_loadu_si256(bytes + 1)));
            part[i] = _mm256_madd_epi16(part[i], _mm256_set1_epi16(i ? 256 : 1));
        }
        const __m256i offset = _mm256_loadu_si256((const __m256i *)(xt + OFFSETS));
        total[t] =
            scaled(_mm256_sub_epi32(_mm256_add_epi32(part[0], part[1]), offset), xt, table.drop, scales, total[t]);
    }
}

/* scales of bf16 are INT4's alone */
DSM_INLINE void add_codes(IntegerTable table, const char *x, size_t stride, const IntegerRow *row, int64_t k,
                          int64_t rest, __m256 *total, const int tokens, const int kind) {
    (kind == DSM_BF16 ? add_offsets : add_integers)(table, x, stride, row, k, rest, total, tokens, kind);
}
DSM_INLINE void integer_rows(const char *x, size_t stride, const Matrix *w, int64_t first, int64_t count, float *out,
                             int64_t ldo, const int tokens, const int kind) {
    const IntegerTable table = integer_table(w->dtype);
    F sums[ROWS * TOKENS_AT_ONCE];
    for (int64_t r = 0; r < count; r++) {
        const IntegerRow row = integer_row(w, first + r, kind);
        __m256 total[TOKENS_AT_ONCE];
        int64_t k = 0;
        UNROLL for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
        for (; k + 256 <= w->cols; k += 256)
            UNROLL for (int i = 0; i < 256; i += 64) add_codes(table, x, stride, &row, k + i, 64, total, tokens, kind);
        for (; k + 64 <= w->cols; k += 64) add_codes(table, x, stride, &row, k, 64, total, tokens, kind);
        if (k < w->cols) add_codes(table, x, stride, &row, k, w->cols - k, total, tokens, kind);
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
