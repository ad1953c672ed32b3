// Encoders of the searched types: fit (search.h, grids.h), then put the codes where the block wants them.
// `effort` 0 is the everyday search, 1 a wider and slower one.
#pragma once

// The weights of one block: importance where it is given, else one each.
INLINE const float *block_weights(const float *importance, int64_t k, const float *ones) { return importance ? importance + k : ones; }
#define FOR_BLOCKS(name, QK)                                                                            \
    float ones[QK];                                                                                     \
    for (int i_ = 0; i_ < QK; i_++) ones[i_] = 1;                                                       \
    block_##name *b = dst;                                                                              \
    for (int64_t k = 0; k < n; k += QK, b++)

// codes = v + zero, as bytes
INLINE void codes_of(int n, const float *v, int zero, int8_t *codes) {
    for (int i = 0; i < n; i += VL) vi_to_i8(codes + i, vi_round(vf_load(v + i)) + zero);
}
// codes of values that are entries of a table of 16 (anything else, which only a NaN weight can bring about, gets the last code)
INLINE void codes_of_table(int n, const float *v, const int8_t *table, int8_t *codes) {
    for (int i = 0; i < n; i++) {
        int c = 0;
        while (c < 15 && table[c] != (int)v[i]) c++;
        codes[i] = c;
    }
}
// 256 codes -> planes of `bits` bits: plane p of each 32 bytes is 32 consecutive weights
INLINE void pack_plane_bits(const int8_t *codes, int bits, int shift, int n_bytes, uint8_t *out) {
    int planes = 8 / bits;
    memset(out, 0, n_bytes);
    for (int j = 0; j < n_bytes; j++)
        for (int p = 0; p < planes; p++) out[j] |= (codes[(j / 32 * planes + p) * 32 + j % 32] >> shift & ((1 << bits) - 1)) << bits * p;
}

#define INTEGERS(low, high, n_steps)                                                                             \
    const float limits[2] = {low, high};                                                                \
    const projection integers = {.project = project_integers, .relaxed = project_integers, .anchors = {low, high}, .n_anchors = 2, \
                                 .below = 1, .above = 1, .steps = n_steps, .levels = limits}

// ---- 32 weights with an importance; without one a formula defines the bytes -----------------------------------------------------------
#define ENCODE_SYMMETRIC(name, ZERO, FIFTH)                                                             \
    static void encode_##name(int64_t n, const float *x, void *dst, const float *importance, int effort) { \
        INTEGERS(-(ZERO), (ZERO) - 1, 20);                                                                  \
        FOR_BLOCKS(name, 32) {                                                                          \
            float v[32];                                                                                \
            int8_t codes[32];                                                                           \
            b->d = f32_to_f16(fit_direct(&integers, 32, x + k, block_weights(importance, k, ones), effort, v)); \
            codes_of(32, v, ZERO, codes);                                                               \
            pack_nibbles(codes, b->qs);                                                                 \
            FIFTH;                                                                                      \
        }                                                                                               \
    }
#define ENCODE_AFFINE(name, TOP, FIFTH)                                                                 \
    static void encode_##name(int64_t n, const float *x, void *dst, const float *importance, int effort) { \
        FOR_BLOCKS(name, 32) {                                                                          \
            float q[32], d, m;                                                                          \
            int8_t codes[32];                                                                           \
            fit_affine_direct(32, x + k, block_weights(importance, k, ones), TOP, effort, &d, &m, q);   \
            b->d = f32_to_f16(d);                                                                       \
            b->m = f32_to_f16(m);                                                                       \
            codes_of(32, q, 0, codes);                                                                  \
            pack_nibbles(codes, b->qs);                                                                 \
            FIFTH;                                                                                      \
        }                                                                                               \
    }
ENCODE_SYMMETRIC(q4_0, 8, )
ENCODE_SYMMETRIC(q5_0, 16, pack_fifth_bits(codes, b->qh))
ENCODE_AFFINE(q4_1, 15, )
ENCODE_AFFINE(q5_1, 31, pack_fifth_bits(codes, b->qh))

static void encode_q8_0(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    INTEGERS(-127, 127, 8);
    FOR_BLOCKS(q8_0, 32) {
        float v[32];
        b->d = f32_to_f16(fit_direct(&integers, 32, x + k, block_weights(importance, k, ones), effort, v));
        codes_of(32, v, 0, b->qs);
    }
}
static void encode_q2_0(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    INTEGERS(-1, 2, 20);
    FOR_BLOCKS(q2_0, 64) {
        float v[64];
        int8_t codes[64];
        b->d = f32_to_f16(fit_direct(&integers, 64, x + k, block_weights(importance, k, ones), effort, v));
        codes_of(64, v, 1, codes);
        for (int j = 0; j < 16; j++) b->qs[j] = codes[4 * j] | codes[4 * j + 1] << 2 | codes[4 * j + 2] << 4 | codes[4 * j + 3] << 6;
    }
}
static void encode_q1_0(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    (void)effort;                              // with the signs given, the weighted mean magnitude is the best scale there is
    FOR_BLOCKS(q1_0, 128) {
        const float *w = block_weights(importance, k, ones);
        float sum = 0, total = 0;
        memset(b->qs, 0, sizeof b->qs);
        for (int i = 0; i < 128; i++) {
            sum += w[i] * fabsf(x[k + i]);
            total += w[i];
            b->qs[i / 8] |= (x[k + i] >= 0) << i % 8;
        }
        b->d = f32_to_f16(total > 0 ? sum / total : 0);
    }
}
#define ENCODE_TERNARY(name, PACK)                                                                      \
    static void encode_##name(int64_t n, const float *x, void *dst, const float *importance, int effort) { \
        INTEGERS(-1, 1, 20);                                                                                \
        FOR_BLOCKS(name, 256) {                                                                         \
            float v[256];                                                                               \
            int8_t codes[256];                                                                          \
            b->d = f32_to_f16(fit_direct(&integers, 256, x + k, block_weights(importance, k, ones), effort, v)); \
            codes_of(256, v, 0, codes);                                                                 \
            PACK(codes, b);                                                                             \
        }                                                                                               \
    }
ENCODE_TERNARY(tq1_0, codes_to_tq1_0)
ENCODE_TERNARY(tq2_0, codes_to_tq2_0)

// ---- nonlinear 4-bit codes ---------------------------------------------------------------------------------------------------------------
#define TABLE16(values, count, reach)                                                                   \
    float sorted[16];                                                                                   \
    int n_sorted = sort_table(values, sorted);                                                          \
    const projection table = {.project = project_levels, .relaxed = project_levels, .anchors = {sorted[0], sorted[n_sorted - 1]}, \
                              .n_anchors = count, .below = (reach) * sorted[n_sorted - 1], .above = (reach) * sorted[n_sorted - 1],   \
                              .steps = 20, .levels = sorted, .n_levels = n_sorted}

// The distinct values of a table of 16, ascending; returns how many.
INLINE int sort_table(const int8_t *values, float *sorted) {
    int n = 0;
    for (int v = -128; v < 128; v++) {
        int c = 0;
        while (c < 16 && values[c] != v) c++;
        if (c < 16) sorted[n++] = v;
    }
    return n;
}
static void encode_iq4_nl(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    TABLE16(iq4_values, 2, 0.15f);
    FOR_BLOCKS(iq4_nl, 32) {
        float v[32];
        int8_t codes[32];
        b->d = f32_to_f16(fit_direct(&table, 32, x + k, block_weights(importance, k, ones), effort, v));
        codes_of_table(32, v, iq4_values, codes);
        pack_nibbles(codes, b->qs);
    }
}
static void encode_iq4_xs(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    TABLE16(iq4_values, 2, 0.15f);
    FOR_BLOCKS(iq4_xs, 256) {
        float v[256];
        int8_t codes[256], s[8];
        b->d = f32_to_f16(fit_scaled(&table, (multipliers){-32, 31, 1, 0}, 256, 32, x + k, block_weights(importance, k, ones), effort, s, v));
        codes_of_table(256, v, iq4_values, codes);
        memset(b->scales_l, 0, sizeof b->scales_l);
        b->scales_h = 0;
        for (int g = 0; g < 8; g++) {
            int six = s[g] + 32;
            b->scales_l[g / 2] |= (six & 15) << 4 * (g % 2);
            b->scales_h |= (six >> 4) << 2 * g;
            pack_nibbles(codes + 32 * g, b->qs + 16 * g);
        }
    }
}

// ---- 4-bit floats ---------------------------------------------------------------------------------------------------------------------------
static void encode_mxfp4(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    (void)effort;                              // few exponents can be best: all of them are tried
    TABLE16(fp4_values, 1, 0);
    FOR_BLOCKS(mxfp4, 32) {
        const float *w = block_weights(importance, k, ones);
        float max = abs_max(32, x + k), least = INFINITY;
        int middle = max > 0 ? (int)floorf(log2f(max)) - 2 + 127 : 0, found = 0;
        for (int e = middle - 2; e <= middle + 1; e++) {
            float v[32], d = e8m0_to_f32_half((e8m0){e < 0 ? 0 : e});
            table.project(&table, 32, x + k, w, 1 / d, v);
            float error = error_of(32, x + k, w, v, d, 0);
            if (e >= 0 && error < least) least = error, found = e;
        }
        int8_t codes[32];
        b->e.bits = found;
        codes_nearest16(32, x + k, fp4_values, e8m0_to_f32_half(b->e), codes);
        pack_nibbles(codes, b->qs);
    }
}
static void encode_nvfp4(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    TABLE16(fp4_values, 1, 0);
    FOR_BLOCKS(nvfp4, 64) {
        const float *w = block_weights(importance, k, ones);
        for (int g = 0; g < 4; g++) {
            const float *xg = x + k + 16 * g, *wg = w + 16 * g;
            float v[16], least = INFINITY, target = abs_max(16, xg) / sorted[n_sorted - 1];
            int found = 0, below = 0;          // the largest scale that is not above the one that holds every weight
            while (below < 0x7e && ue4m3_to_f32_half((ue4m3){below + 1}) <= target) below++;
            int reach = effort ? 12 : 6;       // eight steps are an octave
            for (int e = below - reach; e <= below + 4; e++) {
                if (e < 0 || e > 0x7e) continue;
                float d = ue4m3_to_f32_half((ue4m3){e});
                table.project(&table, 16, xg, wg, inverse(d), v);
                float error = error_of(16, xg, wg, v, d, 0);
                if (error < least) least = error, found = e;
            }
            b->d[g].bits = found;
            int8_t codes[16];
            codes_nearest16(16, xg, fp4_values, ue4m3_to_f32_half(b->d[g]), codes);
            for (int j = 0; j < 8; j++) b->qs[8 * g + j] = codes[j] | codes[j + 8] << 4;
        }
    }
}

// ---- K types ----------------------------------------------------------------------------------------------------------------------------------
static void encode_q2_K(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    FOR_BLOCKS(q2_K, 256) {
        float q[256], d, dmin;
        uint8_t s[16], m[16];
        int8_t codes[256];
        fit_scaled_affine(256, 16, 3, 15, x + k, block_weights(importance, k, ones), effort, &d, &dmin, s, m, q);
        b->d = f32_to_f16(d);
        b->dmin = f32_to_f16(dmin);
        for (int g = 0; g < 16; g++) b->scales[g] = s[g] | m[g] << 4;
        codes_of(256, q, 0, codes);
        pack_plane_bits(codes, 2, 0, 64, b->qs);
    }
}
static void encode_q3_K(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    INTEGERS(-4, 3, 16);
    FOR_BLOCKS(q3_K, 256) {
        float v[256];
        int8_t codes[256], s[16];
        b->d = f32_to_f16(fit_scaled(&integers, (multipliers){-32, 31, 1, 0}, 256, 16, x + k, block_weights(importance, k, ones), effort, s, v));
        memset(b->scales, 0, sizeof b->scales);
        for (int g = 0; g < 16; g++) {
            int six = s[g] + 32;
            b->scales[g % 8] |= (six & 15) << 4 * (g / 8);
            b->scales[8 + g % 4] |= (six >> 4) << 2 * (g / 4);
        }
        codes_of(256, v, 4, codes);
        pack_plane_bits(codes, 2, 0, 64, b->qs);
        pack_plane_bits(codes, 1, 2, 32, b->hmask);
    }
}
INLINE void pack_scales_k4(const uint8_t *s, const uint8_t *m, uint8_t *packed) {
    for (int j = 0; j < 4; j++) {
        packed[j] = s[j] | s[j + 4] >> 4 << 6;
        packed[j + 4] = m[j] | m[j + 4] >> 4 << 6;
        packed[j + 8] = (s[j + 4] & 15) | (m[j + 4] & 15) << 4;
    }
}
#define ENCODE_K4(name, TOP, FIFTH)                                                                     \
    static void encode_##name(int64_t n, const float *x, void *dst, const float *importance, int effort) { \
        FOR_BLOCKS(name, 256) {                                                                         \
            float q[256], d, dmin;                                                                      \
            uint8_t s[8], m[8];                                                                         \
            int8_t codes[256];                                                                          \
            fit_scaled_affine(256, 32, TOP, 63, x + k, block_weights(importance, k, ones), effort, &d, &dmin, s, m, q); \
            b->d = f32_to_f16(d);                                                                       \
            b->dmin = f32_to_f16(dmin);                                                                 \
            pack_scales_k4(s, m, b->scales);                                                            \
            codes_of(256, q, 0, codes);                                                                 \
            pack_plane_bits(codes, 4, 0, 128, b->qs);                                                   \
            FIFTH;                                                                                      \
        }                                                                                               \
    }
ENCODE_K4(q4_K, 15, )
ENCODE_K4(q5_K, 31, pack_plane_bits(codes, 1, 4, 32, b->qh))
static void encode_q6_K(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    INTEGERS(-32, 31, 20);
    FOR_BLOCKS(q6_K, 256) {
        float v[256];
        int8_t codes[256];
        b->d = f32_to_f16(fit_scaled(&integers, (multipliers){-128, 127, 1, 0}, 256, 16, x + k, block_weights(importance, k, ones), effort, b->scales, v));
        codes_of(256, v, 32, codes);
        for (int j = 0; j < 128; j++) {
            const int8_t *c = codes + 128 * (j / 64) + j % 64;
            b->ql[j] = (c[0] & 15) | (c[64] & 15) << 4;
        }
        pack_plane_bits(codes, 2, 4, 64, b->qh);
    }
}

// ---- codebooks -----------------------------------------------------------------------------------------------------------------------------------
static const float equal_weights[8] = {1, 1, 1, 1, 1, 1, 1, 1};

// Entry and signs of 8 (or 4) values that are a codebook entry with signs.
INLINE int entry_of(const grid_projection *gp, const float *v, uint32_t *signs) {
    float t[8], distance;
    *signs = 0;
    for (int j = 0; j < gp->index.width; j++) {
        *signs |= (uint32_t)(v[j] < 0) << j;
        t[j] = fabsf(v[j]);
    }
    return nearest_entry(&gp->index, t, equal_weights, &distance);
}
static void encode_iq2_xxs(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq2_xxs_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq2_xxs, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 15, 0.25f, 0.125f}, 256, 32, x + k, block_weights(importance, k, ones), effort, s, v));
        for (int g = 0; g < 8; g++) {
            uint32_t index = 0, all = (uint32_t)s[g] << 28, signs;
            for (int l = 0; l < 4; l++) {
                index |= (uint32_t)entry_of(&gp, v + 32 * g + 8 * l, &signs) << 8 * l;
                all |= (signs & 127) << 7 * l;
            }
            memcpy(b->qs + 4 * g, &index, 4);
            memcpy(b->qs + 4 * g + 2, &all, 4);
        }
    }
}
INLINE void pack_nibble_pairs(const int8_t *s, int n, uint8_t *packed) { for (int i = 0; i < n; i += 2) packed[i / 2] = s[i] | s[i + 1] << 4; }
static void encode_iq2_xs(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq2_xs_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq2_xs, 256) {
        float v[256];
        int8_t s[16];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 15, 0.25f, 0.125f}, 256, 16, x + k, block_weights(importance, k, ones), effort, s, v));
        pack_nibble_pairs(s, 16, b->scales);
        for (int l = 0; l < 32; l++) {
            uint32_t signs, index = entry_of(&gp, v + 8 * l, &signs);
            b->qs[l] = index | (signs & 127) << 9;
        }
    }
}
static void encode_iq2_s(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq2_s_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 0);
    FOR_BLOCKS(iq2_s, 256) {
        float v[256];
        int8_t s[16];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 15, 0.25f, 0.125f}, 256, 16, x + k, block_weights(importance, k, ones), effort, s, v));
        pack_nibble_pairs(s, 16, b->scales);
        memset(b->qh, 0, sizeof b->qh);
        for (int l = 0; l < 32; l++) {
            uint32_t signs, index = entry_of(&gp, v + 8 * l, &signs);
            b->qs[l] = index & 255;
            b->qs[32 + l] = signs;
            b->qh[l / 4] |= (index >> 8) << 2 * (l % 4);
        }
    }
}
static void encode_iq3_xxs(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq3_xxs_grid, 4, iq3_xxs_levels, 62, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq3_xxs, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 15, 0.5f, 0.25f}, 256, 32, x + k, block_weights(importance, k, ones), effort, s, v));
        for (int g = 0; g < 8; g++) {
            uint32_t all = (uint32_t)s[g] << 28, low, high;
            for (int l = 0; l < 4; l++) {
                b->qs[8 * g + 2 * l] = entry_of(&gp, v + 32 * g + 8 * l, &low);
                b->qs[8 * g + 2 * l + 1] = entry_of(&gp, v + 32 * g + 8 * l + 4, &high);
                all |= ((low | high << 4) & 127) << 7 * l;
            }
            memcpy(b->qs + 64 + 4 * g, &all, 4);
        }
    }
}
static void encode_iq3_s(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq3_s_grid, 4, iq3_s_levels, 15, project_grid, project_magnitudes, 0);
    FOR_BLOCKS(iq3_s, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 15, 2, 1}, 256, 32, x + k, block_weights(importance, k, ones), effort, s, v));
        pack_nibble_pairs(s, 8, b->scales);
        memset(b->qh, 0, sizeof b->qh);
        memset(b->signs, 0, sizeof b->signs);
        for (int l = 0; l < 64; l++) {
            uint32_t signs, index = entry_of(&gp, v + 4 * l, &signs);
            b->qs[l] = index & 255;
            b->qh[l / 8] |= (index >> 8) << l % 8;
            b->signs[l / 2] |= signs << 4 * (l % 2);
        }
    }
}
// Entry of 8 values that are a ternary entry shifted by an eighth, and whether it is shifted down.
INLINE int shifted_entry_of(const grid_projection *gp, const float *v, int *down) {
    float t[8], distance;
    for (int j = 0; j < 8; j++) t[j] = nearbyintf(v[j]);
    *down = v[0] < t[0];
    return nearest_entry(&gp->index, t, equal_weights, &distance);
}
static void encode_iq1_s(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq1_grid, 8, iq1_levels, 1.125f, project_shifted, project_ternary, 32);
    FOR_BLOCKS(iq1_s, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 7, 2, 1}, 256, 32, x + k, block_weights(importance, k, ones), effort, s, v));
        for (int g = 0; g < 8; g++) {
            int down = 0;
            b->qh[g] = s[g] << 12;
            for (int l = 0; l < 4; l++) {
                int index = shifted_entry_of(&gp, v + 32 * g + 8 * l, &down);
                b->qs[4 * g + l] = index & 255;
                b->qh[g] |= (index >> 8) << 3 * l;
            }
            b->qh[g] |= down << 15;
        }
    }
}
static void encode_iq1_m(int64_t n, const float *x, void *dst, const float *importance, int effort) {
    GRID_PROJECTION(gp, iq1_grid, 8, iq1_levels, 1.125f, project_shifted, project_ternary, 8);
    FOR_BLOCKS(iq1_m, 256) {
        float v[256];
        int8_t s[16];
        uint64_t words = 0;
        f16 d = f32_to_f16(fit_scaled(&gp.base, (multipliers){0, 7, 2, 1}, 256, 16, x + k, block_weights(importance, k, ones), effort, s, v));
        for (int i = 0; i < 16; i++) words |= (uint64_t)s[i] << (16 * (i / 4) + 3 * (i % 4));
        for (int i = 0; i < 4; i++) words |= (uint64_t)(d.bits >> 4 * i & 15) << (16 * i + 12);
        memcpy(b->scales, &words, 8);
        memset(b->qh, 0, sizeof b->qh);
        for (int l = 0; l < 32; l++) {
            int down, index = shifted_entry_of(&gp, v + 8 * l, &down);
            b->qs[l] = index & 255;
            b->qh[l / 2] |= (index >> 8 | down << 3) << 4 * (l % 2);
        }
    }
}
