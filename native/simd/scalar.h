// The portable vocabulary: 16-byte compiler vectors, which every target has in some form, and plain C for the rest.
#pragma once
enum { VL = 4 };
typedef float   vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));

static inline float f16_to_f32(f16 h) {
    uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, body = h.bits & 0x7fff, u;
    if (body >= 0x7c00) u = 0x7f800000 | (body & 0x3ff) << 13 | (body & 0x3ff ? 0x400000 : 0);   // infinity, NaN (made quiet, as F16C does)
    else if (body >= 0x400) u = (body << 13) + 0x38000000;                                        // normal
    else { float f = (float)body * 0x1p-24f; memcpy(&u, &f, 4); }                                 // zero, denormal
    u |= sign;
    float f; memcpy(&f, &u, 4);
    return f;
}
static inline f16 f32_to_f16(float f) {       // round to nearest, ties to even
    uint32_t u; memcpy(&u, &f, 4);
    uint32_t sign = u >> 16 & 0x8000, body = u & 0x7fffffff;
    f16 h;
    if (body > 0x7f800000) h.bits = sign | 0x7e00 | (body >> 13 & 0x3ff);
    else if (body >= 0x477ff000) h.bits = sign | 0x7c00;
    else if (body < 0x38800000) {             // denormal: let the float adder round
        float x; memcpy(&x, &body, 4); x += 0.5f;
        uint32_t r; memcpy(&r, &x, 4);
        h.bits = sign | (r - 0x3f000000);
    } else h.bits = sign | ((body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13);
    return h;
}
static inline vf vf_from_f16(const void *p) { const f16 *h = p; return (vf){f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])}; }
static inline void vf_to_f16(void *p, vf v) { f16 *h = p; for (int i = 0; i < VL; i++) h[i] = f32_to_f16(v[i]); }
static inline void vf_stream(void *p, vf v) { memcpy(p, &v, sizeof v); }
static inline vf vf_from_bf16(const void *p) { uint16_t h[4]; memcpy(h, p, 8); return (vf)(vi){h[0] << 16, h[1] << 16, h[2] << 16, (int32_t)((uint32_t)h[3] << 16)}; }
static inline vf vf_max(vf a, vf b) { for (int i = 0; i < VL; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
static inline vf vf_min(vf a, vf b) { for (int i = 0; i < VL; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
static inline vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vf_round(vf a) { for (int i = 0; i < VL; i++) a[i] = nearbyintf(a[i]); return a; }
static inline vf vf_sqrt(vf a) { for (int i = 0; i < VL; i++) a[i] = sqrtf(a[i]); return a; }
static inline vf vf_zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
static inline vf vf_zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
static inline vf vf_lookup16(const float table[16], vi index) { return (vf){table[index[0]], table[index[1]], table[index[2]], table[index[3]]}; }
static inline vi vi_round(vf a) { vi r; for (int i = 0; i < VL; i++) r[i] = (int32_t)nearbyintf(a[i]); return r; }
static inline float vf_sum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float vf_hmax(vf a) { float m = a[0]; for (int i = 1; i < VL; i++) m = a[i] > m ? a[i] : m; return m; }
static inline int32_t vi_sum(vi a) { return a[0] + a[1] + a[2] + a[3]; }
static inline vi vi_from_i8(const void *p) { const int8_t *b = p; return (vi){b[0], b[1], b[2], b[3]}; }
static inline vi vi_from_u8(const void *p) { const uint8_t *b = p; return (vi){b[0], b[1], b[2], b[3]}; }
static inline vi vi_from_i16(const void *p) { int16_t b[4]; memcpy(b, p, 8); return (vi){b[0], b[1], b[2], b[3]}; }
static inline void vi_to_i8(void *p, vi v) { int8_t *b = p; for (int i = 0; i < VL; i++) b[i] = v[i]; }
static inline void vi_to_u8(void *p, vi v) { uint8_t *b = p; for (int i = 0; i < VL; i++) b[i] = v[i]; }
static inline vi vi_min(vi a, vi b) { for (int i = 0; i < VL; i++) a[i] = a[i] < b[i] ? a[i] : b[i]; return a; }
static inline vi vi_max(vi a, vi b) { for (int i = 0; i < VL; i++) a[i] = a[i] > b[i] ? a[i] : b[i]; return a; }
static inline uint32_t vi_signs(vi v) { uint32_t r = 0; for (int i = 0; i < VL; i++) r |= (uint32_t)(v[i] < 0) << i; return r; }      // bit i: lane i is negative

// acc[lane] += sum over the lane's 4 bytes of w * a.  _u7: w in 0..127;  _s8: w is a signed byte stored plus 128 (see S8_BIAS)
static inline vi vi_dot_u7(vi acc, vi w, vi a) {
    int8_t x[16], y[16]; memcpy(x, &w, 16); memcpy(y, &a, 16);
    for (int i = 0; i < VL; i++) acc[i] += x[4*i]*y[4*i] + x[4*i+1]*y[4*i+1] + x[4*i+2]*y[4*i+2] + x[4*i+3]*y[4*i+3];
    return acc;
}
enum { S8_BIAS = 0 };          // what vi_dot_s8 leaves multiplied by the sum of a: 0 means the true signed product
static inline vi vi_dot_s8(vi acc, vi w, vi a) { return vi_dot_u7(acc, w ^ (int32_t)0x80808080, a); }
static inline vi vi_dot_i16(vi acc, vi w, vi a) {   // pairs of int16
    int16_t x[8], y[8]; memcpy(x, &w, 16); memcpy(y, &a, 16);
    for (int i = 0; i < VL; i++) acc[i] += x[2*i]*y[2*i] + x[2*i+1]*y[2*i+1];
    return acc;
}

// ---- 32 bytes, 8 lanes: acc lane i takes bytes 4i .. 4i + 3 ------------------------------------------------------------------
INLINE i32x8 dot_s8x32(u8x32 w, i8x32 a) {      // signed bytes (the bits of w)
    i32x8 r = {0};
    for (int i = 0; i < 32; i++) r[i / 4] += (int8_t)w[i] * a[i];
    return r;
}
INLINE i32x8 dot_u7x32(u8x32 w, i8x32 a) { return dot_s8x32(w, a); }                       // w in 0..127
INLINE i32x8 dot_biased(u8x32 w, int zero, i8x32 a) { return dot_s8x32(w - (uint8_t)zero, a); }   // sum of (w - zero) * a
INLINE f32x8 f32x8_fma(f32x8 a, f32x8 b, f32x8 c) { return a * b + c; }
INLINE float f32x8_sum(f32x8 a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
INLINE f32x8 f32x8_pair(const float *p) { return (f32x8){p[0], p[0], p[0], p[0], p[1], p[1], p[1], p[1]}; }
INLINE i32x8 i32x8_from_u8(const void *p) { const uint8_t *b = p; i32x8 r; for (int i = 0; i < 8; i++) r[i] = b[i]; return r; }
INLINE i32x8 i32x8_from_i8(const void *p) { const int8_t *b = p; i32x8 r; for (int i = 0; i < 8; i++) r[i] = b[i]; return r; }
INLINE i32x8 i32x8_from_i16(const void *p) { int16_t b[8]; memcpy(b, p, 16); i32x8 r; for (int i = 0; i < 8; i++) r[i] = b[i]; return r; }
INLINE i32x8 i32x8_pairs_i16(const void *p) { int16_t b[16]; memcpy(b, p, 32); i32x8 r; for (int i = 0; i < 8; i++) r[i] = b[2 * i] + b[2 * i + 1]; return r; }
INLINE u8x32 u8x32_lookup(const int8_t *table, u8x32 index) { u8x32 r; for (int i = 0; i < 32; i++) r[i] = table[index[i]]; return r; }   // 16 entries
INLINE u8x32 u8x32_mask(uint32_t bits) {        // 0xff where the bit is set
    u8x32 r;
    for (int i = 0; i < 32; i++) r[i] = -(bits >> i & 1);
    return r;
}

// ---- for packed matmuls: bytes in, bytes out ------------------------------------------------------------------------------
static inline vi vi_pairs_from_u8(const void *p) { const uint8_t *b = p; return (vi){b[0] | b[1] << 16, b[2] | b[3] << 16, b[4] | b[5] << 16, b[6] | b[7] << 16}; }
static inline vi vi_lookup(const int8_t table[16], vi index) {     // each byte of index (0..15) replaced by its entry
    int8_t x[16]; memcpy(x, &index, 16);
    for (int i = 0; i < 16; i++) x[i] = table[x[i]];
    vi v; memcpy(&v, x, 16);
    return v;
}
static inline vi vi_set4_shift(const void *p, int n) { int32_t x; memcpy(&x, p, 4); return (n < 0 ? x >> -n : x * (1 << n)) - (vi){0}; }     // 4 bytes << n in every lane
// A sum of byte products in the making, for w below 2^bits: open, a few mac, close. Here every step is already a full sum.
enum { MAC_WHOLE_BYTES = 0 };
static inline int mac_steps(int bits) { (void)bits; return 8; }
static inline vi mac_open(vi c) { return c; }
static inline vi mac(vi sum, vi w, vi a) { return vi_dot_u7(sum, w, a); }
static inline vi mac_close(vi c, vi sum, vi factor) { (void)c, (void)factor; return sum; }

// ---- lanes repeated and swapped, for attention (see x86.h) -----------------------------------------------------------------------
enum { VREGS = 16 };
static inline vf vf_repeat(const float *p, int n) { return (vf){p[0], p[n > 1], p[n > 2 ? 2 : 0], p[n > 2 ? 3 : n > 1]}; }
static inline vf vf_swap(vf v, int n) { return n == 1 ? (vf){v[1], v[0], v[3], v[2]} : (vf){v[2], v[3], v[0], v[1]}; }
