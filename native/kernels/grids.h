// Nearest entries of the I-quant codebooks: exact, by halves.
//
// An entry is 8 (or 4) coordinates of a few levels. The weighted distance of a group to every entry is the sum of two terms, one for each
// half of the coordinates, and each term takes few values (3^4, or 8^2): both tables are filled first. Entries are sorted by their first
// half, so a whole run of entries is skipped when that half alone, with the best second half there is, is already too far.
#pragma once

enum { MAX_ENTRIES = 2048, MAX_HALVES = 81, MAX_LEVELS = 8 };

typedef struct grid_index {
    int      width, n_levels, halves;          // coordinates, levels per coordinate, n_levels^(width / 2)
    float    levels[MAX_LEVELS];
    uint16_t start[MAX_HALVES + 1];            // entries [start[h], start[h + 1]) have first half h
    uint8_t  second[MAX_ENTRIES];              // their second halves
    uint16_t entry[MAX_ENTRIES];               // their places in the codebook
} grid_index;

// codebook: n entries of `width` bytes
static void grid_build(grid_index *g, const void *codebook, int n, int width, const float *levels, int n_levels) {
    uint8_t first[MAX_ENTRIES], second[MAX_ENTRIES];
    const int8_t *bytes = codebook;
    g->width = width;
    g->n_levels = n_levels;
    g->halves = 1;
    for (int j = 0; j < width / 2; j++) g->halves *= n_levels;
    memcpy(g->levels, levels, n_levels * sizeof *levels);
    memset(g->start, 0, sizeof g->start);
    for (int e = 0; e < n; e++) {
        int half[2] = {0, 0};
        for (int j = 0; j < width; j++) {
            int level = 0;
            while (levels[level] != bytes[e * width + j]) level++;
            half[j >= width / 2] = half[j >= width / 2] * n_levels + level;
        }
        first[e] = half[0];
        second[e] = half[1];
        g->start[half[0] + 1]++;
    }
    for (int h = 0; h < g->halves; h++) g->start[h + 1] += g->start[h];
    uint16_t next[MAX_HALVES];
    memcpy(next, g->start, sizeof next);
    for (int e = 0; e < n; e++) {
        int at = next[first[e]]++;
        g->second[at] = second[e];
        g->entry[at] = e;
    }
}

// cost[h] = sum over the coordinates of one half of w (level - t)^2, for every combination h of levels
INLINE void half_costs(const grid_index *g, const float *t, const float *w, float *cost) {
    int count = 1;
    cost[0] = 0;
    for (int j = 0; j < g->width / 2; j++) {
        float step[MAX_LEVELS];
        for (int l = 0; l < g->n_levels; l++) step[l] = w[j] * (g->levels[l] - t[j]) * (g->levels[l] - t[j]);
        for (int c = count - 1; c >= 0; c--) {               // in place: combination c becomes c * n_levels + l, from the end
            float base = cost[c];
            for (int l = g->n_levels - 1; l >= 0; l--) cost[c * g->n_levels + l] = base + step[l];
        }
        count *= g->n_levels;
    }
}

// The codebook entry nearest to t (width) under the weights w; its weighted squared distance goes to *distance.
static int nearest_entry(const grid_index *g, const float *t, const float *w, float *distance) {
    float a[MAX_HALVES], b[MAX_HALVES];
    half_costs(g, t, w, a);
    half_costs(g, t + g->width / 2, w + g->width / 2, b);
    int likely = 0;
    float least_b = b[0], best = INFINITY;
    for (int h = 0; h < g->halves; h++) {
        if (a[h] < a[likely]) likely = h;
        if (b[h] < least_b) least_b = b[h];
    }
    int found = 0;
    for (int i = -1; i < g->halves; i++) {                   // the likely run first: it makes most of the others skippable
        int h = i < 0 ? likely : i;
        if (a[h] + least_b >= best) continue;
        for (int e = g->start[h]; e < g->start[h + 1]; e++) {
            float d = a[h] + b[g->second[e]];
            if (d < best) best = d, found = e;
        }
    }
    *distance = best;
    return g->entry[found];
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
#define GRID_PROJECTION(gp, name, n_width, level_table, top, how, roughly, n_span)                                   \
    grid_projection gp = {.base = {.project = how, .relaxed = roughly, .anchors = {top}, .n_anchors = 1, .below = 0.4f * (top), \
                                   .above = 0.3f * (top), .steps = 24, .levels = level_table,                        \
                                   .n_levels = sizeof level_table / sizeof *level_table, .span = n_span}, .codebook = name}; \
    grid_build(&gp.index, name, sizeof name / (n_width), n_width, level_table, sizeof level_table / sizeof *level_table)
