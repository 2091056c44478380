/* What is shared with Python: `ops/_structs.py` has the same structs. Their sizes and every field's place are compared
   when the library is loaded (layout.c): another layout is refused there. */
#ifndef DSM_ABI_H
#define DSM_ABI_H

#include <stdint.h>

enum { DSM_F32 = 0, DSM_BF16 = 1, DSM_F16 = 2, DSM_FP8 = 3 };
enum { DSM_OK = 0, DSM_NO_MEMORY = -1, DSM_BAD_ARGUMENT = -2, DSM_NOT_FINITE = -3 };

/* A row-major weight [rows, cols]. */
typedef struct {
    const void *data;
    const float *scale; /* NULL for bf16 */
    int64_t rows, cols;
    int dtype; /* DSM_FP8 or DSM_BF16; for `gemm` and `accumulate_pv` also DSM_F32, where activations are that */
} Matrix;

/* RMSNorm */
typedef struct {
    const void *weight; /* of the activations' dtype */
    float eps;
} Norm;

/* One routed expert, by address: gate and up [width, hidden], down [hidden, width]. No gate: it is left out. */
typedef struct {
    const void *gate;
    const float *gate_scale;
    const void *up;
    const float *up_scale;
    const void *down;
    const float *down_scale;
} Expert;

typedef struct {
    const Expert *table; /* [count] */
    int64_t count, width;
    int dtype; /* of the weights */
} Experts;

/* How a router chooses; the fields are those of `ops/routing/reference.py`'s Routing. */
typedef struct {
    int64_t n_group, topk_group, top_k;
    int softmax, group_score_top2, norm_topk_prob;
    float scaling_factor;
} Routing;

typedef struct {
    Matrix gate;       /* [experts, hidden] in bf16; no rows: a dense layer, which is `shared` alone */
    const float *bias; /* [experts], or NULL */
    Routing routing;
    Experts routed, shared; /* the shared experts are one wide expert; none where `shared.count` is 0 */
} Moe;

/* Sizes of latent attention. */
typedef struct {
    int64_t num_heads, qk_nope_head_dim, qk_rope_head_dim, kv_lora_rank, v_head_dim;
    int rope_interleave; /* rotary pairs are neighbours, else an element of each half */
} MlaShape;

typedef struct {
    Matrix q_a, q_b, kv_a; /* no rows of q_a: q_b is q_proj */
    Norm q_a_norm, kv_a_norm;
} MlaProjections;

/* q_nope [batch, heads, nope] and q_pe [batch, heads, rope]; strides in elements */
typedef struct {
    const void *nope, *pe;
    int64_t nope_batch, nope_head, pe_batch, pe_head;
} Queries;

/* c_kv [batch, capacity, kv_lora_rank] and k_pe [batch, capacity, rope]; elements from one sequence to the next */
typedef struct {
    void *c_kv, *k_pe;
    int64_t c_kv_batch, k_pe_batch;
} LatentCache;

/* Added to the scores of each sequence's keys: [batch, keys] fp32, or NULL; elements from one sequence to the next. */
typedef struct {
    const float *values;
    int64_t batch;
} Mask;

typedef struct {
    Norm input_norm, post_attention_norm;
    MlaProjections projections;
    Matrix kv_b, o;
    Moe moe;
} DecoderLayer;

/* What the layers share in one step: `batch` sequences of `past` cached tokens each, and one new token. */
typedef struct {
    int64_t batch, hidden, past;
    MlaShape mla;
    const float *cosine, *sine; /* [batch, rope / 2] */
    Mask mask;                  /* over past + 1 keys */
    float softmax_scale;
} Step;

#endif
