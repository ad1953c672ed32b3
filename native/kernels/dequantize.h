// Rows of any type as floats: scale * (code - zero) + min, each operation rounded once and in this order, as in ggml.
// Generic over the codes_X and scales_X of unpack.h; plain number types are converted one by one.
#pragma once

enum { GROUP = 32, HALF = 16 };

// The float value of 16 signed bytes at `codes`.
INLINE void dequantize_half(const int8_t *codes, float scale, float min, int has_min, float *dst) {
    UNROLL(4)
    for (int j = 0; j < HALF; j += VL) {
        vf v = vf_from_i(vi_from_i8(codes + j)) * scale;
        vf_store(dst + j, has_min ? v + min : v);
    }
}

#define X(id, name, QK, SPAN, ZERO, SIGN, MIN, act)                                                     \
    static void dequantize_##name(int64_t n, const void *src, float *dst) {                             \
        const block_##name *b = src;                                                                    \
        for (int64_t k = 0; k < n; k += QK, b++) {                                                      \
            float scale[QK / SPAN], min[QK / SPAN];                                                     \
            scales_##name(b, scale, min);                                                               \
            UNROLL(8)                                                                                   \
            for (int g = 0; g < QK / GROUP; g++) {                                                      \
                u8x32 codes = codes_##name(b, g) - (uint8_t)(ZERO);                                     \
                int8_t bytes[GROUP];                                                                    \
                memcpy(bytes, &codes, GROUP);                                                           \
                for (int h = 0; h < 2; h++) {                                                           \
                    int s = (GROUP * g + HALF * h) / SPAN;                                              \
                    dequantize_half(bytes + HALF * h, scale[s], MIN ? min[s] : 0, MIN, dst + k + GROUP * g + HALF * h); \
                }                                                                                       \
            }                                                                                           \
        }                                                                                               \
    }
BLOCK_TYPES(X)
#undef X

#define X(id, name, ctype, to_float)                                                                    \
    static void dequantize_##name(int64_t n, const void *src, float *dst) {                             \
        const char *p = src;                                                                            \
        int64_t k = 0;                                                                                  \
        if (id == TYPE_f16 || id == TYPE_bf16)      /* the compiler does not take these in vectors by itself */ \
            UNROLL(2) for (; k + 2 * VL <= n; k += 2 * VL, p += 2 * VL * sizeof(ctype)) {               \
                vf v[2];                                                                                \
                if (id == TYPE_bf16) vf2_from_bf16(p, v);                                               \
                else v[0] = vf_from_f16(p), v[1] = vf_from_f16(p + VL * sizeof(ctype));                 \
                vf_store(dst + k, v[0]);                                                                \
                vf_store(dst + k + VL, v[1]);                                                           \
            }                                                                                           \
        for (; k < n; k++, p += sizeof(ctype)) {                                                        \
            ctype v;                                                                                    \
            memcpy(&v, p, sizeof v);                                                                    \
            dst[k] = to_float;                                                                          \
        }                                                                                               \
    }
PLAIN_TYPES(X)
#undef X

#define DEQUANTIZE_ENTRY(id, name, ...) [id] = dequantize_##name,
#define DEQUANTIZE_TABLE {BLOCK_TYPES(DEQUANTIZE_ENTRY) PLAIN_TYPES(DEQUANTIZE_ENTRY)}
static void (*const dequantize_table[N_TYPES])(int64_t n, const void *src, float *dst) = DEQUANTIZE_TABLE;

// n weights of a type (a multiple of its block) as floats.
static void dequantize_row(int type, int64_t n, const void *src, float *dst) { dequantize_table[type](n, src, dst); }
