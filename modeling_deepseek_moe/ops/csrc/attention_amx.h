/* The values of latent attention on tiles; part of `kernels_amx.c`. */

/* Two rows of 32 bf16 become pairs: unpacking goes by 128-bit lanes, so the first 16 pairs are of columns 0-3, 8-11, 16-19
   and 24-27. */
static void pair_values(const Matrix *v, int64_t first, int64_t count, int64_t c, char *tiles) {
    for (int64_t i = 0; i < DSM_BLOCK; i += 2, tiles += 64) {
        const uint16_t *row = (const uint16_t *)v->data + (first + i) * v->cols + c;
        const int64_t rest = v->cols - c;
        const __mmask32 mask = rest >= 32 ? ~0u : (1u << rest) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(i < count ? mask : 0, row);
        const __m512i b = _mm512_maskz_loadu_epi16(i + 1 < count ? mask : 0, row + v->cols);
        _mm512_store_si512(tiles, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(tiles + DSM_BLOCK / 2 * 64, _mm512_unpackhi_epi16(a, b));
    }
}

/* As `accumulate_pv`: a tile is 16 tokens × 32 keys, or 16 pairs of keys × 16 columns. */
static void accumulate_pv_tiles(const float *p, int64_t ldp, int64_t tokens, const Matrix *v, int64_t first,
                                int64_t count, const float *decay, float *out, int64_t ldo, void *scratch,
                                PrefetchStream *ahead) {
    uint16_t *weights = scratch;
    char *values = (char *)(weights + DSM_PV_TOKENS * DSM_BLOCK);
    const int64_t deep = (count + TILE_COLUMNS - 1) / TILE_COLUMNS, room = (count + 15) / 16 * 16;
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    float c[2 * TILE_FLOATS] __attribute__((aligned(64)));
    memset(weights, 0, sizeof(uint16_t) * DSM_BLOCK * ((tokens + TILE - 1) / TILE * TILE));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < room; k += 16)
            _mm256_store_si256((__m256i *)(weights + t * DSM_BLOCK + k),
                               (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p + t * ldp + k)));
    _tile_loadconfig(&SHAPES);
    for (int64_t column = 0; column < v->cols; column += TILE_COLUMNS) {
        pair_values(v, first, count, column, values);
        MEMORY_WRITTEN;
        for (int64_t t0 = 0; t0 < tokens; t0 += TILE) {
            const uint16_t *from = weights + t0 * DSM_BLOCK;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < deep; i++) {
                _tile_loadd(4, from + i * TILE_COLUMNS, DSM_BLOCK * sizeof(uint16_t));
                _tile_loadd(6, values + i * TILE_BYTES, 64);
                _tile_loadd(7, values + DSM_BLOCK / 2 * 64 + i * TILE_BYTES, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
            }
            _tile_stored(0, c, 64);
            _tile_stored(1, c + TILE_FLOATS, 64);
            MEMORY_WRITTEN;
            for (int64_t t = t0; t < dsm_min(t0 + TILE, tokens); t++) {
                const __m512 a = _mm512_load_ps(c + (t - t0) * 16),
                             b = _mm512_load_ps(c + TILE_FLOATS + (t - t0) * 16);
                const __m512 factor = _mm512_set1_ps(decay[t]);
                float *to = out + t * ldo + column;
                prefetch_lines(ahead, 4);
                _mm512_storeu_ps(to, _mm512_fmadd_ps(factor, _mm512_loadu_ps(to),
                                                     (__m512)_mm512_permutex2var_epi64((__m512i)a, low, (__m512i)b)));
                _mm512_storeu_ps(to + 16,
                                 _mm512_fmadd_ps(factor, _mm512_loadu_ps(to + 16),
                                                 (__m512)_mm512_permutex2var_epi64((__m512i)a, high, (__m512i)b)));
            }
        }
    }
    _tile_release();
}
