/* The kernels for AVX-512 VBMI and BF16 (Zen 4, Sapphire Rapids and later), for bf16 activations.

   Codes become bf16 through two tables of 128 bytes, the low and the high byte of each magnitude (vpermi2b), exactly,
   subnormals and NaN included; vdpbf16ps, which would flush subnormal operands, never meets one. Low and high bytes
   interleave within 128-bit lanes, so activations are packed lane by lane: 16-byte pieces 0 2 4 6 of a group of 64,
   then 1 3 5 7. */
#if defined(__x86_64__)
#include "target.h"

#include <immintrin.h>
#include <math.h>

DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx512vnni,fma,f16c")

#include "avx512_bf16.h"

#define ADD_PAIRS _mm512_dpwssd_epi32
#include "few_tokens_four_bit.h"

#include "few_tokens_avx512_bf16.h"

/* ---- many tokens: 64 weight rows, one block deep, as pairs panel[pair of k][row] ---- */

/* Where four consecutive codes, the q-th of a group of 64, lie in packed activations: pieces of 8 in the order
   0 2 4 6 1 3 5 7, so piece q / 2 moves; in pairs of k. */
DSM_INLINE int pair_of(int q) {
    int piece = q / 2;
    return (piece / 2 + piece % 2 * 4) * 4 + q % 2 * 2;
}

static void fill_panel_fp8(const Matrix *w, int64_t first, int64_t count, int64_t k0, uint32_t *panel) {
    static const uint8_t PAIRS[64] = {
        /* bytes 0 and 1 of each dword of the low and high bytes, interleaved */
        0,  64,  1,  65,  4,  68,  5,  69,  8,  72,  9,  73,  12, 76,  13, 77,  16, 80,  17, 81,  20, 84,
        21, 85,  24, 88,  25, 89,  28, 92,  29, 93,  32, 96,  33, 97,  36, 100, 37, 101, 40, 104, 41, 105,
        44, 108, 45, 109, 48, 112, 49, 113, 52, 116, 53, 117, 56, 120, 57, 121, 60, 124, 61, 125,
    };
    const Tables t = tables();
    const __m512i first_pair = _mm512_loadu_si512(PAIRS);
    const __m512i second_pair = _mm512_add_epi8(first_pair, _mm512_set1_epi8(2));
    for (int g = 0; g < PANEL; g += 16)
        for (int k = 0; k < DSM_BLOCK && k0 + k < w->cols; k += 64) {
            __m512i v[16];
            int64_t rest = w->cols - k0 - k;
            for (int i = 0; i < 16; i++) {
                const uint8_t *p = (const uint8_t *)w->data + (first + g + i) * w->cols + k0 + k;
                v[i] = g + i < count ? load_codes(p, rest) : _mm512_setzero_si512();
                if (g + i < count) _mm_prefetch((const char *)p + DSM_BLOCK, _MM_HINT_T0);
            }
            transpose16(v);
            UNROLL for (int q = 0; q < 16; q++) {
                __m512i low, high;
                uint32_t *to = panel + (k / 2 + pair_of(q)) * PANEL + g;
                bytes_of(t, v[q], &low, &high);
                _mm512_store_si512(to, _mm512_permutex2var_epi8(low, first_pair, high));
                _mm512_store_si512(to + PANEL, _mm512_permutex2var_epi8(low, second_pair, high));
            }
        }
}
static void fill_panel_bf16(const Matrix *w, int64_t first, int64_t count, int64_t k0, uint32_t *panel) {
    for (int g = 0; g < PANEL; g += 16)
        for (int k = 0; k < DSM_BLOCK && k0 + k < (w->cols + 63) / 64 * 64; k += 32) {
            __m512i v[16];
            int64_t rest = w->cols - k0 - k;
            __mmask32 mask = rest >= 32 ? ~0u : rest <= 0 ? 0 : (1u << rest) - 1;
            for (int i = 0; i < 16; i++)
                v[i] = g + i < count ? _mm512_maskz_loadu_epi16(mask, (const uint16_t *)w->data +
                                                                          (first + g + i) * w->cols + k0 + k)
                                     : _mm512_setzero_si512();
            transpose16(v);
            UNROLL for (int q = 0; q < 16; q++) _mm512_store_si512(panel + (k / 2 + q) * PANEL + g, v[q]);
        }
}

/* four-bit codes, with their scales, 64 columns at a time */
DSM_INLINE void fill_four_bit(const Matrix *w, int64_t first, int64_t count, int64_t k0, uint32_t *panel,
                              const int kind) {
    for (int g = 0; g < PANEL; g += 16)
        for (int k = 0; k < DSM_BLOCK && k0 + k < w->cols; k += 64) {
            __m512i v[2][16];
            for (int i = 0; i < 16; i++) {
                v[0][i] = v[1][i] = _mm512_setzero_si512();
                if (g + i < count) {
                    _mm_prefetch(dsm_row(w, first + g + i) + (k0 + k) / 2 + DSM_BLOCK, _MM_HINT_T0);
                    decode_four_bit_row(w, first + g + i, k0 + k, dsm_min(64, w->cols - k0 - k), (char *)(v[0] + i),
                                        sizeof v[0], kind);
                }
            }
            for (int half = 0; half < 2; half++) {
                transpose16(v[half]);
                UNROLL for (int q = 0; q < 16; q++)
                    _mm512_store_si512(panel + (k / 2 + half * 16 + q) * PANEL + g, v[half][q]);
            }
        }
}
static __attribute__((noinline)) void fill_panel_four_bit(const Matrix *w, int64_t first, int64_t count, int64_t k0,
                                                          uint32_t *panel){
    DSM_BY_KIND(w, fill_four_bit, w, first, count, k0, panel)}

/* The micro-kernel: up to 6 tokens x 4 vectors of 16 rows, a pair of columns at a time (vdpbf16ps).

                 panel [pairs][64 rows], a pair of bf16 each
                 p |  rows 0-15 | 16-31 | 32-47 | 48-63
       x [tokens][pairs]                                          acc[t][v] += x[t][p] . b[v]
       t  pair = x[t][p], spread -> | acc[t][0] .. acc[t][3] |    then as `fma_tile` of kernels_vector.h ends
*/
DSM_INLINE void fma_tile(const char *x, size_t stride, const uint32_t *panel, int64_t pairs, float scale,
                         const float *decay, float *out, int64_t ldo, PrefetchStream *ahead, const int tokens) {
    __m512 acc[24];
    PrefetchStream next = *ahead;
    UNROLL for (int i = 0; i < tokens * 4; i++) acc[i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh b[4];
        dsm_prefetch_line(&next);
        if (p < 4 * tokens) _mm_prefetch(x + (tokens + p / 4) * stride + p % 4 * 64, _MM_HINT_T0);
        UNROLL for (int v = 0; v < 4; v++) b[v] = (__m512bh)_mm512_load_si512(panel + p * PANEL + v * 16);
        UNROLL for (int t = 0; t < tokens; t++) {
            int32_t pair;
            memcpy(&pair, x + t * stride + p * 4, 4);
            UNROLL for (int v = 0; v < 4; v++) acc[t * 4 + v] =
                _mm512_dpbf16_ps(acc[t * 4 + v], (__m512bh)_mm512_set1_epi32(pair), b[v]);
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < 4; v++) {
        float *to = out + t * ldo + v * 16;
        const __m512 old = _mm512_loadu_ps(to), sums = acc[t * 4 + v];
        _mm512_storeu_ps(to, decay ? _mm512_fmadd_ps(_mm512_set1_ps(decay[t]), old, sums)
                                   : _mm512_fmadd_ps(_mm512_set1_ps(scale), sums, old));
    }
    *ahead = next;
}
#define PANEL_OF uint32_t
#include "fma_tokens.h"

static void gemm(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, void *scratch, PrefetchStream *ahead) {
    memset(out, 0, sizeof(float) * tokens * PANEL);
    for (int64_t k = 0; k < w->cols; k += DSM_BLOCK) {
        const char *xk = (const char *)x + k * sizeof(uint16_t);
        const int pairs = w->cols - k > 64 ? 64 : 32; /* half a block is often all that is left */
        float scale = 1.0f;
        if (w->dtype == DSM_FP8) {
            scale = *dsm_block_scale(w, first, k);
            fill_panel_fp8(w, first, count, k, scratch);
        } else if (dsm_is_four_bit(w->dtype)) {
            fill_panel_four_bit(w, first, count, k, scratch);
        } else {
            fill_panel_bf16(w, first, count, k, scratch);
        }
        fma_tokens(xk, stride, tokens, scratch, pairs, scale, NULL, out, PANEL, ahead);
    }
}

/* ---- activations ---- */

void dsm_bf16_pack(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    if (dsm_is_four_bit(weight_dtype)) {
        pack_integers(x, dtype, n, weight_dtype, out);
        return;
    }
    for (int64_t k = 0; k < dsm_blocks(n) * DSM_BLOCK; k += 64)
        pack_group((const char *)x + k * dsm_itemsize(dtype), dtype, n - k, weight_dtype, (uint16_t *)out + k);
}
/* one token in bf16; whole groups of 64 are written, and not what another thread packs after them */
static void pack_for_gemm(const void *const *x, int64_t tokens, int dtype, int64_t n, int weight_dtype, char *group,
                          int64_t lane, int64_t first) {
    (void)tokens, (void)lane; /* a group is one token */
    for (int64_t k = 0; k < n; k += 64)
        pack_group((const char *)*x + k * dsm_itemsize(dtype), dtype, n - k, weight_dtype,
                   (uint16_t *)group + first + k);
}

#include "attention_avx512_bf16.h"
#include "blocks_avx512_bf16.h"

const Kernels dsm_kernels_avx512_bf16 = {
    .name = "avx512_bf16",
    DSM_BF16_KERNELS,
    .panel_columns = PANEL,
    .panels = 1,
    .panel_tokens = 1,
    .few_tokens = {.bf16 = 11, .fp8 = 11, .four_bit = 16},
    .scratch_bytes = sizeof(uint32_t) * DSM_BLOCK / 2 * PANEL /* a panel, and `accumulate_pv`'s weights */
                     + sizeof(uint16_t) * DSM_BLOCK * DSM_PV_TOKENS,
    .pack_interleaved = pack_for_gemm,
    .gemv = dsm_bf16_gemv,
    .gemm = gemm,
    .accumulate_pv = accumulate_pv,
};

DSM_TARGET_END
#endif
