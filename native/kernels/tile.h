// Tile kernels: one R16 tile (16 weight rows) times one column tile (1 .. SMALL_COLS columns) -> out[column][16].
//
// lane = row. An activation quad is broadcast from memory and multiplied with a line of weight quads, so a block costs nothing
// but its dot products and one scaling per column; no sum crosses lanes. Bodies below are templates: `d`, `N` and the pass shape
// are compile-time constants in every instance, and each branch on them disappears.
#pragma once

// next: the tile that comes after this one from memory, or NULL
typedef void tile_fn(const char *w, const char *a, int64_t k, float *out, const char *next);
// As many tiles as STREAMS_OF says, `apart` bytes from one to the next, times a column tile -> out[column][tile][16]
typedef void streams_fn(const char *w, int64_t apart, const char *a, int64_t k, float *out);

// A pass computes `vecs` vectors of rows x `cols` columns in registers; a tile is as many passes as it takes.
// AVX-512: the whole tile; 16 registers and fewer lanes: all rows of a column or two, or a vector of rows of four columns; of floats, all
// rows of up to six. Sums of 16 bits (AVX2) wait for theirs of 32 in memory: all rows of four columns, or a vector of rows of more, which are
// then unpacked once; nibbles of Q4_0 and Q4_1 take so little that fewer broadcasts are worth more.
// On Intel's processors vpdpbusd shares its two ports with everything else on 512 bits (a core's loop of products alone: 416 GMAC/s, with
// an `and` beside every other one 308, beside each one 243), so unpacking and scaling cost as much as products: of eight columns Q8_0 has
// 64 products and 33 others a block, Q4_0 37, Q4_K 61 on 128, Q6_K 65 on 64, which leaves 66, 63, 68 and 50 % of the peak at most.
INLINE int least_int(int a, int b) { return a < b ? a : b; }
enum { TILE_VECS = TILE_ROWS / VL, PASS_VECS = 4 };      // vectors of rows: of a tile, of a pass at most
typedef struct {
    int N, v0, vecs, n0, cols;                           // of a column tile of N: which vectors, which columns
    int tiles;                                           // whose vectors those are, one tile after another
    int64_t apart;                                       // from one to the next
    int index, count;                                    // of the tile's passes: which one, of how many
} pass_shape;

// Where vector v of a pass has its rows: in which tile's block, given that of the first tile, and as which of its vectors; where its results go.
INLINE const char *block_of(const pass_shape s, const char *w, int v) { return s.tiles == 1 ? w : w + v / TILE_VECS * s.apart; }
INLINE int vector_of(const pass_shape s, int v) { return s.tiles == 1 ? s.v0 + v : v % TILE_VECS; }
INLINE float *result_of(const pass_shape s, float *out, int n, int v) { return out + (s.n0 + n) * s.tiles * TILE_ROWS + (s.v0 + v) * VL; }

// How far the templates unfold is the ISA's: PASS_ACC sums of a kind (FLOAT_ACC where there is
// one kind only) fit its registers, and SPECIALIZED is INLINE where a function
// per number of columns pays. The scalar build keeps its loops.
#if defined ISA_scalar
enum { PASS_ACC = 1, FLOAT_ACC = 1, FLOAT_VECS = 1, FLOAT_PHASES = 1 };
#define SPECIALIZED static __attribute__((noinline))
#define EACH(i, n) for (int i = 0; i < (n); i++)
#else
enum { PASS_ACC = VL == 16 || SPREADS ? SMALL_COLS : 4, FLOAT_ACC = VL == 8 ? 2 * FLOAT_COLS : 8, FLOAT_VECS = VL == 8 ? 2 : 1, FLOAT_PHASES = VL == 16 ? 2 : 1 };
#define SPECIALIZED INLINE
#define EACH(i, n) UNROLL(16) for (int i = 0; i < (n); i++)
#endif

// With a few columns the weights come from memory, and a tile is then too much work for the processor to look past it by itself. Its own
// prefetch works within pages, a few lines ahead in each, so several pages at once have more lines under way. Where that pays (see
// fetch_streams), several tiles are taken at once, which lie far apart, and lines asked for a little ahead in each: as many tiles as leave
// room for the sums of all columns, four at most (measured on Sapphire Rapids, two threads, one column, Q4_0: one tile 25.5 GB/s, two 29.8,
// four 28.2; with lines asked for ahead 29.0, 32.3 and 33.0; a loop that only reads 34.5). With more columns the driver names the next
// tile, which is asked for in FETCH_STREAMS streams, each the same way along its part of it. Elsewhere one pass asks for what lies a
// little ahead, several share out the next tile; one or two columns keep up without.
enum { AHEAD_BYTES = 2048, FETCH_STREAMS = 4, STREAM_COLS = VL == 16 ? 4 : 1 };
#define STREAMS_OF(cols) (VL == 16 ? ((cols) <= 2 ? 4 : 2) : VL == 8 ? 2 : 1)
typedef struct { const char *start, *next; int64_t bytes; } fetch_plan;        // this tile, the next one, the bytes of each
INLINE void fetch_ahead(const pass_shape s, const fetch_plan f, const char *w, const int bytes) {
    const int lines = (bytes + LINE - 1) / LINE;
    if (s.tiles > 1) {
        EACH(t, s.tiles) EACH(line, lines) __builtin_prefetch(w + AHEAD_BYTES + t * s.apart + LINE * line);
    } else if (f.next) {
        const char *at = f.next + (w - f.start) / FETCH_STREAMS;
        EACH(stream, FETCH_STREAMS) if (stream % s.count == s.index)
            EACH(line, (bytes / FETCH_STREAMS + LINE - 1) / LINE) __builtin_prefetch(at + stream * (f.bytes / FETCH_STREAMS) + LINE * line);
    } else if (s.N > 2) {
        w += s.count == 1 ? AHEAD_BYTES : f.bytes;
        EACH(line, lines) if (line % s.count == s.index) __builtin_prefetch(w + LINE * line);
    }
}

// Line t of a plane group, see pack.h. p: planes of 32 weights, already at this vector's rows; nibbles: its nibble line t or t - 4.
INLINE vi line_at(const char *p, int i) { return vi_load(p + LINE * i); }
INLINE vi quants(const tile_type d, const char *p, const int t, vi nibbles) {
    if (d.bits == 8) return line_at(p, t);
    vi q = vi_set(0);
    const int above = d.bits >= 4 ? 4 : 0;
    if (above) { q = (t < 4 ? nibbles : nibbles >> 4) & 0x0f0f0f0f; p += 4 * LINE; }
    if (d.codebook) return vi_lookup(d.codebook, q) ^ (int32_t)0x80808080;
    if (d.bits - above >= 2) {
        vi x = line_at(p, t >> 2);
        const int up = above - 2 * (t & 3);                  // from its place in the byte to its place in the weight
        q |= (up >= 0 ? x << up : x >> -up) & (0x03030303 << above);
        p += 2 * LINE;
    }
    if (d.bits & 1) {
        vi x = line_at(p, 0);
        const int up = d.bits - 1 - t;
        q |= (up >= 0 ? x << up : x >> -up) & (0x01010101 << (d.bits - 1));
    }
    return q;
}

// Whether the second half of the lines is summed apart, so that fewer products wait for the one before: with more columns there is
// enough else to do, and the sums would have to be joined.
INLINE int in_two_sums(const tile_type d, const pass_shape s, const int quads) {
    return MAC_WHOLE_BYTES && quads == 8 && s.cols <= 2 && (d.block == 32 || (d.bits == 4 && !d.codebook));
}

// Weights that fill the byte are stored plus 128 (see S8_BIAS), the others are small unsigned numbers.
// c[v * cols + n] += lines of quads `first` .. `first + quads` of 32 weights x their activations; factor: see mac_close, NULL: one.
INLINE void dot_lines(const tile_type d, const pass_shape s, const int first, const int quads, const char *planes, const char *q, const vi *factor, vi *c) {
    const int steps = d.zero == 7 ? 1 : least_int(quads, mac_steps(d.bits)), both = quads == 8 && d.bits != 8;
    const int apart = in_two_sums(d, s, quads), in_place = apart && d.bits == 4 && !d.codebook;      // in place: 16 times the upper nibbles
    vi sum[PASS_ACC], rest[PASS_ACC], nibbles[PASS_VECS];
    if (apart) EACH(j, s.vecs * s.cols) rest[j] = vi_set(0);
    EACH(i, quads) {
        const int t = first + (both ? (i & 1) * 4 + i / 2 : i);          // both halves of a nibble line while it is in a register
        vi x[PASS_VECS];
        EACH(v, s.vecs) {
            const char *p = block_of(s, planes, v) + 4 * VL * vector_of(s, v);
            if (d.bits >= 4 && d.bits < 8 && !(both && i & 1)) { nibbles[v] = line_at(p, t & 3); IN_REGISTER(nibbles[v]); }
            x[v] = in_place && t >= 4 ? nibbles[v] & (int32_t)0xf0f0f0f0 : quants(d, p, t, nibbles[v]);
        }
        EACH(n, s.cols) {
            vi y = vi_set4(q + 4 * ((t - first) * s.N + s.n0 + n));
            EACH(v, s.vecs) {
                const int j = v * s.cols + n;
                if (apart && i & 1) rest[j] = mac(rest[j], x[v], y);
                else if (d.zero == 7) c[j] = vi_dot_s8(c[j], x[v], y);
                else sum[j] = mac(i % steps == 0 ? mac_open(c[j]) : sum[j], x[v], y);
                if (d.zero != 7 && (i + 1) % steps == 0) c[j] = mac_close(c[j], sum[j], factor ? factor[v] : PAIR_OF_ONES);
            }
        }
    }
    if (apart) EACH(j, s.vecs * s.cols) c[j] += in_place ? rest[j] >> 4 : rest[j];
}
INLINE int needs_start(const tile_type d) { return d.zero == 7 ? S8_BIAS != 0 : d.zero != 0; }
INLINE vi start_of(const char *minus, const int shift) { return shift ? vi_set4_shift(minus, shift) : vi_set4(minus); }     // a shift is one product's time

INLINE vf scale_32(const tile_type d, const char *w, int v) {
    return d.scales == SCALES_E8M0 ? (vf)(vi_from_u8(w + VL * v) << 23) * 0.5f : vf_from_f16(w + 2 * VL * v);
}

// ---- blocks of 32 x ACT_A32 ------------------------------------------------------------------------------------------------------
INLINE void pass_32(const tile_type d, const pass_shape s, const char *w, const char *a, int64_t k, float *out, const char *next) {
    const int N = s.N, vecs = s.vecs, cols = s.cols;
    const fetch_plan ahead = {w, next, k / 32 * tile_block_bytes(d)};
    const int half = TILE_ROWS * 2, lane = VL * 2;
    vf f[PASS_ACC];
    EACH(i, vecs * cols) f[i] = vf_set(0);
    for (int64_t b = 0; b < k / 32; b++, w += tile_block_bytes(d), a += ACT_LAYOUT[ACT_A32].column_bytes * N) {
        vi c[PASS_ACC];
        EACH(n, cols) {
            vi start = needs_start(d) ? start_of(a + 4 * (2 * N + s.n0 + n), d.zero - A32_SHIFT) : vi_set(0);
            EACH(v, vecs) c[v * cols + n] = start;
        }
        fetch_ahead(s, ahead, w, tile_block_bytes(d));
        const char *planes = w + header_bytes(d), *q = a + 12 * N;
        dot_lines(d, s, 0, 8, planes, q, NULL, c);
        EACH(v, vecs) {
            vf scale = scale_32(d, block_of(s, w, v), vector_of(s, v));
            EACH(n, cols) f[v * cols + n] = vf_fma(vf_from_i(c[v * cols + n]), scale * vf_set(((const float *)a)[s.n0 + n]), f[v * cols + n]);
            if (d.mins) {
                vf m = vf_from_f16(block_of(s, w, v) + half + lane * vector_of(s, v));
                EACH(n, cols) f[v * cols + n] = vf_fma(m, vf_set(((const float *)a)[N + s.n0 + n]), f[v * cols + n]);
            }
        }
    }
    EACH(v, vecs) EACH(n, cols) vf_store(result_of(s, out, n, v), f[v * cols + n]);
}

// ---- blocks of 256 x ACT_A256 -----------------------------------------------------------------------------------------------------
// Scales of sub-blocks 2p and 2p + 1 as bytes in the halves of a lane, their mins, and the scales as numbers.
INLINE vi scale_bytes(const tile_type d, const char *w, const int v, const int p) { return vi_pairs_from_u8(w + 2 * TILE_ROWS * (1 + d.mins + p) + 2 * VL * v); }
INLINE vi min_pair(const tile_type d, const char *w, const int v, const int p) {
    return d.scales == SCALES_NIBBLE ? scale_bytes(d, w, v, p) >> 4 & 0x000f000f : scale_bytes(d, w, v, 128 / d.sub + p);
}
INLINE vi scale_pair(const tile_type d, const char *w, const int v, const int p) {
    const vi two = scale_bytes(d, w, v, p);
    return d.scales == SCALES_NIBBLE ? two & 0x000f000f : d.scales == SCALES_I8 ? vi_pairs_from_i8(two) : two;
}
INLINE vi doubled(vi two, const int side) { return side ? (two >> 16 & 0xffff) | (two & (int32_t)0xffff0000) : (two & 0xffff) | two << 16; }
INLINE vi shifted(vi two, const int zero) { return (vi)(-(vi_pairs)two << zero); }      // what a zero point takes off for each sum of activations

// Where sums are closed by a product, the scale is its factor. Else where the sums of two sub-blocks fit in 16 bits they meet both integer
// scales in one product. Others become floats first: a product of whole lanes takes twice the time, and as floats, too, nearly all sums of
// a block are exact.
INLINE int scales_close(const tile_type d) { return SPREADS && !d.codebook; }
INLINE int sums_fit_i16(const tile_type d) { return !d.codebook && (127 << (d.zero ? d.zero : d.bits)) * d.sub <= INT16_MAX; }
INLINE void pass_256(const tile_type d, const pass_shape s, const char *w, const char *a, int64_t k, float *out, const char *next) {
    const int N = s.N, vecs = s.vecs, cols = s.cols;
    const fetch_plan ahead = {w, next, k / 256 * tile_block_bytes(d)};
    const int half = TILE_ROWS * 2, lane = VL * 2, pairs = 128 / d.sub;
    const int quads = d.sub / 4;                             // per sub-block
    const int share = (tile_block_bytes(d) / LINE + pairs - 1) / pairs * LINE;      // of a block, to fetch ahead with each pair
    vf f[PASS_ACC];
    EACH(i, vecs * cols) f[i] = vf_set(0);
    for (int64_t b = 0; b < k / 256; b++, w += tile_block_bytes(d), a += ACT_LAYOUT[ACT_A256].column_bytes * N) {
        const char *planes = w + header_bytes(d), *q = a + 4 * 29 * N, *sums = a + 4 * (d.sub == 32 ? 25 : 17) * N + 4 * s.n0;
        vi pair[PASS_ACC];
        vf sum[PASS_ACC];
        EACH(i, vecs * cols) pair[i] = vi_set(0), sum[i] = vf_set(0);
        UNROLL(1) for (int p = 0; p < pairs; p++) {
            vi first[PASS_ACC], scales[PASS_VECS];
            fetch_ahead(s, ahead, w + p * share, share);
            if (scales_close(d)) EACH(v, vecs) scales[v] = scale_pair(d, block_of(s, w, v), vector_of(s, v), p);
            if (scales_close(d) && d.zero) EACH(n, cols) {
                const vi two = vi_set4(sums + 4 * (p * N + n));
                EACH(v, vecs) pair[v * cols + n] = vi_dot_i16(pair[v * cols + n], shifted(scales[v], d.zero), two);
            }
            EACH(side, 2) {                                     // the two sub-blocks whose scales lie side by side
                const char *lines = planes + (d.sub == 32 ? 2 * p + side : p) * planes_bytes(d);
                const char *quad = q + (2 * p + side) * quads * 4 * N;
                vi c[PASS_ACC], factor[PASS_VECS];
                if (scales_close(d)) {
                    EACH(v, vecs) factor[v] = doubled(scales[v], side);
                    dot_lines(d, s, d.sub == 32 ? 0 : 4 * side, quads, lines, quad, factor, pair);
                    continue;
                }
                EACH(n, cols) {
                    vi start = vi_set(0);
                    if (needs_start(d)) {
                        const char *minus = a + 4 * N + (2 * p + side) * (d.sub / 16) * 4 * N + 4 * (s.n0 + n);
                        start = start_of(minus, d.zero - A256_SHIFT);
                        if (d.sub == 32) start += start_of(minus + 4 * N, d.zero - A256_SHIFT);
                    }
                    EACH(v, vecs) c[v * cols + n] = start;
                }
                dot_lines(d, s, d.sub == 32 ? 0 : 4 * side, quads, lines, quad, NULL, c);
                if (sums_fit_i16(d) && !side) EACH(i, vecs * cols) first[i] = c[i] & 0xffff;
                else EACH(v, vecs) {
                    if (sums_fit_i16(d)) {
                        const vi two = scale_pair(d, block_of(s, w, v), vector_of(s, v), p);
                        EACH(n, cols) pair[v * cols + n] = vi_dot_i16(pair[v * cols + n], two, first[v * cols + n] | c[v * cols + n] << 16);
                        continue;
                    }
                    const vi two = scale_bytes(d, block_of(s, w, v), vector_of(s, v), p);
                    const vf scale = vf_from_i(d.scales == SCALES_I8 ? (side ? two << 8 : two << 24) >> 24 : side ? two >> 16 : two & 0xff);
                    EACH(n, cols) sum[v * cols + n] = vf_fma(vf_from_i(c[v * cols + n]), scale, sum[v * cols + n]);
                }
            }
        }
        EACH(v, vecs) {
            vf scale = vf_from_f16(block_of(s, w, v) + lane * vector_of(s, v));
            EACH(n, cols) {
                vf y = (scales_close(d) || sums_fit_i16(d) ? vf_from_i(pair[v * cols + n]) : sum[v * cols + n]) * scale;
                if (d.mins) {
                    vi m = vi_set(0);
                    EACH(p, pairs) m = vi_dot_i16(m, min_pair(d, block_of(s, w, v), vector_of(s, v), p), vi_set4(sums + 4 * (p * N + n)));
                    y = vf_fma(-vf_from_i(m), vf_from_f16(block_of(s, w, v) + half + lane * vector_of(s, v)), y);
                }
                f[v * cols + n] = vf_fma(y, vf_set(((const float *)a)[s.n0 + n]), f[v * cols + n]);
            }
        }
    }
    EACH(v, vecs) EACH(n, cols) vf_store(result_of(s, out, n, v), f[v * cols + n]);
}

// ---- codes with a float scale per 16, for either activation format ------------------------------------------------------------------
INLINE void pass_codes(const tile_type d, const pass_shape s, const char *w, const char *a, int64_t k, float *out) {    // never from memory
    const int N = s.N, vecs = s.vecs, cols = s.cols, layout = d.block == 32 ? ACT_A32 : ACT_A256, dwords = d.block == 32 ? 3 : 29;
    vf f[PASS_ACC];
    EACH(i, vecs * cols) f[i] = vf_set(0);
    for (int64_t b = 0; b < k / d.block; b++, w += tile_block_bytes(d), a += ACT_LAYOUT[layout].column_bytes * N) {
        vf sum[PASS_ACC];
        EACH(i, vecs * cols) sum[i] = vf_set(0);
        UNROLL(1) for (int g = 0; g < d.block / 32; g++) EACH(h, 2) {
            const char *quad = a + 4 * (dwords + 8 * g + 4 * h) * N;
            vi c[PASS_ACC];
            EACH(n, cols) {
                vi start = vi_set(0);
                if (S8_BIAS && d.block == 256) start = start_of(a + 4 * ((1 + 2 * g + h) * N + s.n0 + n), d.zero - A256_SHIFT);
                if (S8_BIAS && d.block == 32) {              // A32 has no sums of 16: take them here
                    EACH(t, 4) start = vi_dot_u7(start, vi_set((int32_t)0x80808080), vi_set4(quad + 4 * (t * N + s.n0 + n)));
                    start = -start;
                }
                EACH(v, vecs) c[v * cols + n] = start;
            }
            dot_lines(d, s, 4 * h, 4, w + header_bytes(d) + g * planes_bytes(d), quad, NULL, c);
            EACH(v, vecs) {
                vf scale = vf_load((const float *)w + (2 * g + h) * TILE_ROWS + VL * (s.v0 + v));
                EACH(n, cols) sum[v * cols + n] = vf_fma(vf_from_i(c[v * cols + n]), scale, sum[v * cols + n]);
            }
        }
        EACH(v, vecs) EACH(n, cols) f[v * cols + n] = vf_fma(sum[v * cols + n], vf_set(((const float *)a)[s.n0 + n]), f[v * cols + n]);
    }
    EACH(v, vecs) EACH(n, cols) vf_store(result_of(s, out, n, v), f[v * cols + n]);
}

// ---- floats x ACT_F32 -------------------------------------------------------------------------------------------------------------
INLINE vf float_line(const tile_type d, const char *p) {
    return d.id == TYPE_f32 ? vf_load(p) : d.id == TYPE_f16 ? vf_from_f16(p) : vf_from_bf16(p);
}
INLINE void pass_1(const tile_type d, const pass_shape s, const char *w, const char *a, int64_t k, float *out, const char *next) {
    const int N = s.N, vecs = s.vecs, cols = s.cols;
    const fetch_plan ahead = {w, next, k * tile_block_bytes(d)};
    // a narrow pass needs independent sums to hide the latency of fma; as many in a wide one, for a column must not depend on its neighbours
    const int phases = FLOAT_PHASES, step = tile_block_bytes(d), share = FETCH_STREAMS * LINE;
    vf f[FLOAT_PHASES][FLOAT_ACC];
    EACH(p, phases) EACH(i, vecs * cols) f[p][i] = vf_set(0);
    int64_t i = 0;
    for (; i + share / step <= k; i += share / step) {
        fetch_ahead(s, ahead, w, share);
        for (int j = 0; j < share / step; j += phases, w += phases * step, a += 4 * phases * N)
            EACH(p, phases) {
                vf x[PASS_VECS];
                EACH(v, vecs) x[v] = float_line(d, block_of(s, w, v) + p * step + VL * d.bytes * vector_of(s, v));
                EACH(n, cols) {
                    vf y = vf_set(((const float *)a)[p * N + s.n0 + n]);
                    EACH(v, vecs) f[p][v * cols + n] = vf_fma(x[v], y, f[p][v * cols + n]);
                }
            }
    }
    for (; i < k; i++, w += step, a += 4 * N)
        EACH(v, vecs) EACH(n, cols) f[0][v * cols + n] = vf_fma(float_line(d, block_of(s, w, v) + VL * d.bytes * vector_of(s, v)), vf_set(((const float *)a)[s.n0 + n]), f[0][v * cols + n]);
    EACH(v, vecs) EACH(n, cols) {
        vf y = f[0][v * cols + n];
        if (phases > 1) y += f[FLOAT_PHASES - 1][v * cols + n];
        vf_store(result_of(s, out, n, v), y);
    }
}

// ---- instances: a function per type and number of columns ---------------------------------------------------------------------------
INLINE void pass(const tile_type d, const pass_shape s, const char *w, const char *a, int64_t k, float *out, const char *next) {
    if (d.block == 1) pass_1(d, s, w, a, k, out, next);
    else if (d.scales == SCALES_F32) pass_codes(d, s, w, a, k, out);
    else if (d.block == 32) pass_32(d, s, w, a, k, out, next);
    else pass_256(d, s, w, a, k, out, next);
}
INLINE void passes(const tile_type d, const int N, const char *w, const char *a, int64_t k, float *out, const char *next) {
    const int acc = d.block == 1 ? FLOAT_ACC : PASS_ACC;
    const int wide = d.block == 1 ? FLOAT_VECS : SPREADS && nibbles_alone(d) ? TILE_VECS : 1;
    const int vecs = N * TILE_VECS <= acc ? TILE_VECS : wide, across = (N * vecs + acc - 1) / acc, cols = acc == 1 ? 1 : (N + across - 1) / across;
    const int rest = N % cols, count = TILE_VECS / vecs * across;
    UNROLL(1) for (int v = 0; v < TILE_VECS; v += vecs) {
        const int index = v / vecs * across;
        UNROLL(1) for (int n = 0; n < N - rest; n += cols) pass(d, (pass_shape){N, v, vecs, n, cols, 1, 0, index + n / cols, count}, w, a, k, out, next);
        if (rest) pass(d, (pass_shape){N, v, vecs, N - rest, rest, 1, 0, index + across - 1, count}, w, a, k, out, next);
    }
}

#define ALL_TILES(T) FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T) CODES32_TILES(T) CODES256_TILES(T)
#define INSTANCE(name, n) \
    static void tile_##name##_##n(const char *w, const char *a, int64_t k, float *out, const char *next) { passes_##name(n, w, a, k, out, next); }
#define T(name, ...) \
    SPECIALIZED void passes_##name(const int N, const char *w, const char *a, int64_t k, float *out, const char *next) { \
        passes(TILE_TYPES[TYPE_##name], N, w, a, k, out, next); \
    } \
    INSTANCE(name, 1) INSTANCE(name, 2) INSTANCE(name, 3) INSTANCE(name, 4) INSTANCE(name, 5) INSTANCE(name, 6) INSTANCE(name, 7) INSTANCE(name, 8)
ALL_TILES(T)
#undef T

// By tile type and number of columns less one.
static tile_fn *const TILE_KERNELS[N_TILES][SMALL_COLS] = {
#define T(name, ...) [TYPE_##name] = {tile_##name##_1, tile_##name##_2, tile_##name##_3, tile_##name##_4, \
                                      tile_##name##_5, tile_##name##_6, tile_##name##_7, tile_##name##_8},
    ALL_TILES(T)
#undef T
};

// Several tiles x 1 .. STREAM_COLS columns, by tile type. Where there is no room for several, nobody calls them.
#define STREAMS(name, n) \
    static void streams_##name##_##n(const char *w, int64_t apart, const char *a, int64_t k, float *out) { \
        const pass_shape s = {n, 0, STREAMS_OF(n) * TILE_VECS, 0, n, STREAMS_OF(n), apart, 0, 1}; \
        if (STREAMS_OF(n) > 1 && n <= STREAM_COLS) pass(TILE_TYPES[TYPE_##name], s, w, a, k, out, NULL); \
    }
#define T(name, ...) STREAMS(name, 1) STREAMS(name, 2) STREAMS(name, 3) STREAMS(name, 4)
FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T)
#undef T
#undef STREAMS
static streams_fn *const STREAM_KERNELS[N_TILES][4] = {
#define T(name, ...) [TYPE_##name] = {streams_##name##_1, streams_##name##_2, streams_##name##_3, streams_##name##_4},
    FLOAT_TILES(T) BLOCK32_TILES(T) BLOCK256_TILES(T)
#undef T
};
