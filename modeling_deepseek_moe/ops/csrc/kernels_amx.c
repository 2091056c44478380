/* The kernels for AMX (Sapphire Rapids and later), for bf16 activations; the kernels that need no
   tiles are those of AVX-512 BF16.

   A tile holds 16 rows of up to 64 bytes. Weights are tiles of 16 rows and 32 columns: bf16 as it lies in memory, FP8
   decoded into scratch. Activations are packed for `gemm` in groups of 16 tokens: 64 bytes hold one pair of columns of all
   16, a tile 16 such pairs. Those of `Kernels.few_tokens` need no tiles:

       weight tile [16 rows]      activation tile [16 pairs]        product tile [16 rows]
       row r: columns 0 .. 31     pair p: token 0 | 1 | .. | 15     row r: token 0 | 1 | .. | 15, fp32

   Beyond a block of 128 columns (FP8, whose scale changes there) or 512, products are summed in fp32. What a token gets
   does not depend on which others there are. */
#include "target.h"

#if DSM_AMX
#include <immintrin.h>

DSM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx512vnni,fma,f16c,gfni,amx-tile,amx-bf16")

#include "avx512_bf16.h"

#define TILE 16
#define TILE_COLUMNS 32
#define TILE_BYTES 1024
#define TILE_FLOATS 256
#define BLOCK_TILES (DSM_BLOCK / TILE_COLUMNS)
#define RUN 512  /* columns of a panel that are decoded at a time, or summed in a tile where they are bf16 */
#define PANELS 4 /* that a run of all tokens meets */
#define BLOCK_BYTES (BLOCK_TILES * TILE_BYTES)
#define READ_AHEAD 512 /* bytes of one of several readers */
#define NEAR_GROUPS 2  /* token groups whose sums, next to a block of weights, stay in the first cache */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

/* tiles 0 to 3 are products, 4 and 5 weights, 6 and 7 activations */
static const TileShapes SHAPES = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
};

/* gcc does not know that loading a tile reads memory */
#define MEMORY_WRITTEN __asm__ volatile("" ::: "memory")

/* Weight tiles: the `i`th of row group `g` begins at data + g * group + i * step, its rows `pitch` bytes apart. */
typedef struct {
    const char *data;
    size_t group, step, pitch;
} Tiles;

static void pack_interleaved(const void *const *x, int64_t tokens, int dtype, int64_t n, int weight_dtype, char *group,
                             int64_t lane, int64_t first) {
    uint32_t *to = (uint32_t *)group + first / 2 * TILE;
    const size_t size = dsm_itemsize(dtype);
    for (int64_t k = 0; k < n; k += 64, to += 32 * TILE) {
        uint32_t pairs[TILE * 32] __attribute__((aligned(64)));
        for (int64_t t = 0; t < tokens; t++)
            pack_group((const char *)x[t] + k * size, dtype, n - k, weight_dtype, (uint16_t *)(pairs + t * 32));
        if (tokens == TILE)
            for (int half = 0; half < 2; half++) {
                __m512i v[16];
                UNROLL for (int i = 0; i < 16; i++) v[i] = _mm512_load_si512(pairs + i * 32 + half * 16);
                transpose16(v);
                UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(to + (half * 16 + i) * TILE, v[i]);
            }
        else
            for (int64_t t = 0; t < tokens; t++)
                UNROLL for (int i = 0; i < 32; i++) to[i * TILE + lane + t] = pairs[t * 32 + i];
    }
}

/* The bits of a normal code's bf16 are its own, moved, and the exponent's highest, inverted: two products of bit matrices
   instead of two look-ups of several steps. Zeros, subnormals and NaN are rare, and looked up. */
typedef struct {
    __m512i to_high, to_low, bias, special;
} Normal;

DSM_INLINE Normal normal(void) {
    Normal n = {_mm512_set1_epi64(0x1020404040404080), _mm512_set1_epi64(0x01020408), _mm512_set1_epi8(-16),
                _mm512_set1_epi8((char)0xee)};
    __asm__("" : "+v"(n.to_high), "+v"(n.to_low), "+v"(n.bias), "+v"(n.special)); /* kept in registers */
    return n;
}
/* from `special` on, unsigned, where a code is none: twice its magnitude is below 16, or 254 */
DSM_INLINE __m512i rank_of(Normal n, __m512i codes) { return _mm512_add_epi8(_mm512_add_epi8(codes, codes), n.bias); }
DSM_INLINE void decode64_normal(Normal n, __m512i codes, __m512bh *first, __m512bh *second) {
    const __m512i low = _mm512_gf2p8affine_epi64_epi8(codes, n.to_low, 0);
    const __m512i high = _mm512_gf2p8affine_epi64_epi8(codes, n.to_high, 0x3c);
    *first = (__m512bh)_mm512_unpacklo_epi8(low, high);
    *second = (__m512bh)_mm512_unpackhi_epi8(low, high);
}
/* any codes of a row, as `decode_row` stores them */
static __attribute__((noinline)) void decode_rare(const uint8_t *from, int64_t columns, char *to) {
    const Tables t = tables();
    for (int64_t i = 0; i < columns; i += 64, to += 2 * TILE_BYTES) {
        __m512bh first, second;
        decode64(t, load_codes(from + i, columns - i), &first, &second);
        _mm512_store_si512(to, (__m512i)first);
        _mm512_store_si512(to + TILE_BYTES, (__m512i)second);
    }
}
/* a block's columns of a weight row: 64 bytes of each of its tiles */
DSM_INLINE void decode_block(Normal n, const uint8_t *from, char *to) {
    const __m512i a = _mm512_loadu_si512(from), b = _mm512_loadu_si512(from + 64);
    __m512bh codes[4];
    if (__builtin_expect(_mm512_cmpge_epu8_mask(_mm512_max_epu8(rank_of(n, a), rank_of(n, b)), n.special) != 0, 0)) {
        decode_rare(from, DSM_BLOCK, to);
        return;
    }
    decode64_normal(n, a, codes, codes + 1);
    decode64_normal(n, b, codes + 2, codes + 3);
    UNROLL for (int i = 0; i < 4; i++) _mm512_store_si512(to + i * TILE_BYTES, (__m512i)codes[i]);
}
/* the same of fewer columns; after them is any number, next to zeros of the activations */
DSM_INLINE void decode_rest(Normal n, const uint8_t *from, int64_t columns, char *to) {
    for (int64_t i = 0; i < columns; i += 64, to += 2 * TILE_BYTES) {
        const __m512i a = load_codes(from + i, columns - i);
        const __mmask64 some = columns - i >= 64 ? ~0ull : (1ull << (columns - i)) - 1;
        __m512bh first, second;
        if (__builtin_expect(_mm512_mask_cmpge_epu8_mask(some, rank_of(n, a), n.special) != 0, 0)) {
            decode_rare(from + i, columns - i, to);
            return;
        }
        decode64_normal(n, a, &first, &second);
        _mm512_store_si512(to, (__m512i)first);
        _mm512_store_si512(to + TILE_BYTES, (__m512i)second);
    }
}
/* A run of a weight row: 64 bytes of each tile. Meanwhile what lies `ahead` bytes on is fetched. */
DSM_INLINE void decode_row(Normal n, const uint8_t *from, int64_t columns, int64_t ahead, char *to) {
    int64_t i = 0;
    for (; i + DSM_BLOCK <= columns; i += DSM_BLOCK, to += BLOCK_BYTES) {
        _mm_prefetch((const char *)from + i + ahead, _MM_HINT_T1);
        _mm_prefetch((const char *)from + i + 64 + ahead, _MM_HINT_T1);
        decode_block(n, from + i, to);
    }
    if (i < columns) decode_rest(n, from + i, columns - i, to);
}

/* Runs of rows [first, first + count), columns [k, k + RUN), become tiles [row group][RUN / 32]. A row's next run is
   fetched, or after the last the first of the row a panel further down. */
static void decode_run(const Matrix *w, int64_t first, int64_t count, int64_t k, char *tiles) {
    const Normal n = normal();
    const uint8_t *from = (const uint8_t *)w->data + first * w->cols + k;
    const int64_t columns = dsm_min(RUN, w->cols - k), ahead = k + RUN < w->cols ? RUN : PANEL * w->cols - k;
    for (int64_t r = 0; r < count; r++)
        decode_row(n, from + r * w->cols, columns, ahead,
                   tiles + r / TILE * (RUN / TILE_COLUMNS * TILE_BYTES) + r % TILE * 64);
}
/* the same of four-bit codes, scaled: tiles as those of bf16, in the order of their packing */
DSM_INLINE void decode_four_bit_rows(const Matrix *w, int64_t first, int64_t count, int64_t k, char *tiles,
                                     const int kind) {
    for (int64_t r = 0; r < count; r++)
        decode_four_bit_row(w, first + r, k, dsm_min(RUN, w->cols - k),
                            tiles + r / TILE * (RUN / TILE_COLUMNS * TILE_BYTES) + r % TILE * 64, TILE_BYTES, kind);
}
static __attribute__((noinline)) void decode_four_bit_run(const Matrix *w, int64_t first, int64_t count, int64_t k,
                                                          char *tiles) {
    DSM_BY_KIND(w, decode_four_bit_rows, w, first, count, k, tiles)
}
/* the same of bf16, copied, where the matrix ends within a tile */
static void copy_run(const Matrix *w, int64_t first, int64_t count, int64_t k, char *tiles) {
    const int64_t columns = dsm_min(RUN, w->cols - k);
    for (int64_t r = 0; r < count; r++) {
        const uint16_t *from = (const uint16_t *)w->data + (first + r) * w->cols + k;
        char *to = tiles + r / TILE * (RUN / TILE_COLUMNS * TILE_BYTES) + r % TILE * 64;
        for (int64_t i = 0; i < columns; i += 32, to += TILE_BYTES) {
            const __mmask32 mask = columns - i >= 32 ? ~0u : (1u << (columns - i)) - 1;
            _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, from + i));
        }
    }
}

/* codes are decoded two tiles at a time, between which their columns alternate */
DSM_INLINE int64_t tiles_of(int64_t columns, int coded) {
    return coded ? (columns + 63) / 64 * 2 : (columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
}

DSM_INLINE void prefetch_lines(PrefetchStream *ahead, int lines) {
    for (int i = 0; i < lines && ahead->at < ahead->end; i++) dsm_prefetch_line(ahead);
}

/* Where four product tiles belong. They are added to the sums while the next four are computed: what a tile has stored
   cannot be read at once. */
typedef struct {
    float *to[4]; /* NULL: nothing is pending */
    float scale[4];
    int begun[4], half;
    float c[2][4 * TILE_FLOATS] __attribute__((aligned(64)));
} Pending;

/* to = to + scale * products, or scale * products where nothing was summed before */
DSM_INLINE void add_products(float *to, const float *products, int64_t size, float scale, int begun) {
    const __m512 factor = _mm512_set1_ps(scale);
    if (begun)
        UNROLL for (int64_t i = 0; i < size; i += 16)
            _mm512_store_ps(to + i, _mm512_fmadd_ps(factor, _mm512_load_ps(products + i), _mm512_load_ps(to + i)));
    else
        UNROLL for (int64_t i = 0; i < size; i += 16)
            _mm512_store_ps(to + i, _mm512_mul_ps(factor, _mm512_load_ps(products + i)));
}
DSM_INLINE void settle(Pending *p, int half) {
    for (int i = 0; i < 4; i++)
        if (p->to[i]) add_products(p->to[i], p->c[half] + i * TILE_FLOATS, TILE_FLOATS, p->scale[i], p->begun[i]);
}
/* The four products become the pending ones; those that were are settled. */
DSM_INLINE void store_products(Pending *p) {
    float *c = p->c[p->half];
    _tile_stored(0, c, 64);
    _tile_stored(1, c + TILE_FLOATS, 64);
    _tile_stored(2, c + 2 * TILE_FLOATS, 64);
    _tile_stored(3, c + 3 * TILE_FLOATS, 64);
    settle(p, !p->half);
    p->half = !p->half;
}
DSM_INLINE void expect(Pending *p, int i, float *to, float scale, int begun) {
    p->to[i] = to, p->scale[i] = scale, p->begun[i] = begun;
}
static void settle_last(Pending *p) {
    MEMORY_WRITTEN;
    settle(p, !p->half);
}

/* Two row groups for two token groups; `deep` tiles are summed. */
DSM_INLINE void product_22(Tiles a, const char *b0, const char *b1, int64_t deep) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < deep; i++, a.data += a.step, b0 += TILE_BYTES, b1 += TILE_BYTES) {
        _tile_loadd(4, a.data, a.pitch);
        _tile_loadd(6, b0, 64);
        _tile_loadd(7, b1, 64);
        _tile_loadd(5, a.data + a.group, a.pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}
/* four row groups for one token group */
DSM_INLINE void product_41(Tiles a, const char *b, int64_t deep, PrefetchStream *ahead) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < deep; i++, a.data += a.step, b += TILE_BYTES) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a.data, a.pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a.data + a.group, a.pitch);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, a.data + 2 * a.group, a.pitch);
        _tile_dpbf16ps(2, 7, 6);
        _tile_loadd(4, a.data + 3 * a.group, a.pitch);
        _tile_dpbf16ps(3, 4, 6);
        prefetch_lines(ahead, 32);
    }
}

/* One block of columns of 64 weight rows for a few token groups. The sums of a group lie `pitch` floats after those of
   the one before it, tiles of four row groups. */
static void multiply_block(Tiles a, const char *x, size_t stride, int64_t groups, int64_t deep, float scale,
                           float *sums, int64_t pitch, int begun, Pending *p, PrefetchStream *ahead) {
    for (; groups >= 2; groups -= 2, x += 2 * TILE * stride, sums += 2 * pitch)
        for (int row = 0; row < 4; row += 2) {
            Tiles own = a;
            float *to = sums + row * TILE_FLOATS;
            own.data += row * a.group;
            product_22(own, x, x + TILE * stride, deep);
            prefetch_lines(ahead, 64);
            store_products(p);
            for (int i = 0; i < 4; i++) expect(p, i, to + i / 2 * TILE_FLOATS + i % 2 * pitch, scale, begun);
        }
    if (groups) {
        product_41(a, x, deep, ahead);
        store_products(p);
        for (int i = 0; i < 4; i++) expect(p, i, sums + i * TILE_FLOATS, scale, begun);
    }
}

/* A run of columns of up to 64 weight rows for all tokens. */
static void multiply_run(const Matrix *w, int64_t first, int64_t count, int64_t k, const char *x, size_t stride,
                         int64_t groups, float *sums, int64_t pitch, void *scratch, Pending *p,
                         PrefetchStream *ahead) {
    const int fp8 = w->dtype == DSM_FP8, four_bit = dsm_is_four_bit(w->dtype);
    const int64_t block = fp8 ? DSM_BLOCK : RUN, columns = dsm_min(RUN, w->cols - k);
    const size_t row = w->cols * sizeof(uint16_t);
    const float *scales = dsm_block_scale(w, first, k);
    Tiles tiles = {scratch, RUN / TILE_COLUMNS * TILE_BYTES, TILE_BYTES, 64};
    if (fp8) decode_run(w, first, count, k, scratch);
    else if (four_bit) decode_four_bit_run(w, first, count, k, scratch);
    else if (count < PANEL || columns % TILE_COLUMNS) copy_run(w, first, count, k, scratch);
    else tiles = (Tiles){(const char *)w->data + first * row + k * sizeof(uint16_t), TILE * row, 64, row};
    MEMORY_WRITTEN;
    for (int64_t g = 0; g < groups; g += NEAR_GROUPS) {
        const int64_t near = dsm_min(NEAR_GROUPS, groups - g);
        for (int64_t i = 0; i < columns; i += block) {
            const int64_t deep = tiles_of(dsm_min(block, columns - i), fp8 || four_bit);
            Tiles own = tiles;
            own.data += i / TILE_COLUMNS * tiles.step;
            multiply_block(own, x + g * TILE * stride + (k + i) / 2 * 64, stride, near, deep,
                           fp8 ? scales[i / DSM_BLOCK] : 1.0f, sums + g * pitch, pitch, k + i > 0, p, ahead);
        }
    }
}

#include "few_tokens_amx.h"

/* sums of one token group, of which a panel's rows lie in `turns` turns -> [16 tokens][columns] in the same place */
static void untile(float *sums, int64_t columns, int64_t count, int in_turns) {
    float rows[TILE * PANELS * PANEL] __attribute__((aligned(64)));
    for (int64_t r = 0; r < columns; r += TILE) {
        const int64_t panel = r / PANEL * PANEL, turns = in_turns ? turns_of(dsm_min(PANEL, count - panel)) : 1;
        __m512i v[16];
        for (int64_t i = 0; i < 16; i++)
            v[i] = _mm512_load_si512(sums + (panel + slot_of(r - panel + i, turns)) * TILE);
        transpose16(v);
        UNROLL for (int i = 0; i < 16; i++) _mm512_store_si512(rows + i * columns + r, v[i]);
    }
    memcpy(sums, rows, sizeof(float) * TILE * columns);
}

/* Runs of columns are the outer loop: a run of all tokens stays in the second cache while several panels meet it. */
static void gemm_tiles(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                       float *out, void *scratch, PrefetchStream *ahead) {
    const int64_t groups = (tokens + TILE - 1) / TILE, columns = (count + PANEL - 1) / PANEL * PANEL;
    Pending pending = {.to = {NULL}};
    if (!w->cols) memset(out, 0, sizeof(float) * groups * TILE * columns);
    _tile_loadconfig(&SHAPES);
    const int in_turns = groups == 1 && w->dtype == DSM_FP8;
    if (in_turns)
        for (int64_t r = 0; r < count && w->cols; r += PANEL)
            multiply_group(w, first + r, dsm_min(PANEL, count - r), x, out + r * TILE, scratch,
                           dsm_row(w, first + r + PANEL));
    else
        for (int64_t k = 0; k < w->cols; k += RUN)
            for (int64_t r = 0; r < count; r += PANEL)
                multiply_run(w, first + r, dsm_min(PANEL, count - r), k, x, stride, groups, out + r * TILE,
                             columns * TILE, scratch, &pending, ahead);
    settle_last(&pending);
    _tile_release();
    for (int64_t g = 0; g < groups; g++) untile(out + g * TILE * columns, columns, count, in_turns);
}

#include "attention_amx.h"

const Kernels dsm_kernels_amx = {
    .name = "amx",
    DSM_BF16_KERNELS,
    .panel_columns = PANEL,
    .panels = PANELS,
    .panel_tokens = TILE,
    .few_tokens = {.bf16 = 4, .fp8 = 1, .four_bit = 12},
    .scratch_bytes = (size_t)PANEL * RUN * sizeof(uint16_t),
    .pack_interleaved = pack_interleaved,
    .gemv = dsm_bf16_gemv_near,
    .gemm = gemm_tiles,
    .accumulate_pv = accumulate_pv_tiles,
};

DSM_TARGET_END
#endif
