// Types of 256 weights in groups: integer scales of groups share one or two half floats.
#pragma once

// ---- K types ----------------------------------------------------------------------------------------------------------------------------------
#define RANGES(from, step, n) (affine_candidates){from, step, n, 0}
static void fit_q2_K(const slab *t, int search, int weighted, fitted *f) {
    if (search) fit_scaled_affine(3, 15, RANGES(2.1f, 0.15f, 13), 3, 3, 16, 16, t->x, t->w, f);
    else if (weighted) compat_scaled_affine(3, 15, (affine_candidates)WEIGHTED_RANGES(3), BY_SQUARES, 1, 16, 16, t->x, t->w, f);
    else compat_scaled_affine(3, 15, RANGES(2.5f, 0.1f, 16), BY_MAGNITUDES, 0, 16, 16, t->x, t->w, f);
}
static void pack_q2_K(const float *x, const fitted *f, int l, void *block) {
    block_q2_K *b = block;
    int8_t codes[256];
    b->d = f32_to_f16(f->stored[l]);
    b->dmin = f32_to_f16(f->stored_min[l]);
    for (int g = 0; g < 16; g++) b->scales[g] = (int)f->s[g][l] | (int)f->m[g][l] << 4;
    scaled_affine_codes(16, 16, x, f, l, 3, codes);
    pack_plane_bits(codes, 2, 0, 64, b->qs);
}
ENCODER(q2_K, 256, scaled_affine_errors(3, 16, 16, t, f), NULL, ALWAYS, MAGNITUDE, WITH_BLOCK, EQUAL, WITH_BLOCK, ALWAYS)

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
    static void pack_##name(const float *x, const fitted *f, int l, void *block) {                      \
        block_##name *b = block;                                                                        \
        int8_t codes[256];                                                                              \
        b->d = f32_to_f16(f->stored[l]);                                                                \
        b->dmin = f32_to_f16(f->stored_min[l]);                                                         \
        pack_scales_k4(f, l, b->scales);                                                                \
        scaled_affine_codes(8, 32, x, f, l, TOP, codes);                                                \
        pack_plane_bits(codes, 4, 0, 128, b->qs);                                                       \
        FIFTH;                                                                                          \
    }                                                                                                   \
    ENCODER(name, 256, scaled_affine_errors(TOP, 8, 32, t, f), NULL, ALWAYS, RMS_AND_MAGNITUDE, WITH_TWICE_BLOCK, EQUAL, WITH_FOURFOLD_BLOCK, WITHOUT_IMPORTANCE)
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
        for (int g = 0; g < 16; g++) scale[g] = fit_scale(&levels_q3_K, &c, 0, 16, as_ggml(t->x + 16 * g, t->w + 16 * g)).scale;
        group_weights(16, 16, t->w, sw);
        scale_fit s = fit_scale(&signed_six, &c_scale, 0, 16, as_ggml(scale, sw));
        f->d = vf_half(s.scale);
        for (int g = 0; g < 16; g++) f->s[g] = nearest(&signed_six, scale[g] * s.factor);
    } else {
        for (int g = 0; g < 16; g += 4) scales_by_moves(t->x + 16 * g, scale + g);
        f->d = nearest_multipliers(16, -32, -32, 31, scale, f->s);
    }
}
static void pack_q3_K(const float *x, const fitted *f, int l, void *block) {
    block_q3_K *b = block;
    int8_t codes[256];
    b->d = f32_to_f16(f->stored[l]);
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
// Nearly equal weights lose no more than equal ones, and depend less on the order of a model's channels: of 24 orders 3 lost more than ggml's
// choice on Wikipedia instead of 6.
ENCODER(q3_K, 256, scaled_errors(levels_q3_K, 16, 16, t, f), NULL, ALWAYS, SQUARE, WITH_TWICE_BLOCK, NEARLY_EQUAL, WITH_FOURFOLD_BLOCK, ALWAYS)

static void fit_q6_K(const slab *t, int search, int weighted, fitted *f) {
    (void)weighted;
    if (search) {
        candidates c = from_ends(&levels_q6_K, 0.6f, 0.3f, 20);
        fit_scaled(&levels_q6_K, &c, (multipliers){-128, 127, 0, 3, 2}, 16, 16, t->x, t->w, f);
        return;
    }
    vf scale[16];
    candidates c = tenths_around(32);
    for (int g = 0; g < 16; g++) scale[g] = fit_scale(&levels_q6_K, &c, 0, 16, as_ggml(t->x + 16 * g, t->w + 16 * g)).scale;
    f->d = nearest_multipliers(16, -128, -128, 127, scale, f->s);
}
static void pack_q6_K(const float *x, const fitted *f, int l, void *block) {
    block_q6_K *b = block;
    int8_t codes[256];
    b->d = f32_to_f16(f->stored[l]);
    for (int g = 0; g < 16; g++) b->scales[g] = f->s[g][l];
    scaled_codes(&levels_q6_K, 16, 16, x, f, l, 32, codes);
    for (int j = 0; j < 128; j++) {
        const int8_t *c = codes + 128 * (j / 64) + j % 64;
        b->ql[j] = (c[0] & 15) | (c[64] & 15) << 4;
    }
    pack_plane_bits(codes, 2, 4, 64, b->qh);
}
ENCODER(q6_K, 256, scaled_errors(levels_q6_K, 16, 16, t, f), NULL, ALWAYS, SQUARE, AS_GIVEN, EQUAL, AS_GIVEN, ALWAYS)

static void fit_iq4_xs(const slab *t, int search, int weighted, fitted *f) {
    (void)weighted;
    const levels p = levels_of(iq4_values);
    candidates c = iq4_candidates(&p, search);
    if (search) {
        fit_scaled(&p, &c, (multipliers){-32, 31, 1, 3, 3}, 8, 32, t->x, t->w, f);
        return;
    }
    vf scale[8];
    for (int g = 0; g < 8; g++) scale[g] = fit_scale(&p, &c, 0, 32, as_ggml(t->x + 32 * g, t->w + 32 * g)).scale;
    f->d = nearest_multipliers(8, -32, -32, 31, scale, f->s);
}
static void pack_iq4_xs(const float *x, const fitted *f, int l, void *block) {
    block_iq4_xs *b = block;
    const levels p = levels_of(iq4_values);
    int8_t codes[256];
    b->d = f32_to_f16(f->stored[l]);
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
ENCODER(iq4_xs, 256, scaled_errors(levels_of(iq4_values), 8, 32, t, f), NULL, ALWAYS, SQUARE, WITH_TWICE_BLOCK, EQUAL, WITH_FOURFOLD_BLOCK, ALWAYS)
