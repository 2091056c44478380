/* The kernels of `Kernels`, written once on vectors of WIDTH fp32 lanes. A file that sets WIDTH, PANEL_VECTORS (vectors
   in a panel's row), KERNELS (the name of the table) and LABEL, and selects an instruction set, includes this.

   Decoding E4M3: four codes share a 32-bit lane. A code moved to the lane's top byte and shifted down by four,
   arithmetically, and masked, is an fp32 with the code's sign, exponent and mantissa, too small by 2^-120. Half of that
   is made good in the activations when they are packed (PACKED_GAIN), half in the scale. The packing puts activation 4l + j of
   a group of 4 * WIDTH at j * WIDTH + l, where lane l of the j-th decoded vector finds it (WIDTH 4 here):

       codes in memory     0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13 14 15    a lane: four neighbours
       decoded, j = 0          0           4             8           12         byte j of every lane
       packed activations  0  4  8 12 | 1  5  9 13 | 2  6 10 14 | 3  7 11 15    j = 0, 1, 2, 3

   bf16 weights go two to a lane in the same way. The pattern 0x7f (NaN) would decode as 480: it is looked for, and makes its row's result NaN.

   A set of instructions may define MULTIPLY_ADD_BYTES and MAX_BYTES, which C has no operators for, and LOAD_HALVES (WIDTH
   16-bit numbers as 32-bit ones), which compilers make several instructions of. */
#include "engine.h"

#include <math.h>

typedef float F __attribute__((vector_size(WIDTH * 4)));
typedef int32_t I __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t U __attribute__((vector_size(WIDTH * 4))); /* where a sum may wrap */
typedef float LooseF __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t LooseI __attribute__((vector_size(WIDTH * 4), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t UShorts __attribute__((vector_size(WIDTH * 4)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t LooseBytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));

#define PACKED_GAIN 0x1p60f
#define CODE_MASK ((int32_t)0x87f00000)
#define AHEAD 2048   /* bytes: how far a stream of codes is fetched before it is used */
#define SEGMENT 1024 /* columns */
#define READERS 4    /* rows of a token or two read at once, far apart; 8 bring a model less, 1 a sixth less (Xeon) */
#define ROWS 16      /* of codes of four bits */
#define NEAR_BYTES (192 << 10) /* of rows that several passes read: all but the first find them in a near cache */
#define ROWS_AT_ONCE 2         /* share what is loaded of x */
#define TOKENS_AT_ONCE 4
#define ACCUMULATORS (ROWS_AT_ONCE * TOKENS_AT_ONCE)
#define TILE_TOKENS 6
#define PANEL (PANEL_VECTORS * WIDTH)
#define PANELS (64 / PANEL)
#define PV_PANELS (PANEL < 32 ? 32 / PANEL : 1) /* panels of latents at a time: lines of the cache are read whole */
#define UNROLL _Pragma("GCC unroll 32")
/* functions that tables of other instruction sets have too: dsm_kernels_avx512_swiglu */
#define JOINED(table, name) table##_##name
#define NAMED(table, name) JOINED(table, name)
#define SHARED(name) NAMED(KERNELS, name)

DSM_INLINE F zeros(void) { return (F){0}; }
DSM_INLINE F spread(float x) { return x - zeros(); }
DSM_INLINE F load(const float *p) { return *(const LooseF *)p; }
DSM_INLINE void store(float *p, F v) { *(LooseF *)p = v; }
DSM_INLINE I choose(I mask, I yes, I no) { return (mask & yes) | (~mask & no); }

DSM_INLINE float sum(F v) {
    float lanes[WIDTH] __attribute__((aligned(64)));
    *(F *)lanes = v;
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Lanes of two rows that lie `s` apart in a WIDTH x WIDTH square change places. */
#define FIRST_LANE(l, s) ((l) & (s) ? WIDTH + ((l) ^ (s)) : (l))
#define SECOND_LANE(l, s) ((l) & (s) ? WIDTH + (l) : (l) ^ (s))
#define LANES_4(of, l, s) of(l, s), of((l) + 1, s), of((l) + 2, s), of((l) + 3, s)
#if WIDTH == 4
#define LANES(of, s) LANES_4(of, 0, s)
#elif WIDTH == 8
#define LANES(of, s) LANES_4(of, 0, s), LANES_4(of, 4, s)
#else
#define LANES(of, s) LANES_4(of, 0, s), LANES_4(of, 4, s), LANES_4(of, 8, s), LANES_4(of, 12, s)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, of, s) __builtin_shufflevector(a, b, LANES(of, s))
#else
#define SHUFFLE(a, b, of, s) __builtin_shuffle(a, b, (I){LANES(of, s)})
#endif
#define EXCHANGE(s)                                                                                                   \
    if ((s) < WIDTH) UNROLL for (int i = 0; i < WIDTH; i++) if (!(i & (s))) {                                         \
            const I first = r[i], second = r[i | (s)];                                                                \
            r[i] = SHUFFLE(first, second, FIRST_LANE, s);                                                             \
            r[i | (s)] = SHUFFLE(first, second, SECOND_LANE, s);                                                      \
        }
DSM_INLINE void transpose(I *r){EXCHANGE(1) EXCHANGE(2)
#if WIDTH > 4
                                    EXCHANGE(4)
#endif
#if WIDTH > 8
                                        EXCHANGE(8)
#endif
}

#include "codes_vector.h"
#include "few_tokens_vector.h"
#include "four_bit_vector.h"

/* ---- many tokens: a panel of PANEL weight rows, one block deep, is decoded and multiplied ---- */

/* rows first .. of one block, transposed: panel[position of k][row]; rows that do not exist are zero */
DSM_INLINE
    void fill_panel(const Matrix *w, int64_t first, int64_t count, int64_t k, float *panel, const int per_lane) {
    const int bytes = 4 / per_lane;
    const int64_t deep = dsm_min(DSM_BLOCK, w->cols - k);
    I found = {0};
    for (int v = 0; v < PANEL_VECTORS; v++)
        for (int64_t i = 0; i < DSM_BLOCK; i += per_lane * WIDTH) {
            float *to = panel + i * PANEL + v * WIDTH;
            I raw[WIDTH];
            const char *p = (const char *)w->data + ((first + v * WIDTH) * w->cols + k + i) * bytes;
            if ((v + 1) * WIDTH <= count && i + per_lane * WIDTH <= deep)
                UNROLL for (int l = 0; l < WIDTH; l++) raw[l] = *(const LooseI *)(p + l * w->cols * bytes);
            else
                for (int l = 0; l < WIDTH; l++, p += w->cols * bytes)
                    raw[l] = v * WIDTH + l < count && i < deep ? load_bytes(p, (deep - i) * bytes) : (I){0};
            transpose(raw);
            UNROLL for (int q = 0; q < WIDTH; q++, to += PANEL) {
                if (per_lane == 4) {
                    const Codes codes = split(raw[q]);
                    found = look(found, raw[q]);
                    UNROLL for (int j = 0; j < 4; j++) store(to + j * WIDTH * PANEL, code(codes, j));
                } else if (per_lane == 2) {
                    store(to, (F)(raw[q] << 16));
                    store(to + WIDTH * PANEL, (F)(raw[q] & (int32_t)0xffff0000));
                } else {
                    store(to, (F)raw[q]);
                }
            }
        }
    if (per_lane == 4 && nan_seen(found))
        for (int i = 0; i < DSM_BLOCK * PANEL; i++)
            if (fabsf(panel[i]) == 480 * 0x1p-120f) panel[i] = NAN;
}
#define FILL_PANEL(NAME, PER_LANE)                                                                                    \
    static __attribute__((noinline)) void NAME(const Matrix *w, int64_t first, int64_t count, int64_t k,              \
                                               float *panel) {                                                        \
        fill_panel(w, first, count, k, panel, PER_LANE);                                                              \
    }
FILL_PANEL(fill_panel_fp8, 4)
FILL_PANEL(fill_panel_bf16, 2)
FILL_PANEL(fill_panel_f32, 1)

/* The micro-kernel: TILE_TOKENS x PANEL_VECTORS accumulators in registers, one row of the panel at a time.

                 panel [deep][PANEL]
                 k |  b0  b1 ..  b(PANEL_VECTORS - 1)
       x [tokens][deep]                                         acc[t][v] += x[t][k] * b[v]
       t  a = x[t][k] -> | acc[t][0] acc[t][1] ..  |            and in the end
                                                                out = out * decay[t] + acc (decay), or
                                                                out = out + scale * acc    (no decay)
*/
DSM_INLINE void fma_tile(const char *x, size_t stride, const float *panel, int64_t deep, float scale,
                         const float *decay, float *out, int64_t ldo, PrefetchStream *ahead, const int tokens) {
    F acc[TILE_TOKENS * PANEL_VECTORS];
    PrefetchStream next = *ahead;
    UNROLL for (int i = 0; i < tokens * PANEL_VECTORS; i++) acc[i] = zeros();
    for (int64_t k = 0; k < deep; k++) {
        F b[PANEL_VECTORS];
        /* one for each k fills the queue that loads wait in: AVX2's attention to 8,192 keys took a tenth longer */
        if (k % 4 == 0) dsm_prefetch_line(&next);
        UNROLL for (int v = 0; v < PANEL_VECTORS; v++) b[v] = *(const F *)(panel + k * PANEL + v * WIDTH);
        UNROLL for (int t = 0; t < tokens; t++) {
            float a = ((const float *)(x + t * stride))[k];
            UNROLL for (int v = 0; v < PANEL_VECTORS; v++) acc[t * PANEL_VECTORS + v] += a * b[v];
        }
    }
    UNROLL for (int t = 0; t < tokens; t++) UNROLL for (int v = 0; v < PANEL_VECTORS; v++) {
        float *to = out + t * ldo + v * WIDTH;
        const F sums = acc[t * PANEL_VECTORS + v];
        store(to, decay ? decay[t] * load(to) + sums : load(to) + scale * sums);
    }
    *ahead = next;
}
#define PANEL_OF float
#include "fma_tokens.h"

/* Block by block, so that a block's columns of x, which all panels meet, stay in the second cache. */
static void gemm(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, void *scratch, PrefetchStream *ahead) {
    const int64_t ldo = (count + PANEL - 1) / PANEL * PANEL;
    memset(out, 0, sizeof(float) * tokens * ldo);
    for (int64_t k = 0; k < w->cols; k += DSM_BLOCK) {
        const char *xk = (const char *)x + k * sizeof(float);
        const int deep = w->cols - k > 64 ? DSM_BLOCK : 64; /* half a block is often all that is left */
        for (int64_t r = 0; r < count; r += PANEL) {
            float scale = 1.0f, *to = out + r;
            if (w->dtype == DSM_FP8) {
                scale = PACKED_GAIN * *dsm_block_scale(w, first + r, k);
                fill_panel_fp8(w, first + r, count - r, k, scratch);
            } else if (dsm_is_four_bit(w->dtype)) {
                fill_panel_four_bit(w, first + r, count - r, k, scratch);
            } else if (w->dtype == DSM_BF16) {
                fill_panel_bf16(w, first + r, count - r, k, scratch);
            } else {
                fill_panel_f32(w, first + r, count - r, k, scratch);
            }
            fma_tokens(xk, stride, tokens, scratch, deep, scale, NULL, to, ldo, ahead);
        }
    }
}

/* ---- activations ---- */

DSM_INLINE F load_any(const void *x, int dtype, int64_t i) {
    if (dtype == DSM_F32) return load((const float *)x + i);
    if (dtype == DSM_BF16)
#ifdef LOAD_HALVES
        return (F)((I)LOAD_HALVES((const uint16_t *)x + i) << 16);
#else
        return (F)(__builtin_convertvector(*(const LooseHalves *)((const uint16_t *)x + i), I) << 16);
#endif
    F out = zeros();
    for (int l = 0; l < WIDTH; l++) out[l] = dsm_from_f16(((const uint16_t *)x)[i + l]);
    return out;
}

static void pack(const void *x, int dtype, int64_t n, int weight_dtype, void *out) {
    const int per_lane = weight_dtype >= DSM_FP8 ? 4 : weight_dtype == DSM_BF16 ? 2 : 1;
    const int group = per_lane * WIDTH, swapped = dsm_is_four_bit(weight_dtype) ? dsm_column_of(weight_dtype, 0) : 0;
    const float gain = weight_dtype == DSM_FP8 ? PACKED_GAIN : 1.0f;
    float *to = out;
    for (int64_t k = 0; k < n; k += group) {
        float natural[4 * WIDTH] __attribute__((aligned(64)));
        int64_t have = dsm_min(group, n - k);
        if (have == group)
            for (int i = 0; i < group; i += WIDTH) *(F *)(natural + i) = gain * load_any(x, dtype, k + i);
        else
            for (int i = 0; i < group; i++) natural[i] = i < have ? gain * dsm_load(x, dtype, k + i) : 0.0f;
        for (int j = 0; j < per_lane; j++)
            for (int l = 0; l < WIDTH; l++) to[k + j * WIDTH + l] = natural[per_lane * l + (j ^ swapped)];
    }
    int64_t done = (n + group - 1) / group * group, wanted = (n + DSM_BLOCK - 1) / DSM_BLOCK * DSM_BLOCK;
    if (done < wanted) memset(to + done, 0, sizeof(float) * (wanted - done));
}

/* e^x for x <= 88, to about one unit in the last place; below -87 it stays at e^-87, above 88 it is e^88 */
DSM_INLINE F exponential(F x) {
    x = (F)choose(x < -87.0f, (I)spread(-87.0f), (I)x);
    x = (F)choose(x > 88.0f, (I)spread(88.0f), (I)x);
    /* n = round(x / ln 2), read off the low bits of a large sum; ln 2 in two parts keeps the remainder exact */
    F n = x * 1.44269504f + 0x1.8p23f;
    I exponent = (I)n;
    n -= 0x1.8p23f;
    F f = x - n * 0.693145752f - n * 1.42860677e-6f;
    F p = f * 1.98412698e-4f + 1.38888889e-3f;
    p = p * f + 8.33333333e-3f;
    p = p * f + 4.16666667e-2f;
    p = p * f + 1.66666667e-1f;
    p = p * f + 0.5f;
    p = p * f * f + f + 1.0f;
    return (F)((I)p + (exponent << 23));
}

void SHARED(swiglu)(const float *gate, const float *up, float *out, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        F g = load(gate + i);
        F y = g / (1.0f + exponential(-g)) * load(up + i);
        store(out + i, y);
    }
    for (; i < n; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

DSM_INLINE Halves to_bf16(F v) {
    I bits = (I)v;
    I rounded = (I)((U)bits + 0x7fff + (U)((bits >> 16) & 1));
    I nan = (bits & 0x7fffffff) > 0x7f800000;
    return __builtin_convertvector(choose(nan, (bits >> 16) | 0x40, rounded >> 16) & 0xffff, Halves);
}
DSM_INLINE void store_any(void *x, int dtype, int64_t i, F v) {
    if (dtype == DSM_F32) store((float *)x + i, v);
    else if (dtype == DSM_BF16) *(LooseHalves *)((uint16_t *)x + i) = to_bf16(v);
    else
        for (int l = 0; l < WIDTH; l++) ((uint16_t *)x)[i + l] = dsm_to_f16(v[l]);
}

void SHARED(write)(const float *sums, const float *bias, int64_t n, void *out, int dtype) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store_any(out, dtype, i, load(sums + i) + (bias ? load(bias + i) : zeros()));
    for (; i < n; i++) dsm_store(out, dtype, i, sums[i] + (bias ? bias[i] : 0.0f));
}

void SHARED(norm)(const void *x, const void *w, int64_t n, float eps, void *out, int dtype) {
    F squares = zeros();
    float all = 0.0f;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        F v = load_any(x, dtype, i);
        squares += v * v;
    }
    for (; i < n; i++) all += dsm_load(x, dtype, i) * dsm_load(x, dtype, i);
    float factor = 1.0f / sqrtf((all + sum(squares)) / (float)n + eps);
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        store_any(out, dtype, i, factor * load_any(x, dtype, i));
        store_any(out, dtype, i, load_any(out, dtype, i) * load_any(w, dtype, i));
    }
    for (; i < n; i++) {
        dsm_store(out, dtype, i, factor * dsm_load(x, dtype, i));
        dsm_store(out, dtype, i, dsm_load(out, dtype, i) * dsm_load(w, dtype, i));
    }
}

#include "blocks_vector.h"
#include "attention_vector.h"

/* all but what activations are packed to and meet few weights in */
#define VECTOR_KERNELS                                                                                                \
    .name = LABEL, .packed_bytes = 4, .packed_four_bit_bytes = 4, .panel_columns = PANEL, .panels = PANELS,           \
    .panel_tokens = 1, .few_tokens = {15, 15, 15},                                                                    \
    .scratch_bytes = sizeof(float) * DSM_BLOCK * PANEL * PV_PANELS, /* panels */                                      \
        .gemm = gemm, .swiglu = SHARED(swiglu), .norm = SHARED(norm), .write = SHARED(write),                         \
    .decode = SHARED(decode), .amax = SHARED(amax), .encode = SHARED(encode),                                         \
    .gemv_transposed = SHARED(gemv_transposed), .online_softmax = SHARED(online_softmax),                             \
    .accumulate_pv = accumulate_pv, .weigh_heads = SHARED(weigh_heads), .add_rows = SHARED(add_rows)

const Kernels KERNELS = {
    VECTOR_KERNELS,
    .pack = pack,
    .gemv = gemv,
};
