// What each block type contributes: its weights as small integers and the scales that belong to them. Everything else (dequantize,
// row dot) is generic over it. The bytes are drawn in pyggml/quants/*.py, beside the readable form of the same decoders.
//
//   u8x32 codes_X(const block_X *b, int g)                     codes of weights 32g .. 32g + 31 of a block
//   void  scales_X(const block_X *b, float *scale, float *min) QK / SPAN of each (min only where MIN is 1)
//   weight = scale * (code - ZERO) + min, rounded in this order: ggml's own floats, bit for bit
#pragma once
#include "../codebooks.h"

// U7: codes lie in 0..127 (what a byte dot product likes best). S8: codes are signed bytes and ZERO is 0.
//     id  name     QK   SPAN ZERO  codes MIN  activation
#define BLOCK_TYPES(X) \
    X(2,  q4_0,    32,  32,  8,    U7,   0,   q8_0) \
    X(3,  q4_1,    32,  32,  0,    U7,   1,   q8_1) \
    X(6,  q5_0,    32,  32,  16,   U7,   0,   q8_0) \
    X(7,  q5_1,    32,  32,  0,    U7,   1,   q8_1) \
    X(8,  q8_0,    32,  32,  0,    S8,   0,   q8_0) \
    X(9,  q8_1,    32,  32,  0,    S8,   0,   none) \
    X(10, q2_K,    256, 16,  0,    U7,   1,   q8_K) \
    X(11, q3_K,    256, 16,  4,    U7,   0,   q8_K) \
    X(12, q4_K,    256, 32,  0,    U7,   1,   q8_K) \
    X(13, q5_K,    256, 32,  0,    U7,   1,   q8_K) \
    X(14, q6_K,    256, 16,  32,   U7,   0,   q8_K) \
    X(15, q8_K,    256, 32,  0,    S8,   0,   none) \
    X(16, iq2_xxs, 256, 32,  0,    S8,   0,   q8_K) \
    X(17, iq2_xs,  256, 16,  0,    S8,   0,   q8_K) \
    X(18, iq3_xxs, 256, 32,  0,    S8,   0,   q8_K) \
    X(19, iq1_s,   256, 32,  0,    S8,   0,   q8_K) \
    X(20, iq4_nl,  32,  32,  0,    S8,   0,   q8_0) \
    X(21, iq3_s,   256, 32,  0,    S8,   0,   q8_K) \
    X(22, iq2_s,   256, 16,  0,    S8,   0,   q8_K) \
    X(23, iq4_xs,  256, 32,  0,    S8,   0,   q8_K) \
    X(29, iq1_m,   256, 16,  0,    S8,   0,   q8_K) \
    X(34, tq1_0,   256, 32,  1,    U7,   0,   q8_K) \
    X(35, tq2_0,   256, 32,  1,    U7,   0,   q8_K) \
    X(39, mxfp4,   32,  32,  0,    S8,   0,   q8_0) \
    X(40, nvfp4,   64,  16,  0,    S8,   0,   q8_0) \
    X(41, q1_0,    128, 32,  0,    S8,   0,   q8_0) \
    X(42, q2_0,    64,  32,  1,    U7,   0,   q8_0)

// Types of one number: how one of them becomes a float
#define PLAIN_TYPES(X) \
    X(0,  f32,  float,   (v)) \
    X(1,  f16,  f16,     f16_to_f32(v)) \
    X(24, i8,   int8_t,  (float)(v)) \
    X(25, i16,  int16_t, (float)(v)) \
    X(26, i32,  int32_t, (float)(v)) \
    X(27, i64,  int64_t, (float)(v)) \
    X(28, f64,  double,  (float)(v)) \
    X(30, bf16, bf16,    bf16_to_f32(v))

enum {
#define X(id, name, qk, span, zero, codes, min, act) TYPE_##name = id,
    BLOCK_TYPES(X)
#undef X
#define X(id, name, ctype, to_float) TYPE_##name = id,
    PLAIN_TYPES(X)
#undef X
};

static const struct { int block, bytes; } type_size[N_TYPES] = {
#define X(id, name, qk, span, zero, codes, min, act) [id] = {qk, sizeof(block_##name)},
    BLOCK_TYPES(X)
#undef X
#define X(id, name, ctype, to_float) [id] = {1, sizeof(ctype)},
    PLAIN_TYPES(X)
#undef X
};

// Bytes of a row of n weights (a multiple of the block).
static int64_t row_bytes(int type, int64_t n) { return n / type_size[type].block * type_size[type].bytes; }

INLINE uint32_t read_u16(const void *p) { uint16_t x; memcpy(&x, p, 2); return x; }
INLINE uint32_t read_u32(const void *p) { uint32_t x; memcpy(&x, p, 4); return x; }
INLINE uint64_t read_u64(const void *p) { uint64_t x; memcpy(&x, p, 8); return x; }

// Small integers out of packed bits, one a byte, the lowest first.
INLINE uint64_t bytes_of_nibbles(uint64_t x) {     // 32 bits -> 8 bytes
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
}
INLINE uint64_t bytes_of_pairs(uint64_t x) {       // 16 bits -> 8 bytes
    x = (x | x << 24) & 0x000000ff000000ff;
    x = (x | x << 12) & 0x000f000f000f000f;
    return (x | x << 6) & 0x0303030303030303;
}
INLINE f32x8 floats_of_bytes(uint64_t bytes) { return f32x8_from_i(i32x8_from_u8(&bytes)); }
INLINE void f32x8_store(float *p, f32x8 v) { memcpy(p, &v, 32); }

// ---- 32 weights, one scale: 16 bytes of nibbles, weight j in the low half of byte j, weight 16 + j in its high half -----------
#define SCALE_D(name) \
    INLINE void scales_##name(const block_##name *b, float *scale, float *min) { (void)min; scale[0] = f16_to_f32(b->d); }
#define SCALE_D_M(name) \
    INLINE void scales_##name(const block_##name *b, float *scale, float *min) { scale[0] = f16_to_f32(b->d); min[0] = f16_to_f32(b->m); }

INLINE u8x32 codes_q4_0(const block_q4_0 *b, int g) { (void)g; return u8x32_nibbles(b->qs); }
INLINE u8x32 codes_q4_1(const block_q4_1 *b, int g) { (void)g; return u8x32_nibbles(b->qs); }
INLINE u8x32 codes_q5_0(const block_q5_0 *b, int g) { (void)g; return u8x32_nibbles(b->qs) | (u8x32_mask(read_u32(b->qh)) & 16); }
INLINE u8x32 codes_q5_1(const block_q5_1 *b, int g) { (void)g; return u8x32_nibbles(b->qs) | (u8x32_mask(read_u32(b->qh)) & 16); }
INLINE u8x32 codes_q8_0(const block_q8_0 *b, int g) { (void)g; return u8x32_load(b->qs); }
INLINE u8x32 codes_q8_1(const block_q8_1 *b, int g) { (void)g; return u8x32_load(b->qs); }
INLINE u8x32 codes_iq4_nl(const block_iq4_nl *b, int g) { (void)g; return u8x32_lookup(iq4_values, u8x32_nibbles(b->qs)); }
INLINE u8x32 codes_mxfp4(const block_mxfp4 *b, int g) { (void)g; return u8x32_lookup(fp4_values, u8x32_nibbles(b->qs)); }
SCALE_D(q4_0) SCALE_D_M(q4_1) SCALE_D(q5_0) SCALE_D_M(q5_1) SCALE_D(q8_0) SCALE_D(q8_1) SCALE_D(iq4_nl)
INLINE void scales_mxfp4(const block_mxfp4 *b, float *scale, float *min) { (void)min; scale[0] = e8m0_to_f32_half(b->e); }

// ---- 64 and 128 weights -------------------------------------------------------------------------------------------------------------
INLINE u8x32 codes_nvfp4(const block_nvfp4 *b, int g) {        // 8 bytes hold 16 weights: low nibbles, then high nibbles
    uint64_t low = read_u64(b->qs + 16 * g), high = read_u64(b->qs + 16 * g + 8);
    u8x32 nibbles = (u8x32)(u64x4){low, low >> 4, high, high >> 4} & 15;
    return u8x32_lookup(fp4_values, nibbles);
}
INLINE void scales_nvfp4(const block_nvfp4 *b, float *scale, float *min) {
    (void)min;
    for (int s = 0; s < 4; s++) scale[s] = ue4m3_to_f32_half(b->d[s]);
}
INLINE u8x32 codes_q1_0(const block_q1_0 *b, int g) { return u8x32_mask(~read_u32(b->qs + 4 * g)) | 1; }    // bit 1: +1, bit 0: -1
INLINE u8x32 codes_q2_0(const block_q2_0 *b, int g) {          // four weights a byte, lowest bits first
    const uint8_t *q = b->qs + 8 * g;
    return (u8x32)(u64x4){bytes_of_pairs(read_u16(q)), bytes_of_pairs(read_u16(q + 2)), bytes_of_pairs(read_u16(q + 4)), bytes_of_pairs(read_u16(q + 6))};
}
#define SCALE_REPEATED(name, count) \
    INLINE void scales_##name(const block_##name *b, float *scale, float *min) { \
        (void)min; \
        float d = f16_to_f32(b->d); \
        for (int i = 0; i < count; i++) scale[i] = d; \
    }
SCALE_REPEATED(q1_0, 4) SCALE_REPEATED(q2_0, 2)

// ---- K types: 256 weights, integer scales times a super-scale --------------------------------------------------------------------
// 32 bytes hold four planes of 2-bit codes: plane p (bits 2p, 2p + 1) is 32 consecutive weights.
INLINE u8x32 codes_q2_K(const block_q2_K *b, int g) { return u8x32_load(b->qs + 32 * (g / 4)) >> 2 * (g % 4) & 3; }
INLINE void scales_q2_K(const block_q2_K *b, float *scale, float *min) {
    float d = f16_to_f32(b->d), dmin = -f16_to_f32(b->dmin);
    for (int i = 0; i < 16; i += 8) {
        uint64_t both = read_u64(b->scales + i);
        f32x8_store(scale + i, floats_of_bytes(both & 0x0f0f0f0f0f0f0f0f) * d);
        f32x8_store(min + i, floats_of_bytes(both >> 4 & 0x0f0f0f0f0f0f0f0f) * dmin);
    }
}
INLINE u8x32 codes_q3_K(const block_q3_K *b, int g) {
    u8x32 high = u8x32_load(b->hmask) >> g & 1;
    return (u8x32_load(b->qs + 32 * (g / 4)) >> 2 * (g % 4) & 3) | high << 2;
}
INLINE void scales_q3_K(const block_q3_K *b, float *scale, float *min) {
    (void)min;
    float d = f16_to_f32(b->d);
    // 16 six-bit scales: nibbles in bytes 0..7 (low nibbles are scales 0..7), upper two bits in bytes 8..11, one plane per four scales
    uint64_t low = read_u64(b->scales), two = read_u32(b->scales + 8);
    for (int i = 0; i < 2; i++) {
        uint64_t high = (two >> 4 * i & 0x03030303) | (two >> (4 * i + 2) & 0x03030303) << 32;
        f32x8_store(scale + 8 * i, (floats_of_bytes((low >> 4 * i & 0x0f0f0f0f0f0f0f0f) | high << 4) - 32.0f) * d);
    }
}
// Eight 6-bit scales and eight 6-bit mins in 12 bytes: bytes 0..3 scales 0..3, 4..7 mins 0..3, 8..11 the nibbles of the rest,
// whose upper two bits sit on top of bytes 0..7.
INLINE void scales_k4(const uint8_t *packed, f16 d, f16 dmin, float *scale, float *min) {
    uint64_t a = read_u32(packed), b = read_u32(packed + 4), c = read_u32(packed + 8);
    uint64_t s = (a & 0x3f3f3f3f) | ((c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4) << 32;
    uint64_t m = (b & 0x3f3f3f3f) | ((c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4) << 32;
    f32x8_store(scale, floats_of_bytes(s) * f16_to_f32(d));
    f32x8_store(min, floats_of_bytes(m) * -f16_to_f32(dmin));
}
// 32 bytes hold two planes of nibbles.
INLINE u8x32 codes_q4_K(const block_q4_K *b, int g) { return u8x32_load(b->qs + 32 * (g / 2)) >> 4 * (g % 2) & 15; }
INLINE void scales_q4_K(const block_q4_K *b, float *scale, float *min) { scales_k4(b->scales, b->d, b->dmin, scale, min); }
INLINE u8x32 codes_q5_K(const block_q5_K *b, int g) {
    return (u8x32_load(b->qs + 32 * (g / 2)) >> 4 * (g % 2) & 15) | (u8x32_load(b->qh) >> g & 1) << 4;
}
INLINE void scales_q5_K(const block_q5_K *b, float *scale, float *min) { scales_k4(b->scales, b->d, b->dmin, scale, min); }
INLINE u8x32 codes_q6_K(const block_q6_K *b, int g) {          // per 128 weights: 64 bytes of nibbles, 32 bytes of 2-bit planes
    u8x32 low = u8x32_load(b->ql + 64 * (g / 4) + 32 * (g % 2)) >> 4 * (g / 2 % 2) & 15;
    return low | (u8x32_load(b->qh + 32 * (g / 4)) >> 2 * (g % 4) & 3) << 4;
}
INLINE void scales_q6_K(const block_q6_K *b, float *scale, float *min) {
    (void)min;
    float d = f16_to_f32(b->d);
    for (int i = 0; i < 16; i += 8) f32x8_store(scale + i, f32x8_from_i(i32x8_from_i8(b->scales + i)) * d);
}
INLINE u8x32 codes_q8_K(const block_q8_K *b, int g) { return u8x32_load(b->qs + 32 * g); }
INLINE void scales_q8_K(const block_q8_K *b, float *scale, float *min) {
    (void)min;
    for (int i = 0; i < 8; i++) scale[i] = b->d;
}

// ---- IQ4_XS: a nonlinear code, 6-bit scales ------------------------------------------------------------------------------------------
INLINE u8x32 codes_iq4_xs(const block_iq4_xs *b, int g) { return u8x32_lookup(iq4_values, u8x32_nibbles(b->qs + 16 * g)); }
INLINE void scales_iq4_xs(const block_iq4_xs *b, float *scale, float *min) {
    (void)min;
    uint64_t six = bytes_of_nibbles(read_u32(b->scales_l)) | bytes_of_pairs(b->scales_h) << 4;
    f32x8_store(scale, (floats_of_bytes(six) - 32.0f) * f16_to_f32(b->d));
}

// ---- ternary ------------------------------------------------------------------------------------------------------------------------------
// A byte is a fraction of 256 whose base-3 digits are five weights: times 3^n, its leading digit is digit n of the fraction.
INLINE u8x32 leading_digit(u8x32 q) { return -(u8x32)(q >= 86) - (u8x32)(q >= 171); }
INLINE u8x32 codes_tq1_0(const block_tq1_0 *b, int g) {
    static const uint8_t pow3[5] = {1, 3, 9, 27, 81};
    if (g < 5) return leading_digit(u8x32_load(b->qs) * pow3[g]);              // 32 bytes: digit n is weights 32n ..
    u8x16 q = u8x16_load(b->qs + 32);                                          // 16 bytes: digit n is weights 160 + 16n ..
    if (g < 7) return leading_digit(u8x32_from_halves(q * pow3[2 * (g - 5)], q * pow3[2 * (g - 5) + 1]));
    uint32_t h[4];                                                             // 4 bytes: digit n is weights 240 + 4n ..
    for (int n = 0; n < 4; n++)
        for (int j = 0; j < 4; j++) ((uint8_t *)h)[4 * n + j] = b->qh[j] * pow3[n];
    return leading_digit(u8x32_from_halves(q * pow3[4], u8x16_load(h)));
}
INLINE u8x32 codes_tq2_0(const block_tq2_0 *b, int g) { return u8x32_load(b->qs + 32 * (g / 4)) >> 2 * (g % 4) & 3; }
SCALE_REPEATED(tq1_0, 8) SCALE_REPEATED(tq2_0, 8)

// ---- IQ2, IQ3: groups of 8 or 4 magnitudes from a codebook, and signs ---------------------------------------------------------------
INLINE u8x32 with_signs(u8x32 magnitudes, uint32_t signs) {    // bit i of `signs`: weight i is negative
    u8x32 m = u8x32_mask(signs);
    return (magnitudes ^ m) - m;
}
// Four groups of seven signs in 28 bits; the eighth sign of a group makes the number of minus signs even.
INLINE uint32_t even_signs(uint32_t s) {
    uint32_t t = (s & 0x7f) | (s & 0x3f80) << 1 | (s & 0x1fc000) << 2 | (s & 0xfe00000) << 3;
    uint32_t p = t ^ t >> 4;
    p ^= p >> 2;
    p ^= p >> 1;
    return t | (p & 0x01010101) << 7;
}
// Scales are odd multiples: d * (s + 1/2) / 4 for IQ2.
INLINE void scales_iq2_nibbles(const uint8_t *nibbles, f16 d, float *scale) {
    float f = f16_to_f32(d);
    for (int i = 0; i < 16; i += 8) f32x8_store(scale + i, (floats_of_bytes(bytes_of_nibbles(read_u32(nibbles + i / 2))) + 0.5f) * f * 0.25f);
}
INLINE u8x32 codes_iq2_xxs(const block_iq2_xxs *b, int g) {
    const uint8_t *q = (const uint8_t *)(b->qs + 4 * g);       // 4 grid indices, then 28 bits of signs under a 4-bit scale
    u64x4 v = {iq2_xxs_grid[q[0]], iq2_xxs_grid[q[1]], iq2_xxs_grid[q[2]], iq2_xxs_grid[q[3]]};
    return with_signs((u8x32)v, even_signs(read_u32(q + 4)));
}
INLINE void scales_iq2_xxs(const block_iq2_xxs *b, float *scale, float *min) {
    (void)min;
    float d = f16_to_f32(b->d);
    for (int g = 0; g < 8; g++) scale[g] = d * (0.5f + (float)(b->qs[4 * g + 3] >> 12)) * 0.25f;
}
INLINE u8x32 codes_iq2_xs(const block_iq2_xs *b, int g) {      // 16 bits per 8 weights: 9 of grid index, 7 of signs
    uint16_t q[4];
    memcpy(q, (const char *)b->qs + 8 * g, sizeof q);           // a block may start at an odd byte
    u64x4 v = {iq2_xs_grid[q[0] & 511], iq2_xs_grid[q[1] & 511], iq2_xs_grid[q[2] & 511], iq2_xs_grid[q[3] & 511]};
    return with_signs((u8x32)v, even_signs(q[0] >> 9 | q[1] >> 9 << 7 | q[2] >> 9 << 14 | q[3] >> 9 << 21));
}
INLINE void scales_iq2_xs(const block_iq2_xs *b, float *scale, float *min) { (void)min; scales_iq2_nibbles(b->scales, b->d, scale); }
INLINE u8x32 codes_iq2_s(const block_iq2_s *b, int g) {        // 8 bits of index in qs[0..31], 2 in qh, 8 signs in qs[32..63]
    const uint8_t *q = b->qs + 4 * g;
    int h = b->qh[g];
    u64x4 v = {iq2_s_grid[q[0] | (h & 3) << 8], iq2_s_grid[q[1] | (h >> 2 & 3) << 8], iq2_s_grid[q[2] | (h >> 4 & 3) << 8],
               iq2_s_grid[q[3] | h >> 6 << 8]};
    return with_signs((u8x32)v, read_u32(b->qs + 32 + 4 * g));
}
INLINE void scales_iq2_s(const block_iq2_s *b, float *scale, float *min) { (void)min; scales_iq2_nibbles(b->scales, b->d, scale); }
INLINE u8x32 codes_iq3_xxs(const block_iq3_xxs *b, int g) {    // 64 indices, then per 32 weights 28 bits of signs under a 4-bit scale
    const uint8_t *q = b->qs + 8 * g;
    u32x8 v = {iq3_xxs_grid[q[0]], iq3_xxs_grid[q[1]], iq3_xxs_grid[q[2]], iq3_xxs_grid[q[3]],
               iq3_xxs_grid[q[4]], iq3_xxs_grid[q[5]], iq3_xxs_grid[q[6]], iq3_xxs_grid[q[7]]};
    return with_signs((u8x32)v, even_signs(read_u32(b->qs + 64 + 4 * g)));
}
INLINE void scales_iq3_xxs(const block_iq3_xxs *b, float *scale, float *min) {
    (void)min;
    float d = f16_to_f32(b->d);
    for (int g = 0; g < 8; g++) scale[g] = d * (0.5f + (float)(b->qs[64 + 4 * g + 3] >> 4)) * 0.5f;
}
INLINE u8x32 codes_iq3_s(const block_iq3_s *b, int g) {        // ninth index bit in qh
    const uint8_t *q = b->qs + 8 * g;
    int h = b->qh[g];
#define ENTRY(l) iq3_s_grid[q[l] | (h >> l & 1) << 8]
    u32x8 v = {ENTRY(0), ENTRY(1), ENTRY(2), ENTRY(3), ENTRY(4), ENTRY(5), ENTRY(6), ENTRY(7)};
#undef ENTRY
    return with_signs((u8x32)v, read_u32(b->signs + 4 * g));
}
INLINE void scales_iq3_s(const block_iq3_s *b, float *scale, float *min) {
    (void)min;
    f32x8 s = floats_of_bytes(bytes_of_nibbles(read_u32(b->scales)));
    f32x8_store(scale, (s + s + 1.0f) * f16_to_f32(b->d));
}

// ---- IQ1: groups of 8 from {-1, 0, 1}, shifted as a whole by an eighth up or down --------------------------------------------------
// The codes count eighths, 8 * grid +- 1, and the scale is divided by 8 (exact: every d is a half float).
INLINE u8x32 iq1_eighths(u64x4 grid, uint32_t down) {          // bit l of `down`: group l is shifted down
    u64x4 below = (u64x4){down, down >> 1, down >> 2, down >> 3} & 1;
    return ((u8x32)grid << 3) + ((u8x32)(below * 0xfeull * 0x0101010101010101ull) + 1);        // 1, or 0xfe + 1 = -1
}
INLINE u8x32 codes_iq1_s(const block_iq1_s *b, int g) {        // qh: four times 3 bits of index, a 3-bit scale, the shift
    uint32_t h = b->qh[g];
    const uint8_t *q = b->qs + 4 * g;
    u64x4 v = {iq1_grid[q[0] | (h & 7) << 8], iq1_grid[q[1] | (h >> 3 & 7) << 8], iq1_grid[q[2] | (h >> 6 & 7) << 8],
               iq1_grid[q[3] | (h >> 9 & 7) << 8]};
    return iq1_eighths(v, h >> 15 ? 15 : 0);
}
INLINE void scales_iq1_s(const block_iq1_s *b, float *scale, float *min) {
    (void)min;
    i32x8 s = i32x8_from_i16(b->qh) >> 12 & 7;
    f32x8_store(scale, f32x8_from_i(s + s + 1) * f16_to_f32(b->d) * 0.125f);
}
INLINE u8x32 codes_iq1_m(const block_iq1_m *b, int g) {        // qh: a nibble per 8 weights, 3 bits of index and the shift
    uint32_t h = read_u16(b->qh + 2 * g);
    const uint8_t *q = b->qs + 4 * g;
    u64x4 v = {iq1_grid[q[0] | (h & 7) << 8], iq1_grid[q[1] | (h >> 4 & 7) << 8], iq1_grid[q[2] | (h >> 8 & 7) << 8],
               iq1_grid[q[3] | (h >> 12 & 7) << 8]};
    return iq1_eighths(v, (h >> 3 & 1) | (h >> 6 & 2) | (h >> 9 & 4) | (h >> 12 & 8));
}
INLINE void scales_iq1_m(const block_iq1_m *b, float *scale, float *min) {
    (void)min;                                                 // four 16-bit words: four 3-bit scales each, and a nibble of the super-scale
    uint64_t w = read_u64(b->scales);
    f16 super = {(w >> 12 & 15) | (w >> 24 & 0xf0) | (w >> 36 & 0xf00) | (w >> 48 & 0xf000)};
    float d = f16_to_f32(super);
    for (int i = 0; i < 16; i++) scale[i] = d * (float)(2 * (w >> (16 * (i / 4) + 3 * (i % 4)) & 7) + 1) * 0.125f;
}
