// R16: the packed form of a weight matrix. 16 rows side by side, so that lane = row and no kernel ever adds across lanes.
//
// A tile is 16 rows x k columns, stored block after block. In a block four neighbouring weights of one row form a quad, and a
// vector line is 64 bytes: the quads of the 16 rows at the same place. 32 weights are 8 quads; their bits lie in planes:
//
//   BYTE    8 lines   line t holds quad t                                                        8 bits
//   NIBBLE  4 lines   line t: quad t in the low, quad t + 4 in the high half of each byte        4 bits
//   CRUMB   2 lines   line h: quads 4h .. 4h + 3 from the lowest two bits upwards                2 bits
//   BIT     1 line    quad t in bit t                                                            1 bit
//
//   block of 32   d f16[16] (MXFP4: e8m0[16])   m f16[16]?                                          planes
//   block of 256  d f16[16]   dmin f16[16]?   scale[n/2][16][2]   min u8[n/2][16][2]?               8 x planes
//                 n sub-blocks of 16 or 32 weights; scales and mins as bytes, two neighbours side by side (Q2_K: 4 bits each)
//   floats        [k][16] in the type of the file
//
// The weights of a plane are unsigned: `zero` is the power of two to take off (the kernel starts its sum with it).
#pragma once

enum { F_HALF, F_E8M0 };                                    // how a block of 32 stores its scale
enum { SCALES_U6 = 1, SCALES_I8, SCALES_NIBBLE };           // how a block of 256 stores its sub-block scales

typedef struct {
    int id;                      // ggml type
    int block;                   // 1: floats, 32 or 256 weights
    int bytes;                   // of a weight of float types
    int bits;                    // of a weight in the planes
    int zero;                    // log2 of the zero point, 0: none
    int sub;                     // weights under one sub-block scale
    int mins;                    // 1: w = d * scale * q - dmin * min (block of 256), w = d * q + m (block of 32)
    int scales;                  // SCALES_*, or F_* for blocks of 32
    const int8_t *codebook;      // NULL, or what the 16 nibbles stand for
} tile_type;

static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t FP4_VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};      // twice e2m1

// T(name, type id, ...): everything a kernel must know about a packed type, and the packer `pack_<name>` below
#define FLOAT_TILES(T) T(F32, 0, .bytes = 4) T(F16, 1, .bytes = 2) T(BF16, 30, .bytes = 2)
#define BLOCK32_TILES(T) \
    T(Q4_0, 2, .bits = 4, .zero = 3) T(Q4_1, 3, .bits = 4, .mins = 1) T(Q5_0, 6, .bits = 5, .zero = 4) T(Q5_1, 7, .bits = 5, .mins = 1) \
    T(Q8_0, 8, .bits = 8, .zero = 7) T(IQ4_NL, 20, .bits = 4, .zero = 7, .codebook = IQ4_VALUES) \
    T(MXFP4, 39, .bits = 4, .zero = 7, .scales = F_E8M0, .codebook = FP4_VALUES)
#define BLOCK256_TILES(T) \
    T(Q2_K, 10, .bits = 2, .sub = 16, .mins = 1, .scales = SCALES_NIBBLE) T(Q3_K, 11, .bits = 3, .zero = 2, .sub = 16, .scales = SCALES_I8) \
    T(Q4_K, 12, .bits = 4, .sub = 32, .mins = 1, .scales = SCALES_U6) T(Q5_K, 13, .bits = 5, .sub = 32, .mins = 1, .scales = SCALES_U6) \
    T(Q6_K, 14, .bits = 6, .zero = 5, .sub = 16, .scales = SCALES_I8) \
    T(IQ4_XS, 23, .bits = 4, .zero = 7, .sub = 32, .scales = SCALES_I8, .codebook = IQ4_VALUES)

enum { LINE = 64 };
enum {
#define T(name, number, ...) TYPE_##name = number,
    FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T)
#undef T
};
static const tile_type TILE_TYPES[N_TYPES] = {
#define T(name, number, ...) [number] = {.id = number, .block = 1, __VA_ARGS__},
    FLOAT_TILES(T)
#undef T
#define T(name, number, ...) [number] = {.id = number, .block = 32, __VA_ARGS__},
    BLOCK32_TILES(T)
#undef T
#define T(name, number, ...) [number] = {.id = number, .block = 256, __VA_ARGS__},
    BLOCK256_TILES(T)
#undef T
};

// ---- sizes -------------------------------------------------------------------------------------------------------------------
INLINE int header_bytes(const tile_type d) {
    if (d.block == 32) return TILE_ROWS * (d.scales == F_E8M0 ? 1 : d.mins ? 4 : 2);
    int per_row = d.scales == SCALES_NIBBLE ? 256 / d.sub : 256 / d.sub * (1 + d.mins);
    return TILE_ROWS * (2 + 2 * d.mins + per_row);
}
INLINE int planes_bytes(const tile_type d) { return d.bits * LINE; }                 // of 32 weights
INLINE int tile_block_bytes(const tile_type d) {
    return d.block == 1 ? TILE_ROWS * d.bytes : header_bytes(d) + d.block / 32 * planes_bytes(d);
}
static int64_t tile_bytes(int type, int64_t k) { return k / TILE_TYPES[type].block * tile_block_bytes(TILE_TYPES[type]); }
static int64_t tile_count(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Bytes of the R16 form of (rows, k). An expert tensor (E, rows, k) takes E times that, and E * ceil(rows / 16) ready flags.
static int64_t pack_bytes(int type, int64_t rows, int64_t k) {
    return TILE_TYPES[type].block && k % TILE_TYPES[type].block == 0 ? tile_count(rows) * tile_bytes(type, k) : 0;
}

// How activations are prepared for weights of a type: interleaved for tiles, ggml's own blocks for raw rows (see act.h).
static int act_format(int type, int packed, int exact) {
    const tile_type *t = &TILE_TYPES[type];
    if (exact || t->block == 1) return ACT_F32;
    if (t->block == 32) return packed ? ACT_A32 : t->mins ? ACT_ROW_Q8_1 : ACT_ROW_Q8_0;
    return packed ? ACT_A256 : ACT_ROW_Q8_K;                 // every type without a packed form multiplies with Q8_K
}

// ---- quads: four weights of one row, as bytes, from the file's blocks (i: number of the quad in the block) ----------------------
INLINE uint32_t load4(const void *p) { uint32_t x; memcpy(&x, p, 4); return x; }
INLINE uint32_t low4(uint32_t x) { return x & 0x0f0f0f0fu; }
INLINE uint32_t low2(uint32_t x) { return x & 0x03030303u; }
INLINE uint32_t low1(uint32_t x) { return x & 0x01010101u; }
INLINE uint32_t spread4(uint32_t bits) { return low1((bits & 15) * 0x00204081u); }      // bit i to byte i

INLINE uint32_t halves(const uint8_t qs[16], int i) { return low4(load4(qs + 4 * (i & 3)) >> 4 * (i >> 2)); }   // weight 16 above weight 0
INLINE uint32_t quad_Q4_0(const block_q4_0 *b, int i) { return halves(b->qs, i); }
INLINE uint32_t quad_Q4_1(const block_q4_1 *b, int i) { return halves(b->qs, i); }
INLINE uint32_t quad_Q5_0(const block_q5_0 *b, int i) { return halves(b->qs, i) | spread4(load4(b->qh) >> 4 * i) << 4; }
INLINE uint32_t quad_Q5_1(const block_q5_1 *b, int i) { return halves(b->qs, i) | spread4(load4(b->qh) >> 4 * i) << 4; }
INLINE uint32_t quad_Q8_0(const block_q8_0 *b, int i) { return load4(b->qs + 4 * i) ^ 0x80808080u; }
INLINE uint32_t quad_IQ4_NL(const block_iq4_nl *b, int i) { return halves(b->qs, i); }
INLINE uint32_t quad_MXFP4(const block_mxfp4 *b, int i) { return halves(b->qs, i); }

// K-quants: half h of 128 weights, group g of 32 in it, quad l of 8 in the group
#define KQUAD const int h = i >> 5, g = i >> 3 & 3, l = 4 * (i & 7)
INLINE uint32_t quad_Q2_K(const block_q2_K *b, int i) { KQUAD; return low2(load4(b->qs + 32 * h + l) >> 2 * g); }
INLINE uint32_t quad_Q3_K(const block_q3_K *b, int i) { KQUAD; return low2(load4(b->qs + 32 * h + l) >> 2 * g) | low1(load4(b->hmask + l) >> (4 * h + g)) << 2; }
INLINE uint32_t quad_Q4_K(const block_q4_K *b, int i) { KQUAD; return low4(load4(b->qs + 64 * h + 32 * (g >> 1) + l) >> 4 * (g & 1)); }
INLINE uint32_t quad_Q5_K(const block_q5_K *b, int i) { KQUAD; return low4(load4(b->qs + 64 * h + 32 * (g >> 1) + l) >> 4 * (g & 1)) | low1(load4(b->qh + l) >> (4 * h + g)) << 4; }
INLINE uint32_t quad_Q6_K(const block_q6_K *b, int i) { KQUAD; return low4(load4(b->ql + 64 * h + 32 * (g & 1) + l) >> 4 * (g >> 1)) | low2(load4(b->qh + 32 * h + l) >> 2 * g) << 4; }
INLINE uint32_t quad_IQ4_XS(const block_iq4_xs *b, int i) { return halves(b->qs + 16 * (i >> 3), i & 7); }

// ---- headers: scales of one row's block into its lane (r) of the tile's header --------------------------------------------------
INLINE void put_half(char *header, int plane, int r, f16 x) { memcpy(header + 2 * (TILE_ROWS * plane + r), &x, 2); }
INLINE void put_byte(char *plane, int i, int r, int x) { plane[2 * TILE_ROWS * (i >> 1) + 2 * r + (i & 1)] = (char)x; }

INLINE void head_Q4_0(const block_q4_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_Q4_1(const block_q4_1 *b, char *h, int r) { put_half(h, 0, r, b->d); put_half(h, 1, r, b->m); }
INLINE void head_Q5_0(const block_q5_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_Q5_1(const block_q5_1 *b, char *h, int r) { put_half(h, 0, r, b->d); put_half(h, 1, r, b->m); }
INLINE void head_Q8_0(const block_q8_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_IQ4_NL(const block_iq4_nl *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_MXFP4(const block_mxfp4 *b, char *h, int r) { h[r] = (char)b->e.bits; }

INLINE void head_Q2_K(const block_q2_K *b, char *h, int r) {
    put_half(h, 0, r, b->d); put_half(h, 1, r, b->dmin);
    for (int i = 0; i < 16; i++) put_byte(h + 64, i, r, b->scales[i]);
}
INLINE void head_Q3_K(const block_q3_K *b, char *h, int r) {
    put_half(h, 0, r, b->d);
    for (int i = 0; i < 16; i++) {
        int low = b->scales[i & 7] >> 4 * (i >> 3) & 15, high = b->scales[8 + (i & 3)] >> 2 * (i >> 2) & 3;
        put_byte(h + 32, i, r, (low | high << 4) - 32);
    }
}
INLINE void head_q4k(const uint8_t s[12], f16 d, f16 dmin, char *h, int r) {    // eight 6-bit scales and mins, see block_q4_K
    put_half(h, 0, r, d); put_half(h, 1, r, dmin);
    for (int i = 0; i < 8; i++) {
        put_byte(h + 64, i, r, i < 4 ? s[i] & 63 : (s[i + 4] & 15) | (s[i - 4] >> 6) << 4);
        put_byte(h + 64 + 8 * TILE_ROWS, i, r, i < 4 ? s[i + 4] & 63 : s[i + 4] >> 4 | (s[i] >> 6) << 4);
    }
}
INLINE void head_Q4_K(const block_q4_K *b, char *h, int r) { head_q4k(b->scales, b->d, b->dmin, h, r); }
INLINE void head_Q5_K(const block_q5_K *b, char *h, int r) { head_q4k(b->scales, b->d, b->dmin, h, r); }
INLINE void head_Q6_K(const block_q6_K *b, char *h, int r) {
    put_half(h, 0, r, b->d);
    for (int i = 0; i < 16; i++) put_byte(h + 32, i, r, b->scales[i]);
}
INLINE void head_IQ4_XS(const block_iq4_xs *b, char *h, int r) {
    put_half(h, 0, r, b->d);
    for (int i = 0; i < 8; i++) put_byte(h + 32, i, r, ((b->scales_l[i >> 1] >> 4 * (i & 1) & 15) | (b->scales_h >> 2 * i & 3) << 4) - 32);
}

// ---- packers: 16 rows (or fewer: the tile's missing rows stay zero) of raw blocks into one tile -------------------------------
// Eight quads of row r into the planes of 32 weights.
INLINE void put_planes(const int bits, const uint32_t q[8], char *planes, int r) {
    uint32_t *line = (uint32_t *)planes;
    if (bits == 8) {
        for (int t = 0; t < 8; t++) line[t * TILE_ROWS + r] = q[t];
        return;
    }
    if (bits >= 4) {
        for (int t = 0; t < 4; t++) line[t * TILE_ROWS + r] = low4(q[t]) | low4(q[t + 4]) << 4;
        line += 4 * TILE_ROWS;
    }
    const int above = bits >= 4 ? 4 : 0;                    // bits that the nibbles took
    if (bits - above >= 2) {
        for (int h = 0; h < 2; h++) {
            const uint32_t *p = q + 4 * h;
            line[h * TILE_ROWS + r] = low2(p[0] >> above) | low2(p[1] >> above) << 2 | low2(p[2] >> above) << 4 | low2(p[3] >> above) << 6;
        }
        line += 2 * TILE_ROWS;
    }
    if (bits & 1) {
        uint32_t x = 0;
        for (int t = 0; t < 8; t++) x |= low1(q[t] >> (bits - 1)) << t;
        line[r] = x;
    }
}

typedef void pack_fn(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile);

#define PACKER(name, number, type, size) \
    static void pack_##name(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile) { \
        const tile_type d = TILE_TYPES[number]; \
        if (rows < TILE_ROWS) memset(tile, 0, tile_bytes(number, k)); \
        for (int64_t j = 0; j < k / size; j++, tile += tile_block_bytes(d)) \
            for (int r = 0; r < rows; r++) { \
                const type *b = (const type *)(raw + r * row_stride) + j; \
                head_##name(b, tile, r); \
                for (int s = 0; s < size / 32; s++) { \
                    uint32_t q[8]; \
                    for (int t = 0; t < 8; t++) q[t] = quad_##name(b, 8 * s + t); \
                    put_planes(d.bits, q, tile + header_bytes(d) + s * planes_bytes(d), r); \
                } \
            } \
    }
PACKER(Q4_0, 2, block_q4_0, 32) PACKER(Q4_1, 3, block_q4_1, 32) PACKER(Q5_0, 6, block_q5_0, 32) PACKER(Q5_1, 7, block_q5_1, 32)
PACKER(Q8_0, 8, block_q8_0, 32) PACKER(IQ4_NL, 20, block_iq4_nl, 32) PACKER(MXFP4, 39, block_mxfp4, 32)
PACKER(Q2_K, 10, block_q2_K, 256) PACKER(Q3_K, 11, block_q3_K, 256) PACKER(Q4_K, 12, block_q4_K, 256) PACKER(Q5_K, 13, block_q5_K, 256)
PACKER(Q6_K, 14, block_q6_K, 256) PACKER(IQ4_XS, 23, block_iq4_xs, 256)

#define FLOAT_PACKER(name, type) \
    static void pack_##name(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile) { \
        if (rows < TILE_ROWS) memset(tile, 0, k * TILE_ROWS * sizeof(type)); \
        for (int64_t i = 0; i < k; i++) \
            for (int r = 0; r < rows; r++) ((type *)tile)[i * TILE_ROWS + r] = ((const type *)(raw + r * row_stride))[i]; \
    }
FLOAT_PACKER(F32, float) FLOAT_PACKER(F16, f16) FLOAT_PACKER(BF16, bf16)

static pack_fn *const PACKERS[N_TYPES] = {
#define T(name, number, ...) [number] = pack_##name,
    FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T)
#undef T
};
