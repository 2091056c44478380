/* What is shared with Python: `ops/_structs.py` has the same structs. Their sizes and every field's place are compared
   when the library is loaded (layout.c): another layout is refused there. */
#ifndef DSM_ABI_H
#define DSM_ABI_H

#include <stdint.h>

enum { DSM_F32 = 0, DSM_BF16 = 1, DSM_F16 = 2, DSM_FP8 = 3 };
/* Four-bit codes, two to a byte: table[code] * scale. INT4 and MXFP4: groups of 32 columns, an earlier column in a byte's
   low half; NF4 and FP4, bitsandbytes': groups of 64, an earlier column in the high half. Rows are whole groups. */
enum { DSM_INT4 = 4, DSM_NF4 = 5, DSM_FP4 = 6, DSM_MXFP4 = 7 };
/* Scales of four-bit codes, [rows, cols / group]: those of INT4 in bf16, of MXFP4 powers of two by their exponents, of NF4
   and FP4 in fp32 or nested. */
enum { DSM_E8M0 = 8, DSM_NESTED = 9 };
enum { DSM_BOOL = 10 }; /* of a mask */
enum { DSM_OK = 0, DSM_NO_MEMORY = -1, DSM_BAD_ARGUMENT = -2, DSM_NOT_FINITE = -3, DSM_BAD_INDEX = -4 };

/* What LoRA adds to a linear layer: scale * B A, A [rank, cols] and B [rows, rank], each in fp32 or bf16. */
typedef struct {
    const void *a, *b;
    int64_t rank;
    int a_dtype, b_dtype;
    float scale;
} Adapter;

/* A row-major weight [rows, cols]. */
typedef struct {
    const void *data;
    const void *scale; /* fp32 for FP8, NULL for bf16; see `scale_kind` for four-bit codes */
    int64_t rows, cols;
    int dtype; /* of codes, or DSM_BF16; for `gemm` and `accumulate_pv` also DSM_F32, where activations are that */
    int scale_kind;         /* of four-bit codes: DSM_BF16, DSM_E8M0, DSM_F32 or DSM_NESTED */
    const Adapter *adapter; /* of a linear layer, or NULL: kernels do not look at it */
} Matrix;

/* Where `scale` leads if it is DSM_NESTED: scale i of the matrix is table[codes[i]] * absmax[i / 256] + offset. */
typedef struct {
    const uint8_t *codes;
    const float *absmax, *table;
    float offset;
} Nested;

/* RMSNorm */
typedef struct {
    const void *weight; /* of the activations' dtype */
    float eps;
} Norm;

/* One routed expert, by address: gate and up [width, hidden], down [hidden, width]. No gate: it is left out. */
typedef struct {
    const void *gate, *gate_scale;
    const void *up, *up_scale;
    const void *down, *down_scale;
} Expert;

typedef struct {
    const Expert *table; /* [count] */
    int64_t count, width;
    int dtype, scale_kind; /* of the weights, as of a matrix */
} Experts;

/* What an adapter adds to a matrix of each expert, scale * B A, in bf16: A [experts, rank, inputs], and B turned,
   [experts, rank, outputs]. No rank: nothing. */
typedef struct {
    const void *a, *b;
    int64_t rank;
    float scale;
} LowRank;

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
    LowRank gate_up, down;  /* of the routed experts */
    /* gate, up and down of `shared` by themselves, where an adapter adds to one of them; else no rows */
    Matrix parts[3];
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

/* q_nope [batch, tokens, heads, nope] and q_pe [batch, tokens, heads, rope]; strides in elements */
typedef struct {
    const void *nope, *pe;
    int64_t nope_batch, nope_token, nope_head, pe_batch, pe_token, pe_head;
} Queries;

/* c_kv [batch, capacity, kv_lora_rank] and k_pe [batch, capacity, rope]; elements from one sequence to the next */
typedef struct {
    void *c_kv, *k_pe;
    int64_t c_kv_batch, k_pe_batch;
} LatentCache;

/* Added to the scores of keys: [batch, tokens, keys] fp32; elements from one sequence or token to the next. NULL: a token
   attends to what comes before it, and to itself. */
typedef struct {
    const float *values;
    int64_t batch, token;
} Mask;

/* An indexer's: queries [batch, tokens, heads, width], weights [batch, tokens, heads], keys [batch, length, width]; strides in
   elements. */
typedef struct {
    const void *queries, *keys;
    const float *weights;
    int64_t batch, tokens, heads, width, length;
    int64_t query_batch, query_token, query_head, key_batch;
} Indexer;

/* Which keys a query may see: [batch, tokens, keys], strides in elements, or NULL. Of bytes (DSM_BOOL): 0 hides; else values
   to add to the scores, of which those below `lowest` hide. Causal: besides, no keys after a query's own, the last query's
   being the last. */
typedef struct {
    const void *values;
    int64_t batch, token;
    int dtype, causal;
    float lowest;
} Visible;

typedef struct {
    Norm input_norm, post_attention_norm;
    MlaProjections projections;
    Matrix kv_b, o;
    Moe moe;
} DecoderLayer;

/* What the layers share in one step: `batch` sequences of `past` cached tokens each, and `tokens` new ones; how many there are, and
   the norm after the last. */
typedef struct {
    int64_t batch, tokens, hidden, past, layers;
    Norm norm;
    MlaShape mla;
    const float *cosine, *sine; /* [batch, tokens, rope / 2] */
    Mask mask;                  /* over past + tokens keys */
    float softmax_scale;
} Step;

/* What comes before the first layer, and after the norm. */
typedef struct {
    const void *embedding; /* [vocabulary, hidden] of the activations' dtype */
    int64_t vocabulary;
    Matrix head; /* [logits, hidden] */
} Ends;

#endif
