// NEON with the dot-product extension (4 lanes).
#pragma once
#include <arm_neon.h>
enum { VL = 4, S8_BIAS = 0 };
typedef float   vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
static inline float f16_to_f32(f16 h) { __fp16 x; memcpy(&x, &h, 2); return x; }
static inline f16 f32_to_f16(float f) { __fp16 x = f; f16 h; memcpy(&h, &x, 2); return h; }
static inline vf vf_from_f16(const void *p) { float16x4_t h; memcpy(&h, p, 8); return (vf)vcvt_f32_f16(h); }
static inline void vf_to_f16(void *p, vf v) { float16x4_t h = vcvt_f16_f32((float32x4_t)v); memcpy(p, &h, 8); }
static inline void vf_stream(void *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf vf_from_bf16(const void *p) { uint16x4_t h; memcpy(&h, p, 8); return (vf)vshll_n_u16(h, 16); }
static inline vf vf_max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vf vf_min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline vf vf_round(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
static inline vf vf_sqrt(vf a) { return (vf)vsqrtq_f32((float32x4_t)a); }
static inline vf vf_zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline vf vf_zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
static inline vf vf_lookup16(const float table[16], vi index) { return (vf){table[index[0]], table[index[1]], table[index[2]], table[index[3]]}; }
static inline vi vi_round(vf a) { return (vi)vcvtnq_s32_f32((float32x4_t)a); }
static inline float vf_sum(vf a) { return vaddvq_f32((float32x4_t)a); }
static inline float vf_hmax(vf a) { return vmaxvq_f32((float32x4_t)a); }
static inline int32_t vi_sum(vi a) { return vaddvq_s32((int32x4_t)a); }
static inline vi vi_from_i8(const void *p) { int8x8_t b = vcreate_s8(0); memcpy(&b, p, 4); return (vi)vmovl_s16(vget_low_s16(vmovl_s8(b))); }
static inline vi vi_from_u8(const void *p) { uint8x8_t b = vcreate_u8(0); memcpy(&b, p, 4); return (vi)vmovl_u16(vget_low_u16(vmovl_u8(b))); }
static inline vi vi_from_i16(const void *p) { int16x4_t b; memcpy(&b, p, 8); return (vi)vmovl_s16(b); }
static inline void vi_to_i8(void *p, vi v) { int16x4_t h = vmovn_s32((int32x4_t)v); int8x8_t b = vmovn_s16(vcombine_s16(h, h)); memcpy(p, &b, 4); }
static inline void vi_to_u8(void *p, vi v) { vi_to_i8(p, v); }
static inline vi vi_min(vi a, vi b) { return (vi)vminq_s32((int32x4_t)a, (int32x4_t)b); }
static inline vi vi_max(vi a, vi b) { return (vi)vmaxq_s32((int32x4_t)a, (int32x4_t)b); }
static inline uint32_t vi_signs(vi v) { return vaddvq_u32(vshlq_u32(vshrq_n_u32((uint32x4_t)v, 31), (int32x4_t){0, 1, 2, 3})); }      // bit i: lane i is negative
static inline vi vi_dot_u7(vi acc, vi w, vi a) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)a); }
static inline vi vi_dot_s8(vi acc, vi w, vi a) { return vi_dot_u7(acc, (vi)veorq_u8((uint8x16_t)w, vdupq_n_u8(0x80)), a); }
static inline vi vi_dot_i16(vi acc, vi w, vi a) {
    int32x4_t p = vmull_s16(vget_low_s16((int16x8_t)w), vget_low_s16((int16x8_t)a));
    int32x4_t q = vmull_high_s16((int16x8_t)w, (int16x8_t)a);
    return acc + (vi)vpaddq_s32(p, q);
}

// ---- 32 bytes, 8 lanes: acc lane i takes bytes 4i .. 4i + 3 ------------------------------------------------------------------
#define LOW(T, v) ({ T low_; memcpy(&low_, &(v), 16); low_; })
#define HIGH(T, v) ({ T high_; memcpy(&high_, (const char *)&(v) + 16, 16); high_; })
#define JOIN(T, a, b) ({ T joined_; __auto_type a_ = (a); __auto_type b_ = (b); memcpy(&joined_, &a_, 16); memcpy((char *)&joined_ + 16, &b_, 16); joined_; })
INLINE i32x8 dot_s8x32(u8x32 w, i8x32 a) {      // signed bytes (the bits of w)
    int32x4_t zero = vdupq_n_s32(0);
    return JOIN(i32x8, vdotq_s32(zero, LOW(int8x16_t, w), LOW(int8x16_t, a)), vdotq_s32(zero, HIGH(int8x16_t, w), HIGH(int8x16_t, a)));
}
INLINE i32x8 dot_u7x32(u8x32 w, i8x32 a) { return dot_s8x32(w, a); }                       // w in 0..127
INLINE i32x8 dot_biased(u8x32 w, int zero, i8x32 a) { return dot_s8x32(w - (uint8_t)zero, a); }   // sum of (w - zero) * a
INLINE f32x8 f32x8_fma(f32x8 a, f32x8 b, f32x8 c) {
    return JOIN(f32x8, vfmaq_f32(LOW(float32x4_t, c), LOW(float32x4_t, a), LOW(float32x4_t, b)), vfmaq_f32(HIGH(float32x4_t, c), HIGH(float32x4_t, a), HIGH(float32x4_t, b)));
}
INLINE float f32x8_sum(f32x8 a) { return vaddvq_f32(vaddq_f32(LOW(float32x4_t, a), HIGH(float32x4_t, a))); }
INLINE f32x8 f32x8_pair(const float *p) { return JOIN(f32x8, vld1q_dup_f32(p), vld1q_dup_f32(p + 1)); }
INLINE i32x8 i32x8_widen(int16x8_t h) { return JOIN(i32x8, vmovl_s16(vget_low_s16(h)), vmovl_s16(vget_high_s16(h))); }
INLINE i32x8 i32x8_from_u8(const void *p) { return i32x8_widen(vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p)))); }
INLINE i32x8 i32x8_from_i8(const void *p) { return i32x8_widen(vmovl_s8(vld1_s8(p))); }
INLINE i32x8 i32x8_from_i16(const void *p) { int16x8_t h; memcpy(&h, p, 16); return i32x8_widen(h); }
INLINE i32x8 i32x8_pairs_i16(const void *p) {
    int16x8_t h[2];
    memcpy(h, p, 32);
    return JOIN(i32x8, vpaddlq_s16(h[0]), vpaddlq_s16(h[1]));
}
INLINE u8x32 u8x32_lookup(const int8_t *table, u8x32 index) {       // 16 entries
    int8x16_t t = vld1q_s8(table);
    return JOIN(u8x32, vqtbl1q_s8(t, LOW(uint8x16_t, index)), vqtbl1q_s8(t, HIGH(uint8x16_t, index)));
}
INLINE u8x32 u8x32_mask(uint32_t bits) {        // 0xff where the bit is set
    const u64x4 bit = (u64x4){0} + 0x8040201008040201ull;
    u64x4 bytes = (u64x4){bits & 255, bits >> 8 & 255, bits >> 16 & 255, bits >> 24} * 0x0101010101010101ull;
    return (u8x32)((u8x32)(bytes & bit) == (u8x32)bit);
}
#undef LOW
#undef HIGH
#undef JOIN

// ---- for packed matmuls: bytes in, bytes out ------------------------------------------------------------------------------
static inline vi vi_pairs_from_u8(const void *p) { return (vi)vmovl_u8(vld1_u8(p)); }
static inline vi vi_lookup(const int8_t table[16], vi index) { return (vi)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)index); }
static inline vi vi_set4_shift(const void *p, int n) { int32_t x; memcpy(&x, p, 4); return (n < 0 ? x >> -n : x * (1 << n)) - (vi){0}; }     // 4 bytes << n in every lane
// A sum of byte products in the making, for w below 2^bits: open, a few mac, close. Here every step is already a full sum.
enum { MAC_WHOLE_BYTES = 0 };
static inline int mac_steps(int bits) { (void)bits; return 8; }
static inline vi mac_open(vi c) { return c; }
static inline vi mac(vi sum, vi w, vi a) { return vi_dot_u7(sum, w, a); }
static inline vi mac_close(vi c, vi sum, vi factor) { (void)c, (void)factor; return sum; }

// ---- lanes repeated and swapped, for attention (see x86.h) -----------------------------------------------------------------------
enum { VREGS = 32 };
static inline vf vf_repeat(const float *p, int n) {
    if (n == 1) return (vf)vld1q_dup_f32(p);
    if (n == 2) return (vf)vcombine_f32(vld1_f32(p), vld1_f32(p));
    return (vf)vld1q_f32(p);
}
static inline vf vf_swap(vf v, int n) { return n == 1 ? (vf)vrev64q_f32((float32x4_t)v) : (vf)vextq_f32((float32x4_t)v, (float32x4_t)v, 2); }
