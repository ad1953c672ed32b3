// Encoders whose bytes are defined by a formula: no search, the same bytes as ggml's. The searched types are in encode.h.
// `importance` holds a weight per column of the row, or is NULL.
#pragma once

// ---- helpers over n floats, n a multiple of 32 -----------------------------------------------------------------------------------
INLINE float abs_max(int n, const float *x) {
    vf m = {0};
    for (int i = 0; i < n; i += VL) m = vf_max(m, vf_abs(vf_load(x + i)));
    return vf_hmax(m);
}
// The value of largest magnitude, with its sign; of two the first.
INLINE float signed_max(int n, const float *x) {
    vf up = {0}, down = {0};
    for (int i = 0; i < n; i += VL) {
        vf v = vf_load(x + i);
        up = vf_max(up, v);
        down = vf_max(down, -v);
    }
    float high = vf_hmax(up), low = vf_hmax(down);
    if (high != low) return high > low ? high : -low;
    for (int i = 0; high && i < n; i++) if (fabsf(x[i]) == high) return x[i];
    return 0;
}
static void stream_lines(int64_t bytes, const char *src, char *dst) {
    UNROLL(4) for (int64_t i = 0; i < bytes; i += sizeof(vf)) vf_stream(dst + i, vf_load(src + i));
}
// Whether none of n floats is infinite or NaN: nothing times those is NaN, and times all others a zero of either sign.
static int finite_floats(int64_t n, const float *x) {
    vi bits = {0}, more = {0};                             // two, as each `or` waits for the one before
    int64_t k = 0;
    UNROLL(4) for (; k + 2 * VL <= n; k += 2 * VL) {
        bits |= (vi)(vf_load(x + k) * vf_set(0));
        more |= (vi)(vf_load(x + k + VL) * vf_set(0));
    }
    float rest = 0;
    for (; k < n; k++) rest += x[k] * 0;
    return !vi_sum((bits | more) << 1 != 0) && rest == 0;
}
INLINE float inverse(float d) { return d != 0 ? 1.0f / d : 0.0f; }
INLINE void codes_roundf(int n, const float *x, float factor, int8_t *codes) {
    for (int i = 0; i < n; i += VL) vi_to_i8(codes + i, vi_roundf(vf_load(x + i) * factor));
}
INLINE void codes_roundf_32(const float *x, float factor, int8_t *codes) {
    vi v[32 / VL];
    UNROLL(8) for (int i = 0; i < 32 / VL; i++) v[i] = vi_roundf(vf_load(x + VL * i) * factor);
    vi_to_i8x32(codes, v);
}
INLINE void pack_nibbles(const int8_t *codes, uint8_t *qs) {       // 32 codes: 0..15 low, 16..31 high
    for (int j = 0; j < 16; j++) qs[j] = (codes[j] & 15) | (codes[j + 16] & 15) << 4;
}
INLINE void pack_fifth_bits(const int8_t *codes, uint8_t *qh) {
    uint32_t bits = 0;
    for (int j = 0; j < 32; j += VL) bits |= vi_signs(vi_from_i8(codes + j) << 27) << j;
    memcpy(qh, &bits, 4);
}

// ---- helpers over a slab of VL blocks of 32: what reduces a block to a number is done for all of them at once, a lane each -----------
enum { SLAB = 32 * VL };
#define EACH_BLOCK(l) UNROLL(16) for (int l = 0; l < VL; l++)
#define HALVE(n) UNROLL(8) for (int i = 0; i < n; i++) v[i] = vf_max(vf_zip_low(v[i], v[i + n]), vf_zip_high(v[i], v[i + n]))
INLINE vf vf_hmax_each(vf v[VL]) {              // lane l: the largest lane of v[l]
    if (VL > 8) HALVE(VL / 2);
    if (VL > 4) HALVE(4);
    HALVE(2);
    HALVE(1);
    return v[0];
}
#undef HALVE
INLINE vf vf_inverse(vf d) { return vf_select(d != 0, 1.0f / d, vf_set(0)); }
// Of integers, as which magnitudes have the same order, infinity is beyond every number and NaN beyond that; `largest` collects.
enum { INFINITE = 0x7f800000 };
INLINE vf abs_max_each(const float *x, vi *largest) {
    vf m[VL];
    EACH_BLOCK(l) {
        vi most = vi_load(x + 32 * l) & 0x7fffffff;
        for (int i = VL; i < 32; i += VL) most = vi_max(most, vi_load(x + 32 * l + i) & 0x7fffffff);
        *largest = vi_max(*largest, most);
        m[l] = (vf)most;
    }
    return vf_hmax_each(m);
}
INLINE void range_each(const float *x, vf *min, vf *max) {
    vf up[VL], down[VL];
    EACH_BLOCK(l) {
        up[l] = vf_load(x + 32 * l);
        down[l] = -up[l];
        for (int i = VL; i < 32; i += VL) {
            vf v = vf_load(x + 32 * l + i);
            up[l] = vf_max(up[l], v);
            down[l] = vf_max(down[l], -v);
        }
    }
    *max = vf_hmax_each(up);
    *min = -vf_hmax_each(down);
}
INLINE vf signed_max_each(const float *x) {
    vf low, high;
    range_each(x, &low, &high);
    vf m = vf_select(high > -low, high, low);
    vi twice = high == -low;
    if (vi_sum(twice)) for (int l = 0; l < VL; l++) if (twice[l]) m[l] = signed_max(32, x + 32 * l);
    return m;
}
// (int)((x - base) * factor + offset), at most `limit`
INLINE vi code_truncated(const float *x, float base, float factor, float offset, int limit) {
    return vi_min(vi_trunc((vf_load(x) - base) * factor + offset), vi_set(limit));
}
INLINE void put_nibbles(const float *x, float base, float factor, float offset, uint8_t *qs) {
    for (int i = 0; i < 16; i += VL)
        vi_to_u8(qs + i, code_truncated(x + i, base, factor, offset, 15) | code_truncated(x + i + 16, base, factor, offset, 15) << 4);
}
INLINE void put_five_bits(const float *x, float base, float factor, float offset, uint8_t *qs, uint8_t *qh) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i += VL) {
        vi low = code_truncated(x + i, base, factor, offset, 31), high = code_truncated(x + i + 16, base, factor, offset, 31);
        vi_to_u8(qs + i, (low & 15) | (high & 15) << 4);
        bits |= vi_signs(low << 27) << i | vi_signs(high << 27) << (i + 16);
    }
    memcpy(qh, &bits, 4);
}

// ---- 8 bits: weights and activations -------------------------------------------------------------------------------------------------
// A formula of two parts: `prepare` gives d (the scale) and m (a minimum, where there is one) of a slab x, lane l for block l;
// `put` writes block `to` from its floats y with base (m), factor (1 / d), and minimum (m as it is stored). Returns `largest`, where it is kept.
#define QUANTIZE_SLABS(name, prepare, put)                                                              \
    static vi slabs_##name(int64_t n, const float *x, void *dst) {                                      \
        block_##name *b = dst;                                                                          \
        vi largest = {0};                                                                               \
        float rest[SLAB];                                                                               \
        for (; n > 0; n -= SLAB, x += SLAB, b += VL) {                                                  \
            if (n < SLAB) x = memcpy(memset(rest, 0, sizeof rest), x, n * sizeof(float));               \
            vf d, m = {0};                                                                              \
            prepare;                                                                                    \
            float factors[VL], bases[VL];                                                               \
            f16 scales[VL], minima[VL];                                                                 \
            vf_store(factors, vf_inverse(d));                                                           \
            vf_store(bases, m);                                                                         \
            vf_to_f16(scales, d);                                                                       \
            vf_to_f16(minima, m);                                                                       \
            for (int l = 0; l < VL && 32 * l < n; l++) {                                                \
                block_##name *to = b + l;                                                               \
                const float *y = x + 32 * l, factor = factors[l], base = bases[l];                      \
                f16 minimum = minima[l];                                                                \
                (void)base; (void)minimum;                                                              \
                to->d = scales[l];                                                                      \
                put;                                                                                    \
            }                                                                                           \
        }                                                                                               \
        return largest;                                                                                 \
    }                                                                                                   \
    static void quantize_##name(int64_t n, const float *x, void *dst, const float *importance) {        \
        (void)importance;                                                                               \
        slabs_##name(n, x, dst);                                                                        \
    }
QUANTIZE_SLABS(q8_0, d = abs_max_each(x, &largest) / 127, codes_roundf_32(y, factor, to->qs))
static int quantize_finite_q8_0(int64_t n, const float *x, void *dst) { return !vi_sum(slabs_q8_0(n, x, dst) >= INFINITE); }
// Sums of four codes each: lane i of codes 4i .. 4i + 3.
INLINE i32x8 code_sums(const int8_t *codes) {
    i8x32 q;
    memcpy(&q, codes, 32);
    return dot_u7x32(u8x32_set(1), q);
}
static void quantize_q8_1(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_q8_1 *b = dst;
    for (int64_t k = 0; k < n; k += 32, b++) {
        float d = abs_max(32, x + k) / 127;
        codes_roundf_32(x + k, inverse(d), b->qs);
        b->d = f32_to_f16(d);
        b->s = f32_to_f16(f32x8_sum(f32x8_from_i(code_sums(b->qs))) * d);      // small integers: exact
    }
}
static void quantize_q8_K(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_q8_K *b = dst;
    for (int64_t k = 0; k < n; k += 256, b++) {
        float max = signed_max(256, x + k);
        float factor = max != 0 ? -127.0f / max : 0.0f;
        for (int i = 0; i < 256; i += VL) vi_to_i8(b->qs + i, vi_round(vf_load(x + k + i) * factor));
        for (int g = 0; g < 8; g++) {
            i32x8 sums = code_sums(b->qs + 32 * g);
            b->bsums[2 * g] = sums[0] + sums[1] + sums[2] + sums[3];
            b->bsums[2 * g + 1] = sums[4] + sums[5] + sums[6] + sums[7];
        }
        b->d = inverse(factor);
    }
}

// ---- 4 and 5 bits ----------------------------------------------------------------------------------------------------------------------
#define FROM_RANGE(top) range_each(x, &m, &d); d = (d - m) / (top)
QUANTIZE_SLABS(q4_0, d = signed_max_each(x) / -8, put_nibbles(y, 0, factor, 8.5f, to->qs))
QUANTIZE_SLABS(q4_1, FROM_RANGE(15), to->m = minimum; put_nibbles(y, base, factor, 0.5f, to->qs))
QUANTIZE_SLABS(q5_0, d = signed_max_each(x) / -16, put_five_bits(y, 0, factor, 16.5f, to->qs, to->qh))
QUANTIZE_SLABS(q5_1, FROM_RANGE(31), to->m = minimum; put_five_bits(y, base, factor, 0.5f, to->qs, to->qh))

// ---- ternary -----------------------------------------------------------------------------------------------------------------------------
// Base-3 digits of the weights q[0], q[step], ... (each plus 1), first weight first, as a fraction of 256 rounded up: times 3^n leaves
// digit n on top (see codes_tq1_0).
INLINE int ternary_fraction(const int8_t *q, int step, int count) {
    int value = 0;
    for (int i = 0; i < 5; i++) value = 3 * value + (i < count ? q[i * step] + 1 : 0);
    return (value * 256 + 242) / 243;
}
INLINE void codes_to_tq1_0(const int8_t *q, block_tq1_0 *b) {
    for (int j = 0; j < 32; j++) b->qs[j] = ternary_fraction(q + j, 32, 5);
    for (int j = 0; j < 16; j++) b->qs[32 + j] = ternary_fraction(q + 160 + j, 16, 5);
    for (int j = 0; j < 4; j++) b->qh[j] = ternary_fraction(q + 240 + j, 4, 4);
}
INLINE void codes_to_tq2_0(const int8_t *q, block_tq2_0 *b) {
    for (int j = 0; j < 64; j++) {
        const int8_t *p = q + 128 * (j / 32) + j % 32;
        b->qs[j] = ((p[0] + 1) & 3) | ((p[32] + 1) & 3) << 2 | ((p[64] + 1) & 3) << 4 | ((p[96] + 1) & 3) << 6;
    }
}
INLINE vi trit(const float *x, float factor) { return vi_roundf(vf_load(x) * factor) + 1; }
static void quantize_tq1_0(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_tq1_0 *b = dst;
    for (; n > 0; n -= 256, x += 256, b++) {
        int8_t last[16];
        float d = abs_max(256, x), factor = inverse(d);
        for (int part = 0; part < 2; part++) {          // 32 bytes of five weights 32 apart, then 16 of five weights 16 apart
            int step = part ? 16 : 32;
            const float *y = x + 160 * part;
            for (int j = 0; j < step; j += VL) {
                vi v = {0};
                for (int i = 0; i < 5; i++) v = 3 * v + trit(y + step * i + j, factor);
                vi_to_u8(b->qs + 32 * part + j, v + ((13 * v + 242) * 4316 >> 20));        // ternary_fraction, with 4316 / 2^20 for 1 / 243
            }
        }
        codes_roundf(16, x + 240, factor, last);
        for (int j = 0; j < 4; j++) b->qh[j] = ternary_fraction(last + j, 4, 4);
        b->d = f32_to_f16(d);
    }
}
static void quantize_tq2_0(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_tq2_0 *b = dst;
    for (; n > 0; n -= 256, x += 256, b++) {
        float d = abs_max(256, x), factor = inverse(d);
        for (int half = 0; half < 2; half++)
            for (int j = 0; j < 32; j += VL) {
                const float *y = x + 128 * half + j;
                vi_to_u8(b->qs + 32 * half + j, (trit(y, factor) & 3) | (trit(y + 32, factor) & 3) << 2 | (trit(y + 64, factor) & 3) << 4 |
                                                (trit(y + 96, factor) & 3) << 6);
            }
        b->d = f32_to_f16(d);
    }
}
INLINE void pack_quarters(const int8_t *codes, uint8_t *qs) {          // 64 codes of two bits
    for (int j = 0; j < 16; j++) qs[j] = codes[4 * j] | codes[4 * j + 1] << 2 | codes[4 * j + 2] << 4 | codes[4 * j + 3] << 6;
}
static void quantize_q2_0(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_q2_0 *b = dst;
    for (int64_t k = 0; k < n; k += 64, b++) {
        int8_t codes[64];
        float d = abs_max(64, x + k), factor = inverse(d);
        for (int i = 0; i < 64; i += VL) {
            vi q = vi_roundf(vf_load(x + k + i) * factor) + 1;
            vi_to_i8(codes + i, q & (q > 0));
        }
        pack_quarters(codes, b->qs);
        b->d = f32_to_f16(d);
    }
}

// ---- 4-bit floats -------------------------------------------------------------------------------------------------------------------------
// Codes of the nearest value * d in a table of 16; of two equally near the first.
INLINE void codes_nearest16(int n, const float *x, const int8_t *values, float d, int8_t *codes) {
    for (int i = 0; i < n; i += VL) {
        vf v = vf_load(x + i), best = vf_abs((float)values[0] * d - v);
        vi code = {0};
        for (int c = 1; c < 16; c++) {
            vf err = vf_abs((float)values[c] * d - v);
            vi less = err < best;
            best = vf_select(less, err, best);
            code = (code & ~less) | (less & c);
        }
        vi_to_i8(codes + i, code);
    }
}
static void quantize_mxfp4(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_mxfp4 *b = dst;
    for (int64_t k = 0; k < n; k += 32, b++) {
        int8_t codes[32];
        float max = abs_max(32, x + k);
        float e = max > 0 ? floorf(log2f(max)) - 2 + 127 : 0;      // the largest value, 6 = 1.5 * 2^2, covers the block
        b->e.bits = e > 0 ? (uint8_t)e : 0;
        codes_nearest16(32, x + k, fp4_values, e8m0_to_f32_half(b->e), codes);
        pack_nibbles(codes, b->qs);
    }
}

// The byte of the nearest scale, halves upwards, at most 448.
INLINE ue4m3 f32_to_ue4m3(float x) {
    if (!(x > 0)) return (ue4m3){0};
    if (x < 0x1p-6f) return (ue4m3){x * 512 + 0.5f > 7 ? 7 : (int)(x * 512 + 0.5f)};
    uint32_t u; memcpy(&u, &x, 4);
    int bits = (int)((u + 0x80000) >> 20) - (120 << 3);
    return (ue4m3){bits > 0x7e ? 0x7e : bits};
}
// Group g of a block whose scale stands: 16 weights, the first eight in low nibbles.
INLINE void put_nvfp4(const float *x, int g, block_nvfp4 *b) {
    int8_t codes[16];
    codes_nearest16(16, x, fp4_values, ue4m3_to_f32_half(b->d[g]), codes);
    for (int j = 0; j < 8; j++) b->qs[8 * g + j] = codes[j] | codes[j + 8] << 4;
}
static void quantize_nvfp4(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    block_nvfp4 *b = dst;
    for (int64_t k = 0; k < n; k += 64, b++) {
        for (int g = 0; g < 4; g++) {
            b->d[g] = f32_to_ue4m3(abs_max(16, x + k + 16 * g) / 6);
            put_nvfp4(x + k + 16 * g, g, b);
        }
    }
}

// ---- plain numbers ------------------------------------------------------------------------------------------------------------------------
static void quantize_f32(int64_t n, const float *x, void *dst, const float *importance) { (void)importance; memcpy(dst, x, 4 * n); }
static void quantize_f16(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    f16 *y = dst;
    int64_t k = 0;
    UNROLL(4) for (; k + VL <= n; k += VL) vf_to_f16(y + k, vf_load(x + k));
    for (; k < n; k++) y[k] = f32_to_f16(x[k]);
}
static void quantize_bf16(int64_t n, const float *x, void *dst, const float *importance) {
    (void)importance;
    bf16 *y = dst;
    int64_t k = 0;
    UNROLL(2) for (; k + 2 * VL <= n; k += 2 * VL)
        vi_upper_to_u16(y + k, vi_round_or_nan_bf16(vf_load(x + k)), vi_round_or_nan_bf16(vf_load(x + k + VL)));
    for (; k < n; k++) y[k] = f32_to_bf16(x[k]);
}

#include "loss.h"
#include "search.h"
#include "compat.h"
#include "encode.h"
#include "encode_scales.h"
#include "encode_groups.h"
#include "grids.h"
#include "encode_grids.h"
#include "compat_grids.h"
#include "pack_grids.h"

// Types that a formula defines unless their scales are searched, and types whose scales always are; see encode.h.
#define FORMULA_TYPES(X) X(q4_0) X(q4_1) X(q5_0) X(q5_1) X(q8_0) X(tq1_0) X(tq2_0) X(mxfp4) X(nvfp4) X(q2_0)
#define FITTED_TYPES(X) X(q2_K) X(q3_K) X(q4_K) X(q5_K) X(q6_K) X(iq4_nl) X(iq4_xs) X(iq2_xxs) X(iq2_xs) X(iq2_s) X(iq3_xxs) X(iq3_s) \
    X(iq1_s) X(iq1_m) X(q1_0)
#define X(name)                                                                                         \
    static void quantize_##name(int64_t n, const float *x, void *dst, const float *importance) { encode_##name(1, n, x, dst, importance, 0); }
FITTED_TYPES(X)
#undef X

#define QUANTIZE_ENTRY(name) [TYPE_##name] = quantize_##name,
#define QUANTIZE_TABLE {QUANTIZE_ENTRY(f32) QUANTIZE_ENTRY(f16) QUANTIZE_ENTRY(bf16) QUANTIZE_ENTRY(q8_1) QUANTIZE_ENTRY(q8_K) \
    FORMULA_TYPES(QUANTIZE_ENTRY) FITTED_TYPES(QUANTIZE_ENTRY)}
#define FINITE_TABLE {[TYPE_q8_0] = quantize_finite_q8_0}
#define FORMULA_ENTRY(name) [TYPE_##name] = 1,
#define FORMULA_TABLE {FORMULA_TYPES(FORMULA_ENTRY)}
#define ENCODE_ENTRY(name) [TYPE_##name] = encode_##name,
#define ENCODE_TABLE {FORMULA_TYPES(ENCODE_ENTRY) FITTED_TYPES(ENCODE_ENTRY)}
