/* The kernels for AVX-512 VBMI and BF16 (Zen 4, Sapphire Rapids and later), for bf16 activations.

   Codes become bf16 through two tables of 128 bytes, the low and the high byte of each magnitude (vpermi2b), exactly,
   subnormals and NaN included; vdpbf16ps, which would flush subnormal operands, never meets one. Low and high bytes
   interleave within 128-bit lanes, so activations are packed lane by lane: 16-byte pieces 0 2 4 6 of a group of 64,
   then 1 3 5 7. */
#if defined(__x86_64__)
#include "target.h"

#include <immintrin.h>

DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,f16c")

#define AHEAD 512 /* bytes */
#define FAR_AHEAD 8192
#define PANEL 64
#define SLAB 256 /* columns of four weight rows that are decoded at a time beside three and more tokens */
#define SLAB_TOKENS 32
#define UNROLL _Pragma("GCC unroll 32")

/* bf16 of the E4M3 magnitudes 0..127, low bytes and high bytes */
#define SUBNORMAL_LOW 0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60
#define SUBNORMAL_HIGH 0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c
#define ROW_LOW(odd) odd | 0x00, odd | 0x10, odd | 0x20, odd | 0x30, odd | 0x40, odd | 0x50, odd | 0x60, odd | 0x70
#define ROW_HIGH(b) b, b, b, b, b, b, b, b
static const uint8_t LOW[128] __attribute__((aligned(64))) = {
    SUBNORMAL_LOW, ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80),
    ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0),
    0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xc0,
};
static const uint8_t HIGH[128] __attribute__((aligned(64))) = {
    SUBNORMAL_HIGH, ROW_HIGH(0x3c), ROW_HIGH(0x3d), ROW_HIGH(0x3d), ROW_HIGH(0x3e), ROW_HIGH(0x3e), ROW_HIGH(0x3f),
    ROW_HIGH(0x3f), ROW_HIGH(0x40), ROW_HIGH(0x40), ROW_HIGH(0x41), ROW_HIGH(0x41), ROW_HIGH(0x42), ROW_HIGH(0x42),
    ROW_HIGH(0x43), 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x7f,
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

/* ---- few tokens: one contiguous stream of codes, fetched into the second cache far ahead (the first is x's) ---- */

/* One block of a weight row, of which `rest` columns exist: a constant but at a row's end. */
DSM_INLINE void add_block(Tables t, const char *x, size_t stride, const uint8_t *w, int64_t rest, float scale,
                          __m512 *total, const int tokens) {
    __m512 part[4];
    UNROLL for (int i = 0; i < 2 * tokens; i++) part[i] = _mm512_setzero_ps();
    UNROLL for (int i = 0; i < DSM_BLOCK; i += 64) {
        __m512bh first, second;
        _mm_prefetch((const char *)(w + i + FAR_AHEAD), _MM_HINT_T1);
        decode64(t, load_codes(w + i, rest - i), &first, &second);
        UNROLL for (int m = 0; m < tokens; m++) {
            const uint16_t *xm = (const uint16_t *)(x + m * stride) + i;
            part[2 * m] = _mm512_dpbf16_ps(part[2 * m], first, load_pairs(xm));
            part[2 * m + 1] = _mm512_dpbf16_ps(part[2 * m + 1], second, load_pairs(xm + 32));
        }
    }
    UNROLL for (int m = 0; m < tokens; m++)
        total[m] = _mm512_fmadd_ps(_mm512_set1_ps(scale), _mm512_add_ps(part[2 * m], part[2 * m + 1]), total[m]);
}
DSM_INLINE void row_fp8(const char *x, size_t stride, const uint8_t *w, const float *scale, int64_t cols, float *out,
                        int64_t ldo, const int tokens) {
    const Tables t = tables();
    __m512 total[2];
    int64_t k = 0;
    UNROLL for (int m = 0; m < tokens; m++) total[m] = _mm512_setzero_ps();
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        add_block(t, x + 2 * k, stride, w + k, DSM_BLOCK, *scale++, total, tokens);
    if (k < cols) add_block(t, x + 2 * k, stride, w + k, cols - k, *scale, total, tokens);
    UNROLL for (int m = 0; m < tokens; m++) out[m * ldo] = _mm512_reduce_add_ps(total[m]);
}
DSM_INLINE void row_bf16(const char *x, size_t stride, const uint16_t *w, int64_t cols, float *out, int64_t ldo,
                         const int tokens) {
    __m512 part[8];
    int64_t k = 0;
    UNROLL for (int i = 0; i < 4 * tokens; i++) part[i] = _mm512_setzero_ps();
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        UNROLL for (int i = 0; i < 4; i++) {
            _mm_prefetch((const char *)(w + k + 32 * i) + FAR_AHEAD, _MM_HINT_T1);
            __m512bh weights = load_pairs(w + k + 32 * i);
            UNROLL for (int m = 0; m < tokens; m++)
                part[4 * m + i] = _mm512_dpbf16_ps(part[4 * m + i], weights,
                                                   load_pairs((const uint16_t *)(x + m * stride) + k + 32 * i));
        }
    for (; k < cols; k += 32) {
        __mmask32 mask = cols - k >= 32 ? ~0u : (1u << (cols - k)) - 1;
        __m512bh weights = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + k);
        UNROLL for (int m = 0; m < tokens; m++)
            part[4 * m] = _mm512_dpbf16_ps(part[4 * m], weights, load_pairs((const uint16_t *)(x + m * stride) + k));
    }
    UNROLL for (int m = 0; m < tokens; m++)
        out[m * ldo] = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(part[4 * m], part[4 * m + 1]),
                                                          _mm512_add_ps(part[4 * m + 2], part[4 * m + 3])));
}
/* Not inlined, so that `tokens` is a constant of each and its accumulators stay in registers. */
#define ROW(N)                                                                                                         \
    static __attribute__((noinline)) void row_##N(const void *x, size_t stride, const Matrix *w, int64_t r,            \
                                                  float *out, int64_t ldo) {                                           \
        if (w->dtype == DSM_FP8)                                                                                       \
            row_fp8(x, stride, (const uint8_t *)w->data + r * w->cols,                                                 \
                    w->scale + r / DSM_BLOCK * dsm_blocks(w->cols), w->cols, out, ldo, N);                             \
        else                                                                                                           \
            row_bf16(x, stride, (const uint16_t *)w->data + r * w->cols, w->cols, out, ldo, N);                        \
    }
ROW(1)
ROW(2)

/* Four weight rows of one block beside up to four tokens. The sums stay apart by lane until the row's end. */
DSM_INLINE void multiply_slab(const char *x, size_t stride, const uint16_t *slab, const float *scale, float *sums,
                              const int tokens) {
    __m512 acc[16];
    UNROLL for (int i = 0; i < 4 * tokens; i++) acc[i] = _mm512_setzero_ps();
    UNROLL for (int k = 0; k < DSM_BLOCK; k += 32) {
        __m512bh row[4];
        UNROLL for (int r = 0; r < 4; r++) row[r] = load_pairs(slab + r * DSM_BLOCK + k);
        UNROLL for (int m = 0; m < tokens; m++) {
            __m512bh xm = load_pairs((const uint16_t *)(x + m * stride) + k);
            UNROLL for (int r = 0; r < 4; r++) acc[4 * m + r] = _mm512_dpbf16_ps(acc[4 * m + r], xm, row[r]);
        }
    }
    UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int r = 0; r < 4; r++) {
            float *to = sums + (4 * m + r) * 16;
            _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(scale[r]), acc[4 * m + r], _mm512_load_ps(to)));
        }
}
static __attribute__((noinline)) void slab_4(const char *x, size_t stride, const uint16_t *slab, const float *scale,
                                             float *sums) {
    multiply_slab(x, stride, slab, scale, sums, 4);
}
static __attribute__((noinline)) void slab_1(const char *x, size_t stride, const uint16_t *slab, const float *scale,
                                             float *sums) {
    multiply_slab(x, stride, slab, scale, sums, 1);
}

/* four sums over lanes at once */
DSM_INLINE __m128 sum4(const float *s) {
    __m512 a = _mm512_load_ps(s), b = _mm512_load_ps(s + 16), c = _mm512_load_ps(s + 32), d = _mm512_load_ps(s + 48);
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                               (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* up to four weight rows, up to SLAB_TOKENS tokens: a slab is decoded into the first cache, then used by all tokens */
static void rows_slab(const char *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                      float *out, int64_t ldo) {
    const Tables t = tables();
    float sums[SLAB_TOKENS * 64] __attribute__((aligned(64)));
    uint16_t slab[4 * SLAB] __attribute__((aligned(64)));
    const int64_t cols = w->cols, blocks = dsm_blocks(cols);
    const int fp8 = w->dtype == DSM_FP8;
    memset(sums, 0, (size_t)tokens * 64 * sizeof(float));
    memset(slab, 0, sizeof slab);
    for (int64_t k0 = 0; k0 < cols; k0 += SLAB) {
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < SLAB && k0 + i < (cols + 63) / 64 * 64; i += 64) {
                uint16_t *to = slab + i / DSM_BLOCK * 4 * DSM_BLOCK + r * DSM_BLOCK + i % DSM_BLOCK;
                int64_t k = k0 + i, at = (first + r) * cols + k, rest = cols - k;
                if (fp8) {
                    __m512bh a, b;
                    const char *next = (const char *)w->data + at + AHEAD;
                    /* the end of this row is followed by four rows on */
                    _mm_prefetch(rest > AHEAD ? next : next + 4 * cols - cols, _MM_HINT_T0);
                    decode64(t, load_codes((const uint8_t *)w->data + at, rest), &a, &b);
                    _mm512_store_si512(to, (__m512i)a);
                    _mm512_store_si512(to + 32, (__m512i)b);
                } else {
                    uint64_t mask = rest >= 64 ? ~0ull : (1ull << rest) - 1;
                    const uint16_t *from = (const uint16_t *)w->data + at;
                    _mm512_store_si512(to, _mm512_maskz_loadu_epi16((__mmask32)mask, from));
                    _mm512_store_si512(to + 32, _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), from + 32));
                }
            }
        for (int64_t k = 0; k < SLAB && k0 + k < cols; k += DSM_BLOCK) {
            float scale[4] = {1, 1, 1, 1};
            const char *xk = x + (k0 + k) * sizeof(uint16_t);
            const uint16_t *from = slab + k * 4;
            int64_t m = 0;
            if (cols - k0 - k <= 64) /* half a block: what an earlier block left behind it must not count */
                for (int r = 0; r < 4; r++) memset((uint16_t *)from + r * DSM_BLOCK + 64, 0, 128);
            if (fp8)
                for (int64_t r = 0; r < count; r++)
                    scale[r] = w->scale[(first + r) / DSM_BLOCK * blocks + (k0 + k) / DSM_BLOCK];
            for (; m + 4 <= tokens; m += 4) slab_4(xk + m * stride, stride, from, scale, sums + m * 64);
            for (; m < tokens; m++) slab_1(xk + m * stride, stride, from, scale, sums + m * 64);
        }
    }
    for (int64_t m = 0; m < tokens; m++) {
        float four[4];
        _mm_storeu_ps(four, sum4(sums + m * 64));
        memcpy(out + m * ldo, four, sizeof(float) * count);
    }
}

static void rows(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, int64_t ldo) {
    if (tokens == 1) {
        for (int64_t r = 0; r < count; r++) row_1(x, stride, w, first + r, out + r, ldo);
    } else if (tokens == 2) {
        for (int64_t r = 0; r < count; r++) row_2(x, stride, w, first + r, out + r, ldo);
    } else {
        for (int64_t m = 0; m < tokens; m += SLAB_TOKENS)
            for (int64_t r = 0; r < count; r += 4)
                rows_slab((const char *)x + m * stride, stride, dsm_min(SLAB_TOKENS, tokens - m), w, first + r,
                          dsm_min(4, count - r), out + m * ldo + r, ldo);
    }
}

/* ---- many tokens: 64 weight rows, one block deep, as pairs panel[pair of k][row] ---- */

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

/* Where four consecutive codes, the q-th of a group of 64, lie in packed activations: pieces of 8 in the order
   0 2 4 6 1 3 5 7, so piece q / 2 moves; in pairs of k. */
DSM_INLINE int pair_of(int q) {
    int piece = q / 2;
    return (piece / 2 + piece % 2 * 4) * 4 + q % 2 * 2;
}

static void fill_panel_fp8(const Matrix *w, int64_t first, int64_t count, int64_t k0, uint32_t *panel) {
    static const uint8_t PAIRS[64] = { /* bytes 0 and 1 of each dword of the low and high bytes, interleaved */
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
                v[i] = g + i < count ? _mm512_maskz_loadu_epi16(
                                           mask, (const uint16_t *)w->data + (first + g + i) * w->cols + k0 + k)
                                     : _mm512_setzero_si512();
            transpose16(v);
            UNROLL for (int q = 0; q < 16; q++) _mm512_store_si512(panel + (k / 2 + q) * PANEL + g, v[q]);
        }
}

DSM_INLINE void multiply(const char *x, size_t stride, const uint32_t *panel, int pairs, float scale, float *out,
                         Ahead *ahead, const int tokens) {
    __m512 acc[24];
    Ahead next = *ahead;
    UNROLL for (int i = 0; i < tokens * 4; i++) acc[i] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++) {
        __m512bh b[4];
        dsm_fetch(&next);
        UNROLL for (int v = 0; v < 4; v++) b[v] = (__m512bh)_mm512_load_si512(panel + p * PANEL + v * 16);
        UNROLL for (int m = 0; m < tokens; m++) {
            int32_t pair;
            memcpy(&pair, x + m * stride + p * 4, 4);
            UNROLL for (int v = 0; v < 4; v++)
                acc[m * 4 + v] = _mm512_dpbf16_ps(acc[m * 4 + v], (__m512bh)_mm512_set1_epi32(pair), b[v]);
        }
    }
    UNROLL for (int i = 0; i < tokens * 4; i++) {
        float *to = out + i * 16;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(scale), acc[i], _mm512_loadu_ps(to)));
    }
    *ahead = next;
}
#define MULTIPLY(N)                                                                                                    \
    static __attribute__((noinline)) void multiply_##N(const char *x, size_t stride, const uint32_t *panel, int pairs, \
                                                       float scale, float *out, Ahead *ahead) {                        \
        multiply(x, stride, panel, pairs, scale, out, ahead, N);                                                       \
    }
MULTIPLY(6)
MULTIPLY(4)
MULTIPLY(1)

static void panel(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                  float *out, void *scratch, Ahead *ahead) {
    memset(out, 0, sizeof(float) * tokens * PANEL);
    for (int64_t k = 0; k < w->cols; k += DSM_BLOCK) {
        const char *xk = (const char *)x + k * sizeof(uint16_t);
        const int pairs = w->cols - k > 64 ? 64 : 32; /* half a block is often all that is left */
        float scale = 1.0f;
        int64_t m = 0;
        if (w->dtype == DSM_FP8) {
            scale = w->scale[first / DSM_BLOCK * dsm_blocks(w->cols) + k / DSM_BLOCK];
            fill_panel_fp8(w, first, count, k, scratch);
        } else {
            fill_panel_bf16(w, first, count, k, scratch);
        }
        for (; m + 6 <= tokens; m += 6)
            multiply_6(xk + m * stride, stride, scratch, pairs, scale, out + m * PANEL, ahead);
        for (; m + 4 <= tokens; m += 4)
            multiply_4(xk + m * stride, stride, scratch, pairs, scale, out + m * PANEL, ahead);
        for (; m < tokens; m++) multiply_1(xk + m * stride, stride, scratch, pairs, scale, out + m * PANEL, ahead);
    }
}

/* ---- activations ---- */

/* the first 64 of n values, in the order in which weights of that dtype are decoded */
DSM_INLINE void pack_group(const void *x, int dtype, int64_t n, int weight_dtype, uint16_t *out) {
    uint16_t group[64] __attribute__((aligned(64)));
    __m512i a, b;
    if (n < 64) memset(group, 0, sizeof group);
    if (dtype == DSM_BF16) {
        if (n > 0) memcpy(group, x, sizeof(uint16_t) * dsm_min(64, n));
    } else {
        for (int64_t i = 0; i < dsm_min(64, n); i++) group[i] = dsm_to_bf16(dsm_load(x, dtype, i));
    }
    a = _mm512_load_si512(group);
    b = _mm512_load_si512(group + 32);
    if (weight_dtype == DSM_FP8) {
        _mm512_storeu_si512(out, _mm512_shuffle_i64x2(a, b, 0x88));
        _mm512_storeu_si512(out + 32, _mm512_shuffle_i64x2(a, b, 0xdd));
    } else {
        _mm512_storeu_si512(out, a);
        _mm512_storeu_si512(out + 32, b);
    }
}
static void pack(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    for (int64_t k = 0; k < (n + DSM_BLOCK - 1) / DSM_BLOCK * DSM_BLOCK; k += 64)
        pack_group((const char *)x + k * dsm_itemsize(dtype), dtype, n - k, weight_dtype, (uint16_t *)out + k);
}

extern const Kernels dsm_kernels_avx512;
static void swiglu(const float *gate, const float *up, float *out, int64_t n) {
    dsm_kernels_avx512.swiglu(gate, up, out, n);
}
static void write(const float *sums, const float *bias, int64_t n, void *out, int dtype) {
    dsm_kernels_avx512.write(sums, bias, n, out, dtype);
}
static void norm(const void *x, const void *w, int64_t n, float eps, void *out, int dtype) {
    dsm_kernels_avx512.norm(x, w, n, eps, out, dtype);
}
static void encode(const void *x, int dtype, int64_t n, float scale, uint8_t *out) {
    dsm_kernels_avx512.encode(x, dtype, n, scale, out);
}

static float weigh(float *scores, int64_t n, int64_t room, float scaling, const float *mask, float *peak,
                   float *norm) {
    return dsm_kernels_avx512.weigh(scores, n, room, scaling, mask, peak, norm);
}
#include "attention_avx512_bf16.h"
#include "blocks_avx512_bf16.h"

const Kernels dsm_kernels_avx512_bf16 = {
    .name = "avx512_bf16",
    .packed_bytes = 2,
    .panel_columns = PANEL,
    .panels = 1,
    .panel_tokens = 1,
    .few_tokens = 11,
    .few_rows = DSM_FEW_ROWS,
    .scratch_bytes = sizeof(uint32_t) * DSM_BLOCK / 2 * PANEL /* a panel, and `mix`'s weights */
                     + sizeof(uint16_t) * DSM_BLOCK * DSM_MIX_TOKENS,
    .pack = pack,
    .rows = rows,
    .panel = panel,
    .swiglu = swiglu,
    .norm = norm,
    .write = write,
    .decode = decode,
    .amax = amax,
    .encode = encode,
    .absorb = absorb,
    .weigh = weigh,
    .mix = mix,
};

#if DSM_AMX
#include "kernels_amx.h"
#endif

DSM_TARGET_END
#endif
