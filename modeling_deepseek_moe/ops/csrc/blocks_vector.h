/* Block-scaled FP8 and back, for whole matrices, on vectors of WIDTH lanes; part of `kernels_vector.h`. */

void SHARED(decode)(const uint8_t *codes, const float *scale, int64_t n, void *out, int dtype) {
    for (int64_t k = 0; k < n; k += DSM_BLOCK, scale++) {
        int64_t end = dsm_min(n, k + DSM_BLOCK), i = k;
        for (; i + WIDTH <= end; i += WIDTH) {
            I code = __builtin_convertvector(*(const LooseBytes *)(codes + i), I);
            /* exact: 2^120 is a power of two, and a code times it is no subnormal any more */
            F value = (F)(((code << 24) >> 4) & CODE_MASK) * 0x1p120f * *scale;
            value = (F)choose((code & 0x7f) == 0x7f, (I)spread(NAN), (I)value);
            store_any(out, dtype, i, value);
        }
        for (; i < end; i++) {
            int32_t bits = (int32_t)((uint32_t)codes[i] << 24) >> 4 & CODE_MASK;
            float value;
            memcpy(&value, &bits, 4);
            value = (codes[i] & 0x7f) == 0x7f ? NAN : value * 0x1p120f * *scale;
            dsm_store(out, dtype, i, value);
        }
    }
}

float SHARED(amax)(const void *x, int dtype, int64_t n, int *finite) {
    I most = {0};
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) { /* magnitudes compare as integers do, NaN above infinity */
        I magnitude = (I)load_any(x, dtype, i) & 0x7fffffff;
        most = choose(magnitude > most, magnitude, most);
    }
    int32_t all = 0;
    for (int l = 0; l < WIDTH; l++) all = most[l] > all ? most[l] : all;
    for (; i < n; i++) {
        float value = dsm_load(x, dtype, i);
        int32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7fffffff;
        all = bits > all ? bits : all;
    }
    if (all >= 0x7f800000) *finite = 0;
    float value;
    memcpy(&value, &all, 4);
    return value;
}

DSM_INLINE I encode_vector(F value) {
    I bits = (I)value;
    I sign = (bits >> 24) & 0x80;
    I magnitude = bits & 0x7fffffff;
    magnitude = choose(magnitude > 0x43e00000, (I)spread(448.0f), magnitude);
    /* from 2^-6 on: drop 20 bits of the mantissa, to even, and rebase the exponent (127 -> 7) */
    I normal = (magnitude + 0x7ffff + ((magnitude >> 20) & 1) - (120 << 23)) >> 20;
    /* below: the multiples of 2^-9 are the low bits of a sum with 2^14 */
    I subnormal = (I)((F)magnitude + 0x1p14f) - 0x46800000;
    return sign | choose(magnitude < 0x3c800000, subnormal, normal);
}

void SHARED(encode)(const void *x, int dtype, int64_t n, float scale, uint8_t *out) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        *(LooseBytes *)(out + i) = __builtin_convertvector(encode_vector(load_any(x, dtype, i) / scale), Bytes);
    if (i < n) {
        float rest[WIDTH] = {0};
        for (int64_t l = i; l < n; l++) rest[l - i] = dsm_load(x, dtype, l);
        I codes = encode_vector(load(rest) / scale);
        for (int64_t l = i; l < n; l++) out[l] = (uint8_t)codes[l - i];
    }
}
