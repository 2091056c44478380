/* Codes of four bits for few bf16 activations; part of `kernels_avx512.c` and of `kernels_avx512_bf16.c`, which say in how many
   bytes 64 activations are packed (INTEGER_GROUP) and how products of pairs of 16 bits are added to sums of 32 (ADD_PAIRS).

   64 activations become integers of 16 bits and a step, their largest / 32767, and a weight an integer of up to 14: exactly,
   but for NF4's, which are off by less than 1 / 16382 of the largest. The lanes of a vector are of columns of one group each,
   and sum eight products without overflow, 8 * 32767 * 8191. What is rounded is 2^-16 of the largest of 64 activations; and a
   vector takes half a cycle by vpdpwssd, where vdpbf16ps of numbers in bf16 takes two (Sapphire Rapids, Emerald Rapids). */
#include "four_bit_avx512.h"
#include "turns_avx512.h"

#define MOST_TOKENS 4
#define SCALE_STEP 512           /* columns, whose scales are half a line or less */
#define SECOND_CACHE (256 << 10) /* bytes of rows that stay there */

/* The integers of the codes; twice, since indices have five bits. */
DSM_INLINE __m512i integer_values(int dtype) {
    const __m512 all = _mm512_mul_ps(_mm512_load_ps(dsm_values(dtype)), _mm512_set1_ps(dsm_integer_gain(dtype)));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(all)));
}

/* 32 of n values in fp32, of any dtype, zeros after them */
DSM_INLINE void load_floats(const void *x, int dtype, int64_t n, __m512 *to) {
    if (n >= 32 && dtype == DSM_F32)
        UNROLL for (int i = 0; i < 2; i++) to[i] = _mm512_loadu_ps((const float *)x + 16 * i);
    else if (n >= 32 && dtype == DSM_BF16)
        UNROLL for (int i = 0; i < 2; i++) to[i] =
            (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x + i)), 16);
    else {
        float values[32] __attribute__((aligned(64))) = {0};
        for (int64_t i = 0; i < dsm_min(32, n); i++) values[i] = dsm_load(x, dtype, i);
        UNROLL for (int i = 0; i < 2; i++) to[i] = _mm512_load_ps(values + 16 * i);
    }
}
/* 64 of n values: integers in the order of `pack_four_bit`, and after them their step */
DSM_INLINE void pack_64(const void *x, int dtype, int64_t n, int weight_dtype, char *out) {
    __m512 v[4];
    __m512i top = _mm512_setzero_si512(), halves[2];
    load_floats(x, dtype, n, v);
    load_floats((const char *)x + 32 * dsm_itemsize(dtype), dtype, n - 32, v + 2);
    UNROLL for (int i = 0; i < 4; i++) top = /* magnitudes compare as integers do, NaN above infinity */
        _mm512_max_epi32(top, _mm512_and_si512((__m512i)v[i], _mm512_set1_epi32(0x7fffffff)));
    const int32_t bits = _mm512_reduce_max_epi32(top);
    const int finite = bits < 0x7f800000;
    float most;
    memcpy(&most, &bits, 4);
    /* no smaller, so that neither its inverse is infinite nor the step a subnormal number */
    const float step = most / 32767 > 0x1p-112f ? most / 32767 : 0x1p-112f;
    const __m512 inverse = _mm512_set1_ps(finite ? 1.0f / step : 0.0f);
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256i low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i], inverse))),
                      high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i + 1], inverse)));
        halves[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    pack_four_bit(halves[0], halves[1], weight_dtype, (uint16_t *)out);
    *(float *)(out + 128) = finite ? step / dsm_integer_gain(weight_dtype) : NAN;
}
static void pack_integers(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    char *to = out;
    for (int64_t k = 0; k < dsm_blocks(n) * DSM_BLOCK; k += 64, to += INTEGER_GROUP)
        pack_64((const char *)x + k * dsm_itemsize(dtype), dtype, n - k, weight_dtype, to);
}

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
DSM_INLINE void add_integers(__m512i values, const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart,
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
            UNROLL for (int j = 0; j < 4; j++) dot = ADD_PAIRS(dot, weights[j], xs[m][j]);
            total[r * tokens + m] =
                _mm512_fmadd_ps(scales, _mm512_mul_ps(steps[m], _mm512_cvtepi32_ps(dot)), total[r * tokens + m]);
        }
    }
}
DSM_INLINE void turn_integers(const char *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                              __m512 *total, const int readers, const int tokens, const int kind) {
    const __m512i values = integer_values(w->dtype);
    const int64_t cols = w->cols, ahead = dsm_min(FAR_AHEAD / 2, cols / 2), near = cols - 2 * ahead;
    int64_t k = 0;
    for (; k + 128 <= near; k += 128)
        add_integers(values, x, stride, w, row, apart, k, 128, ahead, total, readers, tokens, kind);
    for (; k + 128 <= cols; k += 128)
        add_integers(values, x, stride, w, row, apart, k, 128, ahead + jump, total, readers, tokens, kind);
    if (k < cols)
        add_integers(values, x, stride, w, row, apart, k, cols - k, ahead + jump, total, readers, tokens, kind);
}

DSM_INLINE void read_integers(const void *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                              float *out, int64_t ldo, const int readers, const int tokens, const int kind) {
    __m512 total[16];
    float sums[16];
    UNROLL for (int i = 0; i < 16; i++) total[i] = _mm512_setzero_ps();
    turn_integers(x, stride, w, row, apart, jump, total, readers, tokens, kind);
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

/* Not inlined, so that each one's accumulators stay in registers. */
#define READ_INTEGERS(name, readers, tokens)                                                                          \
    static __attribute__((noinline)) void name(const void *x, size_t stride, const Matrix *w, int64_t row,            \
                                               int64_t apart, int64_t jump, float *out, int64_t ldo) {                \
        DSM_BY_KIND(w, read_integers, x, stride, w, row, apart, jump, out, ldo, readers, tokens)                      \
    }
READ_INTEGERS(read_8_1_integers, 8, 1)
READ_INTEGERS(read_1_1_integers, 1, 1)
READ_INTEGERS(read_4_2_integers, 4, 2)
READ_INTEGERS(read_1_2_integers, 1, 2)
READ_INTEGERS(read_4_3_integers, 4, 3)
READ_INTEGERS(read_1_3_integers, 1, 3)
READ_INTEGERS(read_4_4_integers, 4, 4)
READ_INTEGERS(read_1_4_integers, 1, 4)

/* four tokens at most at once: more meet as many rows as stay in the second cache one after the other */
static void gemv_integers(const void *given, size_t stride, int64_t tokens, const Matrix *w, int64_t first,
                          int64_t count, float *out, int64_t ldo, const void *next) {
    const char *x = given;
    static const Read SEVERAL[] = {read_8_1_integers, read_4_2_integers, read_4_3_integers, read_4_4_integers},
                      ONE[] = {read_1_1_integers, read_1_2_integers, read_1_3_integers, read_1_4_integers};
    const int64_t near = dsm_max(SECOND_CACHE / dsm_max(dsm_row_bytes(w->dtype, w->cols), 1) / 8 * 8, 8);
    const int64_t most = tokens == 1 ? 8 : 4;
    for (int64_t r = 0, rows; r < count; r += rows) {
        rows = tokens <= MOST_TOKENS ? count : dsm_min(near, count - r);
        const void *then = r + rows < count ? dsm_row(w, first + r + rows) : next;
        DSM_BY_KIND(w, fetch_scales, w, first + r, rows / most, most)
        for (int64_t t = 0, n; t < tokens; t += n) {
            n = dsm_min(MOST_TOKENS, tokens - t);
            gemv_in_turns(SEVERAL[n - 1], ONE[n - 1], n == 1 ? 8 : 4, x + t * stride, stride, w, first + r, rows,
                          out + t * ldo + r, ldo, t + n < tokens ? dsm_row(w, first + r) : then);
        }
    }
}
