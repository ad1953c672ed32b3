// Activations as the matmuls read them.
//
// Packed weights hold 16 rows side by side, so their kernels want the columns side by side too: a column tile is up to
// SMALL_COLS columns, interleaved. N is the number of columns in the tile (the last tile of a batch may be narrower).
//
//   ACT_F32   float [k][N]
//   ACT_A32   per 32 weights     float d[N]   float s[N]   int32 minus[N]   int8 q[8][N][4]
//             x = d * q,  d = max|x| / 127,  s = d * sum(q),  minus = -8 * sum(q)                 (rounding of ggml's Q8_0)
//   ACT_A256  per 256 weights    float d[N]   int32 minus[16][N]   int16 pair16[8][N][2]   int16 pair32[4][N][2]   int8 q[64][N][4]
//             x = d * q,  q = -127 at the value of largest magnitude                               (rounding of ggml's Q8_K)
//             minus[i] = -32 * (sum of the i-th 16 q), pair16 and pair32 are sums of 16 and 32 q, in order
//
//   ACT_PAIRS32, ACT_PAIRS256    float d[8]   int32 own[8]   int16 q[8 or 64][8][4], always 8 columns: of a quad q1 q3 q0 q2
//             x = d * q, as in A32 and A256,  own = -sum(q0 q1 + q2 q3)                            (see spread.h)
//   ACT_BF16  per 32 weights     bf16 x[16][32], always 16 columns, zeros from k on               (a square of simd.h's matrix unit)
//   ACT_BF16X2                   the same twice: x rounded to bf16, then what was lost, rounded
//
// `minus` is what an unsigned weight needs: (w - zero) . q = w . q - zero * sum(q), the accumulator's start value; as Q4_0 and Q6_K take it.
// ACT_ROW_* is for a few columns against raw weights: each column a row of ggml blocks. Beyond SMALL_COLS columns weights
// are unpacked into tiles on the fly, and the columns are interleaved as for packed weights (act_layout).
// Beyond WIDE_COLS columns all weights but F32 are unpacked into bf16 for a matrix unit (squares.h), and on AVX2 tiles are spread (spread.h).
#pragma once

typedef struct {
    int block;                 // weights that one activation block covers
    int column_bytes;          // bytes of a block per column
    int interleaved;           // the layout used beyond SMALL_COLS columns
    int row_type;              // ACT_ROW_*: the ggml type of a row
    int across;                // columns of every column tile, used or not; 0: as many as are used
    int parts;                 // ACT_BF16*: how many bf16 a value is the sum of
} act_layout_row;
static const act_layout_row ACT_LAYOUT[] = {
    [ACT_F32]      = {.block = 1, .column_bytes = 4, .interleaved = ACT_F32},
    [ACT_A32]      = {.block = 32, .column_bytes = 4 + 4 + 4 + 32, .interleaved = ACT_A32},
    [ACT_A256]     = {.block = 256, .column_bytes = 4 + 4 * 16 + 4 * 8 + 4 * 4 + 256, .interleaved = ACT_A256},
    [ACT_ROW_Q8_0] = {.block = 32, .column_bytes = sizeof(block_q8_0), .interleaved = ACT_A32, .row_type = TYPE_q8_0},
    [ACT_ROW_Q8_1] = {.block = 32, .column_bytes = sizeof(block_q8_1), .interleaved = ACT_A32, .row_type = TYPE_q8_1},
    [ACT_ROW_Q8_K] = {.block = 256, .column_bytes = sizeof(block_q8_K), .interleaved = ACT_A256, .row_type = TYPE_q8_K},
    [ACT_PAIRS32]  = {.block = 32, .column_bytes = 4 + 4 + 2 * 32, .across = SMALL_COLS},
    [ACT_PAIRS256] = {.block = 256, .column_bytes = 4 + 4 + 2 * 256, .across = SMALL_COLS},
    [ACT_BF16]     = {.block = MATRIX_DEPTH, .column_bytes = 2 * MATRIX_DEPTH, .across = MATRIX_SIDE, .parts = 1},
    [ACT_BF16X2]   = {.block = MATRIX_DEPTH, .column_bytes = 4 * MATRIX_DEPTH, .across = MATRIX_SIDE, .parts = 2},
};
enum { A32_SHIFT = 3, A256_SHIFT = 5 };            // zero points that `minus` is for, as powers of two
enum { FLOAT_COLS = VL == 8 ? 6 : SMALL_COLS };    // of a tile in a large batch: with two vectors of rows, six columns of sums fill 16 registers best
enum { WIDE_COLS = SPREADS ? 15 : PYG_WIDE_COLS };  // up to this many columns spreading tiles or the matrix unit do not pay for the unpacking
                                                   // (measured: the unit breaks even between 24, Q6_K, and 46, Q4_K)

// The layout that `format` takes for this many columns, and whether it meets spread tiles.
static int act_layout(int format, int64_t cols) {
    if (format >= ACT_WIDE && cols > WIDE_COLS) return format / ACT_WIDE;
    return cols > SMALL_COLS ? ACT_LAYOUT[format % ACT_WIDE].interleaved : format % ACT_WIDE;
}

static int takes_spread(int format, int64_t cols) { return SPREADS && format >= ACT_WIDE && cols > WIDE_COLS; }

// Columns of a whole column tile, of a batch of `cols`.
static int act_width(int layout, int64_t cols) {
    return ACT_LAYOUT[layout].across ? ACT_LAYOUT[layout].across : layout == ACT_F32 && cols > SMALL_COLS ? FLOAT_COLS : SMALL_COLS;
}
static int64_t act_tiles(int layout, int64_t cols) { return (cols + act_width(layout, cols) - 1) / act_width(layout, cols); }

static int64_t act_column_bytes(int layout, int64_t k) {
    const act_layout_row *row = &ACT_LAYOUT[layout];
    return (k + row->block - 1) / row->block * row->column_bytes;
}

// Bytes for up to this many columns.
static int64_t act_bytes(int format, int64_t k, int64_t cols) {
    const int layouts[] = {format % ACT_WIDE, ACT_LAYOUT[format % ACT_WIDE].interleaved, format / ACT_WIDE};
    int64_t most = 0;
    for (int i = 0; i < 2 + (format >= ACT_WIDE); i++) {
        int64_t across = ACT_LAYOUT[layouts[i]].across ? act_tiles(layouts[i], cols) * ACT_LAYOUT[layouts[i]].across : cols;
        int64_t bytes = act_column_bytes(layouts[i], k) * across;
        if (bytes > most) most = bytes;
    }
    return most;
}

// ---- a piece of one column: up to 256 floats to bytes, then into column n of N -------------------------------------------------
enum { ACT_PIECE = 256 };      // floats normalized and rounded at a time, on the stack

typedef struct { float d[8]; int32_t sum[16]; int8_t q[ACT_PIECE]; } act_piece;      // d per 32; sums of 16

// Two sums of four neighbours each.
INLINE void sums_of_4(const int32_t *x, int32_t *sum) {
    typedef int32_t four __attribute__((vector_size(16)));
    four a, b;
    memcpy(&a, x, 16);
    memcpy(&b, x + 4, 16);
    four t = __builtin_shuffle(a, b, (four){0, 2, 4, 6}) + __builtin_shuffle(a, b, (four){1, 3, 5, 7});
    t += __builtin_shuffle(t, (four){1, 0, 3, 2});
    t = __builtin_shuffle(t, (four){0, 2, 0, 2});
    memcpy(sum, &t, 8);
}

// Rounds `count` floats to bytes, block b of 32 times factor[b], and takes the sums.
INLINE void round_piece(const float *x, int count, const float factor[8], act_piece *p) {
    for (int i = 0; i < count; i += VL) vi_to_i8(p->q + i, vi_round(vf_load(x + i) * factor[i / 32]));
    int32_t quad[ACT_PIECE / 4];
    for (int i = 0; i < count / 4; i += VL) vi_store(quad + i, vi_dot_u7(vi_set(0), vi_set(0x01010101), vi_load(p->q + 4 * i)));
    for (int i = 0; i < count / 16; i += 2) sums_of_4(quad + 4 * i, p->sum + i);
}

INLINE void put_quads(const int8_t *q, int quads, int32_t *first, int N) {
    for (int t = 0; t < quads; t++, first += N) memcpy(first, q + 4 * t, 4);
}

INLINE void put_pairs(const int8_t *q, int quads, float d, char *block, int N, int n) {
    int32_t even[VL], odd[VL], *dword = (int32_t *)block + n, *first = dword + 2 * N + n;
    vi own = vi_set(0);
    for (int t = 0; t < quads; t += VL) {
        const vi_pairs x = (vi_pairs)vi_load(q + 4 * t), low = x << 8 >> 8, high = x >> 8;
        own = vi_dot_i16(own, (vi)low, (vi)high);
        vi_store(even, (vi)low);
        vi_store(odd, (vi)high);
        for (int i = 0; i < VL; i++, first += 2 * N) first[0] = odd[i], first[1] = even[i];
    }
    memcpy(dword, &d, 4);
    dword[N] = -vi_sum(own);
}

static void round_32(const float *x, int count, act_piece *p) {
    float factor[8];
    for (int b = 0; b < count / 32; b++) p->d[b] = abs_max(32, x + 32 * b);
    for (int b = count / 32; b < 8; b++) p->d[b] = 0;
    for (int b = 0; b < 8; b++) {
        p->d[b] /= 127.0f;
        factor[b] = inverse(p->d[b]);
    }
    round_piece(x, count, factor, p);
}

static void act_a32(const float *x, int count, char *block, int N, int n) {
    act_piece p;
    round_32(x, count, &p);
    for (int b = 0; b < count / 32; b++, block += ACT_LAYOUT[ACT_A32].column_bytes * N) {
        int32_t sum = p.sum[2 * b] + p.sum[2 * b + 1], *dword = (int32_t *)block + n;
        float s = p.d[b] * (float)sum;
        memcpy(dword, &p.d[b], 4);
        memcpy(dword + N, &s, 4);
        dword[2 * N] = -sum * (1 << A32_SHIFT);
        put_quads(p.q + 32 * b, 8, dword + 3 * N, N);
    }
}

// Returns the scale. The value of largest magnitude becomes -127, so that the scale takes its sign with it.
static float round_256(const float *x, act_piece *p) {
    const float extreme = signed_max(256, x), factor = extreme != 0 ? -127.0f / extreme : 0;
    const float same[8] = {factor, factor, factor, factor, factor, factor, factor, factor};
    round_piece(x, 256, same, p);
    return inverse(factor);
}

INLINE int32_t pair_of(int32_t low, int32_t high) { return (low & 0xffff) | (int32_t)((uint32_t)high << 16); }

static void act_a256(const float *x, char *block, int N, int n) {
    act_piece p;
    const float d = round_256(x, &p);
    int32_t *dword = (int32_t *)block + n;
    memcpy(dword, &d, 4);
    for (int i = 0; i < 16; i++) dword[(1 + i) * N] = -p.sum[i] * (1 << A256_SHIFT);
    for (int i = 0; i < 8; i++) dword[(17 + i) * N] = pair_of(p.sum[2 * i], p.sum[2 * i + 1]);
    for (int i = 0; i < 4; i++) dword[(25 + i) * N] = pair_of(p.sum[4 * i] + p.sum[4 * i + 1], p.sum[4 * i + 2] + p.sum[4 * i + 3]);
    put_quads(p.q, 64, dword + 29 * N, N);
}

// In pairs of 16 bits, per `size` weights.
static void act_pairs(const float *x, int count, const int size, char *block, int N, int n) {
    act_piece p;
    if (size == 256) p.d[0] = round_256(x, &p);
    else round_32(x, count, &p);
    for (int b = 0; b < count / size; b++, block += (8 + 2 * size) * N) put_pairs(p.q + size * b, size / 4, p.d[b], block, N, n);
}

// Column n of the squares for `count` values of a column.
static void act_bf16(const float *x, int count, char *square, int parts, int n) {
    float last[MATRIX_DEPTH];
    for (int i = 0; i < count; i += MATRIX_DEPTH, square += parts * MATRIX_SQUARE) {
        const float *y = x + i;
        if (count - i < MATRIX_DEPTH) {
            memset(last, 0, sizeof last);
            memcpy(last, y, (count - i) * sizeof(float));
            y = last;
        }
        for (int j = 0; j < MATRIX_DEPTH; j += 2 * VL) {
            char *line = square + 2 * MATRIX_DEPTH * n + 2 * j;
            vf low = vf_load(y + j), high = vf_load(y + j + VL);
            vf_store(line, vf_pack_bf16(low, high));
            if (parts == 2) vf_store(line + MATRIX_SQUARE, vf_pack_bf16(low - vf_from_bf16(line), high - vf_from_bf16(line + 2 * VL)));
        }
    }
}

// ---- columns ---------------------------------------------------------------------------------------------------------------
typedef struct { const float *weight; float eps; } act_norm;       // weight NULL: x as it is

// Column x of k floats into column n of a tile of N (row layouts: N = 1, the row starts at `tile`).
static void act_column(int layout, const float *x, act_norm norm, int64_t k, char *tile, int N, int n) {
    float scale = norm.weight ? rms_scale(x, k, norm.eps) : 0, piece[ACT_PIECE];
    const act_layout_row *row = &ACT_LAYOUT[layout];
    for (int64_t i = 0; i < k; i += ACT_PIECE) {
        int count = k - i < ACT_PIECE ? (int)(k - i) : ACT_PIECE;
        const float *y = x + i;
        if (norm.weight) {
            int j = 0;
            for (; j + VL <= count; j += VL) vf_store(piece + j, vf_load(y + j) * scale * vf_load(norm.weight + i + j));
            for (; j < count; j++) piece[j] = y[j] * scale * norm.weight[i + j];
            y = piece;
        }
        char *block = tile + i / row->block * row->column_bytes * N;
        switch (layout) {
        case ACT_F32: for (int j = 0; j < count; j++) ((float *)block)[j * N + n] = y[j]; break;
        case ACT_A32: act_a32(y, count, block, N, n); break;
        case ACT_A256: act_a256(y, block, N, n); break;
        case ACT_PAIRS32: case ACT_PAIRS256: act_pairs(y, count, row->block, block, N, n); break;
        case ACT_BF16: case ACT_BF16X2: act_bf16(y, count, block, row->parts, n); break;
        default: kernels->quantize[row->row_type](count, y, block, NULL);
        }
    }
}

static inline int act_tile_cols(int layout, int64_t cols, int64_t tile) {
    int64_t width = act_width(layout, cols), left = cols - tile * width;
    return (int)(left < width ? left : width);
}

// One column tile of x (a column is a row of the view x) into its place in `dst`.
static void act_tile(int layout, const char *const *columns, act_norm norm, int64_t k, char *dst, int N) {
    int rows = ACT_LAYOUT[layout].row_type != 0, across = ACT_LAYOUT[layout].across ? ACT_LAYOUT[layout].across : N;
    for (int n = 0; n < N; n++) {
        if (rows) act_column(layout, (const float *)columns[n], norm, k, dst + n * act_column_bytes(layout, k), 1, 0);
        else act_column(layout, (const float *)columns[n], norm, k, dst, across, n);
    }
}

static act_norm norm_of(const worker *w, const pyg_step *s, int norm_source) {
    const pyg_view *v = view_of(w, s->src[norm_source]);
    return (act_norm){v ? (const float *)v->data : NULL, s->f[0]};
}

// Columns of a (T, K) or (T, U, K) view, numbered in order.
static inline const char *column_at(const pyg_view *x, int64_t c) {
    return x->ne[2] == 1 ? row_at(x, c, 0, 0) : row_at(x, c % x->ne[1], c / x->ne[1], 0);      // no division where there is nothing to divide
}

static void act_view_tile(int layout, const pyg_view *x, act_norm norm, int64_t cols, int64_t tile, char *dst) {
    const char *columns[MATRIX_SIDE];
    const int64_t first = tile * act_width(layout, cols);
    int N = act_tile_cols(layout, cols, tile);
    for (int n = 0; n < N; n++) columns[n] = column_at(x, first + n);
    act_tile(layout, columns, norm, x->ne[0], dst + first * act_column_bytes(layout, x->ne[0]), N);
}

// prepare: every worker takes column tiles until none is left.
static void op_prepare(worker *w, const pyg_step *s) {
    const pyg_view *x = view_of(w, s->src[0]);
    int64_t cols = x->ne[1] * x->ne[2];
    int layout = act_layout(s->i[1], cols);
    const int64_t tiles = act_tiles(layout, cols);
    for (int64_t t; (t = claim(w, tiles)) < tiles;) act_view_tile(layout, x, norm_of(w, s, 1), cols, t, view_of(w, s->dst)->data);
}

// mul_mat and its kin, small path: the worker's own copy, kept for the next step with the same act id.
static const char *act_private(worker *w, const pyg_step *s, int layout, int64_t cols) {
    if (s->i[0] >= 0 && w->act.id == s->i[0] && w->act.format == layout) return w->act.data;
    const pyg_view *x = view_of(w, s->src[1]);
    for (int64_t t = 0; t < act_tiles(layout, cols); t++) act_view_tile(layout, x, norm_of(w, s, 2), cols, t, w->act.data);
    w->act.id = s->i[0];
    w->act.format = layout;
    return w->act.data;
}
