/* Codes of four bits for bf16 activations; what the kernels of AVX-512 BF16 and those of AMX share. Included within a target.

   64 columns are 16 words of four codes; a table is looked up by the lowest bits of words (vpermw) or of their fp32 (vpermps).
   In memory:

       columns of a word            0  1  2  3     (1 0 3 2 of NF4 and FP4)
       packed activations           codes 0 of words 0 .. 15 | codes 1 of them | codes 2 | codes 3

   For a few tokens 64 activations become integers of 16 bits and a step, their largest / 32767, and a weight an integer of
   up to 14: exactly, but for NF4's, which are off by less than 1 / 16382 of the largest. The lanes of a vector are of columns
   of one group each; vpdpwssd sums eight products of a lane without overflow, 8 * 32767 * 8191. What is rounded is 2^-16 of
   the largest of 64 activations; and a vector takes half a cycle, where vdpbf16ps of numbers in bf16 takes two (Sapphire Rapids,
   Emerald Rapids). For many tokens weights are table[code] * scale in fp32,
   rounded to bf16 once, in the same order. */
#ifndef DSM_FOUR_BIT_AVX512_BF16_H
#define DSM_FOUR_BIT_AVX512_BF16_H

#include "four_bit.h"

#define INTEGER_GROUP 192 /* bytes of 64 activations as integers, their step, and what aligns the next */

/* scale i for the lanes of the first group's words, scale i + 1, if it is there, for those of the second's */
DSM_INLINE __m512 four_bit_scales(const void *scale, int64_t i, int two, const int kind) {
    const __m512 first = _mm512_set1_ps(dsm_group_scale(scale, i, kind));
    if (dsm_group_of(kind) == 64) return first;
    return _mm512_mask_broadcastss_ps(first, 0xff00, _mm_set_ss(two ? dsm_group_scale(scale, i + 1, kind) : 0.0f));
}

/* 64 columns of a row, of which `rest` exist, scaled; the table in fp32 */
DSM_INLINE void decode_scaled(__m512 values, const uint8_t *p, int64_t rest, const void *scale, int64_t i,
                              __m512bh *first, __m512bh *second, const int kind) {
    const __m256i words =
        rest >= 64 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskz_loadu_epi8((1u << rest / 2) - 1, p);
    const __m512i codes = _mm512_cvtepu16_epi32(words);
    const __m512 scales = four_bit_scales(scale, i, rest > 32, kind);
    __m512 v[4];
    UNROLL for (int j = 0; j < 4; j++) v[j] =
        _mm512_mul_ps(scales, _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), values));
    *first = _mm512_cvtne2ps_pbh(v[1], v[0]);
    *second = _mm512_cvtne2ps_pbh(v[3], v[2]);
}
/* `columns` of a row from column k on, 64 at a time, `apart` bytes from one half of them to the next */
DSM_INLINE void decode_four_bit_row(const Matrix *w, int64_t row, int64_t k, int64_t columns, char *to, int64_t apart,
                                    const int kind) {
    const __m512 values = _mm512_load_ps(dsm_values(w->dtype));
    const int64_t group = dsm_group_of(kind);
    const uint8_t *from = (const uint8_t *)w->data + (row * w->cols + k) / 2;
    int64_t i = row * (w->cols / group) + k / group;
    for (; columns > 0; columns -= 64, from += 32, i += 64 / group, to += 2 * apart) {
        __m512bh first, second;
        decode_scaled(values, from, columns, w->scale, i, &first, &second, kind);
        _mm512_store_si512(to, (__m512i)first);
        _mm512_store_si512(to + apart, (__m512i)second);
    }
}

/* 64 activations in that order: four vectors of 16, of each word's first, second .. column, in pairs of 32 bits */
DSM_INLINE void pack_four_bit(__m512i a, __m512i b, int weight_dtype, uint16_t *out) {
    static const uint16_t FIRST[32] __attribute__((aligned(64))) = {
        0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
        1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
    };
    const __m512i swapped = _mm512_set1_epi16((short)dsm_column_of(weight_dtype, 0));
    const __m512i first = _mm512_xor_si512(_mm512_load_si512(FIRST), swapped);
    const __m512i second = _mm512_xor_si512(first, _mm512_set1_epi16(2));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(a, second, b));
}

/* The integers of the codes; twice, since indices have five bits. */
DSM_INLINE __m512i integer_values(int dtype) {
    const __m512 all = _mm512_mul_ps(_mm512_load_ps(dsm_values(dtype)), _mm512_set1_ps(dsm_integer_gain(dtype)));
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(all)));
}

#endif
