// Encoders of blocks with scales: fit VL blocks side by side (search.h; compat.h when ggml's choice is wanted), then put each block's codes
// where the block wants them.
#pragma once

typedef struct { vf x[MAX_BLOCK], w[MAX_BLOCK]; } slab;

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
// And back: n vectors, lane l to out[l].
INLINE void store_lanes(int n, const vf *in, float out[VL][MAX_BLOCK]) {
    for (int i = 0; i < n; i += VL) {
        vf t[VL];
        memcpy(t, in + i, sizeof t);
        transpose(t);
        UNROLL(16) for (int l = 0; l < VL; l++) vf_store(out[l] + i, t[l]);
    }
}
static float mean_square(int64_t n, const float *x) {      // summed in order, as ggml does
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum / n;
}
// Blocks k, k + 1, ... of rows of n weights (missing ones repeat the last) with what their errors weigh; returns how many there are.
INLINE int load_blocks(slab *t, int block, int64_t k, int64_t blocks, int64_t n, const float *x, const float *importance,
                       plain_weights plain, importance_weights given) {
    const float *from[VL], *weights[VL];
    float row[VL];
    int count = blocks - k < VL ? blocks - k : VL;
    for (int l = 0; l < VL; l++) {
        int64_t b = k + (l < count ? l : count - 1), per_row = n / block, r = b / per_row;
        from[l] = x + b * block;
        weights[l] = importance ? importance + b % per_row * block : x;
        if (importance && given == WITH_ROW) row[l] = l && (b - 1) / per_row == r ? row[l - 1] : mean_square(n, x + r * n);
    }
    load_lanes(block, from, t->x);
    if (importance) load_lanes(block, weights, t->w);
    weigh(plain, given, importance != NULL, importance && given == WITH_ROW ? vf_load(row) : vf_set(0), block, t->x, t->w);
    return count;
}

// ---- blocks of a type ----------------------------------------------------------------------------------------------------------------------
typedef enum { NEVER, WITHOUT_IMPORTANCE, WITH_IMPORTANCE, ALWAYS } when;
INLINE int holds(when w, const float *importance) { return w == ALWAYS || w == (importance ? WITH_IMPORTANCE : WITHOUT_IMPORTANCE); }
typedef struct {
    int block, bytes;
    int scale, n_scales;         // where the half floats are that multiply all of a block
    void (*fit)(const slab *t, int search, int weighted, fitted *f);
    void (*pack)(const float *x, const fitted *f, int lane, void *block);
    void (*decode)(int64_t n, const void *block, float *y);
    void (*formula)(int64_t n, const float *x, void *dst, const float *importance);
    when ggml_fits;              // its formula otherwise
    plain_weights plain;         // what errors count without importance, for ggml
    plain_weights searched;      // and in a search
    importance_weights given;
    when stretched;              // where divergence is the less for it, on several texts
} encoder;
enum { LARGEST = sizeof(block_q6_K) };

// What a block loses: squared errors, or with `longer` the loss, after the block was stretched to where that is least.
static float stretch(const encoder *e, const float *x, const float *w, uint8_t *block, int longer) {
    float y[MAX_BLOCK], ratio = 1;
    vf xx = {0}, ex = {0}, ee = {0};
    e->decode(e->block, block, y);
    for (int i = 0; i < e->block; i += VL) {
        vf v = vf_load(x + i), off = v - vf_load(y + i), weighted = vf_load(w + i) * off;
        xx = vf_fma(vf_load(w + i) * v, v, xx);
        ex = vf_fma(weighted, v, ex);
        ee = vf_fma(weighted, off, ee);
    }
    float energy = vf_sum(xx), shrunk = vf_sum(ex), squares = vf_sum(ee);
    if (!longer) return squares;
    moments m = {energy, energy - shrunk, energy - 2 * shrunk + squares};
    float loss = loss_of(squares, shrunk, energy), best = best_scale(m);
    f16 old[2], new[2];
    memcpy(old, block + e->scale, e->n_scales * sizeof *old);
    for (int i = 0; i < e->n_scales; i++) new[i] = f32_to_f16(f16_to_f32(old[i]) * best);
    if (f16_to_f32(old[0]) != 0) ratio = f16_to_f32(new[0]) / f16_to_f32(old[0]);
    float saved = curvature(m) * ((best - 1) * (best - 1) - (ratio - best) * (ratio - best));
    if (!(ratio > 1 && saved > 0)) return loss;
    memcpy(block + e->scale, new, e->n_scales * sizeof *new);
    return loss - saved;
}

// A search minimizes the plain squared error (but see Q4_0), or the weighted one that ggml minimizes: with importance alone, divergence was higher (the
// factor sqrt(.. + x^2) spares large weights, whose inputs are correlated with others). Where ggml fits too and its choice loses less, that
// is taken.
static int encode_blocks(const encoder *e, int64_t rows, int64_t n, const float *x, uint8_t *dst, const float *importance, int search) {
    int fits = holds(e->ggml_fits, importance), longer = holds(e->stretched, importance), given = importance != NULL;
    int weighted = given || (search && e->searched != EQUAL);
    if (!search && !fits) {
        e->formula(rows * n, x, dst, NULL);
        return 0;
    }
    int64_t blocks = rows * (n / e->block);
    float w[VL][MAX_BLOCK];
    for (int l = 0; l < VL; l++)
        for (int i = 0; i < e->block; i++) w[l][i] = 1;
    for (int64_t k = 0; k < blocks; k += VL, dst += VL * e->bytes) {
        slab t;
        fitted f;
        int count = load_blocks(&t, e->block, k, blocks, n, x, importance, search ? e->searched : e->plain, e->given);
        e->fit(&t, search, weighted, &f);
        for (int l = 0; l < count; l++) e->pack(x + (k + l) * e->block, &f, l, dst + l * e->bytes);
        if (!search || !(fits || longer)) continue;
        if (weighted) store_lanes(e->block, t.w, w);
        if (fits) {
            load_blocks(&t, e->block, k, blocks, n, x, importance, e->plain, e->given);
            e->fit(&t, 0, given, &f);
        }
        for (int l = 0; l < count; l++) {
            const float *from = x + (k + l) * e->block;
            uint8_t *block = dst + l * e->bytes, other[LARGEST];
            float loss = stretch(e, from, w[l], block, longer);
            if (!fits) continue;
            e->pack(from, &f, l, other);
            if (stretch(e, from, w[l], other, longer) < loss) memcpy(block, other, e->bytes);
        }
    }
    return 0;
}
#define ENCODER(name, QK, first, n_scales, formula, ggml_fits, plain, searched, given, stretched)       \
    static const encoder encoder_##name = {QK, sizeof(block_##name), offsetof(block_##name, first), n_scales, fit_##name, pack_##name, \
                                           dequantize_##name, formula, ggml_fits, plain, searched, given, stretched}; \
    static int encode_##name(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        return encode_blocks(&encoder_##name, rows, n, x, dst, importance, search);                     \
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
