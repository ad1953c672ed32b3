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

// The weighted squared error of n weights whose blocks are decoded to y.
INLINE float squared_error(int n, const float *x, const float *y, const float *w) {
    vf sum = {0};
    for (int i = 0; i < n; i += VL) {
        vf e = vf_load(x + i) - vf_load(y + i);
        sum = vf_fma(vf_load(w + i) * e, e, sum);
    }
    return vf_sum(sum);
}

// FUNCTION from fit_FUNCTION(slab, search, weighted, out) and pack_FUNCTION(x, out, lane, block); plain, given: ggml's weights.
// A search minimizes the plain squared error, or the weighted one that ggml minimizes: with importance alone, divergence was higher (the
// factor sqrt(.. + x^2) spares large weights, whose inputs are correlated with others). `ranked`: ggml searches too, and where its choice
// has the smaller error, it is taken.
#define ENCODER_OF(function, name, QK, plain, given, ranked)                                            \
    static void encode_##function(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        int64_t blocks = rows * (n / QK);                                                               \
        block_##name *b = dst;                                                                          \
        for (int64_t k = 0; k < blocks; k += VL) {                                                      \
            slab t;                                                                                     \
            fitted f;                                                                                   \
            if (search) {                                                                               \
                int count = load_blocks(&t, QK, k, blocks, n, x, importance, EQUAL, given);             \
                fit_##function(&t, 1, importance != NULL, &f);                                          \
                for (int l = 0; l < count; l++) pack_##function(x + (k + l) * QK, &f, l, b + k + l);    \
                if (!(ranked)) continue;                                                                \
            }                                                                                           \
            int count = load_blocks(&t, QK, k, blocks, n, x, importance, plain, given);                 \
            fit_##function(&t, 0, importance != NULL, &f);                                              \
            for (int l = 0; l < count; l++) {                                                           \
                const float *from = x + (k + l) * QK;                                                   \
                block_##name other;                                                                     \
                float y[2][QK], w[QK];                                                                  \
                pack_##function(from, &f, l, search ? &other : b + k + l);                              \
                if (!search) continue;                                                                  \
                dequantize_##name(QK, b + k + l, y[0]);                                                 \
                dequantize_##name(QK, &other, y[1]);                                                    \
                for (int i = 0; i < QK; i++) w[i] = importance ? t.w[i][l] : 1;                         \
                if (squared_error(QK, from, y[1], w) < squared_error(QK, from, y[0], w)) b[k + l] = other; \
            }                                                                                           \
        }                                                                                               \
    }
#define ENCODER(name, QK, plain, given) ENCODER_OF(name, name, QK, plain, given, 1)
// The same for a type that a formula defines unless it is searched, or weighted and `by_importance`.
#define ENCODER_OR_FORMULA(name, QK, by_importance, given)                                              \
    ENCODER_OF(name##_fitted, name, QK, EQUAL, given, by_importance && importance)                      \
    static void encode_##name(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        if (search || (by_importance && importance)) encode_##name##_fitted(rows, n, x, dst, importance, search); \
        else quantize_##name(rows * n, x, dst, NULL);                                                   \
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

// ---- a scale for the block ------------------------------------------------------------------------------------------------------------------
// What the top may become: from `above` past either end of the codes down in steps. (From the smallest scale up: of equally good ones the
// smallest leaves other groups of a block the finest steps.) Where the codes are symmetric one end is enough.
static candidates from_ends(const levels *p, float above, float step, int n) {
    candidates c = {0};
    if (p->low != -p->high) add_candidates(&c, p->low - above, step, n);
    add_candidates(&c, p->high + above, -step, n);
    return c;
}
#define FIT_INTEGERS(name, QK, first, last, above, step, n)                                              \
    static const levels levels_##name = INTEGERS(first, last);                                          \
    static void fit_##name##_fitted(const slab *t, int search, int weighted, fitted *f) {               \
        candidates c = search ? from_ends(&levels_##name, above, step, n) : tenths_around(-(first));    \
        scale_fit s = !search ? fit_scale(&levels_##name, &c, 0, QK, t->x, t->w)                        \
                    : weighted ? fit_direct(&levels_##name, &c, QK, t->x, t->w) : fit_direct(&levels_##name, &c, QK, t->x, NULL); \
        f->d = s.scale;                                                                                 \
        f->factor = s.factor;                                                                           \
    }
FIT_INTEGERS(q4_0, 32, -8, 7, 0.8f, 0.32f, 6)
FIT_INTEGERS(q5_0, 32, -16, 15, 0.8f, 0.32f, 6)
FIT_INTEGERS(q8_0, 32, -127, 127, 0.4f, 0.75f, 12)
FIT_INTEGERS(q2_0, 64, -1, 2, 1, 0.1f, 21)
FIT_INTEGERS(tq1_0, 256, -1, 1, 0.95f, 0.1f, 20)
FIT_INTEGERS(tq2_0, 256, -1, 1, 0.95f, 0.1f, 20)

#define PACK_INTEGERS(name, QK, ZERO, PUT)                                                              \
    static void pack_##name##_fitted(const float *x, const fitted *f, int l, block_##name *b) {         \
        int8_t codes[QK];                                                                               \
        b->d = f32_to_f16(f->d[l]);                                                                     \
        codes_of(&levels_##name, QK, x, f->factor[l], ZERO, codes);                                     \
        PUT;                                                                                            \
    }
PACK_INTEGERS(q4_0, 32, 8, pack_nibbles(codes, b->qs))
PACK_INTEGERS(q5_0, 32, 16, pack_nibbles(codes, b->qs); pack_fifth_bits(codes, b->qh))
PACK_INTEGERS(q8_0, 32, 0, memcpy(b->qs, codes, 32))
PACK_INTEGERS(q2_0, 64, 1, pack_quarters(codes, b->qs))
PACK_INTEGERS(tq1_0, 256, 0, codes_to_tq1_0(codes, b))
PACK_INTEGERS(tq2_0, 256, 0, codes_to_tq2_0(codes, b))
ENCODER_OR_FORMULA(q4_0, 32, 1, WITH_ROW)
ENCODER_OR_FORMULA(q5_0, 32, 1, WITH_ROW)
ENCODER_OR_FORMULA(q8_0, 32, 0, AS_GIVEN)
ENCODER_OR_FORMULA(q2_0, 64, 0, AS_GIVEN)
ENCODER_OR_FORMULA(tq1_0, 256, 0, AS_GIVEN)
ENCODER_OR_FORMULA(tq2_0, 256, 0, AS_GIVEN)

// ggml's candidates when weights have an importance: the range is 0.9 steps below the codes' to 0.9 above
#define WEIGHTED_RANGES(top) {(top) - 0.9f, 0.05f, 37, 0}
#define SEARCHED_RANGES(top) {(top) - 3, 0.3f, 14, 1}
#define AFFINE(name, TOP, FIFTH)                                                                        \
    static void fit_##name##_fitted(const slab *t, int search, int weighted, fitted *f) {               \
        (void)weighted;                                                                                 \
        affine_fit a = search ? fit_affine_direct(TOP, (affine_candidates)SEARCHED_RANGES(TOP), 32, t->x, t->w) \
                              : fit_affine(TOP, 1, BY_SQUARES, (affine_candidates)WEIGHTED_RANGES(TOP), 32, t->x, t->w); \
        f->d = a.scale;                                                                                 \
        f->dmin = a.minimum;                                                                            \
        f->factor = a.factor;                                                                           \
        f->m[0] = a.base;                                                                               \
    }                                                                                                   \
    static void pack_##name##_fitted(const float *x, const fitted *f, int l, block_##name *b) {         \
        int8_t codes[32];                                                                               \
        b->d = f32_to_f16(f->d[l]);                                                                     \
        b->m = f32_to_f16(f->dmin[l]);                                                                  \
        affine_codes(32, x, f->m[0][l], f->factor[l], TOP, codes);                                      \
        pack_nibbles(codes, b->qs);                                                                     \
        FIFTH;                                                                                          \
    }                                                                                                   \
    ENCODER_OR_FORMULA(name, 32, 1, WITH_ROW)
AFFINE(q4_1, 15, )
AFFINE(q5_1, 31, pack_fifth_bits(codes, b->qh))

// With the signs given, the weighted mean magnitude is the best scale there is.
static void encode_q1_0(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) {
    block_q1_0 *b = dst;
    for (int64_t k = 0; k < rows * n; k += 128, b++) {
        const float *w = search && importance ? importance + k % n : NULL;
        float sum = 0, total = 0;
        memset(b->qs, 0, sizeof b->qs);
        for (int i = 0; i < 128; i++) {
            sum += (w ? w[i] : 1) * fabsf(x[k + i]);
            total += w ? w[i] : 1;
            b->qs[i / 8] |= (x[k + i] >= 0) << i % 8;
        }
        b->d = f32_to_f16(total > 0 ? sum / total : 0);
    }
}

// ---- nonlinear 4-bit codes ---------------------------------------------------------------------------------------------------------------
static candidates iq4_candidates(const levels *p, int search) {
    candidates c = {0};
    if (search) return from_ends(p, 17, 5, 12);
    add_candidates(&c, -p->low, 0, 1);
    add_candidates(&c, p->low - 7, 1, 15);
    return c;
}
static void fit_iq4_nl(const slab *t, int search, int weighted, fitted *f) {
    (void)weighted;
    const levels p = levels_of(iq4_values);
    candidates c = iq4_candidates(&p, search);
    f->d = search ? fit_direct(&p, &c, 32, t->x, t->w).scale : fit_scale(&p, &c, 0, 32, t->x, t->w).scale;
}
static void pack_iq4_nl(const float *x, const fitted *f, int l, block_iq4_nl *b) {
    const levels p = levels_of(iq4_values);
    int8_t codes[32];
    b->d = f32_to_f16(f->d[l]);
    codes_of(&p, 32, x, inverse(f->d[l]), 0, codes);
    pack_nibbles(codes, b->qs);
}
ENCODER(iq4_nl, 32, SQUARE, WITH_TWICE_BLOCK)

static void fit_iq4_xs(const slab *t, int search, int weighted, fitted *f) {
    (void)weighted;
    const levels p = levels_of(iq4_values);
    candidates c = iq4_candidates(&p, search);
    if (search) {
        fit_scaled(&p, &c, (multipliers){-32, 31, 1, 3, 3}, 8, 32, t->x, t->w, f);
        return;
    }
    vf scale[8];
    for (int g = 0; g < 8; g++) scale[g] = fit_scale(&p, &c, 0, 32, t->x + 32 * g, t->w + 32 * g).scale;
    f->d = nearest_multipliers(8, -32, -32, 31, scale, f->s);
}
static void pack_iq4_xs(const float *x, const fitted *f, int l, block_iq4_xs *b) {
    const levels p = levels_of(iq4_values);
    int8_t codes[256];
    b->d = f32_to_f16(f->d[l]);
    scaled_codes(&p, 8, 32, x, f, l, 0, codes);
    memset(b->scales_l, 0, sizeof b->scales_l);
    b->scales_h = 0;
    for (int g = 0; g < 8; g++) {
        int six = (int)f->s[g][l] + 32;
        b->scales_l[g / 2] |= (six & 15) << 4 * (g % 2);
        b->scales_h |= (six >> 4) << 2 * g;
        pack_nibbles(codes + 32 * g, b->qs + 16 * g);
    }
}
ENCODER(iq4_xs, 256, SQUARE, WITH_TWICE_BLOCK)

// ---- 4-bit floats ---------------------------------------------------------------------------------------------------------------------------
// Few exponents can be best: all of them are tried.
static void fit_mxfp4_fitted(const slab *t, int search, int weighted, fitted *f) {
    (void)search; (void)weighted;
    const levels p = levels_of(fp4_values);
    vf top = vf_abs(signed_top(32, t->x)), best = vf_set(-INFINITY);
    vi middle = ((vi)top >> 23) - 2;
    for (int i = -2; i <= 1; i++) {
        vi e = middle + i;
        e = e & (e > 0);
        vf d;
        for (int l = 0; l < VL; l++) d[l] = e8m0_to_f32_half((e8m0){e[l]});
        vf gain = gain_of(sums_at(&p, 32, t->x, t->w, 1.0f / d), d);
        vi better = gain > best;
        vf_keep(better, &best, gain);
        vf_keep(better, &f->s[0], vf_from_i(e));
    }
}
static void pack_mxfp4_fitted(const float *x, const fitted *f, int l, block_mxfp4 *b) {
    int8_t codes[32];
    b->e.bits = (int)f->s[0][l];
    codes_nearest16(32, x, fp4_values, e8m0_to_f32_half(b->e), codes);
    pack_nibbles(codes, b->qs);
}
ENCODER_OR_FORMULA(mxfp4, 32, 0, AS_GIVEN)

static void fit_nvfp4_fitted(const slab *t, int search, int weighted, fitted *f) {
    (void)search; (void)weighted;
    const levels p = levels_of(fp4_values);
    for (int g = 0; g < 4; g++) {
        vf top = vf_abs(signed_top(16, t->x + 16 * g)), best = vf_set(-INFINITY);
        vi middle;
        for (int l = 0; l < VL; l++) middle[l] = f32_to_ue4m3(top[l] / 6).bits;
        for (int i = -7; i <= 4; i++) {                       // eight steps are an octave
            vi e = middle + i, over = e > 0x7e;
            e = e & (e > 0);
            e = (e & ~over) | (over & 0x7e);
            vf d;
            for (int l = 0; l < VL; l++) d[l] = ue4m3_to_f32_half((ue4m3){e[l]});
            vf gain = gain_of(sums_at(&p, 16, t->x + 16 * g, t->w + 16 * g, vf_inverse(d)), d);
            vi better = gain > best;
            vf_keep(better, &best, gain);
            vf_keep(better, &f->s[g], vf_from_i(e));
        }
    }
}
static void pack_nvfp4_fitted(const float *x, const fitted *f, int l, block_nvfp4 *b) {
    for (int g = 0; g < 4; g++) {
        b->d[g].bits = (int)f->s[g][l];
        put_nvfp4(x + 16 * g, g, b);
    }
}
ENCODER_OR_FORMULA(nvfp4, 64, 0, AS_GIVEN)

// ---- K types ----------------------------------------------------------------------------------------------------------------------------------
#define RANGES(from, step, n) (affine_candidates){from, step, n, 0}
static void fit_q2_K(const slab *t, int search, int weighted, fitted *f) {
    if (search) fit_scaled_affine(3, 15, RANGES(2.1f, 0.15f, 13), 3, 3, 16, 16, t->x, t->w, f);
    else if (weighted) compat_scaled_affine(3, 15, (affine_candidates)WEIGHTED_RANGES(3), BY_SQUARES, 1, 16, 16, t->x, t->w, f);
    else compat_scaled_affine(3, 15, RANGES(2.5f, 0.1f, 16), BY_MAGNITUDES, 0, 16, 16, t->x, t->w, f);
}
static void pack_q2_K(const float *x, const fitted *f, int l, block_q2_K *b) {
    int8_t codes[256];
    b->d = f32_to_f16(f->d[l]);
    b->dmin = f32_to_f16(f->dmin[l]);
    for (int g = 0; g < 16; g++) b->scales[g] = (int)f->s[g][l] | (int)f->m[g][l] << 4;
    scaled_affine_codes(16, 16, x, f, l, 3, codes);
    pack_plane_bits(codes, 2, 0, 64, b->qs);
}
ENCODER(q2_K, 256, MAGNITUDE, WITH_BLOCK)

INLINE void pack_scales_k4(const fitted *f, int l, uint8_t *packed) {
    uint8_t s[8], m[8];
    for (int g = 0; g < 8; g++) s[g] = f->s[g][l], m[g] = f->m[g][l];
    for (int j = 0; j < 4; j++) {
        packed[j] = s[j] | s[j + 4] >> 4 << 6;
        packed[j + 4] = m[j] | m[j + 4] >> 4 << 6;
        packed[j + 8] = (s[j + 4] & 15) | (m[j + 4] & 15) << 4;
    }
}
#define ENCODE_K4(name, TOP, PLAIN, FIFTH)                                                              \
    static void fit_##name(const slab *t, int search, int weighted, fitted *f) {                        \
        if (search) fit_scaled_affine(TOP, 63, (affine_candidates)SEARCHED_RANGES(TOP), 4, 3, 8, 32, t->x, t->w, f); \
        else if (weighted) compat_scaled_affine(TOP, 63, (affine_candidates)WEIGHTED_RANGES(TOP), BY_SQUARES, 1, 8, 32, t->x, t->w, f); \
        else compat_scaled_affine(TOP, 63, PLAIN, BY_SQUARES, 0, 8, 32, t->x, t->w, f);                          \
    }                                                                                                   \
    static void pack_##name(const float *x, const fitted *f, int l, block_##name *b) {                  \
        int8_t codes[256];                                                                              \
        b->d = f32_to_f16(f->d[l]);                                                                     \
        b->dmin = f32_to_f16(f->dmin[l]);                                                               \
        pack_scales_k4(f, l, b->scales);                                                                \
        scaled_affine_codes(8, 32, x, f, l, TOP, codes);                                                \
        pack_plane_bits(codes, 4, 0, 128, b->qs);                                                       \
        FIFTH;                                                                                          \
    }                                                                                                   \
    ENCODER(name, 256, RMS_AND_MAGNITUDE, WITH_TWICE_BLOCK)
ENCODE_K4(q4_K, 15, RANGES(14, 0.1f, 21), )
ENCODE_K4(q5_K, 31, RANGES(30.5f, 0.1f, 16), pack_plane_bits(codes, 1, 4, 32, b->qh))

static const levels levels_q3_K = INTEGERS(-4, 3), levels_q6_K = INTEGERS(-32, 31);
static void fit_q3_K(const slab *t, int search, int weighted, fitted *f) {
    vf scale[16], sw[16];
    if (search) {
        candidates c = from_ends(&levels_q3_K, 0.8f, 0.3f, 6);
        fit_scaled(&levels_q3_K, &c, (multipliers){-32, 31, 1, 6, 2}, 16, 16, t->x, t->w, f);
    } else if (weighted) {
        static const levels signed_six = INTEGERS(-32, 31);
        candidates c = tenths_around(4), c_scale = tenths_around(32);
        for (int g = 0; g < 16; g++) scale[g] = fit_scale(&levels_q3_K, &c, 0, 16, t->x + 16 * g, t->w + 16 * g).scale;
        group_weights(16, 16, t->w, sw);
        scale_fit s = fit_scale(&signed_six, &c_scale, 0, 16, scale, sw);
        f->d = vf_half(s.scale);
        for (int g = 0; g < 16; g++) f->s[g] = nearest(&signed_six, scale[g] * s.factor);
    } else {
        for (int g = 0; g < 16; g++) scale[g] = scale_by_moves(16, t->x + 16 * g);
        f->d = nearest_multipliers(16, -32, -32, 31, scale, f->s);
    }
}
static void pack_q3_K(const float *x, const fitted *f, int l, block_q3_K *b) {
    int8_t codes[256];
    b->d = f32_to_f16(f->d[l]);
    memset(b->scales, 0, sizeof b->scales);
    for (int g = 0; g < 16; g++) {
        int six = (int)f->s[g][l] + 32;
        b->scales[g % 8] |= (six & 15) << 4 * (g / 8);
        b->scales[8 + g % 4] |= (six >> 4) << 2 * (g / 4);
    }
    scaled_codes(&levels_q3_K, 16, 16, x, f, l, 4, codes);
    pack_plane_bits(codes, 2, 0, 64, b->qs);
    pack_plane_bits(codes, 1, 2, 32, b->hmask);
}
ENCODER(q3_K, 256, SQUARE, WITH_TWICE_BLOCK)

static void fit_q6_K(const slab *t, int search, int weighted, fitted *f) {
    (void)weighted;
    if (search) {
        candidates c = from_ends(&levels_q6_K, 0.6f, 0.3f, 20);
        fit_scaled(&levels_q6_K, &c, (multipliers){-128, 127, 0, 3, 2}, 16, 16, t->x, t->w, f);
        return;
    }
    vf scale[16];
    candidates c = tenths_around(32);
    for (int g = 0; g < 16; g++) scale[g] = fit_scale(&levels_q6_K, &c, 0, 16, t->x + 16 * g, t->w + 16 * g).scale;
    f->d = nearest_multipliers(16, -128, -128, 127, scale, f->s);
}
static void pack_q6_K(const float *x, const fitted *f, int l, block_q6_K *b) {
    int8_t codes[256];
    b->d = f32_to_f16(f->d[l]);
    for (int g = 0; g < 16; g++) b->scales[g] = f->s[g][l];
    scaled_codes(&levels_q6_K, 16, 16, x, f, l, 32, codes);
    for (int j = 0; j < 128; j++) {
        const int8_t *c = codes + 128 * (j / 64) + j % 64;
        b->ql[j] = (c[0] & 15) | (c[64] & 15) << 4;
    }
    pack_plane_bits(codes, 2, 4, 64, b->qh);
}
ENCODER(q6_K, 256, SQUARE, AS_GIVEN)
