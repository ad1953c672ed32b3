// Encoders of the codebook types: a table says how they differ, a search fills in codes, a packer for each type puts them into its block.
//
// weight = d * (step * s + offset) * value: s for every group of 16 or 32 weights, values from the codebook; IQ2 and IQ3 hold magnitudes, with
// signs beside them, IQ1 ternary values that are shifted by an eighth up or down. One block at a time: what is near differs from group to
// group, so that no lanes can share the search.
#pragma once

static const float iq2_levels[3] = {8, 25, 43};
static const float iq3_xxs_levels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
static const float iq3_s_levels[8] = {1, 3, 5, 7, 9, 11, 13, 15};
static const float iq1_levels[3] = {-1, 0, 1};
#define EIGHTH 0.125f

typedef enum { OFF_GRID, ALL_IF_OFF_GRID, ALL } refined;       // which entries ggml chooses again for its final scale of a group
typedef struct {
    const void *codebook;
    const float *levels;
    int n, width, n_levels;
    int span;                    // weights that share an even number of minus signs, or a shift; 0: signs are free
    int group, most;             // weights of a scale; s from 0
    float step, offset;
    float top;                   // what the largest weight may become: from 0.4 times less to 0.3 times more
    // ggml's procedure
    int shells;                  // how many distances it looks for entries at
    plain_weights plain;
    importance_weights given;
    int reach;                   // the largest weight becomes the highest level, or up to so many steps less or more
    float reach_step;
    refined refine;
    float stretch;               // of the block's scale in the end
} grid_type;

#define CODEBOOK(name, n_width, levels) name, levels, sizeof name / (n_width), n_width, sizeof levels / sizeof *levels
static const grid_type grid_iq2_xxs = {CODEBOOK(iq2_xxs_grid, 8, iq2_levels), 8, 32, 15, 0.25f, 0.125f, 43,
                                       2, OF_ONES, WITH_BLOCK, 6, 0.1f, ALL, 1};
static const grid_type grid_iq2_xs = {CODEBOOK(iq2_xs_grid, 8, iq2_levels), 8, 16, 15, 0.25f, 0.125f, 43,
                                      2, OF_ONES, WITH_BLOCK, 9, 0.1f, OFF_GRID, 1};
static const grid_type grid_iq2_s = {CODEBOOK(iq2_s_grid, 8, iq2_levels), 0, 16, 15, 0.25f, 0.125f, 43,
                                     1, MEAN_AND_SQUARE, WITH_TWICE_BLOCK, 9, 0.1f, OFF_GRID, 0.9875f};
static const grid_type grid_iq3_xxs = {CODEBOOK(iq3_xxs_grid, 4, iq3_xxs_levels), 8, 32, 15, 0.5f, 0.25f, 62,
                                       2, SQUARE, WITH_TWICE_BLOCK, 15, 0.2f, OFF_GRID, 1.0125f};
static const grid_type grid_iq3_s = {CODEBOOK(iq3_s_grid, 4, iq3_s_levels), 0, 32, 15, 2, 1, 15,
                                     3, SQUARE, WITH_TWICE_BLOCK, 9, 0.2f, ALL_IF_OFF_GRID, 1.033f};
static const grid_type grid_iq1_s = {CODEBOOK(iq1_grid, 8, iq1_levels), 32, 32, 7, 2, 1, 1 + EIGHTH,
                                     3, OF_ONES, WITH_TWICE_BLOCK, .stretch = 1.125f};
static const grid_type grid_iq1_m = {CODEBOOK(iq1_grid, 8, iq1_levels), 8, 16, 7, 2, 1, 1 + EIGHTH,
                                     3, OF_ONES, WITH_TWICE_BLOCK, .stretch = 1.1125f};
INLINE int is_ternary(const grid_type *type) { return type->levels == iq1_levels; }

// A grid is built when it is first needed and kept; of two threads that build the same one, the second throws its own away.
static const grid *grid_of(const grid_type *type, grid *_Atomic *kept) {
    grid *g = atomic_load(kept), *none = NULL;
    if (g || !(g = grid_build(type->codebook, type->n, type->width, type->levels, type->n_levels, type->shells))) return g;
    if (atomic_compare_exchange_strong(kept, &none, g)) return g;
    free(g->list);
    free(g);
    return none;
}

// ---- what a block becomes ------------------------------------------------------------------------------------------------------------------
typedef struct { uint16_t entry[8]; uint8_t minus[4], down[4]; float value[32]; } grid_group;      // minus, down: of every 8 weights
typedef struct { float d; int s[MAX_GROUPS]; uint16_t entry[64]; uint8_t minus[32], down[32]; } grid_block;

INLINE void keep_group(const grid_type *type, int g, const grid_group *c, int s, grid_block *b) {
    int entries = type->group / type->width, eights = type->group / 8;
    b->s[g] = s;
    memcpy(b->entry + g * entries, c->entry, entries * sizeof *c->entry);
    memcpy(b->minus + g * eights, c->minus, eights);
    memcpy(b->down + g * eights, c->down, eights);
}

INLINE float half_rounded(float d) { return f16_to_f32(f32_to_f16(d)); }
static float sum_of_squares(int n, const float *x) {      // in ggml's order: in another one weights differ in their last bit, and choices with them
    float sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

// ---- nearest values ------------------------------------------------------------------------------------------------------------------------
// Levels nearest to t, at their places in p->levels.
INLINE vi nearest_levels(const grid *g, vf t) {
    vi at = {0};
    for (int l = 1; l < g->n_levels; l++) at -= t > 0.5f * (g->levels[l - 1] + g->levels[l]);
    return at;
}
INLINE void levels_near(const grid *g, int n, const float *t, uint8_t *level) {
    for (int i = 0; i < n; i += VL) {
        int8_t bytes[VL > 4 ? VL : 4];
        vi_to_i8(bytes, nearest_levels(g, vf_load(t + i)));
        memcpy(level + i, bytes, VL);
    }
}
// The values nearest to x * factor under the weights w.
static void nearest_magnitudes(const grid_type *type, const grid *g, const float *x, const float *w, float factor, grid_group *c) {
    float t[32];
    uint8_t level[32];
    for (int i = 0; i < type->group; i += VL) vf_store(t + i, vf_abs(vf_load(x + i)) * factor);
    levels_near(g, type->group, t, level);
    for (int i = 0; i < type->group; i += 8) {
        int minus = 0;
        for (int j = 0; j < 8; j++) minus |= (x[i + j] < 0) << j;
        if (type->span && __builtin_parity(minus)) {       // the sign whose loss is least changes
            int weakest = i;
            float least = INFINITY;
            for (int j = i; j < i + 8; j++) {
                float kept = t[j] - g->levels[level[j]], changed = t[j] + g->levels[0], loss = w[j] * (changed * changed - kept * kept);
                if (loss < least) least = loss, weakest = j;
            }
            minus ^= 1 << (weakest - i);
            t[weakest] = -t[weakest];
            level[weakest] = 0;
        }
        c->minus[i / 8] = minus;
        c->down[i / 8] = 0;
        for (int j = i; j < i + 8; j += type->width) {
            int e = c->entry[j / type->width] = nearest_entry(g, t + j, level + j, w + j, &g->own, NULL);
            for (int k = 0; k < type->width; k++) {
                float v = g->value[e * type->width + k];
                c->value[j + k] = minus >> (j + k - i) & 1 ? -v : v;
            }
        }
    }
}
// No entry is nearer than the levels nearest to each weight: what those leave tells which shift to try first, and often that the other cannot win.
static void nearest_ternary(const grid_type *type, const grid *g, const float *x, const float *w, float factor, grid_group *c) {
    float t[2][32], bound[2][4];
    uint8_t level[2][32];
    memset(c->minus, 0, sizeof c->minus);
    for (int down = 0; down < 2; down++) {
        float left[32];
        for (int i = 0; i < type->group; i += VL) {
            vf shifted = vf_load(x + i) * factor - (down ? -EIGHTH : EIGHTH), off = shifted - vf_clamp(vf_round(shifted), -1, 1);
            vf_store(t[down] + i, shifted);
            vf_store(left + i, vf_load(w + i) * off * off);
        }
        levels_near(g, type->group, t[down], level[down]);
        for (int i = 0; i < type->group; i += 8) bound[down][i / 8] = f32x8_sum(f32x8_load(left + i));
    }
    for (int i = 0; i < type->group; i += type->span) {
        float least = INFINITY, total[2] = {0};
        for (int j = i; j < i + type->span; j += 8) total[0] += bound[0][j / 8], total[1] += bound[1][j / 8];
        const int first = total[1] < total[0];
        for (int turn = 0; turn < 2; turn++) {
            int down = first ^ turn;
            float distance = total[down], v[32];
            uint16_t entry[4];
            for (int j = 0; j < type->span && distance < least; j += 8) {
                const float *tj = t[down] + i + j;
                int e = entry[j / 8] = nearest_entry(g, tj, level[down] + i + j, w + i + j, &g->own, NULL);
                distance -= bound[down][(i + j) / 8];
                for (int k = 0; k < 8; k++) {
                    float off = tj[k] - g->value[8 * e + k];
                    distance += w[i + j + k] * off * off;
                    v[j + k] = g->value[8 * e + k] + (down ? -EIGHTH : EIGHTH);
                }
            }
            if (!(distance < least)) continue;
            least = distance;
            memcpy(c->value + i, v, type->span * sizeof *v);
            memcpy(c->entry + i / 8, entry, type->span / 8 * sizeof *entry);
            memset(c->down + i / 8, down, type->span / 8);
        }
    }
}
INLINE void nearest_values(const grid_type *type, const grid *g, const float *x, const float *w, float factor, grid_group *c) {
    (is_ternary(type) ? nearest_ternary : nearest_magnitudes)(type, g, x, w, factor, c);
}

// The moments of a group, in every lane.
INLINE moments group_moments(int n, const float *x, const float *w, const float *v) {
    vf xx = {0}, xv = {0}, vv = {0};
    for (int i = 0; i < n; i += VL) {
        vf wx = vf_load(w + i) * vf_load(x + i), wv = vf_load(w + i) * vf_load(v + i);
        xx = vf_fma(wx, vf_load(x + i), xx);
        xv = vf_fma(wx, vf_load(v + i), xv);
        vv = vf_fma(wv, vf_load(v + i), vv);
    }
    return (moments){vf_set(vf_sum(xx)), vf_set(vf_sum(xv)), vf_set(vf_sum(vv))};
}

// ---- the search ----------------------------------------------------------------------------------------------------------------------------
// The scale of least squares for a group without the codebook: the best of 13. Of equally good ones the smallest leaves other groups the
// finest steps.
static float rough_scale(const grid_type *type, const grid *g, const float *x, const float *w) {
    float max = abs_max(type->group, x), best = 0, best_gain = 0;
    if (max < 1e-15f) return 0;
    for (int i = 0; i <= 12; i++) {
        float factor = type->top * (1.3f - 0.7f * i / 12) / max;
        for (int down = 0; down <= is_ternary(type); down++) {
            float shift = !is_ternary(type) ? 0 : down ? -EIGHTH : EIGHTH;
            vf xv = {0}, vv = {0};
            for (int j = 0; j < type->group; j += VL) {
                vf xj = vf_load(x + j), t = xj * factor - shift, a = is_ternary(type) ? t : vf_abs(t), v = vf_set(g->levels[0]);
                for (int l = 1; l < g->n_levels; l++)
                    v = vf_select(a > 0.5f * (g->levels[l - 1] + g->levels[l]), vf_set(g->levels[l]), v);
                vf wv = vf_load(w + j) * (v + shift);
                xv = vf_fma(wv, is_ternary(type) ? xj : vf_abs(xj), xv);
                vv = vf_fma(wv, v + shift, vv);
            }
            float sum_xv = vf_sum(xv), sum_vv = vf_sum(vv);
            if (sum_xv * sum_xv > best_gain * 1.000001f * sum_vv) best = sum_xv / sum_vv, best_gain = sum_xv * best;
        }
    }
    return best;
}

static void search_grid(const grid_type *type, const grid *grid, const float *x, const float *w, grid_block *out) {
    int groups = 256 / type->group;
    float scale[MAX_GROUPS], swell[MAX_GROUPS], top = 0, best = INFINITY;      // swell: how much larger than that of least squares a scale is
    memset(out, 0, sizeof *out);
    for (int g = 0; g < groups; g++) {
        const float *xg = x + g * type->group, *wg = w + g * type->group;
        float gain = 0, now = rough_scale(type, grid, xg, wg);
        scale[g] = 0, swell[g] = 1;
        for (int polish = 0; polish < 2 && now != 0; polish++) {
            grid_group c;
            nearest_values(type, grid, xg, wg, 1 / now, &c);
            moments m = group_moments(type->group, xg, wg, c.value);
            float xv = m.xv[0], vv = m.vv[0];
            if (!(xv * xv > gain * vv)) break;
            now = xv / vv;
            gain = xv * now;
            scale[g] = best_scale(m)[0], swell[g] = scale[g] / now;
        }
        if (scale[g] > top) top = scale[g];
    }
    float d = top / (type->step * type->most + type->offset), last = INFINITY;     // the largest scale gets the largest multiplier
    for (int round = 0; round < 3; round++) {
        grid_block now;
        float total = 0, num = 0, den = 0;
        d = half_rounded(d);
        for (int g = 0; g < groups; g++) {
            const float *xg = x + g * type->group, *wg = w + g * type->group;
            float ratio = (scale[g] * inverse(d) - type->offset) / type->step, least = INFINITY;
            int middle = !(ratio > 0) ? 0 : ratio > type->most ? type->most : (int)nearbyintf(ratio);      // of a NaN, too, 0
            moments of_best = {0};
            int reach = round && is_ternary(type) ? 0 : 1;       // few multipliers: the first round finds them
            for (int s = middle - reach; s <= middle + reach; s++) {
                if (s < 0 || s > type->most) continue;
                grid_group c;
                float factor = type->step * s + type->offset;
                nearest_values(type, grid, xg, wg, swell[g] * inverse(d * factor), &c);
                moments m = group_moments(type->group, xg, wg, c.value);
                float loss = loss_of(errors_at(m, vf_set(d * factor)))[0];
                if (!(loss < least) && s > 0 && least < INFINITY) continue;
                least = loss, of_best = m;
                keep_group(type, g, &c, s, &now);
            }
            float factor = type->step * now.s[g] + type->offset;
            num += COHERENCE * factor * of_best.xv[0];
            den += factor * factor * curvature(of_best)[0];
            total += least;
            scale[g] = best_scale(of_best)[0];
        }
        if (total < best) best = total, *out = now, out->d = d;
        if (!(total < last) || !(den > 0)) break;
        last = total;
        d = num / den;
    }
}
