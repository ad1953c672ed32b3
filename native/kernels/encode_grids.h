// Encoders of the codebook types, one block at a time: the nearest entry of a codebook is a search of its own that no lanes can share.
#pragma once

// What an error in each weight of a block counts: as in ggml, importance * sqrt(twice the mean square + x^2). Importance alone gave IQ2_S a
// divergence 15 % above llama.cpp's. Returns 1.
static int block_weights(int n, const float *x, const float *importance, float *w) {
    float square = 0;
    for (int i = 0; i < n; i++) square += x[i] * x[i];
    square *= 2.0f / n;
    for (int i = 0; i < n; i++) w[i] = importance ? importance[i] * sqrtf(square + x[i] * x[i]) : 1;
    return 1;
}

#define FOR_BLOCKS(name, QK)                                                                            \
    float weights[QK];                                                                                  \
    block_##name *b = dst;                                                                              \
    for (int64_t k = 0; k < n && block_weights(QK, x + k, importance ? importance + k : NULL, weights); k += QK, b++)

typedef struct { float xv, vv, error; } moments;     // sums over a group of w x v, w v v

INLINE moments moments_of(int n, const float *x, const float *w, const float *v) {
    vf xv = {0}, vv = {0};
    for (int i = 0; i < n; i += VL) {
        vf wv = vf_load(w + i) * vf_load(v + i);
        xv = vf_fma(wv, vf_load(x + i), xv);
        vv = vf_fma(wv, vf_load(v + i), vv);
    }
    return (moments){vf_sum(xv), vf_sum(vv), 0};
}
INLINE float error_of(int n, const float *x, const float *w, const float *v, float scale, float shift) {
    vf sum = {0};
    for (int i = 0; i < n; i += VL) {
        vf e = vf_load(x + i) - vf_load(v + i) * scale - shift;
        sum = vf_fma(vf_load(w + i) * e, e, sum);
    }
    return vf_sum(sum);
}
INLINE float half_rounded(float d) { return f16_to_f32(f32_to_f16(d)); }

// ---- projections ---------------------------------------------------------------------------------------------------------------------------
typedef struct projection projection;
typedef void project_fn(const projection *p, int n, const float *x, const float *w, float factor, float *v);
struct projection {
    project_fn *project;         // v = the values nearest to x * factor under the weights w
    project_fn *relaxed;         // the same, roughly and fast: ranks candidates
    float top;                   // what the weight of largest magnitude may become: from 0.4 times less to 0.3 times more
    const float *levels;         // the possible values (or magnitudes), ascending
    int   n_levels;
    int   span;                  // weights that share what else the projection chooses (even signs, a shift)
};

INLINE vf nearest_level(const projection *p, vf t) {
    vf v = vf_set(p->levels[0]);
    for (int l = 1; l < p->n_levels; l++) v = vf_select(t > 0.5f * (p->levels[l - 1] + p->levels[l]), vf_set(p->levels[l]), v);
    return v;
}
static void project_magnitudes(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    (void)w;
    for (int i = 0; i < n; i += VL) {
        vf t = vf_load(x + i) * factor;
        vi sign = (vi)t & (int32_t)0x80000000;
        vf_store(v + i, (vf)((vi)nearest_level(p, vf_abs(t)) | sign));
    }
}

// ---- one scale ---------------------------------------------------------------------------------------------------------------------------------
// The scale of least error for a group: the best of 25 for the rough projection, twice polished with the exact one.
static float fit_group(const projection *p, int n, const float *x, const float *w) {
    float max = abs_max(n, x), v[MAX_BLOCK], best = 0, best_gain = 0;
    if (max == 0) return 0;
    for (int i = 0; i <= 24; i++) {                          // of equally good scales the smallest leaves other groups the finest steps
        p->relaxed(p, n, x, w, p->top * (1.3f - 0.7f * i / 24) / max, v);
        moments m = moments_of(n, x, w, v);
        if (m.xv * m.xv > best_gain * 1.000001f * m.vv) best = m.xv / m.vv, best_gain = m.xv * best;
    }
    best_gain = 0;                                           // a rough gain is no measure for an exact one
    for (int polish = 0; polish < 2 && best != 0; polish++) {
        p->project(p, n, x, w, 1 / best, v);
        moments m = moments_of(n, x, w, v);
        if (!(m.xv * m.xv > best_gain * m.vv)) break;
        best = m.xv / m.vv;
        best_gain = m.xv * best;
    }
    return best;
}

// ---- a block of groups: weight = d * (step * s + offset) * value --------------------------------------------------------------------------
typedef struct { int low, high; float step, offset; } group_multipliers;       // s from low to high

INLINE int nearest_multiplier(group_multipliers f, float ratio) {
    float s = nearbyintf((ratio - f.offset) / f.step);
    return !(s > f.low) ? f.low : s > f.high ? f.high : (int)s;     // a NaN, too, gives f.low
}

// Of all the group_multipliers the one that a rough projection likes best.
static int likely_multiplier(const projection *p, group_multipliers f, int n, const float *x, const float *w, float d) {
    int found = f.low;
    float v[MAX_BLOCK], least = INFINITY;
    for (int s = f.low; s <= f.high; s++) {
        float scale = d * (f.step * s + f.offset);
        p->relaxed(p, n, x, w, inverse(scale), v);
        float error = error_of(n, x, w, v, scale, 0);
        if (error < least) least = error, found = s;
    }
    return found;
}

// Fills in s (n / group) and the values v (n); returns d, a half float.
static float fit_groups(const projection *p, group_multipliers f, int n, int group, const float *x, const float *w, int8_t *s, float *v) {
    int groups = n / group;
    float scale[MAX_GROUPS], top = 0, best_d = 0, best = INFINITY;
    memset(s, 0, groups);
    memset(v, 0, n * sizeof *v);
    for (int g = 0; g < groups; g++) {
        scale[g] = fit_group(p, group, x + g * group, w + g * group);
        if (scale[g] > top) top = scale[g];
    }
    // the largest scale gets the largest multiplier (more starts, like more rounds, gain less than a hundredth)
    float d = top / (f.step * f.high + f.offset), last = INFINITY;
    for (int round = 0; round < 3; round++) {
        int8_t si[MAX_GROUPS] = {0};
        float u[MAX_BLOCK] = {0}, total = 0, num = 0, den = 0;
        d = half_rounded(d);
        for (int g = 0; g < groups; g++) {
            const float *xg = x + g * group, *wg = w + g * group;
            int tried[2] = {nearest_multiplier(f, scale[g] * inverse(d)), likely_multiplier(p, f, group, xg, wg, d)};
            float least = INFINITY, t[32];
            for (int i = 0; i < 1 + (tried[0] != tried[1]); i++) {
                int c = tried[i];
                float factor = f.step * c + f.offset;
                p->project(p, group, xg, wg, inverse(d * factor), t);
                float error = error_of(group, xg, wg, t, d * factor, 0);
                if (error < least) least = error, si[g] = c, memcpy(u + g * group, t, group * sizeof *t);
            }
            moments m = moments_of(group, xg, wg, u + g * group);
            float factor = f.step * si[g] + f.offset;
            num += factor * m.xv;
            den += factor * factor * m.vv;
            total += least;
            if (m.vv > 0) scale[g] = m.xv / m.vv;
        }
        if (total < best) best = total, best_d = d, memcpy(s, si, groups), memcpy(v, u, n * sizeof *v);
        if (total >= last || den <= 0) break;
        last = total;
        d = num / den;
    }
    return best_d;
}

// ---- projections on codebooks ---------------------------------------------------------------------------------------------------------------
static const float iq2_levels[3] = {8, 25, 43};
static const float iq3_xxs_levels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const float iq3_s_levels[8] = {1, 3, 5, 7, 9, 11, 13, 15};
static const float iq1_levels[3] = {-1, 0, 1};

// Fill in the values of entry e.
INLINE void entry_values(const void *codebook, int width, int e, float *v) {
    const int8_t *bytes = (const int8_t *)codebook + e * width;
    for (int j = 0; j < width; j++) v[j] = bytes[j];
}

typedef struct { projection base; grid_index index; const void *codebook; } grid_projection;

// Magnitudes from the codebook; signs free (span 0), or an even number of minus signs in every 8, so that one may have to flip.
static void project_grid(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    const grid_projection *gp = (const grid_projection *)p;
    int width = gp->index.width;
    for (int i = 0; i < n; i += 8) {
        float t[8], sign[8];
        int minus = 0, weakest = 0;
        for (int j = 0; j < 8; j++) {
            t[j] = x[i + j] * factor;
            sign[j] = t[j] < 0 ? -1 : 1;
            minus += t[j] < 0;
            t[j] = fabsf(t[j]);
            if (w[i + j] * t[j] < w[i + weakest] * t[weakest]) weakest = j;
        }
        if (p->span && minus % 2) sign[weakest] = -sign[weakest], t[weakest] = -t[weakest];
        for (int j = 0; j < 8; j += width) {
            float distance;
            entry_values(gp->codebook, width, nearest_entry(&gp->index, t + j, w + i + j, &distance), v + i + j);
        }
        for (int j = 0; j < 8; j++) v[i + j] *= sign[j];
    }
}

// Ternary entries shifted by an eighth, up or down as is best for every `span` weights.
static void project_shifted(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    const grid_projection *gp = (const grid_projection *)p;
    for (int i = 0; i < n; i += p->span) {
        float least = INFINITY;
        for (int down = 0; down < 2; down++) {
            float shift = down ? -0.125f : 0.125f, total = 0, u[32];
            for (int k = 0; k < p->span; k += 8) {
                float t[8], distance;
                for (int j = 0; j < 8; j++) t[j] = x[i + k + j] * factor - shift;
                entry_values(gp->codebook, 8, nearest_entry(&gp->index, t, w + i + k, &distance), u + k);
                for (int j = 0; j < 8; j++) u[k + j] += shift;
                total += distance;
            }
            if (total < least) least = total, memcpy(v + i, u, p->span * sizeof *u);
        }
    }
}
// Roughly: any ternary pattern, shifted up.
static void project_ternary(const projection *p, int n, const float *x, const float *w, float factor, float *v) {
    (void)p; (void)w;
    for (int i = 0; i < n; i += VL) {
        vf t = vf_round(vf_load(x + i) * factor - 0.125f);
        vf_store(v + i, vf_min(vf_max(t, vf_set(-1)), vf_set(1)) + 0.125f);
    }
}

// A projection on codebook `name`; span as in project_grid and project_shifted.
#define GRID_PROJECTION(gp, name, n_width, level_table, top_level, how, roughly, n_span)                                   \
    grid_projection gp = {.base = {.project = how, .relaxed = roughly, .top = top_level, .levels = level_table, \
                                   .n_levels = sizeof level_table / sizeof *level_table, .span = n_span}, .codebook = name}; \
    grid_build(&gp.index, name, sizeof name / (n_width), n_width, level_table, sizeof level_table / sizeof *level_table)
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
static void encode_row_iq2_xxs(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq2_xxs_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq2_xxs, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 15, 0.25f, 0.125f}, 256, 32, x + k, weights, s, v));
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
static void encode_row_iq2_xs(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq2_xs_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq2_xs, 256) {
        float v[256];
        int8_t s[16];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 15, 0.25f, 0.125f}, 256, 16, x + k, weights, s, v));
        pack_nibble_pairs(s, 16, b->scales);
        for (int l = 0; l < 32; l++) {
            uint32_t signs, index = entry_of(&gp, v + 8 * l, &signs);
            b->qs[l] = index | (signs & 127) << 9;
        }
    }
}
static void encode_row_iq2_s(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq2_s_grid, 8, iq2_levels, 43, project_grid, project_magnitudes, 0);
    FOR_BLOCKS(iq2_s, 256) {
        float v[256];
        int8_t s[16];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 15, 0.25f, 0.125f}, 256, 16, x + k, weights, s, v));
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
static void encode_row_iq3_xxs(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq3_xxs_grid, 4, iq3_xxs_levels, 62, project_grid, project_magnitudes, 8);
    FOR_BLOCKS(iq3_xxs, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 15, 0.5f, 0.25f}, 256, 32, x + k, weights, s, v));
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
static void encode_row_iq3_s(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq3_s_grid, 4, iq3_s_levels, 15, project_grid, project_magnitudes, 0);
    FOR_BLOCKS(iq3_s, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 15, 2, 1}, 256, 32, x + k, weights, s, v));
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
static void encode_row_iq1_s(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq1_grid, 8, iq1_levels, 1.125f, project_shifted, project_ternary, 32);
    FOR_BLOCKS(iq1_s, 256) {
        float v[256];
        int8_t s[8];
        b->d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 7, 2, 1}, 256, 32, x + k, weights, s, v));
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
static void encode_row_iq1_m(int64_t n, const float *x, void *dst, const float *importance) {
    GRID_PROJECTION(gp, iq1_grid, 8, iq1_levels, 1.125f, project_shifted, project_ternary, 8);
    FOR_BLOCKS(iq1_m, 256) {
        float v[256];
        int8_t s[16];
        uint64_t words = 0;
        f16 d = f32_to_f16(fit_groups(&gp.base, (group_multipliers){0, 7, 2, 1}, 256, 16, x + k, weights, s, v));
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

#define ROW_BY_ROW(name)                                                                                \
    static void encode_##name(int64_t rows, int64_t n, const float *x, void *dst, const float *importance, int search) { \
        (void)search; \
        for (int64_t r = 0; r < rows; r++) encode_row_##name(n, x + r * n, (block_##name *)dst + r * (n / 256), importance); \
    }
ROW_BY_ROW(iq2_xxs) ROW_BY_ROW(iq2_xs) ROW_BY_ROW(iq2_s) ROW_BY_ROW(iq3_xxs) ROW_BY_ROW(iq3_s) ROW_BY_ROW(iq1_s) ROW_BY_ROW(iq1_m)
