/* Few tokens; part of `kernels_avx512_bf16.c`. The rows of up to four are read in turns (turns_avx512.h). */
#define AHEAD 512 /* bytes of rows that are decoded by slabs */
#define SLAB 256  /* columns of four weight rows that are decoded at a time for five and more tokens */
#define SLAB_TOKENS 32

#include "turns_avx512.h"

/* 128 columns, of which `rest` exist, of `readers` weight rows that lie `pitch` bytes apart; `ahead` is what is fetched */
DSM_INLINE void add_block(Tables t, const char *x, size_t stride, const uint8_t *w, int64_t pitch, int64_t ahead,
                          int64_t rest, float scale, __m512 *total, const int readers, const int tokens) {
    __m512 part[8];
    UNROLL for (int i = 0; i < readers * tokens; i++) part[i] = _mm512_setzero_ps();
    UNROLL for (int k = 0; k < DSM_BLOCK; k += 64) UNROLL for (int r = 0; r < readers; r++) {
        const uint8_t *from = w + r * pitch + k;
        __m512bh first, second;
        if (rest <= k) continue;
        _mm_prefetch((const char *)from + ahead, _MM_HINT_T1);
        decode64(t, load_codes(from, rest - k), &first, &second);
        UNROLL for (int m = 0; m < tokens; m++) {
            const uint16_t *xm = (const uint16_t *)(x + m * stride) + k;
            part[r * tokens + m] = _mm512_dpbf16_ps(part[r * tokens + m], first, load_pairs(xm));
            part[r * tokens + m] = _mm512_dpbf16_ps(part[r * tokens + m], second, load_pairs(xm + 32));
        }
    }
    UNROLL for (int i = 0; i < readers * tokens; i++) total[i] =
        _mm512_fmadd_ps(_mm512_set1_ps(scale), part[i], total[i]);
}
DSM_INLINE void turn_fp8(const char *x, size_t stride, const Matrix *w, int64_t row, int64_t pitch, int64_t jump,
                         __m512 *total, const int readers, const int tokens) {
    const Tables t = tables();
    const uint8_t *from = (const uint8_t *)w->data + row * w->cols;
    const float *scale = dsm_block_scale(w, row, 0);
    const int64_t cols = w->cols, ahead = dsm_min(FAR_AHEAD, cols);
    int64_t k = 0;
    for (; k + DSM_BLOCK <= cols - ahead; k += DSM_BLOCK)
        add_block(t, x + 2 * k, stride, from + k, pitch, ahead, DSM_BLOCK, *scale++, total, readers, tokens);
    for (; k + DSM_BLOCK <= cols; k += DSM_BLOCK)
        add_block(t, x + 2 * k, stride, from + k, pitch, ahead + jump, DSM_BLOCK, *scale++, total, readers, tokens);
    if (k < cols)
        add_block(t, x + 2 * k, stride, from + k, pitch, ahead + jump, cols - k, *scale, total, readers, tokens);
}

/* The same of bf16, 64 columns; near: into the first cache, nearer ahead, as Intel's processors like it. */
DSM_INLINE void add_bf16(const char *x, size_t stride, const char *w, int64_t pitch, int64_t ahead, int64_t rest,
                         __m512 *part, const int readers, const int tokens, const int near) {
    UNROLL for (int k = 0; k < 2; k++) UNROLL for (int r = 0; r < readers; r++) {
        const char *from = w + r * pitch + 64 * k;
        const int64_t left = rest - 32 * k;
        const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
        const __m512bh weights =
            (__m512bh)(left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(mask, from));
        if (near) _mm_prefetch(from + ahead, _MM_HINT_T0);
        else _mm_prefetch(from + ahead, _MM_HINT_T1);
        UNROLL for (int m = 0; m < tokens; m++) {
            const __m512bh xm = load_pairs((const uint16_t *)(x + m * stride) + 32 * k);
            part[2 * (r * tokens + m) + k] = _mm512_dpbf16_ps(part[2 * (r * tokens + m) + k], weights, xm);
        }
    }
}
DSM_INLINE void turn_bf16(const char *x, size_t stride, const Matrix *w, int64_t row, int64_t pitch, int64_t jump,
                          __m512 *total, const int readers, const int tokens, const int near) {
    __m512 part[16];
    const char *from = (const char *)w->data + row * 2 * w->cols;
    const int64_t cols = w->cols, ahead = dsm_min(near ? AHEAD : FAR_AHEAD, 2 * cols);
    int64_t k = 0;
    UNROLL for (int i = 0; i < 2 * readers * tokens; i++) part[i] = _mm512_setzero_ps();
    for (; 2 * (k + 64) <= 2 * cols - ahead; k += 64)
        add_bf16(x + 2 * k, stride, from + 2 * k, pitch, ahead, 64, part, readers, tokens, near);
    for (; k + 64 <= cols; k += 64)
        add_bf16(x + 2 * k, stride, from + 2 * k, pitch, ahead + jump, 64, part, readers, tokens, near);
    if (k < cols)
        add_bf16(x + 2 * k, stride, from + 2 * k, pitch, ahead + jump, cols - k, part, readers, tokens, near);
    UNROLL for (int i = 0; i < readers * tokens; i++) total[i] = _mm512_add_ps(part[2 * i], part[2 * i + 1]);
}

/* Weight rows row, row + apart .. of one block of rows, one for each reader; `jump` leads from the row after the first of
   them to what is read after it. */
DSM_INLINE void read_rows(const void *x, size_t stride, const Matrix *w, int64_t row, int64_t apart, int64_t jump,
                          float *out, int64_t ldo, const int readers, const int tokens, const int near) {
    __m512 total[8];
    float sums[8];
    UNROLL for (int i = 0; i < 8; i++) total[i] = _mm512_setzero_ps();
    if (w->dtype == DSM_FP8) turn_fp8(x, stride, w, row, apart * w->cols, jump, total, readers, tokens);
    else turn_bf16(x, stride, w, row, apart * 2 * w->cols, jump, total, readers, tokens, near);
    sum8(total, sums);
    UNROLL for (int r = 0; r < readers; r++) UNROLL for (int m = 0; m < tokens; m++) out[m * ldo + r * apart] =
        sums[r * tokens + m];
}
/* Not inlined, so that each one's accumulators stay in registers. */
#define READ(name, readers, tokens, near)                                                                             \
    static __attribute__((noinline)) void name(const void *x, size_t stride, const Matrix *w, int64_t row,            \
                                               int64_t apart, int64_t jump, float *out, int64_t ldo) {                \
        read_rows(x, stride, w, row, apart, jump, out, ldo, readers, tokens, near);                                   \
    }
READ(read_8_1, 8, 1, 0)
READ(read_1_1, 1, 1, 0)
READ(read_4_2, 4, 2, 0)
READ(read_1_2, 1, 2, 0)
READ(read_8_1_near, 8, 1, 1)

/* Four weight rows of one block for up to four tokens. The sums stay apart by lane until the row's end. */
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
    UNROLL for (int m = 0; m < tokens; m++) UNROLL for (int r = 0; r < 4; r++) {
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

#include "few_tokens_decoded.h"

/* up to four weight rows, up to SLAB_TOKENS tokens: a slab is decoded into the first cache, then used by all tokens */
static void gemv_slab(const char *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                      float *out, int64_t ldo) {
    const Tables t = tables();
    float sums[SLAB_TOKENS * 64] __attribute__((aligned(64)));
    uint16_t slab[4 * SLAB] __attribute__((aligned(64)));
    const int64_t cols = w->cols;
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
            if (cols - k0 - k <= 64) /* half a block: what an earlier block left after it must not count */
                for (int r = 0; r < 4; r++) memset((uint16_t *)from + r * DSM_BLOCK + 64, 0, 128);
            if (fp8)
                for (int64_t r = 0; r < count; r++) scale[r] = *dsm_block_scale(w, first + r, k0 + k);
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

void dsm_bf16_gemv(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                   float *out, int64_t ldo, const void *next) {
    if (dsm_is_four_bit(w->dtype)) {
        gemv_integers(x, stride, tokens, w, first, count, out, ldo, next);
    } else if (tokens <= 4) {
        for (int64_t r = 0, n; r < count; r += n) {
            n = dsm_min(count - r, DSM_BLOCK - (first + r) % DSM_BLOCK);
            const void *then = dsm_row(w, first + r + n);
            if (r + n == count) then = next;
            if (tokens == 1) gemv_in_turns(read_8_1, read_1_1, 8, x, stride, w, first + r, n, out + r, ldo, then);
            else if (tokens == 2) gemv_in_turns(read_4_2, read_1_2, 4, x, stride, w, first + r, n, out + r, ldo, then);
            else if (tokens == 3) gemv_in_turns(read_4_3, read_1_3, 4, x, stride, w, first + r, n, out + r, ldo, then);
            else gemv_in_turns(read_4_4, read_1_4, 4, x, stride, w, first + r, n, out + r, ldo, then);
        }
    } else {
        for (int64_t m = 0; m < tokens; m += SLAB_TOKENS)
            for (int64_t r = 0; r < count; r += 4)
                gemv_slab((const char *)x + m * stride, stride, dsm_min(SLAB_TOKENS, tokens - m), w, first + r,
                          dsm_min(4, count - r), out + m * ldo + r, ldo);
    }
}

void dsm_bf16_gemv_near(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                        float *out, int64_t ldo, const void *next) {
    if (tokens == 1 && w->dtype == DSM_BF16)
        gemv_in_turns(read_8_1_near, read_1_1, 8, x, stride, w, first, count, out, ldo, next);
    else dsm_bf16_gemv(x, stride, tokens, w, first, count, out, ldo, next);
}
