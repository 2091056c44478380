/* How activations are packed that meet codes of four bits, for all kernels of AVX-512: F, BW, DQ and VL are enough. Included
   within a target.

   64 columns are 16 words of four codes; a table is looked up by the lowest bits of words (vpermw) or of their fp32 (vpermps).
   In memory:

       columns of a word            0  1  2  3     (1 0 3 2 of NF4 and FP4)
       packed activations           codes 0 of words 0 .. 15 | codes 1 of them | codes 2 | codes 3 */
#ifndef DSM_FOUR_BIT_AVX512_H
#define DSM_FOUR_BIT_AVX512_H

#include "four_bit.h"

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

#endif
