// AVX2 and AVX-VNNI (8 lanes), AVX-512 with VNNI (16 lanes), the matrix unit of AMX.
#pragma once
#include <immintrin.h>
static inline float f16_to_f32(f16 h) { return _cvtsh_ss(h.bits); }
static inline f16 f32_to_f16(float f) { return (f16){_cvtss_sh(f, 0)}; }

#if defined ISA_avx512 || defined ISA_avx512bf16 || defined ISA_amx
#define SIMD_512
#endif

// A build may have the 32-byte form of vpdpbusd under either of its encodings: see PYGGML_EVEX_AVXVNNI in build.py.
#if defined __AVXVNNI__
#define DPBUSD(c, w, a) _mm256_dpbusd_avx_epi32(c, w, a)
#define DPWSSD(c, w, a) _mm256_dpwssd_avx_epi32(c, w, a)
#elif defined __AVX512VNNI__
#define DPBUSD(c, w, a) _mm256_dpbusd_epi32(c, w, a)
#define DPWSSD(c, w, a) _mm256_dpwssd_epi32(c, w, a)
#endif

#if defined SIMD_512
enum { VL = 16, S8_BIAS = 128 };
typedef float   vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
static inline vf vf_from_f16(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
static inline void vf_to_f16(void *p, vf v) { _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)v, 0)); }
static inline void vf_stream(void *p, vf v) { _mm512_stream_ps(p, (__m512)v); }
static inline vf vf_from_bf16(const void *p) { return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16); }
static inline vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vf vf_min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
static inline vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
static inline vf vf_round(vf a) { return (vf)_mm512_roundscale_ps((__m512)a, 0); }
static inline vf vf_sqrt(vf a) { return (vf)_mm512_sqrt_ps((__m512)a); }
static inline vf vf_zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
static inline vf vf_zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
static inline vf vf_lookup16(const float table[16], vi index) { return (vf)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table)); }
static inline vi vi_round(vf a) { return (vi)_mm512_cvtps_epi32((__m512)a); }
static inline float vf_sum(vf a) { return _mm512_reduce_add_ps((__m512)a); }
static inline float vf_hmax(vf a) { return _mm512_reduce_max_ps((__m512)a); }
static inline int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32((__m512i)a); }
static inline vi vi_from_i8(const void *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
static inline vi vi_from_u8(const void *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
static inline vi vi_from_i16(const void *p) { return (vi)_mm512_cvtepi16_epi32(_mm256_loadu_si256(p)); }
static inline void vi_to_i8(void *p, vi v) { _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)v)); }
static inline void vi_to_u8(void *p, vi v) { vi_to_i8(p, v); }
static inline vi vi_min(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
static inline vi vi_max(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline uint32_t vi_signs(vi v) { return _mm512_movepi32_mask((__m512i)v); }      // bit i: lane i is negative
// vpdpbusd takes unsigned x signed, so a biased signed byte needs no repair: the caller starts acc at -128 * sum(a)
static inline vi vi_dot_u7(vi acc, vi w, vi a) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)a); }
static inline vi vi_dot_s8(vi acc, vi w, vi a) { return vi_dot_u7(acc, w, a); }
static inline vi vi_dot_i16(vi acc, vi w, vi a) { return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)w, (__m512i)a); }
// ---- for packed matmuls: bytes in, bytes out ------------------------------------------------------------------------------
// (the operators would shift in a general register first, which costs a slow move per lane vector)
static inline __attribute__((always_inline)) vi vi_set4_shift(const void *p, const int n) {
    int32_t x;
    memcpy(&x, p, 4);
    return (vi)(n < 0 ? _mm512_srai_epi32(_mm512_set1_epi32(x), -n) : _mm512_slli_epi32(_mm512_set1_epi32(x), n));
}
// A sum of byte products in the making, for w below 2^bits: open, a few mac, close. Here every step is already a full sum.
enum { MAC_WHOLE_BYTES = 1 };                       // and w may be any unsigned byte
static inline int mac_steps(int bits) { (void)bits; return 8; }
static inline vi mac_open(vi c) { return c; }
static inline vi mac(vi sum, vi w, vi a) { return vi_dot_u7(sum, w, a); }
static inline vi mac_close(vi c, vi sum, vi factor) { (void)c, (void)factor; return sum; }
static inline vi vi_pairs_from_u8(const void *p) { return (vi)_mm512_cvtepu8_epi16(_mm256_loadu_si256(p)); }
static inline vi vi_lookup(const int8_t table[16], vi index) {
    return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table)), (__m512i)index);
}
#else
enum { VL = 8 };
typedef float   vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
static inline vf vf_from_f16(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
static inline void vf_to_f16(void *p, vf v) { _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)v, 0)); }
static inline void vf_stream(void *p, vf v) { _mm256_stream_ps(p, (__m256)v); }
static inline vf vf_from_bf16(const void *p) { return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16); }
static inline vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline vf vf_min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
static inline vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static inline vf vf_round(vf a) { return (vf)_mm256_round_ps((__m256)a, 0); }
static inline vf vf_sqrt(vf a) { return (vf)_mm256_sqrt_ps((__m256)a); }
static inline vf vf_zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
static inline vf vf_zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
static inline vf vf_lookup16(const float table[16], vi index) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
}
static inline vi vi_round(vf a) { return (vi)_mm256_cvtps_epi32((__m256)a); }
static inline float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline float vf_hmax(vf a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
static inline int32_t vi_sum(vi a) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
    s = _mm_add_epi32(s, _mm_unpackhi_epi64(s, s));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 1)));
}
static inline vi vi_from_i8(const void *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
static inline vi vi_from_u8(const void *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
static inline vi vi_from_i16(const void *p) { return (vi)_mm256_cvtepi16_epi32(_mm_loadu_si128(p)); }
static inline void vi_to_i8(void *p, vi v) {    // values that fit
    __m128i h = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64(p, _mm_packs_epi16(h, h));
}
static inline void vi_to_u8(void *p, vi v) {
    __m128i h = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64(p, _mm_packus_epi16(h, h));
}
// many at once cost half the instructions of one vector after the other
#define PACKS_MANY 1
static inline void vi_to_i8x32(void *p, const vi v[4]) {
    __m256i low = _mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]), high = _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);            // packing works on halves of a register
    _mm256_storeu_si256(p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
static inline void vi_upper_to_u16(void *p, vi a, vi b) {       // the upper halves of the lanes
    __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32((__m256i)a, 16), _mm256_srli_epi32((__m256i)b, 16));
    _mm256_storeu_si256(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
static inline void vf2_from_bf16(const void *p, vf v[2]) {
    __m256i x = _mm256_permute4x64_epi64(_mm256_loadu_si256(p), 0xd8), zero = _mm256_setzero_si256();
    v[0] = (vf)_mm256_unpacklo_epi16(zero, x);
    v[1] = (vf)_mm256_unpackhi_epi16(zero, x);
}
static inline vi vi_min(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
static inline vi vi_max(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
static inline uint32_t vi_signs(vi v) { return _mm256_movemask_ps((__m256)v); }
#if defined DPBUSD
enum { S8_BIAS = 128, MAC_WHOLE_BYTES = 1 };
static inline vi vi_dot_u7(vi acc, vi w, vi a) { return (vi)DPBUSD((__m256i)acc, (__m256i)w, (__m256i)a); }
static inline vi vi_dot_s8(vi acc, vi w, vi a) { return vi_dot_u7(acc, w, a); }
static inline vi vi_dot_i16(vi acc, vi w, vi a) { return (vi)DPWSSD((__m256i)acc, (__m256i)w, (__m256i)a); }
static inline int mac_steps(int bits) { (void)bits; return 8; }
static inline vi mac_open(vi c) { return c; }
static inline vi mac(vi sum, vi w, vi a) { return vi_dot_u7(sum, w, a); }
static inline vi mac_close(vi c, vi sum, vi factor) { (void)c, (void)factor; return sum; }
#else
enum { S8_BIAS = 0, MAC_WHOLE_BYTES = 0 };
#define SPREADS 1
// vpmaddubsw adds two products in 16 bits: 127 * 127 * 2 fits, a full unsigned byte does not, hence the sign trick in _s8
static inline vi vi_dot_u7(vi acc, vi w, vi a) {
    return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)a), _mm256_set1_epi16(1));
}
static inline vi vi_dot_s8(vi acc, vi w, vi a) {
    __m256i s = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
    return vi_dot_u7(acc, (vi)_mm256_abs_epi8(s), (vi)_mm256_sign_epi8((__m256i)a, s));
}
static inline vi vi_dot_i16(vi acc, vi w, vi a) { return acc + (vi)_mm256_madd_epi16((__m256i)w, (__m256i)a); }
// A sum of byte products in the making, for w below 2^bits: open, up to mac_steps times mac, close. It stays in 16 bits as long as
// 2 * 127 * (2^bits - 1) * steps fits, and what widens it is a product anyway: by a factor, the same in both halves of a lane.
static inline int mac_steps(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }
static inline vi mac_open(vi c) { (void)c; return (vi)_mm256_setzero_si256(); }
static inline vi mac_first(vi w, vi a) { return (vi)_mm256_maddubs_epi16((__m256i)w, (__m256i)a); }
static inline vi mac(vi sum, vi w, vi a) {
    sum = (vi)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)a));
    IN_REGISTER(sum);
    return sum;
}
static inline vi mac_close(vi c, vi sum, vi factor) { return vi_dot_i16(c, sum, factor); }
#endif
// ---- for packed matmuls: bytes in, bytes out ------------------------------------------------------------------------------
static inline __attribute__((always_inline)) vi vi_set4_shift(const void *p, const int n) {
    int32_t x;
    memcpy(&x, p, 4);
    return (vi)(n < 0 ? _mm256_srai_epi32(_mm256_set1_epi32(x), -n) : _mm256_slli_epi32(_mm256_set1_epi32(x), n));
}
static inline vi vi_pairs_from_u8(const void *p) { return (vi)_mm256_cvtepu8_epi16(_mm_loadu_si128(p)); }
static inline vi vi_lookup(const int8_t table[16], vi index) {
    return (vi)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), (__m256i)index);
}
#endif

// ---- 32 bytes, 8 lanes: acc lane i takes bytes 4i .. 4i + 3 ------------------------------------------------------------------
#if defined DPBUSD
INLINE i32x8 dot_u7x32(u8x32 w, i8x32 a) { return (i32x8)DPBUSD(_mm256_setzero_si256(), (__m256i)w, (__m256i)a); }
// one more dpbusd costs less than taking signs apart
INLINE i32x8 dot_biased(u8x32 w, int zero, i8x32 a) { return dot_u7x32(w, a) - dot_u7x32(u8x32_set(zero), a); }
#else
INLINE i32x8 dot_u7x32(u8x32 w, i8x32 a) { return (i32x8)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)a), _mm256_set1_epi16(1)); }
INLINE i32x8 dot_biased(u8x32 w, int zero, i8x32 a) {
    __m256i d = _mm256_sub_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)a), _mm256_maddubs_epi16(_mm256_set1_epi8(zero), (__m256i)a));
    return (i32x8)_mm256_madd_epi16(d, _mm256_set1_epi16(1));
}
#endif
#if defined SIMD_512
INLINE u8x32 u8x32_mask(uint32_t bits) { return (u8x32)_mm256_movm_epi8(bits); }
#else
INLINE u8x32 u8x32_mask(uint32_t bits) {        // 0xff where the bit is set
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte);
    return (u8x32)_mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}
#endif
INLINE i32x8 dot_s8x32(u8x32 w, i8x32 a) {      // signed bytes (the bits of w); a is never -128
    return dot_u7x32((u8x32)_mm256_abs_epi8((__m256i)w), (i8x32)_mm256_sign_epi8((__m256i)a, (__m256i)w));
}
INLINE f32x8 f32x8_fma(f32x8 a, f32x8 b, f32x8 c) { return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE float f32x8_sum(f32x8 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)a), _mm256_extractf128_ps((__m256)a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE f32x8 f32x8_pair(const float *p) {       // p[0] in lanes 0..3, p[1] in lanes 4..7
    double d;
    memcpy(&d, p, 8);
    return (f32x8)_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(d)), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}
INLINE i32x8 i32x8_from_u8(const void *p) { return (i32x8)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE i32x8 i32x8_from_i8(const void *p) { return (i32x8)_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
INLINE i32x8 i32x8_from_i16(const void *p) { return (i32x8)_mm256_cvtepi16_epi32(_mm_loadu_si128(p)); }
INLINE i32x8 i32x8_pairs_i16(const void *p) { return (i32x8)_mm256_madd_epi16(_mm256_loadu_si256(p), _mm256_set1_epi16(1)); }   // sums of neighbours
INLINE u8x32 u8x32_lookup(const int8_t *table, u8x32 index) {       // 16 entries
    return (u8x32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), (__m256i)index);
}

// ---- lanes repeated and swapped, for attention ------------------------------------------------------------------------------
// vf_repeat(p, n): the n floats at p, again and again;  vf_swap(v, n): lane i gets lane i ^ n.  n is a constant power of two.
#if defined SIMD_512
enum { VREGS = 32 };
static inline __attribute__((always_inline)) vf vf_repeat(const float *p, int n) {
    if (n == 1) return (vf)_mm512_set1_ps(*p);
    if (n == 2) { double pair; memcpy(&pair, p, 8); return (vf)_mm512_set1_pd(pair); }
    if (n == 4) return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
    if (n == 8) return (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    return (vf)_mm512_loadu_ps(p);
}
static inline __attribute__((always_inline)) vf vf_swap(vf v, int n) {
    if (n == 1) return (vf)_mm512_permute_ps((__m512)v, 0xb1);
    if (n == 2) return (vf)_mm512_permute_ps((__m512)v, 0x4e);
    if (n == 4) return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
    return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
}
#if defined __AVX512BF16__
#define NATIVE_BF16 1
static inline vf vf_pack_bf16(vf low, vf high) { return (vf)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
static inline vf vf_pair_bf16(vf even, vf odd) {
    vi i = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __m512i zip = (__m512i)(i | (i + 16) << 16);            // halves i and 16 + i side by side
    return (vf)_mm512_permutexvar_epi16(zip, (__m512i)vf_pack_bf16(even, odd));
}
static inline vf vf_dot_bf16(vf acc, vf a, vf b) { return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }
#endif
#else
enum { VREGS = 16 };
static inline __attribute__((always_inline)) vf vf_repeat(const float *p, int n) {
    if (n == 1) return (vf)_mm256_set1_ps(*p);
    if (n == 2) { double pair; memcpy(&pair, p, 8); return (vf)_mm256_set1_pd(pair); }
    if (n == 4) return (vf)_mm256_broadcast_ps((const __m128 *)p);
    return (vf)_mm256_loadu_ps(p);
}
static inline __attribute__((always_inline)) vf vf_swap(vf v, int n) {
    if (n == 1) return (vf)_mm256_permute_ps((__m256)v, 0xb1);
    if (n == 2) return (vf)_mm256_permute_ps((__m256)v, 0x4e);
    return (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
}
#endif

// ---- matrix products of bf16 (AMX) ----------------------------------------------------------------------------------------------
#if defined ISA_amx
#define MATRIX_UNIT 1
typedef struct { uint8_t palette, start, none[14]; uint16_t line[16]; uint8_t lines[16]; } __attribute__((aligned(64))) matrix_shape;
// The tile registers of this thread: eight of 16 lines of 64 bytes. Other libraries in the process (llama.cpp) shape them once for each
// thread and stop at an illegal instruction when they find them in another shape.
INLINE void matrix_begin(matrix_shape *before) {
    const matrix_shape shape = {
        .palette = 1, .line = {64, 64, 64, 64, 64, 64, 64, 64}, .lines = {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_storeconfig(before);
    __asm__ volatile("" : : "r"(&shape) : "memory");        // gcc 12 does not know that the next line reads it
    _tile_loadconfig(&shape);
}
INLINE void matrix_end(const matrix_shape *before) {        // without a shape before, a context switch need not save the 8 KB of tiles
    __asm__ volatile("" : : "r"(before) : "memory");
    _tile_loadconfig(before);
}

// Operands of one part come from the second-level cache about as fast as they are used: streaming loads are a tenth faster there. And a
// tile store that follows no other for 0.6 microseconds waits for 0.2 more, so one goes out now and then (measured on Sapphire Rapids).
enum { STORE_EVERY = 16 };                                  // steps, a power of two
#define MATRIX_LOAD(square, p) if (parts == 1) _tile_stream_loadd(square, p, 64); else _tile_loadd(square, p, 64)
INLINE void matrix_block(const int parts, const char *const a[2], const char *const b[2], int64_t steps, const matrix_sums *from, const matrix_sums *to) {
    const char *a0 = a[0], *a1 = a[1], *b0 = b[0], *b1 = b[1];
    __asm__ volatile("" : : : "memory");                    // nor that tile loads read memory
    if (from) {
        _tile_loadd(0, from->square[0][0], from->line); _tile_loadd(1, from->square[0][1], from->line);
        _tile_loadd(2, from->square[1][0], from->line); _tile_loadd(3, from->square[1][1], from->line);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (int64_t i = 0; i < steps; i++, a0 += 1024 * parts, a1 += 1024 * parts, b0 += 1024 * parts, b1 += 1024 * parts) {
        MATRIX_LOAD(6, b0);
        if (parts == 2) {                                   // high weights x low activations
            MATRIX_LOAD(4, a0 + 1024);
            _tile_dpbf16ps(0, 4, 6);
            MATRIX_LOAD(7, b1);
            _tile_dpbf16ps(1, 4, 7);
            MATRIX_LOAD(5, a1 + 1024);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        MATRIX_LOAD(4, a0);
        _tile_dpbf16ps(0, 4, 6);
        if (parts == 1) _tile_stream_loadd(7, b1, 64);
        _tile_dpbf16ps(1, 4, 7);
        MATRIX_LOAD(5, a1);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (parts == 2) {                                   // low weights x high activations
            MATRIX_LOAD(6, b0 + 1024);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            MATRIX_LOAD(7, b1 + 1024);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (parts == 1 && i % STORE_EVERY == STORE_EVERY - 1) _tile_stored(0, to->square[0][0], to->line);
    }
    _tile_stored(0, to->square[0][0], to->line); _tile_stored(1, to->square[0][1], to->line);
    _tile_stored(2, to->square[1][0], to->line); _tile_stored(3, to->square[1][1], to->line);
}
#undef MATRIX_LOAD
#endif
