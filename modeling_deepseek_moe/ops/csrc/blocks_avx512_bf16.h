/* Block-scaled FP8 to bf16 and back, for whole matrices; part of `kernels_avx512_bf16.c`. */

/* finite fp32, rounded to nearest even, in the low half of each lane; not by vcvtneps2bf16, to which subnormals are 0 */
DSM_INLINE __m256i round_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

/* A code moved up by seven bits is an fp16 whose exponent is short by 8. */
void dsm_bf16_decode(const uint8_t *codes, const float *scale, int64_t n, void *out, int dtype) {
    if (dtype != DSM_BF16) {
        dsm_kernels_avx512_decode(codes, scale, n, out, dtype);
        return;
    }
    uint16_t *y = out;
    const __m512 short_by = _mm512_set1_ps(256.0f);
    const __m512i sign = _mm512_set1_epi16((short)0x8000), magnitude = _mm512_set1_epi16(0x7f);
    for (int64_t k = 0; k < n; k += DSM_BLOCK, scale++) {
        const int64_t end = dsm_min(n, k + DSM_BLOCK);
        const __m512 factor = _mm512_set1_ps(*scale);
        __mmask32 nan = 0;
        for (int64_t i = k; i < end; i += 32) {
            const __mmask32 mask = end - i >= 32 ? 0xffffffffu : (1u << (end - i)) - 1;
            const __m512i code = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, codes + i));
            const __m512i kept = _mm512_and_si512(code, magnitude);
            const __m512i half =
                _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(code, 8), sign), _mm512_slli_epi16(kept, 7));
            nan |= _mm512_cmpeq_epi16_mask(kept, magnitude);
            const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
            const __m512 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
            const __m256i first = round_bf16(_mm512_mul_ps(_mm512_mul_ps(low, short_by), factor));
            const __m256i second = round_bf16(_mm512_mul_ps(_mm512_mul_ps(high, short_by), factor));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
            _mm512_mask_storeu_epi16(y + i, mask, both);
        }
        if (nan || !(*scale - *scale == 0.0f)) dsm_kernels_avx512_decode(codes + k, scale, end - k, y + k, dtype);
    }
}
/* magnitudes of bf16 compare as integers do, NaN above infinity */
float dsm_bf16_amax(const void *x, int dtype, int64_t n, int *finite) {
    if (dtype != DSM_BF16) return dsm_kernels_avx512_amax(x, dtype, n, finite);
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 mask = n - i >= 32 ? 0xffffffffu : (1u << (n - i)) - 1;
        const __m512i values = _mm512_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
        most = _mm512_max_epu16(most, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i low = _mm512_and_si512(most, _mm512_set1_epi32(0xffff));
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(low, _mm512_srli_epi32(most, 16))) << 16;
    if (bits >= 0x7f800000) *finite = 0;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
