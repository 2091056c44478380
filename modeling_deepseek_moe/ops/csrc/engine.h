/* What every file of the CPU engine shares.

   The engine is plain C on pointers: it knows neither Python nor torch. A *matrix* is a row-major weight [rows, cols],
   FP8 (E4M3 codes and one fp32 scale per 128 x 128 block, ragged at the edges), bf16, or codes of four bits with scales
   along each row (four_bit.h). A *packed* row of activations is padded with zeros to whole blocks, or groups of 64, and
   permuted so that its elements meet the weights in the order in which a kernel decodes them; each set of kernels has a
   packing of its own. All sums are fp32, but for those of a few products of integers. */
#ifndef DSM_ENGINE_H
#define DSM_ENGINE_H

#include "abi.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#define DSM_VERSION 10 /* of the functions' signatures; `_native.py` wants the same */
#define DSM_BLOCK 128
#define DSM_PV_TOKENS 64
#define DSM_GROUP_TOKENS 16 /* most tokens that are packed together */
/* least and most weight rows of a task that calls `gemv`: long runs of memory are read faster */
#define DSM_GEMV_ROWS 16
#define DSM_MOST_GEMV_ROWS 256
#define DSM_STEP_TOKENS 16 /* most tokens of the operations that are for few */
#define DSM_INLINE static inline __attribute__((always_inline))
#define DSM_API __attribute__((visibility("default")))
/* whether the compiler knows AMX */
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define DSM_AMX 1
#else
#define DSM_AMX 0
#endif

/* Memory that is wanted soon: a long product fetches it into the second cache, line by line, as it goes on. A burst of
   prefetches would be dropped in part. */
typedef struct {
    const char *at, *end;
} PrefetchStream;

/* One instruction set's kernels. `tokens` rows of packed activations lie `stride` bytes apart. */
typedef struct {
    const char *name;
    int packed_bytes;          /* bytes of one packed activation: 4 (fp32) or 2 (bf16) */
    int packed_four_bit_bytes; /* the same where it meets codes of four bits: no fewer */
    int panel_columns;         /* weight rows of a panel */
    int panels;                /* most panels of one call of `gemm` */
    int panel_tokens;          /* tokens that are packed together for `gemm`, and that it writes results for */
    struct {
        int64_t bf16, fp8, four_bit;
    } few_tokens; /* up to here `gemv` is the faster of the two, by the weight's dtype; fp32 counts as bf16 does */
    size_t scratch_bytes; /* for `gemm` and `accumulate_pv` */

    /* one row of activations of any dtype -> packed */
    void (*pack)(const void *x, int dtype, int64_t n, int weight_dtype, void *out);
    /* columns [first, first + n) of `tokens` rows for `gemm`, from the `lane`th place of a group on; zeros up to a whole
       group of 64 after them; first: whole groups of 64 */
    void (*pack_interleaved)(const void *const *x, int64_t tokens, int dtype, int64_t n, int weight_dtype, char *group,
                             int64_t lane, int64_t first);
    /* out[t * ldo + r] = x_t . w[first + r], r < count: streams each weight row once. next: the rows that this thread is
       likely to read then, if they lie in the same way, or NULL */
    void (*gemv)(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, int64_t ldo, const void *next);
    /* the same for count <= panels * panel_columns: decodes panels next to the product; out is [tokens, count in whole
       panels] */
    void (*gemm)(const void *x, size_t stride, int64_t tokens, const Matrix *w, int64_t first, int64_t count,
                 float *out, void *scratch, PrefetchStream *ahead);
    /* out = silu(gate) * up */
    void (*swiglu)(const float *gate, const float *up, float *out, int64_t n);
    /* one row: out = w * x / sqrt(mean(x^2) + eps), all of `dtype`, rounded before and after the product with w; out may
       be x */
    void (*norm)(const void *x, const void *w, int64_t n, float eps, void *out, int dtype);
    /* sums (+ bias unless NULL), rounded */
    void (*write)(const float *sums, const float *bias, int64_t n, void *out, int dtype);
    /* a run of codes of one row, first_col anywhere -> values of `dtype`; scale is the row's first */
    void (*decode)(const uint8_t *codes, const float *scale, int64_t n, void *out, int dtype);
    /* max |x| of a run, and whether all of it is finite */
    float (*amax)(const void *x, int dtype, int64_t n, int *finite);
    /* E4M3(x / scale), round to nearest even */
    void (*encode)(const void *x, int dtype, int64_t n, float scale, uint8_t *out);
    /* out[c] = sum over i < count of q[i] * w[first + i][c]; workspace: w->cols floats in whole blocks */
    void (*gemv_transposed)(const float *q, const Matrix *w, int64_t first, int64_t count, float *out,
                            float *workspace);
    /* out[c] += sum over i < count of q[i] * rows[i * pitch + c], c < n, of rows in bf16 */
    void (*add_rows)(const float *q, int64_t count, const void *rows, int64_t pitch, int64_t n, float *out);
    /* one step of a running softmax: n scores become e^(scores * scaling + mask - peak), zeros up to `room` after them;
       returns by what the sums so far are to be multiplied, since the peak may have moved */
    float (*online_softmax)(float *scores, int64_t n, int64_t room, float scaling, const float *mask, float *peak,
                            float *norm);
    /* out[t * ldo + c] = decay[t] * out + sum over i < count of p[t * ldp + i] * v[first + i][c]; up to DSM_PV_TOKENS
       tokens and DSM_BLOCK rows of v, bf16 or fp32; out's rows are whole panels, p's zero after their end */
    void (*accumulate_pv)(const float *p, int64_t ldp, int64_t tokens, const Matrix *v, int64_t first, int64_t count,
                          const float *decay, float *out, int64_t ldo, void *scratch, PrefetchStream *ahead);
    /* out[i] = sum over h < heads of weights[h] * max(products[h * ldp + i], 0), of n columns in whole panels */
    void (*weigh_heads)(const float *products, int64_t ldp, int64_t heads, const float *weights, int64_t n,
                        float *out);
} Kernels;

/* The kernels of an instruction set (an index of `dsm_isa_name`; clipped to what this CPU has) for activations of a
   dtype: fp32 activations are never rounded to bf16. */
const Kernels *dsm_kernels(int isa, int activation_dtype);

/* How many threads to use: `wanted`, fewer for little work, one in a forked process (OpenMP's threads stay with the parent). */
int dsm_threads(int wanted, int64_t weight_bytes);

void *dsm_alloc(size_t bytes); /* 64-byte aligned, free() releases it; NULL when there is no memory */
/* The same for the duration of a call; up to three that were given back are kept for the next calls, of 32 MB at most. */
void *dsm_borrow(size_t bytes);
void dsm_give_back(void *memory);

DSM_INLINE size_t dsm_itemsize(int dtype) { return dtype == DSM_F32 ? 4 : dtype == DSM_FP8 ? 1 : 2; }
DSM_INLINE int dsm_is_four_bit(int dtype) { return dtype >= DSM_INT4 && dtype <= DSM_MXFP4; }
/* of one packed activation that meets a weight of that dtype */
DSM_INLINE int dsm_packed_bytes(const Kernels *k, int weight_dtype) {
    return dsm_is_four_bit(weight_dtype) ? k->packed_four_bit_bytes : k->packed_bytes;
}
DSM_INLINE size_t dsm_packed_stride(const Kernels *k, int64_t n, int weight_dtype) {
    return (size_t)((n + DSM_BLOCK - 1) / DSM_BLOCK * DSM_BLOCK) * dsm_packed_bytes(k, weight_dtype);
}
/* tokens of a packing, those of an unfinished group included */
DSM_INLINE int64_t dsm_packed_tokens(const Kernels *k, int64_t tokens) {
    return (tokens + k->panel_tokens - 1) / k->panel_tokens * k->panel_tokens;
}
/* whether `gemm` multiplies this many tokens with a weight of that dtype, else `gemv` */
DSM_INLINE int dsm_are_many(const Kernels *k, int64_t tokens, int weight_dtype) {
    if (dsm_is_four_bit(weight_dtype)) return tokens > k->few_tokens.four_bit;
    return tokens > (weight_dtype == DSM_FP8 ? k->few_tokens.fp8 : k->few_tokens.bf16);
}
/* packs whole rows of activations, tokens t .. of one group, for `gemm` or for `gemv` */
DSM_INLINE void dsm_pack(const Kernels *k, int panel, const void *const *x, int64_t tokens, int dtype, int64_t n,
                         int weight_dtype, char *packed, size_t stride, int64_t t) {
    const int64_t lane = t % k->panel_tokens;
    if (panel && k->pack_interleaved)
        k->pack_interleaved(x, tokens, dtype, n, weight_dtype, packed + (t - lane) * stride, lane, 0);
    else
        for (int64_t i = 0; i < tokens; i++) k->pack(x[i], dtype, n, weight_dtype, packed + (t + i) * stride);
}
/* rows in whole panels */
DSM_INLINE int64_t dsm_panels(const Kernels *k, int64_t rows) {
    return (rows + k->panel_columns - 1) / k->panel_columns * k->panel_columns;
}
/* rows of one call of `gemm`: as many as it takes, if every thread still has some calls */
DSM_INLINE int64_t dsm_panel_rows(const Kernels *k, int64_t rows, int threads) {
    int64_t panels = k->panels;
    while (panels > 1 && rows < 4 * threads * panels * k->panel_columns) panels /= 2;
    return panels * k->panel_columns;
}
/* rows of a task that calls `gemv`: many, if every thread still has some tasks */
DSM_INLINE int64_t dsm_gemv_rows(int64_t rows, int threads) {
    int64_t most = DSM_MOST_GEMV_ROWS;
    while (most > DSM_GEMV_ROWS && rows < 8 * threads * most) most /= 2;
    return most;
}
/* of n values of a row */
DSM_INLINE int64_t dsm_row_bytes(int dtype, int64_t n) {
    return dsm_is_four_bit(dtype) ? n / 2 : n * (int64_t)dsm_itemsize(dtype);
}
DSM_INLINE const char *dsm_row(const Matrix *w, int64_t row) {
    return (const char *)w->data + row * dsm_row_bytes(w->dtype, w->cols);
}
DSM_INLINE int64_t dsm_bytes(const Matrix *w) { return w->rows * dsm_row_bytes(w->dtype, w->cols); }
/* the scale of an FP8 matrix's block of 128 x 128 that a row and a column lie in; only its address where it has none */
DSM_INLINE const float *dsm_block_scale(const Matrix *w, int64_t row, int64_t col) {
    return (const float *)w->scale + row / DSM_BLOCK * ((w->cols + DSM_BLOCK - 1) / DSM_BLOCK) + col / DSM_BLOCK;
}
DSM_INLINE int64_t dsm_blocks(int64_t n) { return (n + DSM_BLOCK - 1) / DSM_BLOCK; }
DSM_INLINE int64_t dsm_min(int64_t a, int64_t b) { return a < b ? a : b; }
DSM_INLINE int64_t dsm_max(int64_t a, int64_t b) { return a > b ? a : b; }

DSM_INLINE void dsm_prefetch_line(PrefetchStream *ahead) {
    if (ahead->at < ahead->end) {
        __builtin_prefetch(ahead->at, 0, 2);
        ahead->at += 64;
    }
}

DSM_INLINE float dsm_from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}
DSM_INLINE uint16_t dsm_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DSM_INLINE float dsm_from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = bits & 0x7fff, wide;
    float value;
    if (magnitude >= 0x7c00) {
        wide = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
    } else { /* the exponent is short by 112; a multiplication also sets subnormals right */
        wide = magnitude << 13;
        memcpy(&value, &wide, 4);
        value *= 0x1p112f;
        memcpy(&wide, &value, 4);
        wide |= sign;
    }
    memcpy(&value, &wide, 4);
    return value;
}
DSM_INLINE uint16_t dsm_to_f16(float value) {
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 65520 and up */
    if (bits < 0x38800000u) { /* below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    return (uint16_t)(sign | ((bits + 0xfff + (bits >> 13 & 1) - 0x38000000u) >> 13));
}
DSM_INLINE float dsm_load(const void *x, int dtype, int64_t i) {
    if (dtype == DSM_F32) return ((const float *)x)[i];
    if (dtype == DSM_BF16) return dsm_from_bf16(((const uint16_t *)x)[i]);
    return dsm_from_f16(((const uint16_t *)x)[i]);
}
DSM_INLINE void dsm_store(void *x, int dtype, int64_t i, float value) {
    if (dtype == DSM_F32) ((float *)x)[i] = value;
    else if (dtype == DSM_BF16) ((uint16_t *)x)[i] = dsm_to_bf16(value);
    else ((uint16_t *)x)[i] = dsm_to_f16(value);
}
/* to += from, rounded; a constant dtype lets compilers make vectors of the loop */
DSM_INLINE void dsm_add_of(const int dtype, void *restrict to, const void *restrict from, int64_t n) {
    for (int64_t i = 0; i < n; i++) dsm_store(to, dtype, i, dsm_load(to, dtype, i) + dsm_load(from, dtype, i));
}
DSM_INLINE void dsm_add(int dtype, void *to, const void *from, int64_t n) {
    if (dtype == DSM_F32) dsm_add_of(DSM_F32, to, from, n);
    else if (dtype == DSM_BF16) dsm_add_of(DSM_BF16, to, from, n);
    else dsm_add_of(DSM_F16, to, from, n);
}

/* E4M3's subnormals are fp32 subnormals while they are decoded: a thread that treats those as zero must not. Returns
   the thread's floating-point mode, for `dsm_restore_mode`. */
#if defined(__x86_64__)
#include <xmmintrin.h>
DSM_INLINE uint64_t dsm_exact_mode(void) {
    unsigned mode = _mm_getcsr();
    if (mode & 0x8040) _mm_setcsr(mode & ~0x8040u);
    return mode;
}
DSM_INLINE void dsm_restore_mode(uint64_t mode) {
    if (mode & 0x8040) _mm_setcsr((unsigned)mode);
}
#elif defined(__aarch64__)
DSM_INLINE uint64_t dsm_exact_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    if (mode & 1ull << 24) __asm__ volatile("msr fpcr, %0" : : "r"(mode & ~(1ull << 24)));
    return mode;
}
DSM_INLINE void dsm_restore_mode(uint64_t mode) {
    if (mode & 1ull << 24) __asm__ volatile("msr fpcr, %0" : : "r"(mode));
}
#else
DSM_INLINE uint64_t dsm_exact_mode(void) { return 0; }
DSM_INLINE void dsm_restore_mode(uint64_t mode) { (void)mode; }
#endif

/* A linear layer's adapter, `inputs` columns wide. low [rank] = scale * A x; out[r] += B[first + r] . low, r < count; out [inputs] +=
   scale * A^T (B[first ..]^T q) of `count` rows, `low` being workspace. */
void dsm_adapter_low(const Adapter *a, const float *x, int64_t inputs, float *low);
void dsm_adapter_add(const Adapter *a, int64_t first, int64_t count, const float *low, float *out);
void dsm_adapter_add_transposed(const Adapter *a, const float *q, int64_t first, int64_t count, int64_t inputs,
                                float *low, float *out);
/* y [tokens, rows], rounded, += w's adapter of x [tokens, cols], both bf16 or fp32. In a team: called by all threads of a parallel
   region, and done when it returns; low [tokens, rank] is workspace. */
int dsm_adapt(int threads, const Matrix *w, int dtype, const void *x, int64_t tokens, void *y);
void dsm_adapt_in_team(const Matrix *w, int dtype, const void *x, int64_t tokens, float *low, void *y);

/* operations that others are made of */
int dsm_linear(int isa, int threads, int dtype, const void *x, int64_t tokens, const Matrix *w, const float *bias,
               void *y);
int dsm_experts(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden, const int64_t *indices,
                const float *weights, int64_t top_k, const Experts *experts, float *out, void *y);
int dsm_experts_low_rank(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden,
                         const int64_t *indices, const float *weights, int64_t top_k, const Experts *experts,
                         const LowRank *gate_up, const LowRank *down, void *y);
int dsm_route(int isa, int threads, const float *logits, int64_t tokens, int64_t experts, const float *bias,
              const Routing *routing, float *weights, int64_t *indices);
int dsm_rms_norm(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t n, const Norm *norm,
                 void *out);
int dsm_mla_project(int isa, int threads, int dtype, const void *x, int64_t tokens, const MlaShape *shape,
                    const MlaProjections *projections, const float *cosine, const float *sine, void *q, void *c_kv,
                    void *k_pe);
int dsm_mla_decode(int isa, int threads, int dtype, int64_t batch, int64_t tokens, int64_t length,
                   const MlaShape *shape, const Queries *queries, const LatentCache *cache, const Mask *mask,
                   const Matrix *kv_b, float softmax_scale, void *out);
int dsm_moe(int isa, int threads, int dtype, const void *x, int64_t tokens, int64_t hidden, const Moe *moe, void *out);

#endif
