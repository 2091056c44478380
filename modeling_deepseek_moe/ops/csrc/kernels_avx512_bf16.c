/* The kernels for AVX-512 VBMI and BF16 (Zen 4, Sapphire Rapids and later), for bf16 activations.

   Codes become bf16 through two tables of 128 bytes, the low and the high byte of each magnitude (vpermi2b), exactly,
   subnormals and NaN included; vdpbf16ps, which would flush subnormal operands, never meets one. Low and high bytes
   interleave within 128-bit lanes, so activations are packed lane by lane: 16-byte pieces 0 2 4 6 of a group of 64,
   then 1 3 5 7. */
#if defined(__x86_64__)
#include "target.h"

#include <immintrin.h>

DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,fma,f16c")

#define PANEL 64
#define UNROLL _Pragma("GCC unroll 32")

/* bf16 of the E4M3 magnitudes 0..127, low bytes and high bytes */
#define SUBNORMAL_LOW 0x00, 0x00, 0x80, 0xc0, 0x00, 0x20, 0x40, 0x60
#define SUBNORMAL_HIGH 0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c
#define ROW_LOW(odd) odd | 0x00, odd | 0x10, odd | 0x20, odd | 0x30, odd | 0x40, odd | 0x50, odd | 0x60, odd | 0x70
#define ROW_HIGH(b) b, b, b, b, b, b, b, b
static const uint8_t LOW[128] __attribute__((aligned(64))) = {
    SUBNORMAL_LOW, ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80),
    ROW_LOW(0),    ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), ROW_LOW(0x80), ROW_LOW(0), 0x80,
    0x90,          0xa0,          0xb0,       0xc0,          0xd0,       0xe0,          0xc0,
};
static const uint8_t HIGH[128] __attribute__((aligned(64))) = {
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

#include "few_tokens_avx512_bf16.h"

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

DSM_INLINE void multiply(const char *x, size_t stride, const uint32_t *panel, int pairs, float scale, float *out,
                         Ahead *ahead, const int tokens) {
    __m512 acc[24];
    Ahead next = *ahead;
    UNROLL for (int i = 0; i < tokens * 4; i++) acc[i] = _mm512_setzero_ps();
    for (int p = 0; p < pairs; p++) {
        __m512bh b[4];
        dsm_fetch(&next);
        if (p < 4 * tokens) _mm_prefetch(x + (tokens + p / 4) * stride + p % 4 * 64, _MM_HINT_T0);
        UNROLL for (int v = 0; v < 4; v++) b[v] = (__m512bh)_mm512_load_si512(panel + p * PANEL + v * 16);
        UNROLL for (int m = 0; m < tokens; m++) {
            int32_t pair;
            memcpy(&pair, x + m * stride + p * 4, 4);
            UNROLL for (int v = 0; v < 4; v++) acc[m * 4 + v] =
                _mm512_dpbf16_ps(acc[m * 4 + v], (__m512bh)_mm512_set1_epi32(pair), b[v]);
        }
    }
    UNROLL for (int i = 0; i < tokens * 4; i++) {
        float *to = out + i * 16;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(scale), acc[i], _mm512_loadu_ps(to)));
    }
    *ahead = next;
}
#define MULTIPLY(N)                                                                                                   \
    static __attribute__((noinline)) void multiply_##N(const char *x, size_t stride, const uint32_t *panel,           \
                                                       int pairs, float scale, float *out, Ahead *ahead) {            \
        multiply(x, stride, panel, pairs, scale, out, ahead, N);                                                      \
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
    .few_rows = DSM_MOST_FEW_ROWS,
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
