/* Codes of four bits for many bf16 activations: what the kernels of AVX-512 BF16 and those of AMX share. Included within a
   target.

   Weights are table[code] * scale in fp32, rounded to bf16 once, in the order of packed activations. */
#ifndef DSM_FOUR_BIT_AVX512_BF16_H
#define DSM_FOUR_BIT_AVX512_BF16_H

#include "four_bit_avx512.h"

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

#endif
