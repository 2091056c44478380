/* E4M3 codes and bf16 on vectors of WIDTH lanes; part of `kernels_vector.h`. */

/* Four codes a lane, two of them at once: each in the upper half of 16 bits, its sign spread over five. */
typedef struct {
    I even, odd;
} Codes;
DSM_INLINE Codes split(I raw) {
#ifdef MULTIPLY_ADD_BYTES /* one instruction each: codes, signed, times 16 or 0 */
    return (Codes){(I)MULTIPLY_ADD_BYTES((I)((Shorts){0} + 0x0010), raw),
                   (I)MULTIPLY_ADD_BYTES((I)((Shorts){0} + 0x1000), raw)};
#else
    return (Codes){(I)((Shorts)((UShorts)raw << 8) >> 4), (I)((Shorts)raw >> 4)};
#endif
}
DSM_INLINE F code(Codes c, int j) {
    const I pair = j & 1 ? c.odd : c.even;
    return (F)((j & 2 ? pair : pair << 16) & CODE_MASK);
}
/* Looks for NaN among the codes: a byte's lower bits are all ones. */
DSM_INLINE I look(I found, I raw) {
#ifdef MAX_BYTES
    return (I)MAX_BYTES(found, raw | (int32_t)0x80808080);
#else
    return found | (I)((U)(raw & 0x7f7f7f7f) + 0x01010101);
#endif
}
DSM_INLINE int nan_seen(I found) {
    int32_t any = 0;
#ifdef MAX_BYTES
    found = (I)((U)(found & 0x7f7f7f7f) + 0x01010101);
#endif
    for (int l = 0; l < WIDTH; l++) any |= found[l] & (int32_t)0x80808080;
    return any != 0;
}

/* 4 * WIDTH bytes of a row that has `rest` left, zeros after its end */
DSM_INLINE I load_bytes(const void *p, int64_t rest) {
    if (rest >= 4 * WIDTH) return *(const LooseI *)p;
    uint8_t padded[WIDTH * 4] __attribute__((aligned(64))) = {0};
    memcpy(padded, p, (size_t)rest);
    return *(const I *)padded;
}
