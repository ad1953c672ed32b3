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
//   codes         what every other type becomes for the length of a chunk: float scale[n][16] for sub-blocks of 16, then BYTE planes
//
// The weights of a plane are unsigned: `zero` is the power of two to take off (the kernel starts its sum with it).
#pragma once

// How scales are stored: of a block of 32 (HALF, E8M0), of sub-blocks (the others).
enum { SCALES_HALF, SCALES_E8M0, SCALES_U6, SCALES_I8, SCALES_NIBBLE, SCALES_F32 };

typedef struct {
    int id;                      // ggml type
    int block;                   // 1: floats, 32 or 256 weights
    int bytes;                   // of a weight of float types
    int bits;                    // of a weight in the planes
    int zero;                    // log2 of the zero point, 0: none
    int reach;                   // log2 of what no weight's size reaches, where that is less than the zero point
    int sub;                     // weights under one sub-block scale
    int mins;                    // 1: w = d * scale * q - dmin * min (block of 256), w = d * q + m (block of 32)
    int scales;                  // SCALES_*
    const int8_t *codebook;      // NULL, or what the 16 nibbles stand for
} tile_type;

// T(name, ...): everything a kernel must know about a packed type; the packer is r16_<name> below
#define FLOAT_TILES(T) T(f32, .bytes = 4) T(f16, .bytes = 2) T(bf16, .bytes = 2)
#define NIBBLE_TILES(T) T(q4_0, .bits = 4, .zero = 3) T(q4_1, .bits = 4, .mins = 1)
#define OTHER32_TILES(T) \
    T(q5_0, .bits = 5, .zero = 4) T(q5_1, .bits = 5, .mins = 1) T(q8_0, .bits = 8, .zero = 7) T(iq4_nl, .bits = 4, .zero = 7, .codebook = iq4_values) \
    T(mxfp4, .bits = 4, .zero = 7, .reach = 4, .scales = SCALES_E8M0, .codebook = fp4_values)
#define BLOCK32_TILES(T) NIBBLE_TILES(T) OTHER32_TILES(T)
#define BLOCK256_TILES(T) \
    T(q2_K, .bits = 2, .sub = 16, .mins = 1, .scales = SCALES_NIBBLE) T(q3_K, .bits = 3, .zero = 2, .sub = 16, .scales = SCALES_I8) \
    T(q4_K, .bits = 4, .sub = 32, .mins = 1, .scales = SCALES_U6) T(q5_K, .bits = 5, .sub = 32, .mins = 1, .scales = SCALES_U6) \
    T(q6_K, .bits = 6, .zero = 5, .sub = 16, .scales = SCALES_I8) \
    T(iq4_xs, .bits = 4, .zero = 7, .sub = 32, .scales = SCALES_I8, .codebook = iq4_values)

// The tiles made on the fly of types that have none of their own, for A32 and A256 activations; their numbers follow the file's.
#define CODES32_TILES(T) T(codes32, .bits = 8, .zero = 7, .reach = 6, .sub = 16, .scales = SCALES_F32)
#define CODES256_TILES(T) T(codes256, .bits = 8, .zero = 7, .reach = 6, .sub = 16, .scales = SCALES_F32)
enum { TYPE_codes32 = N_TYPES, TYPE_codes256, N_TILES };

static const tile_type TILE_TYPES[N_TILES] = {
#define T(name, ...) [TYPE_##name] = {.id = TYPE_##name, .block = 1, __VA_ARGS__},
    FLOAT_TILES(T)
#undef T
#define T(name, ...) [TYPE_##name] = {.id = TYPE_##name, .block = 32, __VA_ARGS__},
    BLOCK32_TILES(T) CODES32_TILES(T)
#undef T
#define T(name, ...) [TYPE_##name] = {.id = TYPE_##name, .block = 256, __VA_ARGS__},
    BLOCK256_TILES(T) CODES256_TILES(T)
#undef T
};

// ---- sizes -------------------------------------------------------------------------------------------------------------------
INLINE int header_bytes(const tile_type d) {
    if (d.scales == SCALES_F32) return TILE_ROWS * 4 * (d.block / d.sub);
    if (d.block == 32) return TILE_ROWS * (d.scales == SCALES_E8M0 ? 1 : d.mins ? 4 : 2);
    int per_row = d.scales == SCALES_NIBBLE ? 256 / d.sub : 256 / d.sub * (1 + d.mins);
    return TILE_ROWS * (2 + 2 * d.mins + per_row);
}
INLINE int in_pairs(const tile_type d) { return d.zero == 7 && !d.reach; }           // weights fill the byte: see spread.h
INLINE int nibbles_alone(const tile_type d) { return d.block == 32 && d.bits == 4 && !d.codebook; }      // hardly anything to take apart
INLINE int planes_bytes(const tile_type d) { return d.bits * LINE; }                 // of 32 weights
INLINE int tile_block_bytes(const tile_type d) {
    return d.block == 1 ? TILE_ROWS * d.bytes : header_bytes(d) + d.block / 32 * planes_bytes(d);
}
// A tile of whole pages gets a few unused bytes more: tiles that are read side by side would otherwise end their pages together, where a
// core's own prefetch stops (measured on Sapphire Rapids, see fetch_ahead: F16 decodes at 15.3 tokens/s instead of 14.5).
enum { PAGE = 4096, TILE_SKEW = 256 };
static int64_t tile_bytes(int type, int64_t k) {
    const int64_t bytes = k / TILE_TYPES[type].block * tile_block_bytes(TILE_TYPES[type]);
    return bytes % PAGE ? bytes : bytes + TILE_SKEW;
}
static int64_t tile_count(int64_t rows) { return (rows + TILE_ROWS - 1) / TILE_ROWS; }

// Bytes of the R16 form of (rows, k). An expert tensor (E, rows, k) takes E times that, and E * ceil(rows / 16) ready flags.
static int64_t pack_bytes(int type, int64_t rows, int64_t k) {
    return TILE_TYPES[type].block && k % TILE_TYPES[type].block == 0 ? tile_count(rows) * tile_bytes(type, k) : 0;
}

// How activations are prepared for weights of a type: interleaved for tiles, ggml's own blocks for raw rows (see act.h).
// Many columns go another way where `fixed` does not forbid it: as bf16 where there is a matrix unit, F16 weights keeping their bits in two
// parts, or to spread tiles, which sum in another order.
static int act_format(int type, int packed, int exact, int fixed) {
    enum { ROW_none = ACT_F32, ROW_q8_0 = ACT_ROW_Q8_0, ROW_q8_1 = ACT_ROW_Q8_1, ROW_q8_K = ACT_ROW_Q8_K };
    static const int8_t rows[N_TYPES] = {
#define X(id, name, qk, span, zero, codes, min, act) [id] = ROW_##act,
        BLOCK_TYPES(X)
#undef X
    };                                                       // plain numbers: ACT_F32
    if (exact) return ACT_F32;
    const int few = packed || fixed ? ACT_LAYOUT[rows[type]].interleaved : rows[type];
    if (fixed || type == TYPE_f32 || !(MATRIX_UNIT || (SPREADS && few))) return few;
    const tile_type *tile = &TILE_TYPES[type];
    if (SPREADS && nibbles_alone(*tile)) return few;
    if (SPREADS) return few + ACT_WIDE * (!in_pairs(*tile) ? ACT_LAYOUT[few].interleaved : tile->block == 256 ? ACT_PAIRS256 : ACT_PAIRS32);
    return few + ACT_WIDE * (type == TYPE_f16 ? ACT_BF16X2 : ACT_BF16);
}

// ---- quads: 16 weights of one row as bytes, four quads, from the file's blocks (i: which 16 of the block) -------------------------
typedef uint32_t quads4 __attribute__((vector_size(16)));
INLINE quads4 load16(const void *p) { quads4 x; memcpy(&x, p, 16); return x; }
INLINE quads4 low4(quads4 x) { return x & 0x0f0f0f0fu; }
INLINE quads4 low2(quads4 x) { return x & 0x03030303u; }
INLINE quads4 low1(quads4 x) { return x & 0x01010101u; }
INLINE quads4 spread16(uint32_t bits) {                       // bit i to byte i, for 16 bits
    const quads4 x = {bits & 15, bits >> 4 & 15, bits >> 8 & 15, bits >> 12 & 15};
    return low1(x * 0x00204081u);
}

INLINE quads4 halves(const uint8_t qs[16], int i) { return low4(load16(qs) >> 4 * i); }      // weight 16 above weight 0
INLINE quads4 quads_q4_0(const block_q4_0 *b, int i) { return halves(b->qs, i); }
INLINE quads4 quads_q4_1(const block_q4_1 *b, int i) { return halves(b->qs, i); }
INLINE quads4 quads_q5_0(const block_q5_0 *b, int i) { return halves(b->qs, i) | spread16(read_u32(b->qh) >> 16 * i) << 4; }
INLINE quads4 quads_q5_1(const block_q5_1 *b, int i) { return halves(b->qs, i) | spread16(read_u32(b->qh) >> 16 * i) << 4; }
INLINE quads4 quads_q8_0(const block_q8_0 *b, int i) { return load16(b->qs + 16 * i) ^ 0x80808080u; }
INLINE quads4 quads_iq4_nl(const block_iq4_nl *b, int i) { return halves(b->qs, i); }
INLINE quads4 quads_mxfp4(const block_mxfp4 *b, int i) { return halves(b->qs, i); }

// K-quants: half h of 128 weights, group g of 32 in it, weight l of the group
#define PLACE const int h = i >> 3, g = i >> 1 & 3, l = 16 * (i & 1)
INLINE quads4 quads_q2_K(const block_q2_K *b, int i) { PLACE; return low2(load16(b->qs + 32 * h + l) >> 2 * g); }
INLINE quads4 quads_q3_K(const block_q3_K *b, int i) {
    PLACE;
    return low2(load16(b->qs + 32 * h + l) >> 2 * g) | low1(load16(b->hmask + l) >> (4 * h + g)) << 2;
}
INLINE quads4 quads_q4_K(const block_q4_K *b, int i) { PLACE; return low4(load16(b->qs + 64 * h + 32 * (g >> 1) + l) >> 4 * (g & 1)); }
INLINE quads4 quads_q5_K(const block_q5_K *b, int i) {
    PLACE;
    return low4(load16(b->qs + 64 * h + 32 * (g >> 1) + l) >> 4 * (g & 1)) | low1(load16(b->qh + l) >> (4 * h + g)) << 4;
}
INLINE quads4 quads_q6_K(const block_q6_K *b, int i) {
    PLACE;
    return low4(load16(b->ql + 64 * h + 32 * (g & 1) + l) >> 4 * (g >> 1)) | low2(load16(b->qh + 32 * h + l) >> 2 * g) << 4;
}
INLINE quads4 quads_iq4_xs(const block_iq4_xs *b, int i) { return halves(b->qs + 16 * (i >> 1), i & 1); }

// ---- headers: scales of one row's block into its lane (r) of the tile's header --------------------------------------------------
INLINE void put_half(char *header, int plane, int r, f16 x) { memcpy(header + 2 * (TILE_ROWS * plane + r), &x, 2); }
INLINE void put_byte(char *plane, int i, int r, int x) { plane[2 * TILE_ROWS * (i >> 1) + 2 * r + (i & 1)] = (char)x; }

INLINE void head_q4_0(const block_q4_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_q4_1(const block_q4_1 *b, char *h, int r) { put_half(h, 0, r, b->d); put_half(h, 1, r, b->m); }
INLINE void head_q5_0(const block_q5_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_q5_1(const block_q5_1 *b, char *h, int r) { put_half(h, 0, r, b->d); put_half(h, 1, r, b->m); }
INLINE void head_q8_0(const block_q8_0 *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_iq4_nl(const block_iq4_nl *b, char *h, int r) { put_half(h, 0, r, b->d); }
INLINE void head_mxfp4(const block_mxfp4 *b, char *h, int r) { h[r] = (char)b->e.bits; }

INLINE void head_q2_K(const block_q2_K *b, char *h, int r) {
    put_half(h, 0, r, b->d); put_half(h, 1, r, b->dmin);
    for (int i = 0; i < 16; i++) put_byte(h + 64, i, r, b->scales[i]);
}
INLINE void head_q3_K(const block_q3_K *b, char *h, int r) {
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
INLINE void head_q4_K(const block_q4_K *b, char *h, int r) { head_q4k(b->scales, b->d, b->dmin, h, r); }
INLINE void head_q5_K(const block_q5_K *b, char *h, int r) { head_q4k(b->scales, b->d, b->dmin, h, r); }
INLINE void head_q6_K(const block_q6_K *b, char *h, int r) {
    put_half(h, 0, r, b->d);
    for (int i = 0; i < 16; i++) put_byte(h + 32, i, r, b->scales[i]);
}
INLINE void head_iq4_xs(const block_iq4_xs *b, char *h, int r) {
    put_half(h, 0, r, b->d);
    for (int i = 0; i < 8; i++) put_byte(h + 32, i, r, ((b->scales_l[i >> 1] >> 4 * (i & 1) & 15) | (b->scales_h >> 2 * i & 3) << 4) - 32);
}

// ---- packers: 16 rows (or fewer: the tile's missing rows stay zero) of raw blocks into one tile -------------------------------
// Eight quads of row r (two times four) into the planes of 32 weights.
INLINE void put_lines(quads4 x, uint32_t *line, int r) { for (int t = 0; t < 4; t++) line[t * TILE_ROWS + r] = x[t]; }
INLINE void put_planes(const int bits, quads4 q0, quads4 q1, char *planes, int r) {
    uint32_t *line = (uint32_t *)planes;
    if (bits == 8) {
        put_lines(q0, line, r);
        put_lines(q1, line + 4 * TILE_ROWS, r);
        return;
    }
    if (bits >= 4) {
        put_lines(low4(q0) | low4(q1) << 4, line, r);
        line += 4 * TILE_ROWS;
    }
    const int above = bits >= 4 ? 4 : 0;                    // bits that the nibbles took
    if (bits - above >= 2) {
        quads4 x = low2(q0 >> above) << (quads4){0, 2, 4, 6}, y = low2(q1 >> above) << (quads4){0, 2, 4, 6};
        line[r] = x[0] | x[1] | x[2] | x[3];
        line[TILE_ROWS + r] = y[0] | y[1] | y[2] | y[3];
        line += 2 * TILE_ROWS;
    }
    if (bits & 1) {
        quads4 x = low1(q0 >> (bits - 1)) << (quads4){0, 1, 2, 3} | low1(q1 >> (bits - 1)) << (quads4){4, 5, 6, 7};
        line[r] = x[0] | x[1] | x[2] | x[3];
    }
}

typedef void pack_fn(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile);

#define PACKER(name, ...) \
    static void r16_##name(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile) { \
        const tile_type d = TILE_TYPES[TYPE_##name]; \
        if (rows < TILE_ROWS) memset(tile, 0, tile_bytes(d.id, k)); \
        for (int64_t j = 0; j < k / d.block; j++, tile += tile_block_bytes(d)) \
            for (int r = 0; r < rows; r++) { \
                const block_##name *b = (const block_##name *)(raw + r * row_stride) + j; \
                head_##name(b, tile, r); \
                UNROLL(8) \
                for (int s = 0; s < d.block / 32; s++) \
                    put_planes(d.bits, quads_##name(b, 2 * s), quads_##name(b, 2 * s + 1), tile + header_bytes(d) + s * planes_bytes(d), r); \
            } \
    }
BLOCK32_TILES(PACKER) BLOCK256_TILES(PACKER)

#define FLOAT_PACKER(name, type) \
    static void r16_##name(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile) { \
        if (rows < TILE_ROWS) memset(tile, 0, k * TILE_ROWS * sizeof(type)); \
        for (int64_t i = 0; i < k; i++) \
            for (int r = 0; r < rows; r++) ((type *)tile)[i * TILE_ROWS + r] = ((const type *)(raw + r * row_stride))[i]; \
    }
FLOAT_PACKER(f32, float) FLOAT_PACKER(f16, f16) FLOAT_PACKER(bf16, bf16)

// Types without a form of their own: signed codes and float scales, by the generic decoders of unpack.h.
#define CODES_TYPES(T) T(iq2_xxs) T(iq2_xs) T(iq2_s) T(iq3_xxs) T(iq3_s) T(iq1_s) T(iq1_m) T(tq1_0) T(tq2_0) T(nvfp4) T(q1_0) T(q2_0)
enum {
#define X(id, name, qk, span, zero, codes, min, act) QK_##name = qk, SPAN_##name = span, ZERO_##name = zero, CODES_##name = TYPE_codes_##act,
#define TYPE_codes_q8_0 TYPE_codes32
#define TYPE_codes_q8_1 TYPE_codes32
#define TYPE_codes_q8_K TYPE_codes256
#define TYPE_codes_none 0
    BLOCK_TYPES(X)
#undef X
};
INLINE void put_codes(u8x32 codes, char *planes, int r) {
    codes ^= 0x80;
    put_planes(8, load16(&codes), load16((const char *)&codes + 16), planes, r);
}
#define CODES_PACKER(name) \
    static void r16_##name(const char *raw, int64_t row_stride, int rows, int64_t k, char *tile) { \
        const tile_type d = TILE_TYPES[CODES_##name]; \
        if (rows < TILE_ROWS) memset(tile, 0, tile_bytes(d.id, k)); \
        for (int r = 0; r < rows; r++) \
            for (int64_t j = 0; j < k; j += QK_##name) { \
                const block_##name *b = (const block_##name *)(raw + r * row_stride) + j / QK_##name; \
                float scale[QK_##name / SPAN_##name], min[QK_##name / SPAN_##name]; \
                scales_##name(b, scale, min); \
                for (int g = 0; g < QK_##name / 32; g++) { \
                    const int64_t at = j + 32 * g; \
                    char *block = tile + at / d.block * tile_block_bytes(d); \
                    const int half = (int)(at % d.block) / 16;            /* number of the sub-block in the tile's block */ \
                    for (int h = 0; h < 2; h++) ((float *)block)[(half + h) * TILE_ROWS + r] = scale[(32 * g + 16 * h) / SPAN_##name]; \
                    put_codes(codes_##name(b, g) - (uint8_t)ZERO_##name, block + header_bytes(d) + half / 2 * planes_bytes(d), r); \
                } \
            } \
    }
CODES_TYPES(CODES_PACKER)

static const uint8_t CODES_OF[N_TYPES] = {
#define T(name) [TYPE_##name] = CODES_##name,
    CODES_TYPES(T)
#undef T
};
// The kind of tile that a type's weights become.
static int tile_of(int type) { return CODES_OF[type] ? CODES_OF[type] : type; }

static pack_fn *const PACKERS[N_TYPES] = {
#define T(name, ...) [TYPE_##name] = r16_##name,
    FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T) CODES_TYPES(T)
#undef T
};
