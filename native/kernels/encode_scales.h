// Types with one scale for the block, or a scale and a minimum.
#pragma once

// ---- a scale for the block ------------------------------------------------------------------------------------------------------------------
// What the top may become: from `above` past either end of the codes down in steps. (From the smallest scale up: of equally good ones the
// smallest leaves other groups of a block the finest steps.) Where the codes are symmetric one end is enough.
static candidates from_ends(const levels *p, float above, float step, int n) {
    candidates c = {0};
    if (p->low != -p->high) add_candidates(&c, p->low - above, step, n);
    add_candidates(&c, p->high + above, -step, n);
    return c;
}
#define FIT_INTEGERS(name, QK, first, last, above, step, n, polish)                                     \
    static const levels levels_##name = INTEGERS(first, last);                                          \
    static void fit_##name(const slab *t, int search, int weighted, fitted *f) {                        \
        candidates c = search ? from_ends(&levels_##name, above, step, n) : tenths_around(-(first));    \
        vf products[QK];                                                                                \
        scale_fit s = !search ? fit_scale(&levels_##name, &c, 0, QK, as_ggml(t->x, t->w))               \
                    : weighted ? fit_direct(&levels_##name, &c, polish, QK, weights_of(QK, t->x, t->w, products)) \
                    : fit_direct(&levels_##name, &c, polish, QK, weights_of(QK, t->x, NULL, products)); \
        f->d = s.scale;                                                                                 \
        f->factor = s.factor;                                                                           \
    }
FIT_INTEGERS(q4_0, 32, -8, 7, 0.65f, 0.32f, 6, 0)
FIT_INTEGERS(q5_0, 32, -16, 15, 0.8f, 0.32f, 6, 0)
FIT_INTEGERS(q8_0, 32, -127, 127, 0.4f, 0.75f, 12, 0)
FIT_INTEGERS(q2_0, 64, -1, 2, 1, 0.1f, 21, 2)
FIT_INTEGERS(tq1_0, 256, -1, 1, 0.95f, 0.1f, 20, 2)
FIT_INTEGERS(tq2_0, 256, -1, 1, 0.95f, 0.1f, 20, 2)

#define PACK_INTEGERS(name, QK, ZERO, PUT)                                                              \
    static void pack_##name(const float *x, const fitted *f, int l, void *block) {                      \
        block_##name *b = block;                                                                        \
        int8_t codes[QK];                                                                               \
        b->d = f32_to_f16(f->stored[l]);                                                                \
        codes_of(&levels_##name, QK, x, f->factor[l], ZERO, codes);                                     \
        PUT;                                                                                            \
    }
PACK_INTEGERS(q4_0, 32, 8, pack_nibbles(codes, b->qs))
PACK_INTEGERS(q5_0, 32, 16, pack_nibbles(codes, b->qs); pack_fifth_bits(codes, b->qh))
PACK_INTEGERS(q8_0, 32, 0, memcpy(b->qs, codes, 32))
PACK_INTEGERS(q2_0, 64, 1, pack_quarters(codes, b->qs))
PACK_INTEGERS(tq1_0, 256, 0, codes_to_tq1_0(codes, b))
PACK_INTEGERS(tq2_0, 256, 0, codes_to_tq2_0(codes, b))
// Q4_0 without importance: its formula spares the largest weight of a block. A search for the least plain error clips it, which divergence
// on text like the model's own rewards by 8 % and on other text punishes by 15 %; errors that count by the square of a weight win by 3 to 5 %
// on both.
ENCODER(q4_0, 32, direct_errors(levels_q4_0, 32, t, f), quantize_q4_0, WITH_IMPORTANCE, EQUAL, WITH_ROW, SQUARE, WITH_ROW, WITHOUT_IMPORTANCE)
ENCODER(q5_0, 32, direct_errors(levels_q5_0, 32, t, f), quantize_q5_0, WITH_IMPORTANCE, EQUAL, WITH_ROW, EQUAL, WITH_ROW, WITHOUT_IMPORTANCE)
ENCODER(q8_0, 32, direct_errors(levels_q8_0, 32, t, f), quantize_q8_0, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, NEVER)
ENCODER(q2_0, 64, direct_errors(levels_q2_0, 64, t, f), quantize_q2_0, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, ALWAYS)
ENCODER(tq1_0, 256, direct_errors(levels_tq1_0, 256, t, f), quantize_tq1_0, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, ALWAYS)
ENCODER(tq2_0, 256, direct_errors(levels_tq2_0, 256, t, f), quantize_tq2_0, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, ALWAYS)

// ggml's candidates when weights have an importance: the range is 0.9 steps below the codes' to 0.9 above
#define WEIGHTED_RANGES(top) {(top) - 0.9f, 0.05f, 37, 0}
#define SEARCHED_RANGES(top) {(top) - 3, 0.3f, 16, 1}
#define AFFINE(name, TOP, FIFTH)                                                                        \
    static void fit_##name(const slab *t, int search, int weighted, fitted *f) {                        \
        vf products[32];                                                                                \
        affine_candidates c = SEARCHED_RANGES(TOP);                                                     \
        c.polish = 0;                          /* that is done in half floats */                        \
        affine_fit a = !search ? compat_affine(TOP, BY_SQUARES, (affine_candidates)WEIGHTED_RANGES(TOP), 32, t->x, t->w) \
                     : weighted ? fit_affine_direct(TOP, c, 32, weights_of(32, t->x, t->w, products))   \
                     : fit_affine_direct(TOP, c, 32, weights_of(32, t->x, NULL, products));             \
        f->d = a.scale;                                                                                 \
        f->dmin = a.minimum;                                                                            \
        f->factor = a.factor;                                                                           \
        f->m[0] = a.base;                                                                               \
    }                                                                                                   \
    static void pack_##name(const float *x, const fitted *f, int l, void *block) {                      \
        block_##name *b = block;                                                                        \
        int8_t codes[32];                                                                               \
        b->d = f32_to_f16(f->stored[l]);                                                                \
        b->m = f32_to_f16(f->stored_min[l]);                                                            \
        affine_codes(32, x, f->m[0][l], f->factor[l], TOP, codes);                                      \
        pack_nibbles(codes, b->qs);                                                                     \
        FIFTH;                                                                                          \
    }                                                                                                   \
    ENCODER(name, 32, direct_affine_errors(TOP, 32, t, f), quantize_##name, WITH_IMPORTANCE, EQUAL, WITH_ROW, EQUAL, WITH_ROW, WITHOUT_IMPORTANCE)
AFFINE(q4_1, 15, )
AFFINE(q5_1, 31, pack_fifth_bits(codes, b->qh))

// With the signs given, the weighted mean magnitude is the best scale there is.
static int encode_q1_0(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) {
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
    return 0;
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
    vf products[32];
    f->d = search ? fit_direct(&p, &c, 2, 32, weights_of(32, t->x, t->w, products)).scale : fit_scale(&p, &c, 0, 32, as_ggml(t->x, t->w)).scale;
    f->factor = vf_inverse(f->d);
}
static void pack_iq4_nl(const float *x, const fitted *f, int l, void *block) {
    block_iq4_nl *b = block;
    const levels p = levels_of(iq4_values);
    int8_t codes[32];
    b->d = f32_to_f16(f->stored[l]);
    codes_of(&p, 32, x, f->factor[l], 0, codes);
    pack_nibbles(codes, b->qs);
}
ENCODER(iq4_nl, 32, direct_errors(levels_of(iq4_values), 32, t, f), NULL, ALWAYS, SQUARE, WITH_TWICE_BLOCK, EQUAL, WITH_FOURFOLD_BLOCK, ALWAYS)

// ---- 4-bit floats ---------------------------------------------------------------------------------------------------------------------------
// Few exponents can be best: all of them are tried.
static void fit_mxfp4(const slab *t, int search, int weighted, fitted *f) {
    (void)search; (void)weighted;
    const levels p = levels_of(fp4_values);
    vf top = vf_abs(signed_top(32, t->x)), best = vf_set(-INFINITY);
    vi middle = ((vi)top >> 23) - 2;
    f->s[0] = vf_set(0);
    for (int i = -2; i <= 1; i++) {
        vi e = middle + i;
        e = e & (e > 0);
        vf d;
        for (int l = 0; l < VL; l++) d[l] = e8m0_to_f32_half((e8m0){e[l]});
        vf gain = gain_of(sums_at(&p, 32, as_ggml(t->x, t->w), 1.0f / d), d);
        vi better = gain > best;
        vf_keep(better, &best, gain);
        vf_keep(better, &f->s[0], vf_from_i(e));
    }
}
static void pack_mxfp4(const float *x, const fitted *f, int l, void *block) {
    block_mxfp4 *b = block;
    int8_t codes[32];
    b->e.bits = (int)f->s[0][l];
    codes_nearest16(32, x, fp4_values, e8m0_to_f32_half(b->e), codes);
    pack_nibbles(codes, b->qs);
}
ENCODER(mxfp4, 32, no_errors, quantize_mxfp4, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, NEVER)

static void fit_nvfp4(const slab *t, int search, int weighted, fitted *f) {
    (void)search; (void)weighted;
    const levels p = levels_of(fp4_values);
    for (int g = 0; g < 4; g++) {
        vf top = vf_abs(signed_top(16, t->x + 16 * g)), best = vf_set(-INFINITY);
        vi middle;
        for (int l = 0; l < VL; l++) middle[l] = f32_to_ue4m3(top[l] / 6).bits;
        f->s[g] = vf_set(0);
        for (int i = -7; i <= 4; i++) {                       // eight steps are an octave
            vi e = middle + i, over = e > 0x7e;
            e = e & (e > 0);
            e = (e & ~over) | (over & 0x7e);
            vf d;
            for (int l = 0; l < VL; l++) d[l] = ue4m3_to_f32_half((ue4m3){e[l]});
            vf gain = gain_of(sums_at(&p, 16, as_ggml(t->x + 16 * g, t->w + 16 * g), vf_inverse(d)), d);
            vi better = gain > best;
            vf_keep(better, &best, gain);
            vf_keep(better, &f->s[g], vf_from_i(e));
        }
    }
}
static void pack_nvfp4(const float *x, const fitted *f, int l, void *block) {
    block_nvfp4 *b = block;
    for (int g = 0; g < 4; g++) {
        b->d[g].bits = (int)f->s[g][l];
        put_nvfp4(x + 16 * g, g, b);
    }
}
ENCODER(nvfp4, 64, no_errors, quantize_nvfp4, NEVER, EQUAL, AS_GIVEN, EQUAL, AS_GIVEN, NEVER)
