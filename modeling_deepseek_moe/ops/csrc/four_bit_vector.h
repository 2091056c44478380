/* Codes of four bits on vectors of WIDTH fp32 lanes; part of `kernels_vector.h`.

   Four codes, 16 bits, are spread to a lane of 32; moved down by 4 j, the low bits of every lane are those of vector j, whose
   values are looked up in fp32. Activations are packed as for FP8, in the order of the codes (without its gain):

       codes in memory     0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13 14 15    a lane: 16 bits
       vector j = 0          0           4             8           12

   The columns of such a group of 4 * WIDTH share a scale, or its halves do. LOOK_UP finds WIDTH values in a table of 16,
   LOOK_UP_8 in one of 8; each sees the low bits of an index alone. */
#include "four_bit.h"

#define FOUR_BIT_ROWS 4 /* that share what is loaded of x, for several tokens */

#if defined(LOOK_UP)
typedef F Values;
DSM_INLINE Values values_of(int dtype) { return load(dsm_values(dtype)); }
DSM_INLINE F look_up(Values values, I codes, int j) { return (F)LOOK_UP(values, codes >> (4 * j)); }
#elif defined(LOOK_UP_8)
typedef struct {
    F low, high;
} Values;
DSM_INLINE Values values_of(int dtype) { return (Values){load(dsm_values(dtype)), load(dsm_values(dtype) + 8)}; }
DSM_INLINE F look_up(Values values, I codes, int j) {
    const I index = codes >> (4 * j); /* bit 3 chooses, from the place of a sign */
    return (F)CHOOSE_BY_SIGN(codes << (28 - 4 * j), LOOK_UP_8(values.high, index), LOOK_UP_8(values.low, index));
}
#else
typedef const float *Values;
DSM_INLINE Values values_of(int dtype) { return dsm_values(dtype); }
DSM_INLINE F look_up(Values values, I codes, int j) {
    F out;
    for (int l = 0; l < WIDTH; l++) out[l] = values[codes[l] >> (4 * j) & 15];
    return out;
}
#endif

/* the values of codes j; scales in bf16 are INT4's, whose values are its codes less 8 */
DSM_INLINE F value_of(Values values, I codes, int j, const int kind) {
#ifdef LOOK_UP
    (void)kind; /* a look-up is one instruction */
#else
    if (kind == DSM_BF16) return __builtin_convertvector(codes >> (4 * j) & 15, F) - 8.0f;
#endif
    return look_up(values, codes, j);
}

/* 4 * WIDTH codes of a row that has `rest` left */
DSM_INLINE I load_four_bit(const uint8_t *p, int64_t rest) {
    uint16_t padded[WIDTH] = {0};
    if (rest < 4 * WIDTH) {
        memcpy(padded, p, (size_t)rest / 2);
        p = (const uint8_t *)padded;
    }
#ifdef LOAD_HALVES
    return (I)LOAD_HALVES(p);
#else
    return __builtin_convertvector(*(const LooseHalves *)p, I);
#endif
}

/* the lanes' scales of the columns from k on, of which `rest` exist */
DSM_INLINE F scales_of(const Matrix *w, int64_t row, int64_t k, int64_t rest, const int kind) {
    const int64_t group = dsm_group_of(kind), at = row * (w->cols / group) + k / group;
    const F first = spread(dsm_group_scale(w->scale, at, kind));
    if (4 * WIDTH <= group) return first;
    I upper;
    for (int l = 0; l < WIDTH; l++) upper[l] = l < WIDTH / 2 ? 0 : -1;
    return (F)choose(upper, rest > group ? (I)spread(dsm_group_scale(w->scale, at + 1, kind)) : (I){0}, (I)first);
}

/* 4 * WIDTH columns, of which `rest` exist, of `rows` weight rows for `tokens` tokens */
DSM_INLINE void add_four_bit(const Values values, const float *x, size_t stride, const Matrix *w, int64_t row,
                             int64_t k, int64_t rest, F *total, const int rows, const int tokens, const int kind) {
    I codes[FOUR_BIT_ROWS];
    F part[FOUR_BIT_ROWS * TOKENS_AT_ONCE];
    const int64_t pitch = w->cols / 2;
    const uint8_t *from = (const uint8_t *)w->data + row * pitch + k / 2;
    UNROLL for (int r = 0; r < rows; r++) codes[r] = load_four_bit(from + r * pitch, rest);
    if (k % 128 < 4 * WIDTH) UNROLL for (int r = 0; r < rows; r++) __builtin_prefetch(from + r * pitch + AHEAD, 0, 2);
    UNROLL for (int j = 0; j < 4; j++) {
        F value[FOUR_BIT_ROWS];
        UNROLL for (int r = 0; r < rows; r++) value[r] = value_of(values, codes[r], j, kind);
        UNROLL for (int t = 0; t < tokens; t++) {
            const F xt = load((const float *)((const char *)x + t * stride) + k + j * WIDTH);
            UNROLL for (int r = 0; r < rows; r++) {
                F *to = part + r * tokens + t;
                *to = j ? *to + value[r] * xt : value[r] * xt;
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const F scales = scales_of(w, row + r, k, rest, kind);
        UNROLL for (int t = 0; t < tokens; t++) total[r * tokens + t] += scales * part[r * tokens + t];
    }
}
DSM_INLINE void four_bit_dots(const float *x, size_t stride, const Matrix *w, int64_t row, F *sums, const int rows,
                              const int tokens, const int kind) {
    const Values values = values_of(w->dtype);
    F total[FOUR_BIT_ROWS * TOKENS_AT_ONCE];
    int64_t k = 0;
    UNROLL for (int i = 0; i < rows * tokens; i++) total[i] = zeros();
    for (; k + 4 * WIDTH <= w->cols; k += 4 * WIDTH)
        add_four_bit(values, x, stride, w, row, k, 4 * WIDTH, total, rows, tokens, kind);
    if (k < w->cols) add_four_bit(values, x, stride, w, row, k, w->cols - k, total, rows, tokens, kind);
    UNROLL for (int i = 0; i < rows * tokens; i++) sums[i] = total[i];
}
/* Up to ROWS weight rows. One token's rows are one stream. */
DSM_INLINE void four_bit_rows(const float *x, size_t stride, const Matrix *w, int64_t first, int64_t count, float *out,
                              int64_t ldo, const int tokens, const int kind) {
    F sums[ROWS * TOKENS_AT_ONCE];
    const int at_once = tokens == 1 ? 1 : tokens == 2 ? FOUR_BIT_ROWS : FOUR_BIT_ROWS / 2;
    int64_t r = 0;
    for (; r + at_once <= count; r += at_once)
        four_bit_dots(x, stride, w, first + r, sums + r * tokens, at_once, tokens, kind);
    for (; r < count; r++) four_bit_dots(x, stride, w, first + r, sums + r * tokens, 1, tokens, kind);
    add_lanes(sums, count, 1.0f, out, ldo, tokens);
}
#define FOUR_BIT_ROWS_OF(NAME, TOKENS)                                                                                \
    static __attribute__((noinline)) void NAME(const void *x, size_t stride, const Matrix *w, int64_t first,          \
                                               int64_t count, float *out, int64_t ldo) {                              \
        DSM_BY_KIND(w, four_bit_rows, x, stride, w, first, count, out, ldo, TOKENS)                                   \
    }
FOUR_BIT_ROWS_OF(four_bit_rows_1, 1)
FOUR_BIT_ROWS_OF(four_bit_rows_2, 2)
FOUR_BIT_ROWS_OF(four_bit_rows_4, 4)

static void gemv_four_bit(const char *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                          float *out, int64_t ldo) {
    for (int64_t r = 0; r < count; r += ROWS) {
        const int64_t n = dsm_min(ROWS, count - r);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            four_bit_rows_4(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
        if (t + 2 <= tokens) four_bit_rows_2(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo), t += 2;
        if (t < tokens) four_bit_rows_1(x + t * stride, stride, w, first + r, n, out + t * ldo + r, ldo);
    }
}

/* as `fill_panel`, with the scales: they change along a row */
DSM_INLINE void fill_four_bit(const Matrix *w, int64_t first, int64_t count, int64_t k, float *panel, const int kind) {
    const Values values = values_of(w->dtype);
    const int64_t deep = dsm_min(DSM_BLOCK, w->cols - k);
    for (int v = 0; v < PANEL_VECTORS; v++)
        for (int64_t i = 0; i < DSM_BLOCK; i += 4 * WIDTH) {
            I codes[WIDTH];
            F scales[WIDTH];
            for (int l = 0; l < WIDTH; l++) {
                const int64_t row = first + v * WIDTH + l;
                const int is_there = v * WIDTH + l < count && i < deep;
                codes[l] = is_there ? load_four_bit((const uint8_t *)dsm_row(w, row) + (k + i) / 2, deep - i) : (I){0};
                scales[l] = is_there ? scales_of(w, row, k + i, deep - i, kind) : zeros();
            }
            for (int j = 0; j < 4; j++) {
                I column[WIDTH];
                UNROLL for (int l = 0; l < WIDTH; l++) column[l] =
                    (I)(scales[l] * value_of(values, codes[l], j, kind));
                transpose(column);
                UNROLL for (int l = 0; l < WIDTH; l++)
                    store(panel + (i + j * WIDTH + l) * PANEL + v * WIDTH, (F)column[l]);
            }
        }
}
static __attribute__((noinline)) void fill_panel_four_bit(const Matrix *w, int64_t first, int64_t count, int64_t k,
                                                          float *panel){
    DSM_BY_KIND(w, fill_four_bit, w, first, count, k, panel)}

#define ABSORBED_AT_ONCE                                                                                              \
    32 /* rows whose strips of columns are summed in registers: their lines stay in the first cache */

/* sums [4 * WIDTH] += q[i] * the columns from k on, of which `rest` exist, of row first + i, `count` of them; the rows
   after the ABSORBED_AT_ONCE that begin with it are fetched */
DSM_INLINE void absorb_strip(const Values values, const float *q, const Matrix *w, int64_t first, int64_t count,
                             int64_t k, int64_t rest, float *sums, const int kind) {
    const int64_t pitch = w->cols / 2, groups = w->cols / dsm_group_of(kind);
    const uint8_t *from = (const uint8_t *)w->data + first * pitch + k / 2;
    F acc[4];
    UNROLL for (int j = 0; j < 4; j++) acc[j] = *(const F *)(sums + j * WIDTH);
    for (int64_t i = 0; i < count; i++, from += pitch) {
        const I codes = load_four_bit(from, rest);
        const F factor = q[i] * scales_of(w, first + i, k, rest, kind);
        if (k % 128 == 0) __builtin_prefetch(from + ABSORBED_AT_ONCE * pitch, 0, 2);
        if (k == 0) __builtin_prefetch(dsm_scale_place(w->scale, (first + i + ABSORBED_AT_ONCE) * groups, kind), 0, 2);
        UNROLL for (int j = 0; j < 4; j++) acc[j] += factor * value_of(values, codes, j, kind);
    }
    UNROLL for (int j = 0; j < 4; j++) * (F *)(sums + j * WIDTH) = acc[j];
}
/* sums [columns, packed] += q[i] * row first + i, `count` of them */
DSM_INLINE
void absorb_four_bit(const float *q, const Matrix *w, int64_t first, int64_t count, float *sums, const int kind) {
    const Values values = values_of(w->dtype);
    int64_t k = 0;
    for (; k + 4 * WIDTH <= w->cols; k += 4 * WIDTH)
        absorb_strip(values, q, w, first, count, k, 4 * WIDTH, sums + k, kind);
    if (k < w->cols) absorb_strip(values, q, w, first, count, k, w->cols - k, sums + k, kind);
}
static void transposed_four_bit(const float *q, const Matrix *w, int64_t first, int64_t count, float *out,
                                float *sums) {
    memset(sums, 0, sizeof(float) * dsm_blocks(w->cols) * DSM_BLOCK);
    for (int64_t i = 0; i < count; i += ABSORBED_AT_ONCE) {
        const int64_t n = dsm_min(ABSORBED_AT_ONCE, count - i);
        DSM_BY_KIND(w, absorb_four_bit, q + i, w, first + i, n, sums)
    }
    for (int64_t k = 0; k < w->cols; k += 4 * WIDTH)
        for (int l = 0; l < WIDTH; l++)
            for (int j = 0; j < 4; j++) {
                const int64_t c = k + 4 * l + dsm_column_of(w->dtype, j);
                if (c < w->cols) out[c] = sums[k + j * WIDTH + l];
            }
}
