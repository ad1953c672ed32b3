// Weights for a matrix unit: 32 weights of the 16 rows of an R16 tile become a square of bf16 (simd.h), scaled.
//
// What a weight loses by rounding to bf16 (2^-9 of itself) is far less than a byte of an activation loses elsewhere. F16 has three bits
// more than bf16: there a square of what was lost follows each square.
#pragma once

typedef void square_fn(const char *tile, int64_t k, int64_t step, char *square);      // weights 32 * step .. 32 * step + 31

// Weights i and i + 1 of VL rows, i even.
INLINE void put_pair(const int parts, vf even, vf odd, char *line) {
    vf high = vf_pair_bf16(even, odd);
    vf_store(line, high);
    if (parts == 1) return;
    vf_store(line + MATRIX_SQUARE, vf_pair_bf16(even - (vf)((vi)high << 16), odd - (vf)((vi)high & (int32_t)0xffff0000)));
}

INLINE void square_1(const tile_type d, const char *w, int64_t k, int64_t step, char *square) {
    const int64_t left = least_int(MATRIX_DEPTH, (int)(k - step * MATRIX_DEPTH));
    w += step * MATRIX_DEPTH * tile_block_bytes(d);
    EACH(v, TILE_VECS) {
        const char *from = w + VL * d.bytes * v;
        char *line = square + 4 * VL * v;
        for (int i = 0; i < MATRIX_DEPTH; i += 2, from += 2 * tile_block_bytes(d), line += LINE) {
            vf even = i < left ? float_line(d, from) : vf_set(0), odd = i + 1 < left ? float_line(d, from + tile_block_bytes(d)) : vf_set(0);
            put_pair(d.id == TYPE_f16 ? 2 : 1, even, odd, line);
        }
    }
}

// weight = scale * q + offset for quads of group g (32 weights) of a block; h: which sub-block of 16 in it.
INLINE void scale_of(const tile_type d, const char *w, const int g, const int h, const int v, vf *scale, vf *offset) {
    const int half = TILE_ROWS * 2, lane = VL * 2, pairs = 256 / 2 / (d.sub ? d.sub : 32);
    vf min = vf_set(0);
    if (d.scales == SCALES_F32) *scale = vf_load((const float *)w + (2 * g + h) * TILE_ROWS + VL * v);
    else if (d.block == 32) {
        *scale = scale_32(d, w, v);
        if (d.mins) min = vf_from_f16(w + half + lane * v);
    } else {
        const int pair = d.sub == 32 ? g / 2 : g, shift = 16 * (d.sub == 32 ? g % 2 : h);
        const char *scales = w + half * (1 + d.mins) + pair * 2 * TILE_ROWS + lane * v;
        vi two = vi_pairs_from_u8(scales), low = two;
        if (d.mins && d.scales != SCALES_NIBBLE) low = vi_pairs_from_u8(scales + pairs * 2 * TILE_ROWS);
        vi s = d.scales == SCALES_I8 ? two << (24 - shift) >> 24 : two >> shift & (d.scales == SCALES_NIBBLE ? 15 : 255);
        *scale = vf_from_f16(w + lane * v) * vf_from_i(s);
        if (d.mins) min = -vf_from_f16(w + half + lane * v) * vf_from_i(low >> shift >> (d.scales == SCALES_NIBBLE ? 4 : 0) & 255);
    }
    *offset = d.mins ? min : *scale * (d.zero ? -(float)(1 << d.zero) : 0.0f);
}

INLINE void square_quants(const tile_type d, const char *w, int64_t step, char *square) {
    const int groups = d.block / MATRIX_DEPTH, g = (int)(step % groups);
    w += step / groups * tile_block_bytes(d);
    const char *planes = w + header_bytes(d) + g * planes_bytes(d);
    EACH(v, TILE_VECS) {
        const char *p = planes + 4 * VL * v;
        char *line = square + 4 * VL * v;
        EACH(h, 2) {
            vf scale, offset;
            scale_of(d, w, g, h, v, &scale, &offset);
            EACH(i, 4) {
                const int t = 4 * h + i;
                vi q = quants(d, p, t, d.bits >= 4 && d.bits < 8 ? line_at(p, i) : vi_set(0));
                EACH(pair, 2) {
                    vf even = vf_from_i(q >> 16 * pair & 255), odd = vf_from_i(q >> (16 * pair + 8) & 255);
                    put_pair(1, vf_fma(even, scale, offset), vf_fma(odd, scale, offset), line + LINE * (2 * t + pair));
                }
            }
        }
    }
}

#define T(name, ...) \
    static void square_##name(const char *w, int64_t k, int64_t step, char *square) { \
        const tile_type d = TILE_TYPES[TYPE_##name]; \
        if (d.block == 1) square_1(d, w, k, step, square); \
        else square_quants(d, w, step, square); \
    }
ALL_TILES(T)
#undef T

static square_fn *const SQUARES[N_TILES] = {
#define T(name, ...) [TYPE_##name] = square_##name,
    ALL_TILES(T)
#undef T
};
