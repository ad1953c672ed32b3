// Spread tiles: what an R16 tile becomes for a large batch where bytes are multiplied in pairs of 16 bits (AVX2).
//
// There a product of 32 bytes is two instructions, and taking weights out of their planes, scales out of half floats and signs out of
// both factors would be as many again for each eight columns. So a worker spreads a tile once for a block of columns, in its scratch:
//
//   block of 32   scale f32[16]   min f32[16]?                                               lines
//   block of 256  d f32[16]   dmin f32[16]?   scale i16[n][16][2]   less i16[n/2][16][2]     lines
//   codes         scale f32[n][16]                                                           lines
//   pairs         scale f32[16]   own i32[16]                                                two lines a quad
//
// A line is a quad of 16 rows as in pack.h, a byte a weight. A scale stands twice, so that one product of pairs joins the sums of a
// sub-block and scales them. less: what a sum of activations counts, of two sub-blocks side by side: mins, or minus zero points times scales.
//
// 16 bits hold the sum of a few products while weights are small. Weights that fill the byte are in pairs: of a quad w0 w2, in another line w1 w3,
// each in 16 bits and times its sub-block's scale where that is whole. Two products then are one (S. Winograd, 1968):
//
//   w0 y0 + w1 y1 = (w0 + y1) (w1 + y0) - w0 w1 - y0 y1
//
// where the last two are sums of one factor alone, `own`, taken once. On Zen 3 a pair takes four instructions as the signs of
// vpmaddubsw did, but two of them were products and one a vpsignb, which share two of the four ports (1.05 cycles instead of 1.5).
#pragma once

enum { SPREAD_DEPTH = 256 };            // weights along k that are spread at a time
typedef struct {
    void (*spread)(const char *w, int64_t k, char *to);
    void (*columns)(const char *w, const char *a, int64_t k, int cols, float *out);
} spread_kernel;
#if SPREADS

// The zero point and the bits of a spread tile's bytes.
INLINE int spread_zero(const tile_type d) { return d.reach ? d.reach : d.zero; }
INLINE int spread_bits(const tile_type d) { return d.reach ? d.reach + 1 : d.bits; }
INLINE int spread_line(const tile_type d) { return in_pairs(d) ? 2 * LINE : LINE; }
INLINE int spread_header(const tile_type d) {
    if (in_pairs(d)) return 2 * LINE;
    if (d.scales == SCALES_F32) return d.block / 16 * LINE;
    return (1 + d.mins) * LINE + (d.block == 256 ? 256 / d.sub * (LINE + LINE / 2) : 0);
}
INLINE int spread_block(const tile_type d) { return spread_header(d) + d.block / 4 * spread_line(d); }
static int64_t spread_bytes(int tile, int64_t k) {
    return TILE_TYPES[tile].block == 1 ? 0 : k / TILE_TYPES[tile].block * spread_block(TILE_TYPES[tile]);
}

// ---- from an R16 tile ------------------------------------------------------------------------------------------------------------
INLINE void spread_scales(const tile_type d, const char *w, const int v, char *to) {      // of a block of 256
    const int pairs = 128 / d.sub;
    char *scale = to + (1 + d.mins) * LINE, *less = scale + 2 * pairs * LINE;
    EACH(p, pairs) {
        const vi two = scale_pair(d, w, v, p);
        EACH(side, 2) vi_store(scale + (2 * p + side) * LINE, doubled(two, side));
        vi_store(less + p * LINE, d.mins ? min_pair(d, w, v, p) : shifted(two, spread_zero(d)));
    }
}

INLINE void spread_tile(const tile_type d, const char *w, int64_t k, char *to) {
    for (int64_t b = 0; b < k / d.block; b++, w += tile_block_bytes(d), to += spread_block(d))
        EACH(v, TILE_VECS) {
            const int lane = 2 * VL * v, bytes = 4 * VL * v;
            if (d.scales == SCALES_F32) {
                EACH(i, d.block / 16) vf_store(to + i * LINE + bytes, vf_load(w + i * LINE + bytes));
            } else {
                vf_store(to + bytes, d.block == 32 ? scale_32(d, w, v) : vf_from_f16(w + lane));
                if (d.mins) vf_store(to + LINE + bytes, vf_from_f16(w + 2 * TILE_ROWS + lane));
                if (d.block == 256 && !in_pairs(d)) spread_scales(d, w, v, to + bytes);
            }
            char *line = to + spread_header(d) + bytes;
            vi own = vi_set(0), scale = own;
            UNROLL(1) for (int g = 0; g < d.block / 32; g++) {
                const char *p = w + header_bytes(d) + g * planes_bytes(d) + bytes;
                if (d.sub && in_pairs(d)) {                      // 32 weights
                    const vi two = scale_pair(d, w, v, g / 2);
                    scale = g % 2 ? doubled(two, 1) : doubled(two, 0);
                }
                EACH(t, 8) {
                    vi q = quants(d, p, t, d.bits >= 4 && d.bits < 8 ? line_at(p, t & 3) : vi_set(0));
                    if (d.reach) q -= ((1 << d.zero) - (1 << d.reach)) * 0x01010101;      // no byte borrows
                    if (in_pairs(d)) {
                        q ^= (int32_t)0x80808080;
                        vi_pairs even = ((vi_pairs)q << 8) >> 8, odd = (vi_pairs)q >> 8;
                        if (d.sub) even *= (vi_pairs)scale, odd *= (vi_pairs)scale;
                        own = vi_dot_i16(own, (vi)even, (vi)odd);
                        vi_store(line, (vi)even);
                        vi_store(line + LINE, (vi)odd);
                    } else vi_store(line, q);
                    line += spread_line(d);
                }
            }
            if (in_pairs(d)) vi_store(to + LINE + bytes, -own);
        }
}

// ---- eight columns ------------------------------------------------------------------------------------------------------------------
// A pass is all rows of four columns: 16 registers hold its eight sums and their operands.
enum { SPREAD_COLS = 4, SPREAD_SUMS = TILE_VECS * SPREAD_COLS };
#define EACH_SUM(v, n) EACH(v, TILE_VECS) EACH(n, SPREAD_COLS)
INLINE int sum_at(int v, int n) { return v * SPREAD_COLS + n; }
INLINE float *spread_result(float *out, int v, int n) { return out + TILE_ROWS * n + VL * v; }

// c[sum] += factor[v] * (`quads` quads of weights x their activations); factor: the same in both halves of a lane.
INLINE void spread_dot(const tile_type d, const int quads, const char *line, const char *q, const vi *factor, vi *c) {
    const int steps = least_int(quads, mac_steps(spread_bits(d)));
    vi sum[SPREAD_SUMS];
    EACH(t, quads) {
        vi x[TILE_VECS];
        EACH(v, TILE_VECS) x[v] = vi_load(line + t * LINE + 4 * VL * v);
        EACH(n, SPREAD_COLS) {
            vi y = vi_set4(q + 4 * (t * SMALL_COLS + n));
            EACH(v, TILE_VECS) {
                const int i = sum_at(v, n);
                sum[i] = t % steps ? mac(sum[i], x[v], y) : mac_first(x[v], y);
                if ((t + 1) % steps) continue;
                c[i] = vi_dot_i16(c[i], factor[v], sum[i]);
                IN_REGISTER(c[i]);
            }
        }
    }
}

// a: of the pass's columns; out: their rows, a column's being TILE_ROWS apart
INLINE void spread_32(const tile_type d, const char *w, const char *a, int64_t blocks, float *out) {
    const vi ones[TILE_VECS] = {vi_set(0x00010001), vi_set(0x00010001)};
    for (int64_t b = 0; b < blocks; b++, w += spread_block(d), a += ACT_LAYOUT[ACT_A32].column_bytes * SMALL_COLS) {
        vi c[SPREAD_SUMS];
        EACH_SUM(v, n) c[sum_at(v, n)] = vi_set(0);
        spread_dot(d, 8, w + spread_header(d), a + 12 * SMALL_COLS, ones, c);
        EACH(n, SPREAD_COLS) {
            const vi start = d.zero ? start_of(a + 4 * (2 * SMALL_COLS + n), spread_zero(d) - A32_SHIFT) : vi_set(0);
            const vf scale = vf_set(((const float *)a)[n]), sums = vf_set(((const float *)a)[SMALL_COLS + n]);
            EACH(v, TILE_VECS) {
                float *to = spread_result(out, v, n);
                vf y = vf_fma(vf_from_i(c[sum_at(v, n)] + start), vf_load(w + 4 * VL * v) * scale, vf_load(to));
                if (d.mins) y = vf_fma(vf_load(w + LINE + 4 * VL * v), sums, y);
                vf_store(to, y);
            }
        }
    }
}

INLINE void spread_256(const tile_type d, const char *w, const char *a, int64_t blocks, float *out) {
    const int subs = 256 / d.sub;
    for (int64_t b = 0; b < blocks; b++, w += spread_block(d), a += ACT_LAYOUT[ACT_A256].column_bytes * SMALL_COLS) {
        const char *scale = w + (1 + d.mins) * LINE, *less = scale + subs * LINE, *line = w + spread_header(d), *q = a + 4 * 29 * SMALL_COLS;
        vi c[SPREAD_SUMS];
        EACH_SUM(v, n) c[sum_at(v, n)] = vi_set(0);
        UNROLL(1) for (int i = 0; i < subs; i++, line += d.sub / 4 * LINE, q += d.sub * SMALL_COLS) {
            vi factor[TILE_VECS];
            EACH(v, TILE_VECS) factor[v] = vi_load(scale + i * LINE + 4 * VL * v);
            spread_dot(d, d.sub / 4, line, q, factor, c);
        }
        EACH(n, SPREAD_COLS) {
            const char *sums = a + 4 * (d.sub == 32 ? 25 : 17) * SMALL_COLS + 4 * n;
            const vf times = vf_set(((const float *)a)[n]);
            EACH(v, TILE_VECS) {
                const vi q_sum = c[sum_at(v, n)];
                vi m = d.mins ? vi_set(0) : q_sum;
                EACH(p, subs / 2) m = vi_dot_i16(m, vi_load(less + p * LINE + 4 * VL * v), vi_set4(sums + 4 * p * SMALL_COLS));
                vf y = vf_from_i(d.mins ? q_sum : m) * vf_load(w + 4 * VL * v);
                if (d.mins) y = vf_fma(-vf_from_i(m), vf_load(w + LINE + 4 * VL * v), y);
                float *to = spread_result(out, v, n);
                vf_store(to, vf_fma(y, times, vf_load(to)));
            }
        }
    }
}

INLINE void spread_codes(const tile_type d, const char *w, const char *a, int64_t blocks, float *out) {
    const int layout = d.block == 32 ? ACT_A32 : ACT_A256, dwords = d.block == 32 ? 3 : 29;
    const vi ones[TILE_VECS] = {vi_set(0x00010001), vi_set(0x00010001)}, bytes = vi_set(0x01010101);
    for (int64_t b = 0; b < blocks; b++, w += spread_block(d), a += ACT_LAYOUT[layout].column_bytes * SMALL_COLS) {
        const char *line = w + spread_header(d), *q = a + 4 * dwords * SMALL_COLS;
        vf sum[SPREAD_SUMS];
        EACH_SUM(v, n) sum[sum_at(v, n)] = vf_set(0);
        UNROLL(1) for (int i = 0; i < d.block / 16; i++, line += 4 * LINE, q += 16 * SMALL_COLS) {
            vi c[SPREAD_SUMS];
            EACH(n, SPREAD_COLS) {
                vi start = mac_first(bytes, vi_set4(q + 4 * n));
                if (d.block == 256) start = start_of(a + 4 * ((1 + i) * SMALL_COLS + n), spread_zero(d) - A256_SHIFT);
                else {                                       // A32 has no sums of 16: take them here
                    for (int t = 1; t < 4; t++) start = mac(start, bytes, vi_set4(q + 4 * (t * SMALL_COLS + n)));
                    start = vi_dot_i16(vi_set(0), (vi)(-(vi_pairs)ones[0] << spread_zero(d)), start);
                }
                EACH(v, TILE_VECS) c[sum_at(v, n)] = start;
            }
            spread_dot(d, 4, line, q, ones, c);
            EACH_SUM(v, n) sum[sum_at(v, n)] = vf_fma(vf_from_i(c[sum_at(v, n)]), vf_load(w + i * LINE + 4 * VL * v), sum[sum_at(v, n)]);
        }
        EACH_SUM(v, n) {
            float *to = spread_result(out, v, n);
            vf_store(to, vf_fma(sum[sum_at(v, n)], vf_set(((const float *)a)[n]), vf_load(to)));
        }
    }
}

INLINE void spread_pairs(const tile_type d, const char *w, const char *a, const char *q, int64_t blocks, float *out) {
    const int step = (8 + 2 * d.block) * SMALL_COLS;
    for (int64_t b = 0; b < blocks; b++, w += spread_block(d), a += step, q += step) {
        vi c[SPREAD_SUMS];
        EACH_SUM(v, n) c[sum_at(v, n)] = vi_set4(a + 4 * (SMALL_COLS + n)) + vi_load(w + LINE + 4 * VL * v);
        UNROLL(1) for (int g = 0; g < d.block / 32; g++) {
            const char *line = w + spread_header(d) + g * 8 * 2 * LINE, *quad = q + g * 8 * 8 * SMALL_COLS;
            EACH(t, 8) {
                vi_pairs even[TILE_VECS], odd[TILE_VECS];
                EACH(v, TILE_VECS) even[v] = (vi_pairs)vi_load(line + 2 * LINE * t + 4 * VL * v), odd[v] = (vi_pairs)vi_load(line + 2 * LINE * t + LINE + 4 * VL * v);
                EACH(n, SPREAD_COLS) {
                    const vi_pairs y_odd = (vi_pairs)vi_set4(quad + 8 * (t * SMALL_COLS + n)), y_even = (vi_pairs)vi_set4(quad + 8 * (t * SMALL_COLS + n) + 4);
                    EACH(v, TILE_VECS) {
                        vi *sum = &c[sum_at(v, n)];
                        *sum = vi_dot_i16(*sum, (vi)(even[v] + y_odd), (vi)(odd[v] + y_even));
                        IN_REGISTER(*sum);
                    }
                }
            }
        }
        EACH_SUM(v, n) {
            float *to = spread_result(out, v, n);
            vf_store(to, vf_fma(vf_from_i(c[sum_at(v, n)]), vf_load(w + 4 * VL * v) * vf_set(((const float *)a)[n]), vf_load(to)));
        }
    }
}

// out[column][16] += a spread tile x the first `cols` of eight columns, and as many more as fill a pass
INLINE void spread_columns(const tile_type d, const char *w, const char *a, int64_t k, int cols, float *out) {
    UNROLL(1) for (int n = 0; n < cols; n += SPREAD_COLS, a += 4 * SPREAD_COLS, out += TILE_ROWS * SPREAD_COLS) {
        if (in_pairs(d)) spread_pairs(d, w, a, a + 8 * SMALL_COLS + 4 * n, k / d.block, out);
        else if (d.scales == SCALES_F32) spread_codes(d, w, a, k / d.block, out);
        else if (d.block == 32) spread_32(d, w, a, k / 32, out);
        else spread_256(d, w, a, k / 256, out);
    }
}

#define SPREAD_TILES(T) OTHER32_TILES(T) BLOCK256_TILES(T) CODES32_TILES(T) CODES256_TILES(T)
#define T(name, ...) \
    static void spread_##name(const char *w, int64_t k, char *to) { spread_tile(TILE_TYPES[TYPE_##name], w, k, to); } \
    static void spread_columns_##name(const char *w, const char *a, int64_t k, int cols, float *out) { spread_columns(TILE_TYPES[TYPE_##name], w, a, k, cols, out); }
SPREAD_TILES(T)
#undef T
static const spread_kernel SPREAD_KERNELS[N_TILES] = {
#define T(name, ...) [TYPE_##name] = {spread_##name, spread_columns_##name},
    SPREAD_TILES(T)
#undef T
};
#else
static int64_t spread_bytes(int tile, int64_t k) { (void)tile, (void)k; return 0; }
static const spread_kernel SPREAD_KERNELS[N_TILES];          // nobody calls them
#endif
