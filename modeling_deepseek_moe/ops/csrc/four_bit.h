/* Codes of four bits: their values, groups and scales. */
#ifndef DSM_FOUR_BIT_H
#define DSM_FOUR_BIT_H

#include "engine.h"

/* by dtype, from DSM_INT4 on */
static const float DSM_VALUES[4][16] __attribute__((aligned(64), unused)) = {
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {-1.0f, -0x1.647362p-1f, -0x1.0cd66p-1f, -0x1.94654p-2f, -0x1.23449ap-2f, -0x1.7a6a7ep-3f, -0x1.74f0e2p-4f, 0.0f,
     0x1.45f5fep-4f, 0x1.4995c6p-3f, 0x1.f809bap-3f, 0x1.5a0674p-2f, 0x1.c3497p-2f, 0x1.200f56p-1f, 0x1.722766p-1f,
     1.0f},
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, 0.0f, -0.0625f / 12, -8.0f / 12, -1.0f,
     -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
    {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6},
};
DSM_INLINE const float *dsm_values(int dtype) { return DSM_VALUES[dtype - DSM_INT4]; }

/* The values times this are integers of up to 14 bits, NF4's nearly. */
DSM_INLINE float dsm_integer_gain(int dtype) {
    return dtype == DSM_NF4 ? 8191.0f : dtype == DSM_FP4 ? 192.0f : dtype == DSM_MXFP4 ? 2.0f : 1.0f;
}

/* columns that share a scale, by dtype or by the kind of its scales */
DSM_INLINE int64_t dsm_group(int dtype) { return dtype == DSM_NF4 || dtype == DSM_FP4 ? 64 : 32; }
DSM_INLINE int64_t dsm_group_of(const int kind) { return kind == DSM_BF16 || kind == DSM_E8M0 ? 32 : 64; }

/* Where code j of 16 bits, counted from the lowest, stands among its four columns. */
DSM_INLINE int dsm_column_of(int dtype, int j) { return dsm_group(dtype) == 64 ? j ^ 1 : j; }

/* scale i of a matrix; kind: a constant */
DSM_INLINE float dsm_group_scale(const void *scale, int64_t i, const int kind) {
    if (kind == DSM_F32) return ((const float *)scale)[i];
    if (kind == DSM_BF16) return dsm_from_bf16(((const uint16_t *)scale)[i]);
    if (kind == DSM_E8M0) { /* 0 is 2^-127, a subnormal number; 255 is NaN */
        const uint32_t e = ((const uint8_t *)scale)[i], bits = e << 23 | (e == 0 || e == 255 ? 0x400000u : 0);
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    const Nested *nested = scale;
    return nested->table[nested->codes[i]] * nested->absmax[i >> 8] + nested->offset;
}

/* of a scale; of a nested one its code's */
DSM_INLINE int64_t dsm_scale_bytes(const int kind) { return kind == DSM_F32 ? 4 : kind == DSM_BF16 ? 2 : 1; }
/* where scale i lies */
DSM_INLINE const char *dsm_scale_place(const void *scale, int64_t i, const int kind) {
    if (kind == DSM_NESTED) return (const char *)((const Nested *)scale)->codes + i;
    return (const char *)scale + i * dsm_scale_bytes(kind);
}

/* calls one of a function's four versions by the kind of a matrix's scales */
#define DSM_BY_KIND(w, function, ...)                                                                                 \
    switch ((w)->scale_kind) {                                                                                        \
    case DSM_F32: function(__VA_ARGS__, DSM_F32); break;                                                              \
    case DSM_BF16: function(__VA_ARGS__, DSM_BF16); break;                                                            \
    case DSM_E8M0: function(__VA_ARGS__, DSM_E8M0); break;                                                            \
    default: function(__VA_ARGS__, DSM_NESTED);                                                                       \
    }

#endif
