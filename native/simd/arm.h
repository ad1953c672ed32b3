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
static inline vf vf_from_bf16(const void *p) { uint16x4_t h; memcpy(&h, p, 8); return (vf)vshll_n_u16(h, 16); }
static inline vf vf_max(vf a, vf b) { return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vf vf_min(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
static inline vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
static inline vf vf_round(vf a) { return (vf)vrndnq_f32((float32x4_t)a); }
static inline vi vi_round(vf a) { return (vi)vcvtnq_s32_f32((float32x4_t)a); }
static inline float vf_sum(vf a) { return vaddvq_f32((float32x4_t)a); }
static inline float vf_hmax(vf a) { return vmaxvq_f32((float32x4_t)a); }
static inline int32_t vi_sum(vi a) { return vaddvq_s32((int32x4_t)a); }
static inline vi vi_from_i8(const void *p) { int8x8_t b = vcreate_s8(0); memcpy(&b, p, 4); return (vi)vmovl_s16(vget_low_s16(vmovl_s8(b))); }
static inline vi vi_from_u8(const void *p) { uint8x8_t b = vcreate_u8(0); memcpy(&b, p, 4); return (vi)vmovl_u16(vget_low_u16(vmovl_u8(b))); }
static inline vi vi_from_i16(const void *p) { int16x4_t b; memcpy(&b, p, 8); return (vi)vmovl_s16(b); }
static inline vi vi_dot_u7(vi acc, vi w, vi a) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)a); }
static inline vi vi_dot_s8(vi acc, vi w, vi a) { return vi_dot_u7(acc, (vi)veorq_u8((uint8x16_t)w, vdupq_n_u8(0x80)), a); }
static inline vi vi_dot_i16(vi acc, vi w, vi a) {
    int32x4_t p = vmull_s16(vget_low_s16((int16x8_t)w), vget_low_s16((int16x8_t)a));
    int32x4_t q = vmull_high_s16((int16x8_t)w, (int16x8_t)a);
    return acc + (vi)vpaddq_s32(p, q);
}

// ---- for packed matmuls: bytes in, bytes out ------------------------------------------------------------------------------
static inline void vi_to_i8(void *p, vi v) {
    int8x8_t b = vmovn_s16(vcombine_s16(vmovn_s32((int32x4_t)v), vdup_n_s16(0)));
    memcpy(p, &b, 4);
}
static inline vi vi_pairs_from_u8(const void *p) { return (vi)vmovl_u8(vld1_u8(p)); }
static inline vi vi_lookup(const int8_t table[16], vi index) { return (vi)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)index); }
static inline vi vi_set4_shift(const void *p, int n) { int32_t x; memcpy(&x, p, 4); return x * (1 << n) - (vi){0}; }     // 4 bytes << n in every lane
// A sum of byte products in the making, for w below 2^bits: open, a few mac, close. Here every step is already a full sum.
static inline int mac_steps(int bits) { (void)bits; return 8; }
static inline vi mac_open(vi c) { return c; }
static inline vi mac(vi sum, vi w, vi a) { return vi_dot_u7(sum, w, a); }
static inline vi mac_close(vi c, vi sum) { (void)c; return sum; }
