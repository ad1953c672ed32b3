// Encoders of blocks with scales: fit VL blocks side by side (search.h; compat.h when ggml's choice is wanted), then put each block's codes
// where the block wants them.
#pragma once

typedef struct { vf x[MAX_BLOCK], w[MAX_BLOCK], importance[MAX_BLOCK], row; } slab;      // row: mean squares of the blocks' rows

INLINE void transpose(vf t[VL]) {
    for (int round = 1; round < VL; round *= 2) {
        vf u[VL];
        UNROLL(16) for (int i = 0; i < VL / 2; i++) {
            u[2 * i] = vf_zip_low(t[i], t[i + VL / 2]);
            u[2 * i + 1] = vf_zip_high(t[i], t[i + VL / 2]);
        }
        memcpy(t, u, sizeof u);
    }
}
// n weights from each of VL places, lane by lane.
INLINE void load_lanes(int n, const float *const from[VL], vf *out) {
    for (int i = 0; i < n; i += VL) {
        vf t[VL];
        UNROLL(16) for (int l = 0; l < VL; l++) t[l] = vf_load(from[l] + i);
        transpose(t);
        memcpy(out + i, t, sizeof t);
    }
}
typedef struct { int64_t row; float mean; } row_square;      // the mean square of the row that was last asked for
static float mean_square(int64_t row, int64_t n, const float *x, row_square *last) {
    if (last->row == row) return last->mean;
    float sum = 0;                                         // in order, as ggml does
    for (int64_t i = 0; i < n; i++) sum += x[row * n + i] * x[row * n + i];
    *last = (row_square){row, sum / n};
    return last->mean;
}
// Blocks k, k + 1, ... of rows of n weights (missing ones repeat the last) with their importance; returns how many there are.
INLINE int load_blocks(slab *t, int block, int64_t k, int64_t blocks, int64_t n, const float *x, const float *importance,
                       int by_row, row_square *last) {
    const float *from[VL], *weights[VL];
    float row[VL];
    int count = blocks - k < VL ? blocks - k : VL;
    for (int l = 0; l < VL; l++) {
        int64_t b = k + (l < count ? l : count - 1), per_row = n / block;
        from[l] = x + b * block;
        weights[l] = importance ? importance + b % per_row * block : x;
        for (int i = 0; i < block; i += LINE / 4) __builtin_prefetch(from[l] + VL * block + i);     // of the blocks that come next
        if (by_row) row[l] = mean_square(b / per_row, n, x, last);
    }
    load_lanes(block, from, t->x);
    if (importance) load_lanes(block, weights, t->importance);
    t->row = by_row ? vf_load(row) : vf_set(0);
    return count;
}

// ---- blocks of a type ----------------------------------------------------------------------------------------------------------------------
typedef enum { NEVER, WITHOUT_IMPORTANCE, WITH_IMPORTANCE, ALWAYS } when;
INLINE int holds(when w, const float *importance) { return w == ALWAYS || w == (importance ? WITH_IMPORTANCE : WITHOUT_IMPORTANCE); }
static const errors no_errors = {{0}, {0}, {0}};
typedef struct {
    int block, bytes;
    void (*fit)(const slab *t, int search, int weighted, fitted *f);
    errors (*errors)(const slab *t, const fitted *f);      // of a fit, before it is stretched
    void (*pack)(const float *x, const fitted *f, int lane, void *block);
    void (*formula)(int64_t n, const float *x, void *dst, const float *importance);
    when ggml_fits;              // its formula otherwise
    counting ggml, searched;     // what errors count
    when stretched;              // where divergence is the less for it, on several texts
} encoder;

// What blocks lose: squared errors, or with `longer` the loss (loss.h), a lane each, after they were stretched to where that is least.
INLINE vf stretch(errors s, int longer, fitted *f) {
    f->stored = f->d;
    f->stored_min = f->dmin;
    if (!longer) return s.ee;
    moments m = moments_of(s);
    vf loss = loss_of(s), best = best_scale(m), ratio = vf_half(f->d * best) * vf_inverse(vf_half(f->d));
    vf saved = curvature(m) * ((best - 1) * (best - 1) - (ratio - best) * (ratio - best));
    vi better = (ratio > 1) & (saved > 0);
    vf_keep(better, &f->stored, f->d * best);
    vf_keep(better, &f->stored_min, f->dmin * best);
    return loss - vf_select(better, saved, vf_set(0));
}
INLINE void keep_fit(vi better, fitted *best, const fitted *f) {
    vf *to = (vf *)best;
    const vf *from = (const vf *)f;
    for (size_t i = 0; i < sizeof *f / sizeof *from; i++) vf_keep(better, to + i, from[i]);
}

// A search minimizes the plain squared error (but see Q4_0 and Q3_K), or one weighted as ggml's: with importance alone, divergence was higher (the
// factor sqrt(.. + x^2) spares large weights, whose inputs are correlated with others). But where ggml has twice the mean square of a block
// in there, with four times divergence was 1 % lower, for text like that of the importance and for other text (means of nine orders of a
// model's channels). Where ggml fits too and its choice loses less, that is taken.
static int encode_blocks(const encoder *e, int64_t rows, int64_t n, const float *x, uint8_t *dst, const float *importance, int search) {
    int fits = holds(e->ggml_fits, importance), longer = search && holds(e->stretched, importance), given = importance != NULL;
    int weighted = given || (search && e->searched.plain != EQUAL);
    if (!search && !fits) {
        e->formula(rows * n, x, dst, NULL);
        return 0;
    }
    int64_t blocks = rows * (n / e->block);
    row_square last = {-1, 0};
    fitted f = {0}, other = {0};
    const counting counts = search ? e->searched : e->ggml;
    for (int64_t k = 0; k < blocks; k += VL, dst += VL * e->bytes) {
        slab t;
        int count = load_blocks(&t, e->block, k, blocks, n, x, importance, given && counts.given == WITH_ROW, &last);
        const vf *known = given ? t.importance : NULL;
        weigh(counts, known, t.row, e->block, t.x, t.w);
        e->fit(&t, search, weighted, &f);
        if (!search || !(fits || longer)) stretch(no_errors, 0, &f);
        else {
            vf loss = stretch(e->errors(&t, &f), longer, &f);
            if (fits) {
                weigh(e->ggml, known, t.row, e->block, t.x, t.w);
                e->fit(&t, 0, given, &other);
                weigh(counts, known, t.row, e->block, t.x, t.w);
                keep_fit(stretch(e->errors(&t, &other), longer, &other) < loss, &f, &other);
            }
        }
        for (int l = 0; l < count; l++) e->pack(x + (k + l) * e->block, &f, l, dst + l * e->bytes);
    }
    return 0;
}
#define ENCODER(name, QK, ERRORS, formula, ggml_fits, plain, given, searched, sought, stretched)        \
    static errors errors_##name(const slab *t, const fitted *f) { (void)t; (void)f; return ERRORS; }    \
    static const encoder encoder_##name = {QK, sizeof(block_##name), fit_##name, errors_##name, pack_##name, formula, ggml_fits, {plain, given}, \
                                           {searched, sought}, stretched};                              \
    static int encode_##name(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        return encode_blocks(&encoder_##name, rows, n, x, dst, importance, search);                     \
    }

// ---- errors, blocks side by side ------------------------------------------------------------------------------------------------------------
INLINE void add_error(errors *s, vf w, vf x, vf v) {
    vf e = x - v, wx = w * x;
    s->xx = vf_fma(wx, x, s->xx);
    s->ex = vf_fma(wx, e, s->ex);
    s->ee = vf_fma(w * e, e, s->ee);
}
// Of weight = d * value, and of weight = d * code + minimum; with groups, of integer multiples of those.
INLINE errors direct_errors(levels p, int n, const slab *t, const fitted *f) {
    errors s = {{0}, {0}, {0}};
    vf d = vf_half(f->d);
    for (int i = 0; i < n; i++) add_error(&s, t->w[i], t->x[i], d * value_at(&p, t->x[i], f->factor));
    return s;
}
INLINE errors direct_affine_errors(float top, int n, const slab *t, const fitted *f) {
    errors s = {{0}, {0}, {0}};
    vf d = vf_half(f->d), m = vf_half(f->dmin);
    for (int i = 0; i < n; i++) add_error(&s, t->w[i], t->x[i], vf_fma(d, affine_code(t->x[i], f->m[0], f->factor, top), m));
    return s;
}
INLINE errors scaled_errors(levels p, int groups, int n, const slab *t, const fitted *f) {
    errors s = {{0}, {0}, {0}};
    for (int g = 0; g < groups; g++) {
        vf d = f->d * f->s[g], factor = vf_inverse(d);
        for (int i = g * n; i < (g + 1) * n; i++) add_error(&s, t->w[i], t->x[i], d * value_at(&p, t->x[i], factor));
    }
    return s;
}
INLINE errors scaled_affine_errors(float top, int groups, int n, const slab *t, const fitted *f) {
    errors s = {{0}, {0}, {0}};
    for (int g = 0; g < groups; g++) {
        vf d = f->d * f->s[g], m = -f->dmin * f->m[g], factor = vf_inverse(d);
        for (int i = g * n; i < (g + 1) * n; i++) add_error(&s, t->w[i], t->x[i], vf_fma(d, affine_code(t->x[i], m, factor, top), m));
    }
    return s;
}

// ---- codes, one block at a time -------------------------------------------------------------------------------------------------------------
// codes = nearest value of x * factor, plus zero
INLINE void codes_of(const levels *p, int n, const float *x, float factor, int zero, int8_t *codes) {
    for (int i = 0; i < n; i += VL) {
        vf t = vf_load(x + i) * factor;
        vi_to_i8(codes + i, p->integers ? vi_round(vf_clamp(t, p->low, p->high)) + zero : nearest_place(p, t));
    }
}
INLINE void affine_codes(int n, const float *x, float minimum, float factor, float top, int8_t *codes) {
    for (int i = 0; i < n; i += VL) vi_to_i8(codes + i, vi_round(affine_code(vf_load(x + i), vf_set(minimum), vf_set(factor), top)));
}
INLINE void scaled_codes(const levels *p, int groups, int n, const float *x, const fitted *f, int l, int zero, int8_t *codes) {
    for (int g = 0; g < groups; g++) codes_of(p, n, x + g * n, inverse(f->d[l] * f->s[g][l]), zero, codes + g * n);
}
INLINE void scaled_affine_codes(int groups, int n, const float *x, const fitted *f, int l, float top, int8_t *codes) {
    for (int g = 0; g < groups; g++) affine_codes(n, x + g * n, -f->dmin[l] * f->m[g][l], inverse(f->d[l] * f->s[g][l]), top, codes + g * n);
}
// 256 codes -> planes of `bits` bits: plane p of each 32 bytes is 32 consecutive weights
INLINE void pack_plane_bits(const int8_t *codes, int bits, int shift, int n_bytes, uint8_t *out) {
    int planes = 8 / bits;
    memset(out, 0, n_bytes);
    for (int i = 0; i < n_bytes; i += 32)
        for (int p = 0; p < planes; p++)
            for (int j = 0; j < 32; j++) out[i + j] |= (codes[(i / 32 * planes + p) * 32 + j] >> shift & ((1 << bits) - 1)) << bits * p;
}
