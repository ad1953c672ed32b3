// The bytes of every quantized ggml tensor type: the one place where a block layout is written.
// C reads them as structs; Python reads the same declarations through cffi (types.py), so a size or a field is never repeated.
// Declarations only: cffi parses this file with the preprocessor lines removed. Blocks are packed: a tensor may start at any byte.
#pragma once
#include <stdint.h>
#pragma pack(push, 1)

typedef struct { uint16_t bits; } f16;    // IEEE half
typedef struct { uint16_t bits; } bf16;   // upper half of an IEEE single
typedef struct { uint8_t bits; } e8m0;    // power of two, 2^(bits - 127)
typedef struct { uint8_t bits; } ue4m3;   // unsigned 8-bit float: 4 exponent bits, 3 mantissa bits

// 32 weights a block
typedef struct { f16 d; uint8_t qs[16]; } block_q4_0;
typedef struct { f16 d, m; uint8_t qs[16]; } block_q4_1;
typedef struct { f16 d; uint8_t qh[4]; uint8_t qs[16]; } block_q5_0;
typedef struct { f16 d, m; uint8_t qh[4]; uint8_t qs[16]; } block_q5_1;
typedef struct { f16 d; int8_t qs[32]; } block_q8_0;
typedef struct { f16 d, s; int8_t qs[32]; } block_q8_1;
typedef struct { f16 d; uint8_t qs[16]; } block_iq4_nl;
typedef struct { e8m0 e; uint8_t qs[16]; } block_mxfp4;

// 64 and 128 weights a block
typedef struct { ue4m3 d[4]; uint8_t qs[32]; } block_nvfp4;
typedef struct { f16 d; uint8_t qs[16]; } block_q2_0;
typedef struct { f16 d; uint8_t qs[16]; } block_q1_0;

// 256 weights a block
typedef struct { uint8_t scales[16]; uint8_t qs[64]; f16 d, dmin; } block_q2_K;
typedef struct { uint8_t hmask[32]; uint8_t qs[64]; uint8_t scales[12]; f16 d; } block_q3_K;
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qs[128]; } block_q4_K;
typedef struct { f16 d, dmin; uint8_t scales[12]; uint8_t qh[32]; uint8_t qs[128]; } block_q5_K;
typedef struct { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; f16 d; } block_q6_K;
typedef struct { float d; int8_t qs[256]; int16_t bsums[16]; } block_q8_K;
typedef struct { f16 d; uint16_t qs[32]; } block_iq2_xxs;
typedef struct { f16 d; uint16_t qs[32]; uint8_t scales[8]; } block_iq2_xs;
typedef struct { f16 d; uint8_t qs[64]; uint8_t qh[8]; uint8_t scales[8]; } block_iq2_s;
typedef struct { f16 d; uint8_t qs[96]; } block_iq3_xxs;
typedef struct { f16 d; uint8_t qs[64]; uint8_t qh[8]; uint8_t signs[32]; uint8_t scales[4]; } block_iq3_s;
typedef struct { f16 d; uint8_t qs[32]; uint16_t qh[8]; } block_iq1_s;
typedef struct { uint8_t qs[32]; uint8_t qh[16]; uint8_t scales[8]; } block_iq1_m;
typedef struct { f16 d; uint16_t scales_h; uint8_t scales_l[4]; uint8_t qs[128]; } block_iq4_xs;
typedef struct { uint8_t qs[48]; uint8_t qh[4]; f16 d; } block_tq1_0;
typedef struct { uint8_t qs[64]; f16 d; } block_tq2_0;

#pragma pack(pop)
