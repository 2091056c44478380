/* Where the fields of the shared structs lie, for Python to compare its own with. */
#include "abi.h"
#include "engine.h"

#define SIZE(type) {#type, 0, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(((type *)0)->field)}

typedef struct {
    const char *name;
    int64_t offset, size;
} Place;

static const Place PLACES[] = {
    SIZE(Matrix),
    FIELD(Matrix, data),
    FIELD(Matrix, scale),
    FIELD(Matrix, rows),
    FIELD(Matrix, cols),
    FIELD(Matrix, dtype),
    SIZE(Norm),
    FIELD(Norm, weight),
    FIELD(Norm, eps),
    SIZE(Expert),
    FIELD(Expert, gate),
    FIELD(Expert, gate_scale),
    FIELD(Expert, up),
    FIELD(Expert, up_scale),
    FIELD(Expert, down),
    FIELD(Expert, down_scale),
    SIZE(Experts),
    FIELD(Experts, table),
    FIELD(Experts, count),
    FIELD(Experts, width),
    FIELD(Experts, dtype),
    SIZE(Routing),
    FIELD(Routing, n_group),
    FIELD(Routing, topk_group),
    FIELD(Routing, top_k),
    FIELD(Routing, softmax),
    FIELD(Routing, group_score_top2),
    FIELD(Routing, norm_topk_prob),
    FIELD(Routing, scaling_factor),
    SIZE(Moe),
    FIELD(Moe, gate),
    FIELD(Moe, bias),
    FIELD(Moe, routing),
    FIELD(Moe, routed),
    FIELD(Moe, shared),
    SIZE(MlaShape),
    FIELD(MlaShape, num_heads),
    FIELD(MlaShape, qk_nope_head_dim),
    FIELD(MlaShape, qk_rope_head_dim),
    FIELD(MlaShape, kv_lora_rank),
    FIELD(MlaShape, v_head_dim),
    FIELD(MlaShape, rope_interleave),
    SIZE(MlaProjections),
    FIELD(MlaProjections, q_a),
    FIELD(MlaProjections, q_b),
    FIELD(MlaProjections, kv_a),
    FIELD(MlaProjections, q_a_norm),
    FIELD(MlaProjections, kv_a_norm),
    SIZE(Queries),
    FIELD(Queries, nope),
    FIELD(Queries, pe),
    FIELD(Queries, nope_batch),
    FIELD(Queries, nope_head),
    FIELD(Queries, pe_batch),
    FIELD(Queries, pe_head),
    SIZE(LatentCache),
    FIELD(LatentCache, c_kv),
    FIELD(LatentCache, k_pe),
    FIELD(LatentCache, c_kv_batch),
    FIELD(LatentCache, k_pe_batch),
    SIZE(Mask),
    FIELD(Mask, values),
    FIELD(Mask, batch),
    SIZE(DecoderLayer),
    FIELD(DecoderLayer, input_norm),
    FIELD(DecoderLayer, post_attention_norm),
    FIELD(DecoderLayer, projections),
    FIELD(DecoderLayer, kv_b),
    FIELD(DecoderLayer, o),
    FIELD(DecoderLayer, moe),
    SIZE(Step),
    FIELD(Step, batch),
    FIELD(Step, hidden),
    FIELD(Step, past),
    FIELD(Step, mla),
    FIELD(Step, cosine),
    FIELD(Step, sine),
    FIELD(Step, mask),
    FIELD(Step, softmax_scale),
};

/* The `pack_interleaved`th entry of the table: its name, or NULL after the last; for a field where it lies, and its size. */
DSM_API const char *dsm_layout(int place, int64_t *offset, int64_t *size) {
    if (place < 0 || place >= (int)(sizeof PLACES / sizeof *PLACES)) return NULL;
    *offset = PLACES[place].offset;
    *size = PLACES[place].size;
    return PLACES[place].name;
}
