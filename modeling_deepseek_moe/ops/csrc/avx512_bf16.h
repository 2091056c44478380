/* What the kernels of AVX-512 BF16 and those of AMX share: codes, packing, and the functions that both tables have.
   Included within a target. */
#ifndef DSM_AVX512_BF16_H
#define DSM_AVX512_BF16_H

#define PANEL 64
#define UNROLL _Pragma("GCC unroll 32")
#define INTEGER_GROUP 192 /* bytes of 64 activations as integers, their step, and what aligns the next */

#include "four_bit_avx512_bf16.h"

/* bf16 of the E4M3 magnitudes 0..127, low bytes and high bytes */
#define SUBNORMAL_LOW 0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60
#define SUBNORMAL_HIGH 0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c
#define ROW_LOW(odd) odd | 0x00, odd | 0x10, odd | 0x20, odd | 0x30, odd | 0x40, odd | 0x50, odd | 0x60, odd | 0x70
#define ROW_HIGH(b) b, b, b, b, b, b, b, b
static const uint8_t LOW[128] __attribute__((aligned(64), unused)) = {
    SUBNORMAL_LOW, ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80),
    ROW_LOW(0),    ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), 0x80,
    0x90,          0xa0,          0xb0,       0xc0,          0xd0,       0xe0,          0xc0,
};
static const uint8_t HIGH[128] __attribute__((aligned(64), unused)) = {
    SUBNORMAL_HIGH, ROW_HIGH(0x3c), ROW_HIGH(0x3d), ROW_HIGH(0x3d), ROW_HIGH(0x3e), ROW_HIGH(0x3e),
    ROW_HIGH(0x3f), ROW_HIGH(0x3f), ROW_HIGH(0x40), ROW_HIGH(0x40), ROW_HIGH(0x41), ROW_HIGH(0x41),
    ROW_HIGH(0x42), ROW_HIGH(0x42), ROW_HIGH(0x43), 0x43,           0x43,           0x43,
    0x43,           0x43,           0x43,           0x43,           0x7f,
};

typedef struct {
    __m512i low0, low1, high0, high1, sign;
} Tables;

DSM_INLINE Tables tables(void) {
    return (Tables){_mm512_load_si512(LOW), _mm512_load_si512(LOW + 64), _mm512_load_si512(HIGH),
                    _mm512_load_si512(HIGH + 64), _mm512_set1_epi8((char)0x80)};
}
/* vpermi2b ignores a code's sign bit, which the third step of the logic puts back */
DSM_INLINE void bytes_of(Tables t, __m512i codes, __m512i *low, __m512i *high) {
    __asm__("" : "+v"(codes)); /* else the compiler loads them once for each of the three uses */
    *low = _mm512_permutex2var_epi8(t.low0, codes, t.low1);
    *high = _mm512_ternarylogic_epi64(_mm512_permutex2var_epi8(t.high0, codes, t.high1), codes, t.sign, 0xf8);
}
DSM_INLINE void decode64(Tables t, __m512i codes, __m512bh *first, __m512bh *second) {
    __m512i low, high;
    bytes_of(t, codes, &low, &high);
    *first = (__m512bh)_mm512_unpacklo_epi8(low, high);
    *second = (__m512bh)_mm512_unpackhi_epi8(low, high);
}
DSM_INLINE __m512i load_codes(const uint8_t *p, int64_t rest) {
    if (rest >= 64) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi8(rest <= 0 ? 0 : ((__mmask64)1 << rest) - 1, p);
}
DSM_INLINE __m512bh load_pairs(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* 16 x 16 dwords */
DSM_INLINE void transpose16(__m512i *r) {
    __m512i t[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* the first 64 of n values, in the order in which weights of that dtype are decoded */
DSM_INLINE void pack_group(const void *x, int dtype, int64_t n, int weight_dtype, uint16_t *out) {
    uint16_t group[64] __attribute__((aligned(64)));
    if (dtype != DSM_BF16 || n < 64) {
        memset(group, 0, sizeof group);
        for (int64_t i = 0; i < dsm_min(64, n); i++)
            group[i] = dtype == DSM_BF16 ? ((const uint16_t *)x)[i] : dsm_to_bf16(dsm_load(x, dtype, i));
        x = group;
    }
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512((const char *)x + 64);
    if (weight_dtype == DSM_FP8) {
        _mm512_storeu_si512(out, _mm512_shuffle_i64x2(a, b, 0x88));
        _mm512_storeu_si512(out + 32, _mm512_shuffle_i64x2(a, b, 0xdd));
    } else if (dsm_is_four_bit(weight_dtype)) {
        pack_four_bit(a, b, weight_dtype, out);
    } else {
        _mm512_storeu_si512(out, a);
        _mm512_storeu_si512(out + 32, b);
    }
}

/* of kernels_avx512.c and kernels_avx512_bf16.c */
void dsm_kernels_avx512_swiglu(const float *gate, const float *up, float *out, int64_t n);
void dsm_kernels_avx512_write(const float *sums, const float *bias, int64_t n, void *out, int dtype);
void dsm_kernels_avx512_norm(const void *x, const void *w, int64_t n, float eps, void *out, int dtype);
void dsm_kernels_avx512_decode(const uint8_t *codes, const float *scale, int64_t n, void *out, int dtype);
float dsm_kernels_avx512_amax(const void *x, int dtype, int64_t n, int *finite);
void dsm_kernels_avx512_encode(const void *x, int dtype, int64_t n, float scale, uint8_t *out);
float dsm_kernels_avx512_online_softmax(float *scores, int64_t n, int64_t room, float scaling, const float *mask,
                                        float *peak, float *norm);
void dsm_kernels_avx512_weigh_heads(const float *products, int64_t ldp, int64_t heads, const float *weights, int64_t n,
                                    float *out);
void dsm_kernels_avx512_add_rows(const float *q, int64_t count, const void *rows, int64_t pitch, int64_t n,
                                 float *out);
void dsm_kernels_avx512_gemv_transposed(const float *q, const Matrix *w, int64_t first, int64_t count, float *out,
                                        float *sums);
void dsm_bf16_pack(const void *x, int dtype, int64_t n, int weight_dtype, void *out);
void dsm_bf16_decode(const uint8_t *codes, const float *scale, int64_t n, void *out, int dtype);
float dsm_bf16_amax(const void *x, int dtype, int64_t n, int *finite);
void dsm_bf16_gemv_transposed(const float *q, const Matrix *w, int64_t first, int64_t count, float *out, float *sums);
void dsm_bf16_gemv(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                   float *out, int64_t ldo, const void *next);
/* the same; bf16 rows for one token are fetched as Intel's processors like it */
void dsm_bf16_gemv_near(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                        float *out, int64_t ldo, const void *next);

/* what AVX-512 BF16 and AMX have in common */
#define DSM_BF16_KERNELS                                                                                              \
    .packed_bytes = 2, .packed_four_bit_bytes = INTEGER_GROUP / 64, .pack = dsm_bf16_pack,                            \
    .swiglu = dsm_kernels_avx512_swiglu, .norm = dsm_kernels_avx512_norm, .write = dsm_kernels_avx512_write,          \
    .decode = dsm_bf16_decode, .amax = dsm_bf16_amax, .encode = dsm_kernels_avx512_encode,                            \
    .gemv_transposed = dsm_bf16_gemv_transposed, .online_softmax = dsm_kernels_avx512_online_softmax,                 \
    .weigh_heads = dsm_kernels_avx512_weigh_heads, .add_rows = dsm_kernels_avx512_add_rows

#endif
