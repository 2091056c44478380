/* Weight rows read in turns that lie apart, each by a reader of its own; part of `kernels_avx512.c` and of
   `kernels_avx512_bf16.c`. Memory gives a tenth to a third more to eight readers than to one. Each is fetched into the second
   cache ahead of its use (the first is x's), at the end of the last turn what `next` says comes after these rows. */
#ifndef DSM_TURNS_AVX512_H
#define DSM_TURNS_AVX512_H

#include "engine.h"

#define FAR_AHEAD 2048 /* bytes of one reader */

typedef void (*Read)(const void *, size_t, const Matrix *, int64_t, int64_t, int64_t, float *, int64_t);

/* out[i] = the sum over v[i]'s lanes: those 8 apart are added first, neighbours last */
DSM_INLINE void sum8(const __m512 *v, float *out) {
    __m512 two[4], four[2], all;
    UNROLL for (int i = 0; i < 4; i++) two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                                                              _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xee));
    UNROLL for (int i = 0; i < 2; i++) four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0x88),
                                                               _mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0xdd));
    all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)four[0], (__m512d)four[1]),
                        (__m512)_mm512_unpackhi_pd((__m512d)four[0], (__m512d)four[1]));
    all = _mm512_add_ps(
        all, _mm512_permute_ps(all, 0xb1)); /* the i-th 128 bits: twice the sum of v[i], twice of v[4 + i] */
    all = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 4, 8, 12, 2, 6, 10, 14), all);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(all));
}

/* count rows for up to four tokens, `readers` of them at a time */
static void gemv_in_turns(Read several, Read one, int64_t readers, const void *x, size_t stride, const Matrix *w,
                          int64_t first, int64_t count, float *out, int64_t ldo, const void *next) {
    const int64_t turns = count / readers;
    const int64_t jump = next ? (const char *)next - dsm_row(w, first + turns) : 0;
    for (int64_t i = 0; i < turns; i++)
        several(x, stride, w, first + i, turns, i + 1 < turns ? 0 : jump, out + i, ldo);
    for (int64_t i = turns * readers; i < count; i++) one(x, stride, w, first + i, 1, 0, out + i, ldo);
}

#endif
