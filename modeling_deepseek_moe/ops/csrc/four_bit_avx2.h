/* Codes of four bits for few bf16 activations with AVX2 (`bf16_by_integers.h`); part of `kernels_avx2.c`.

   Without instructions for bf16, fp32 products wait for the decoding of weights to fp32. Here 64 activations become
   integers of 16 bits and a scale, their largest / 32767, and a weight an integer of up to 14: exactly, but for NF4's, which
   are off by less than 1 / 16382 of the largest. vpmaddwd sums 64 columns without overflow, 8 * 32767 * 8191 in a lane. What
   is rounded is 2^-16 of the largest of 64 activations, where bf16 rounds 2^-9 of each.

       32 bytes of codes         low halves | high halves
       by pshufb, unpacked       bytes 0-7 and 16-23, bytes 8-15 and 24-31 of the low halves, the same of the high
       64 activations, packed    64 integers in that order, `Beyond`: 140 of 256 bytes

   INT4's and MXFP4's codes are small integers (`dot_of_bytes`). The columns of a 128-bit lane are those of a group, or of
   half a one. What a core decodes bounds this, and most of all instructions, so that whatever is not of one code is done
   for 256 columns at once: their scales, times those of the activations, are one vector,

       groups of 32     0  2  4  6 |  1  3  5  7          of 64     0  1  2  3 |  0  1  2  3

   of which block b of 64 columns finds its own by spreading lane b.

   Four pipes could take INT4's 15.75 instructions of 64 columns in 3.9 cycles, NF4's 23 in 5.8; a Zen 3 takes 5.5 and 7.0
   from its first cache, where a load counts as a third of an instruction, and from memory half as long again: what a core
   decodes and what it reads overlap in part. Two rows at once, far apart, are the fastest there, for NF4 a sixth faster than
   four: their copies of x left the registers. One row at a time is a tenth slower in pages of 4 kB, and on a Xeon came at
   half to two thirds of what a core reads without decoding, four at 80 to 95 % (two were not tried there). Rows in turns of
   1,024 columns or whole rows, which take fewer instructions, were a tenth slower from memory; fetched 1,024 or 4,096 bytes ahead
   instead of 2,048 none was faster; nested scales decoded before a row instead of within took a seventh longer. For several
   tokens the sums of several rows leave the registers, which costs more than it brings. */

#define BEYOND 128        /* bytes before what is not an activation */
#define STRIDE_256 256    /* columns whose scales are one vector */
#define STRIDES 64        /* of them are prepared at a time */
#define SUMS 256          /* of rows that share what is prepared, and of their tokens */
#define INTEGER_READERS 2 /* rows of one token read at once, far apart */
/* x is loaded where it is used: NF4's integers leave no registers for it, and compilers would keep copies on the stack. */
#define FROM_MEMORY __asm__ volatile("" ::: "memory")

/* after 64 activations */
typedef struct {
    float scale;
    float offsets[2]; /* what codes that were made positive have too much, in each group of 32 */
} Beyond;

/* what makes positive bytes of the integers, 0 where they are no bytes */
DSM_INLINE int byte_offset(int dtype) { return dtype == DSM_INT4 ? 8 : dtype == DSM_MXFP4 ? 12 : 0; }

/* 64 integers of 16 bits, in their order, as bytes: the low ones of the even columns and of the odd ones, then the high
   ones; and sums of 32 times `offset`. A high byte is what is left of the rest that a signed low byte leaves. */
DSM_INLINE void store_bytes(const __m256i *words, char *to, float *offsets, int offset) {
    const __m256i group = _mm256_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15, 0, 4, 8, 12, 2, 6, 10,
                                           14, 1, 5, 9, 13, 3, 7, 11, 15);
    __m256i bytes[4]; /* of 16 columns each, in a lane: low even, low odd, high even, high odd */
    UNROLL for (int i = 0; i < 4; i++) {
        const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(words[i], _mm256_set1_epi16(128)), 8);
        bytes[i] = _mm256_shuffle_epi8(
            _mm256_blendv_epi8(_mm256_slli_epi16(high, 8), words[i], _mm256_set1_epi16(255)), group);
    }
    UNROLL for (int g = 0; g < 2; g++) {
        const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(words[2 * g], _mm256_set1_epi16(1)),
                                               _mm256_madd_epi16(words[2 * g + 1], _mm256_set1_epi16(1)));
        offsets[g] = (float)offset * sum(_mm256_cvtepi32_ps(pairs));
    }
    const __m256i first = _mm256_unpacklo_epi32(bytes[0], bytes[1]),
                  second = _mm256_unpacklo_epi32(bytes[2], bytes[3]),
                  third = _mm256_unpackhi_epi32(bytes[0], bytes[1]),
                  fourth = _mm256_unpackhi_epi32(bytes[2], bytes[3]);
    const __m256i all[4] = {_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second),
                            _mm256_unpacklo_epi64(third, fourth), _mm256_unpackhi_epi64(third, fourth)};
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    UNROLL for (int i = 0; i < 4; i++)
        _mm256_storeu_si256((__m256i *)to + i, _mm256_permutevar8x32_epi32(all[i], order));
}
/* The same as they are multiplied with what `look_up_integers` finds, first the columns whose codes are low halves. */
DSM_INLINE void store_words(const __m256i *words, char *to, const int swapped) {
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i natural[2]; /* of every other column */
        UNROLL for (int i = 0; i < 2; i++) {
            __m256i pair[2];
            UNROLL for (int j = 0; j < 2; j++) pair[j] =
                half ^ swapped ? _mm256_srai_epi32(words[2 * i + j], 16)
                               : _mm256_srai_epi32(_mm256_slli_epi32(words[2 * i + j], 16), 16);
            natural[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(pair[0], pair[1]), 0xd8);
        }
        __m256i *at = (__m256i *)to + 2 * half;
        _mm256_storeu_si256(at, _mm256_permute2x128_si256(natural[0], natural[1], 0x20));
        _mm256_storeu_si256(at + 1, _mm256_permute2x128_si256(natural[0], natural[1], 0x31));
    }
}

/* 64 activations at a time, zeros after n */
static void pack_integers(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    const int swapped = dsm_column_of(weight_dtype, 0), offset = byte_offset(weight_dtype);
    const float largest = offset ? 127 * 256 + 127 : 32767; /* of two signed bytes, or of 16 bits */
    char *to = out;
    for (int64_t k = 0; k < dsm_blocks(n) * DSM_BLOCK; k += 64, to += 64 * sizeof(float)) {
        float natural[64] __attribute__((aligned(64))) = {0};
        __m256i words[4];
        Beyond beyond = {0};
        I most = {0};
        if (n - k >= 64)
            for (int i = 0; i < 64; i += WIDTH) *(F *)(natural + i) = load_any(x, dtype, k + i);
        else
            for (int64_t i = 0; i < n - k; i++) natural[i] = dsm_load(x, dtype, k + i);
        for (int i = 0; i < 64; i += WIDTH) /* magnitudes compare as integers do, NaN above infinity */
            most = (I)_mm256_max_epi32((__m256i)most, (__m256i)(*(const I *)(natural + i) & 0x7fffffff));
        int32_t bits = 0;
        for (int l = 0; l < WIDTH; l++) bits = most[l] > bits ? most[l] : bits;
        float top;
        memcpy(&top, &bits, sizeof top);
        const int finite = top <= 3e38f;
        /* no smaller, so that neither its inverse is infinite nor the scale a subnormal number */
        const float step = top / largest > 0x1p-112f ? top / largest : 0x1p-112f;
        const F inverse = spread(finite ? 1.0f / step : 0.0f);
        UNROLL for (int i = 0; i < 4; i++) {
            const F *from = (const F *)(natural + 16 * i); /* what is not finite has no integer, and a scale of NaN */
            const __m256i first = _mm256_cvtps_epi32((__m256)(from[0] * inverse)),
                          last = _mm256_cvtps_epi32((__m256)(from[1] * inverse));
            words[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, last), 0xd8);
        }
        beyond.scale = finite ? step / dsm_integer_gain(weight_dtype) : NAN;
        if (offset) store_bytes(words, to, beyond.offsets, offset);
        else if (swapped) store_words(words, to, 1);
        else store_words(words, to, 0);
        memcpy(to + BEYOND, &beyond, sizeof beyond);
    }
}

typedef struct {
    __m256i low, high; /* bytes of the 16 integers, twice */
} IntegerTable;

/* in registers: what is stored in parts and loaded as a whole waits until all before it is done */
DSM_INLINE IntegerTable integer_table(int dtype) {
    const __m256 gain = _mm256_set1_ps(dsm_integer_gain(dtype));
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(dsm_values(dtype)), gain)),
                  last = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(dsm_values(dtype) + 8), gain));
    const __m256i all = _mm256_add_epi16(_mm256_permute4x64_epi64(_mm256_packs_epi32(first, last), 0xd8),
                                         _mm256_set1_epi16((int16_t)byte_offset(dtype)));
    const __m256i low = _mm256_and_si256(all, _mm256_set1_epi16(0xff)), high = _mm256_srai_epi16(all, 8);
    return (IntegerTable){_mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0x88),
                          _mm256_permute4x64_epi64(_mm256_packs_epi16(high, high), 0x88)};
}

/* of 256 activations, in the order of the groups' scales: the other lanes' are the same where a group is 64 */
typedef struct {
    __m256 scales, offsets;
} Side;

/* the sides of a token's columns up to `length`; there are up to STRIDES of them */
DSM_INLINE void gather_sides(const char *x, int64_t length, Side *sides) {
    static const Beyond NONE;
    for (int64_t k = 0; k < length; k += STRIDE_256, sides++) {
        const Beyond *of[4];
        for (int64_t b = 0; b < 4; b++)
            of[b] = k + 64 * b < length ? (const Beyond *)(x + (k + 64 * b) * sizeof(float) + BEYOND) : &NONE;
        const __m128 scales = _mm_setr_ps(of[0]->scale, of[1]->scale, of[2]->scale, of[3]->scale);
        sides->scales = _mm256_set_m128(scales, scales);
        sides->offsets = _mm256_setr_ps(of[0]->offsets[0], of[1]->offsets[0], of[2]->offsets[0], of[3]->offsets[0],
                                        of[0]->offsets[1], of[1]->offsets[1], of[2]->offsets[1], of[3]->offsets[1]);
    }
}

/* the scales of 256 columns, of which `rest` exist, from scale `at` on */
DSM_INLINE __m256 integer_scales(const void *scale, int64_t at, int64_t rest, const int kind) {
    const int64_t have = dsm_min(rest, STRIDE_256) / dsm_group_of(kind);
    if (kind == DSM_BF16) { /* they move to the upper half of their lanes */
        const __m256i place = _mm256_setr_epi32(0x01008080, 0x05048080, 0x09088080, 0x0d0c8080, 0x03028080, 0x07068080,
                                                0x0b0a8080, 0x0f0e8080);
        const uint16_t *from = (const uint16_t *)scale + at;
        uint16_t padded[8] = {0};
        __m128i all;
        if (have == 8) all = _mm_loadu_si128((const __m128i *)from);
        else if (have == 4) all = _mm_loadl_epi64((const __m128i *)from);
        else all = _mm_loadu_si128(memcpy(padded, from, (size_t)have * sizeof *padded));
        return (__m256)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(all), place);
    }
    if (kind == DSM_E8M0) {
        const __m256i place =
            _mm256_setr_epi32(~0xff, ~0xff | 2, ~0xff | 4, ~0xff | 6, ~0xff | 1, ~0xff | 3, ~0xff | 5, ~0xff | 7);
        uint8_t padded[16] = {0};
        memcpy(padded, (const uint8_t *)scale + at, (size_t)have);
        const __m256i e =
            _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i *)padded)), place);
        /* 0 is 2^-127 and 255 NaN, as `dsm_group_scale` has it */
        const __m256i ends = _mm256_or_si256(_mm256_cmpeq_epi32(e, _mm256_setzero_si256()),
                                             _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)));
        return (__m256)_mm256_or_si256(_mm256_slli_epi32(e, 23), _mm256_and_si256(ends, _mm256_set1_epi32(0x400000)));
    }
    const Nested *nested = scale;
    __m128 four;
    if (kind == DSM_F32 && have == 4) four = _mm_loadu_ps((const float *)scale + at);
    else if (kind == DSM_NESTED && have == 4 && at % 256 <= 252) { /* of one absmax */
        const uint8_t *code = nested->codes + at;
        const float *table = nested->table;
        four = _mm_load_ss(table + code[0]);
        four = _mm_insert_ps(four, _mm_load_ss(table + code[1]), 0x10);
        four = _mm_insert_ps(four, _mm_load_ss(table + code[2]), 0x20);
        four = _mm_insert_ps(four, _mm_load_ss(table + code[3]), 0x30);
        four = _mm_fmadd_ps(four, _mm_set1_ps(nested->absmax[at >> 8]), _mm_set1_ps(nested->offset));
    } else
        four = _mm_setr_ps(dsm_group_scale(scale, at, kind), have > 1 ? dsm_group_scale(scale, at + 1, kind) : 0.0f,
                           have > 2 ? dsm_group_scale(scale, at + 2, kind) : 0.0f,
                           have > 3 ? dsm_group_scale(scale, at + 3, kind) : 0.0f);
    return _mm256_set_m128(four, four);
}

/* sums of products of 64 columns with 16-bit integers, of whatever their table holds */
DSM_INLINE void look_up_integers(IntegerTable table, const __m256i *halves, __m256i *value) {
    UNROLL for (int half = 0; half < 2; half++) {
        const __m256i low = _mm256_shuffle_epi8(table.low, halves[half]),
                      high = _mm256_shuffle_epi8(table.high, halves[half]);
        value[2 * half] = _mm256_unpacklo_epi8(low, high);
        value[2 * half + 1] = _mm256_unpackhi_epi8(low, high);
    }
}
DSM_INLINE __m256i dot_of_integers(const __m256i *value, const char *x) {
    __m256i sum[4];
    UNROLL for (int i = 0; i < 4; i++) sum[i] =
        _mm256_madd_epi16(value[i], _mm256_loadu_si256((const __m256i *)x + i));
    return _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]), _mm256_add_epi32(sum[2], sum[3]));
}
/* The same of bytes, multiplied with both bytes of the activations. Two products of 24 * 128, and two of these, do not
   overflow 16 bits. */
DSM_INLINE __m256i dot_of_bytes(const __m256i *halves, const char *x) {
    __m256i part[2];
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256i *bytes = (const __m256i *)x + 2 * i;
        part[i] = _mm256_add_epi16(_mm256_maddubs_epi16(halves[0], _mm256_loadu_si256(bytes)),
                                   _mm256_maddubs_epi16(halves[1], _mm256_loadu_si256(bytes + 1)));
        part[i] = _mm256_madd_epi16(part[i], _mm256_set1_epi16(i ? 256 : 1));
    }
    return _mm256_add_epi32(part[0], part[1]);
}

/* 256 columns, of which `rest` exist, of one weight row: `codes` and their `scales`, for `tokens` tokens */
DSM_INLINE void add_256(IntegerTable table, const char *x, size_t stride, const Side *sides, const uint8_t *codes,
                        __m256 scales, int64_t rest, __m256 *total, const int dtype, const int tokens) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 own[TOKENS_AT_ONCE];
    UNROLL for (int t = 0; t < tokens; t++) {
        const Side *side = sides + t * STRIDES;
        own[t] = _mm256_mul_ps(scales, side->scales);
        if (byte_offset(dtype)) total[2 * t] = _mm256_fnmadd_ps(own[t], side->offsets, total[2 * t]);
    }
    UNROLL for (int b = 0; b < 4; b++) {
        const uint8_t *from = codes + 32 * b;
        if (64 * b >= rest) break;
        const __m256i both = 64 * b + 64 <= rest ? _mm256_loadu_si256((const __m256i *)from)
                                                 : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)from));
        __m256i halves[2] = {_mm256_and_si256(both, nibble), _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble)};
        __m256i value[4];
        if (b % 2 == 0) _mm_prefetch((const char *)from + AHEAD, _MM_HINT_T0);
        if (!byte_offset(dtype)) look_up_integers(table, halves, value);
        if (dtype == DSM_MXFP4)
            UNROLL for (int i = 0; i < 2; i++) halves[i] = _mm256_shuffle_epi8(table.low, halves[i]);
        UNROLL for (int t = 0; t < tokens; t++) {
            const char *xt = x + t * stride + 64 * b * sizeof(float);
            const __m256i dot = byte_offset(dtype) ? dot_of_bytes(halves, xt) : dot_of_integers(value, xt);
            __m256 *to = total + 2 * t + b % 2;
            *to = _mm256_fmadd_ps(_mm256_permute_ps(own[t], 0x55 * b), _mm256_cvtepi32_ps(dot), *to);
        }
    }
}

/* 256 columns from k on, of which `rest` exist, of each of several rows in turn, whose codes and first scales lie at `codes` and
   `scale` + `at`. */
DSM_INLINE void add_in_turn(IntegerTable table, const char *x, size_t stride, const Side *side,
                            const uint8_t *const *codes, const void *scale, const int64_t *at, int64_t k, int64_t rest,
                            __m256 *total, const int readers, const int tokens, const int dtype, const int kind) {
    UNROLL for (int q = 0; q < readers; q++) {
        if (!byte_offset(dtype)) FROM_MEMORY;
        add_256(table, x + k * sizeof(float), stride, side + k / STRIDE_256, codes[q] + k / 2,
                integer_scales(scale, at[q] + k / dsm_group_of(kind), rest, kind), rest, total + q * 2 * tokens, dtype,
                tokens);
    }
}

/* `length` columns from k0 on of weight rows row, row + apart .., `readers` of them; token t's sum of the q-th is added to
   sums[q * apart * tokens + t]. x and `side` begin at k0. */
DSM_INLINE void integer_turn(IntegerTable table, const char *x, size_t stride, const Side *side, const Matrix *w,
                             int64_t row, int64_t apart, int64_t k0, int64_t length, F *sums, const int readers,
                             const int tokens, const int dtype, const int kind) {
    const int64_t group = dsm_group_of(kind), groups = w->cols / group, count = length / group;
    const uint8_t *codes[INTEGER_READERS];
    int64_t at[INTEGER_READERS], k = 0;
    __m256 total[INTEGER_READERS * 2 * TOKENS_AT_ONCE];
    for (int q = 0; q < readers; q++) {
        codes[q] = (const uint8_t *)dsm_row(w, row + q * apart) + k0 / 2;
        at[q] = (row + q * apart) * groups + k0 / group;
        for (int64_t i = 0; i < count; i += 64 / dsm_scale_bytes(kind)) /* four rows ahead */
            _mm_prefetch(dsm_scale_place(w->scale, at[q] + i + 4 * groups, kind), _MM_HINT_T0);
    }
    UNROLL for (int i = 0; i < readers * 2 * tokens; i++) total[i] = _mm256_setzero_ps();
    for (; k + STRIDE_256 <= length; k += STRIDE_256)
        add_in_turn(table, x, stride, side, codes, w->scale, at, k, STRIDE_256, total, readers, tokens, dtype, kind);
    if (length - k == STRIDE_256 / 2) /* often all that is left, and faster as a constant */
        add_in_turn(table, x, stride, side, codes, w->scale, at, k, STRIDE_256 / 2, total, readers, tokens, dtype,
                    kind);
    else if (k < length)
        add_in_turn(table, x, stride, side, codes, w->scale, at, k, length - k, total, readers, tokens, dtype, kind);
    UNROLL for (int q = 0; q < readers; q++) UNROLL for (int t = 0; t < tokens; t++) {
        const F sum = (F)_mm256_add_ps(total[(q * tokens + t) * 2], total[(q * tokens + t) * 2 + 1]);
        F *to = sums + q * apart * tokens + t;
        *to = k0 ? *to + sum : sum;
    }
}

/* up to SUMS weight rows of one token, fewer of several */
DSM_INLINE void integer_rows(const char *x, size_t stride, const Matrix *w, int64_t first, int64_t count, float *out,
                             int64_t ldo, const int tokens, const int dtype, const int kind) {
    const IntegerTable table = integer_table(dtype);
    const int64_t cols = w->cols, turns = tokens == 1 ? count / INTEGER_READERS : 0;
    F sums[SUMS];
    for (int64_t k0 = 0; k0 < cols; k0 += STRIDES * STRIDE_256) {
        const int64_t length = dsm_min(cols - k0, STRIDES * STRIDE_256);
        Side sides[TOKENS_AT_ONCE * STRIDES];
        for (int t = 0; t < tokens; t++)
            gather_sides(x + t * stride + k0 * sizeof(float), length, sides + t * STRIDES);
        for (int64_t r = 0; r < turns; r++)
            integer_turn(table, x + k0 * sizeof(float), stride, sides, w, first + r, turns, k0, length,
                         sums + r * tokens, INTEGER_READERS, 1, dtype, kind);
        for (int64_t r = turns * INTEGER_READERS; r < count; r++)
            integer_turn(table, x + k0 * sizeof(float), stride, sides, w, first + r, 1, k0, length, sums + r * tokens,
                         1, tokens, dtype, kind);
    }
    add_lanes(sums, count, 1.0f, out, ldo, tokens);
}
/* formats that go the same way: INT4, MXFP4, and those of 16-bit integers by the kind of their scales */
#define INTEGER_ROWS(NAME, TOKENS)                                                                                    \
    static __attribute__((noinline)) void NAME(const char *x, size_t stride, const Matrix *w, int64_t first,          \
                                               int64_t count, float *out, int64_t ldo) {                              \
        if (w->dtype == DSM_INT4) integer_rows(x, stride, w, first, count, out, ldo, TOKENS, DSM_INT4, DSM_BF16);     \
        else if (w->dtype == DSM_MXFP4)                                                                               \
            integer_rows(x, stride, w, first, count, out, ldo, TOKENS, DSM_MXFP4, DSM_E8M0);                          \
        else if (w->scale_kind == DSM_F32)                                                                            \
            integer_rows(x, stride, w, first, count, out, ldo, TOKENS, w->dtype, DSM_F32);                            \
        else integer_rows(x, stride, w, first, count, out, ldo, TOKENS, w->dtype, DSM_NESTED);                        \
    }
INTEGER_ROWS(integer_rows_1, 1)
INTEGER_ROWS(integer_rows_2, 2)
INTEGER_ROWS(integer_rows_4, 4)

static void gemv_integers(const void *given, size_t stride, int64_t tokens, const Matrix *w, int64_t first,
                          int64_t count, float *out, int64_t ldo, const void *next) {
    const char *x = given;
    (void)next; /* as for `gemv` of `kernels_vector.h` */
    const int64_t rows = tokens == 1 ? SUMS : SUMS / TOKENS_AT_ONCE;
    for (int64_t r = 0; r < count; r += rows) {
        const int64_t n = dsm_min(rows, count - r);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            integer_rows_4(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
        if (t + 2 <= tokens) integer_rows_2(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo), t += 2;
        if (t < tokens) integer_rows_1(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
    }
}
