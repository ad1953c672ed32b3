// The vector vocabulary that kernels are written in. A kernel names no register width: it works on vectors of VL lanes.
//
//   vf, vi            VL floats, VL int32; + - * & | << >> and comparisons are the compiler's own vector operators
//   u8x32 ...         32 bytes (a group of weights) and 8 lanes, the same width on every ISA: what codecs and row dots work on
//   one of            scalar.h (plain C on 16-byte vectors)  x86.h (AVX2: VL 8, AVX-512: VL 16)  arm.h (NEON: VL 4)
//
// The R16 layout interleaves 16 rows, so a tile is TILE_ROWS / VL vectors wide on every ISA.
// Only what the operators cannot say is spelled per ISA: dot products of bytes, half floats, fma, reductions, permutes.
#pragma once
#include <stdint.h>
#include <string.h>
#include <math.h>
#include "../blocks.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL(n) _Pragma_(GCC unroll n)
#define _Pragma_(x) _Pragma(#x)

typedef uint8_t  u8x16 __attribute__((vector_size(16)));
typedef uint8_t  u8x32 __attribute__((vector_size(32)));
typedef int8_t   i8x32 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));
typedef int32_t  i32x8 __attribute__((vector_size(32)));
typedef float    f32x8 __attribute__((vector_size(32)));
INLINE u8x32 u8x32_set(int x) { return (uint8_t)x - (u8x32){0}; }

// For a matrix unit (see below): where four squares of sums lie, and the bytes from one of their lines to the next.
typedef struct { float *square[2][2]; int64_t line; } matrix_sums;

// Holds a value in a register: the compiler would load it again for each use, or add in another order and run out of registers.
#if defined __x86_64__
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#elif defined __aarch64__
#define IN_REGISTER(v) __asm__("" : "+w"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif

#if defined ISA_avx2 || defined ISA_avxvnni || defined ISA_avx512 || defined ISA_avx512bf16 || defined ISA_amx
#include "x86.h"
#elif defined ISA_neon
#include "arm.h"
#else
#include "scalar.h"
#endif

// ---- the same on every ISA ------------------------------------------------------------------------------------------------
INLINE vf vf_set(float x) { return x - (vf){0}; }
INLINE vi vi_set(int32_t x) { return x - (vi){0}; }
INLINE vf vf_load(const void *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE vi vi_load(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(void *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE void vi_store(void *p, vi v) { memcpy(p, &v, sizeof v); }
INLINE vi vi_set4(const void *p) { int32_t x; memcpy(&x, p, 4); return vi_set(x); }      // the same 4 bytes in every lane
typedef int16_t vi_pairs __attribute__((vector_size(4 * VL)));
INLINE vi vi_pairs_from_i8(vi bytes) { return (vi)(((vi_pairs)bytes ^ 0x80) - 0x80); }   // pairs of bytes in 16 bits, now with their sign
INLINE vf vf_from_i(vi a) { return __builtin_convertvector(a, vf); }
INLINE vf vf_select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }     // mask lanes are 0 or -1
INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7fffffff); }
INLINE vi vi_trunc(vf a) { return __builtin_convertvector(a, vi); }
INLINE vi vi_roundf(vf a) {                // as roundf: halves away from zero (0.5 itself added would round 0.49999997 up)
    return vi_trunc(a + (vf)(((vi)a & (int32_t)0x80000000) | (vi)vf_set(0x1.fffffep-2f)));
}

INLINE u8x16 u8x16_load(const void *p) { u8x16 v; memcpy(&v, p, 16); return v; }
INLINE u8x32 u8x32_load(const void *p) { u8x32 v; memcpy(&v, p, 32); return v; }
INLINE u8x32 u8x32_from_halves(u8x16 low, u8x16 high) {       // in registers: a store of halves and a load of the whole would stall
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE u8x32 u8x32_nibbles(const void *p) {                   // 16 bytes: their low nibbles, then their high ones
    u8x16 b = u8x16_load(p);
    typedef uint16_t u16x8 __attribute__((vector_size(16)));
    return u8x32_from_halves(b, (u8x16)((u16x8)b >> 4)) & 15;
}
INLINE f32x8 f32x8_load(const void *p) { f32x8 v; memcpy(&v, p, 32); return v; }
INLINE f32x8 f32x8_set(float x) { return x - (f32x8){0}; }
INLINE f32x8 f32x8_from_i(i32x8 a) { return __builtin_convertvector(a, f32x8); }

// Scalars of the formats. The compiler turns these into single instructions where the ISA has them (f16_to_f32 is per ISA).
INLINE float bf16_to_f32(bf16 h) { uint32_t u = (uint32_t)h.bits << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE float e8m0_to_f32_half(e8m0 e) {   // half of 2^(e - 127), whatever e: goes with the doubled fp4_values
    uint32_t u = e.bits < 2 ? 0x00200000u << e.bits : (uint32_t)(e.bits - 1) << 23;
    float f; memcpy(&f, &u, 4); return f;
}
INLINE float ue4m3_to_f32_half(ue4m3 e) { // halved likewise; 0x7f, a NaN elsewhere, reads as 0, and the sign bit is ignored
    if (e.bits == 0x7f) return 0.0f;
    uint32_t exponent = e.bits >> 3 & 15, mantissa = e.bits & 7;
    if (exponent == 0) return (float)mantissa * 0x1p-10f;
    uint32_t u = (exponent + 119) << 23 | mantissa << 20;
    float f; memcpy(&f, &u, 4); return f;
}
INLINE bf16 f32_to_bf16(float f) {         // round to nearest, ties to even; a NaN stays one and becomes quiet
    uint32_t u; memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (bf16){u >> 16 | 64};
    return (bf16){(u + 0x7fff + (u >> 16 & 1)) >> 16};
}

// e^x to about 1 ulp for x in [-87, 88], 0 below. Cody-Waite reduction and a degree-5 polynomial (Cephes coefficients).
INLINE vf vf_exp(vf x) {
    x = vf_min(x, vf_set(88.0f));
    vi dead = x < -87.3f;                  // also keeps 2^n out of the denormals
    vf n = vf_round(x * 1.44269504088896341f);
    vf r = vf_fma(n, vf_set(-0.693359375f), x);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, r * r, r + 1.0f);
    vi scale = (__builtin_convertvector(n, vi) + 127) << 23;
    return (vf)((vi)(p * (vf)scale) & ~dead);
}

// ---- activation functions ---------------------------------------------------------------------------------------------------
INLINE vf vf_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }
INLINE vf vf_tanh(vf x) { return 2.0f * vf_sigmoid(2.0f * x) - 1.0f; }

// ---- the first n lanes (n < VL): for the end of a row -------------------------------------------------------------------------
INLINE vf vf_load_first(const void *p, int64_t n) { vf v = {0}; memcpy(&v, p, n * sizeof(float)); return v; }
INLINE void vf_store_first(void *p, vf v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

// ---- groups of `rep` neighbouring lanes (a power of two, a constant where these are called); vf_swap is per ISA ------------------
INLINE vf vf_group_sum(vf v, int rep) {         // every lane gets the sum over its group
    if (rep > 1) v += vf_swap(v, 1);
    if (rep > 2) v += vf_swap(v, 2);
    if (rep > 4) v += vf_swap(v, 4);
    if (rep > 8) v += vf_swap(v, 8);
    return v;
}

// 2^x for x <= 0 (or not far above), and 0 below 2^-125. Adding 1.5 * 2^23 rounds x to a whole number n and leaves it in the low bits; 2^(x - n) is
// a polynomial fitted for least relative error on [-1/2, 1/2]: 1e-7, or with `coarse` 1e-4, a twentieth of what bf16 rounds away.
INLINE vf vf_exp2_below(vf x, int coarse) {
    const float whole = 12582912.0f;
    vi dead = x < -125.0f;
    vf shifted = x + whole, r = x - (shifted - whole), p;
    if (coarse) {
        p = vf_fma(r, vf_set(5.500875e-2f), vf_set(2.4221097e-1f));
        p = vf_fma(p, r, vf_set(6.9328296e-1f));
    } else {
        p = vf_fma(r, vf_set(1.3264697e-3f), vf_set(9.671513e-3f));
        p = vf_fma(p, r, vf_set(5.5507340e-2f));
        p = vf_fma(p, r, vf_set(2.4022242e-1f));
        p = vf_fma(p, r, vf_set(6.9314700e-1f));
    }
    p = vf_fma(p, r, vf_set(1.0f));
    return (vf)(((vi)p + ((vi)shifted << 23)) & ~dead);
}

// ---- pairs of bf16, the even one in the lower half of a lane ------------------------------------------------------------------------
INLINE vi vi_round_bf16(vf v) {                 // to nearest even, as an int32 whose upper half is the bf16 (the lower half is noise)
    vi u = (vi)v;
    return u + 0x7fff + ((u >> 16) & 1);
}
typedef int16_t vi_half __attribute__((vector_size(2 * VL)));
INLINE vi vi_round_or_nan_bf16(vf v) {          // the same, but a NaN stays one
    vi nan = v != v;
    return (vi_round_bf16(v) & ~nan) | (((vi)v | 0x400000) & nan);
}
INLINE void vf_to_bf16(void *p, vf v) {         // VL bf16 at p
    vi_half h = __builtin_convertvector(vi_round_or_nan_bf16(v) >> 16, vi_half);
    memcpy(p, &h, sizeof h);
}
#if !PACKS_MANY
INLINE void vi_to_i8x32(void *p, const vi v[32 / VL]) { UNROLL(8) for (int i = 0; i < 32 / VL; i++) vi_to_i8((char *)p + VL * i, v[i]); }
INLINE void vi_upper_to_u16(void *p, vi a, vi b) {
    vi_half low = __builtin_convertvector(a >> 16, vi_half), high = __builtin_convertvector(b >> 16, vi_half);
    memcpy(p, &low, sizeof low);
    memcpy((char *)p + sizeof low, &high, sizeof high);
}
INLINE void vf2_from_bf16(const void *p, vf v[2]) {
    v[0] = vf_from_bf16(p);
    v[1] = vf_from_bf16((const char *)p + 2 * VL);
}
#endif
#ifndef NATIVE_BF16
enum { NATIVE_BF16 = 0 };
INLINE vf vf_pair_bf16(vf even, vf odd) {       // lane i: even[i] and odd[i]
    return (vf)(((vi_round_bf16(even) >> 16) & 0xffff) | (vi_round_bf16(odd) & (int32_t)0xffff0000));
}
INLINE vf vf_pack_bf16(vf low, vf high) {       // neighbours pair up: low[0] and low[1], low[2] and low[3], ... high[0] and high[1], ...
    vf packed;
    vf_to_bf16(&packed, low);
    vf_to_bf16((char *)&packed + 2 * VL, high);
    return packed;
}
INLINE vf vf_dot_bf16(vf acc, vf a, vf b) {     // acc + a.even * b.even + a.odd * b.odd
    acc = vf_fma((vf)((vi)a << 16), (vf)((vi)b << 16), acc);
    return vf_fma((vf)((vi)a & (int32_t)0xffff0000), (vf)((vi)b & (int32_t)0xffff0000), acc);
}
#endif

// ---- a matrix unit: products of bf16 in squares of 16 --------------------------------------------------------------------------------
// A square is 1 KB: of activations 16 columns x 32 k, of weights [k / 2][16 rows][2 k], of sums float [column][row].
//   matrix_begin(before), matrix_end(before)      around products, in each thread; before: how the unit was set up for others
//   matrix_block(parts, a, b, steps, from, to)
//       c[i][j] = from[i][j] + sum over steps of a[i] x b[j], i and j in 0 .. 1, stored to `to`; from NULL: zero.
//       The squares of a step follow those of the one before. parts 2: a value is the sum of two bf16, the higher one in the first
//       of two squares; the product of the lower ones is left out.
enum { MATRIX_SIDE = 16, MATRIX_DEPTH = 32, MATRIX_SQUARE = 1024 };
INLINE matrix_sums squares_at(float *c) {                           // one after another
    return (matrix_sums){{{c, c + 256}, {c + 512, c + 768}}, 64};
}
INLINE matrix_sums columns_at(float *c, int64_t line) {             // 32 rows of 32 columns, these `line` bytes apart
    float *next = (float *)((char *)c + MATRIX_SIDE * line);
    return (matrix_sums){{{c, c + MATRIX_SIDE}, {next, next + MATRIX_SIDE}}, line};
}
#define PAIR_OF_ONES vi_set(0x00010001)    // a factor for mac_close
#ifndef SPREADS                            // 1: sums of products are of 16 bits, and tiles are spread for large batches, see kernels/spread.h
#define SPREADS 0
#endif
#ifndef MATRIX_UNIT
enum { MATRIX_UNIT = 0 };
typedef char matrix_shape;
INLINE void matrix_begin(matrix_shape *before) { *before = 0; }
INLINE void matrix_end(const matrix_shape *before) { (void)before; }
INLINE void matrix_block(const int parts, const char *const a[2], const char *const b[2], int64_t steps, const matrix_sums *from, const matrix_sums *to) {
    (void)parts, (void)a, (void)b, (void)steps, (void)from, (void)to;
}
#endif
