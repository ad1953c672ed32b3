// The codebooks of the I types, and the entry nearest to a group of weights.
//
// A codebook holds groups of 8 coordinates of three levels, or of 4 coordinates of eight. Weights rounded one by one to their nearest levels
// make a pattern. Where the pattern is an entry, that is the nearest one; for every other pattern the entries around it are listed, and the
// best of them is found VL at a time: an entry is four nibbles, each says which combination of levels two coordinates (or one) have, and its
// weighted distance is the sum of four terms, looked up in tables that are filled for the group.
#pragma once
#include <stdatomic.h>
#include <stdlib.h>

enum { MAX_ENTRIES = 2048, MAX_LEVELS = 8, MAX_PATTERNS = 6561, SHELLS = 3 };

typedef struct { int32_t start, few, all; } nearby;        // of a pattern: entries in grid.list, `few` in the nearest distances that ggml looks at
typedef struct { float low[16], high[16]; } nibble_levels; // what a nibble stands for: the levels of its two coordinates, or of one in `low`
typedef struct {
    int     width, n_levels, n;                            // coordinates, levels per coordinate, entries
    float   levels[MAX_LEVELS];
    nibble_levels own, odd;                                // by these levels, and by 1, 3, 5 ..., as ggml counts them
    uint8_t level[MAX_ENTRIES * 8];                        // of each coordinate of each entry
    float   value[MAX_ENTRIES * 8];
    nearby  near[MAX_PATTERNS];                            // start < 0: the pattern is entry -1 - start
    int32_t *list;                                         // nibbles | entry << 16
} grid;

INLINE int pattern_of(const grid *g, const uint8_t *level) {
    int pattern = 0;
    for (int j = g->width - 1; j >= 0; j--) pattern = pattern * g->n_levels + level[j];
    return pattern;
}

// Entries around `pattern`, nearest first, of the SHELLS smallest distances that occur; distances are counted in levels. Returns how many.
static int entries_around(const grid *g, int pattern, const int32_t *nibbles, int few_shells, int32_t *found, int32_t *few) {
    int32_t distance[MAX_ENTRIES], count[512] = {0};
    float cost[4][16] = {{0}};
    for (int k = 0, rest = pattern; k < 4; k++) {
        int radix = g->width == 8 ? g->n_levels * g->n_levels : g->n_levels, own = rest % radix;
        rest /= radix;
        for (int c = 0; c < radix; c++) {
            int low = c % g->n_levels - own % g->n_levels, high = c / g->n_levels - own / g->n_levels;
            cost[k][c] = low * low + high * high;
        }
    }
    for (int e = 0; e < g->n; e += VL) {
        vi at = vi_load(nibbles + e);
        vi_store(distance + e, vi_trunc(vf_lookup16(cost[0], at & 15) + vf_lookup16(cost[1], at >> 4 & 15)
                                      + vf_lookup16(cost[2], at >> 8 & 15) + vf_lookup16(cost[3], at >> 12 & 15)));
    }
    for (int e = 0; e < g->n; e++) count[distance[e]]++;
    int n = 0;
    for (int d = 0, shells = 0; shells < SHELLS && n < g->n; d++) {
        if (!count[d]) continue;
        for (int e = 0; e < g->n; e++)
            if (distance[e] == d) found[n++] = nibbles[e] | e << 16;
        if (++shells == few_shells) *few = n;
    }
    return n;
}
// codebook: n entries of `width` bytes, n a multiple of VL. few_shells: how many distances ggml looks at. NULL when there is no memory.
static grid *grid_build(const void *codebook, int n, int width, const float *levels, int n_levels, int few_shells) {
    const int8_t *bytes = codebook;
    int32_t nibbles[MAX_ENTRIES], found[MAX_ENTRIES], room = 1 << 16, used = 0, n_patterns = width == 8 ? MAX_PATTERNS : 4096;
    grid *g = calloc(1, sizeof *g);
    if (!g || !(g->list = malloc(room * sizeof *g->list))) return free(g), NULL;
    g->width = width, g->n_levels = n_levels, g->n = n;
    memcpy(g->levels, levels, n_levels * sizeof *levels);
    for (int c = 0; c < 16; c++) {
        int low = c % n_levels, high = c / n_levels % n_levels;
        g->own.low[c] = levels[low], g->own.high[c] = levels[high];
        g->odd.low[c] = 2 * low + 1, g->odd.high[c] = 2 * high + 1;
    }
    for (int e = 0; e < n; e++) {
        nibbles[e] = 0;
        for (int j = 0; j < width; j++) {
            int level = 0, shift = width == 8 ? j / 2 * 4 : j * 4;
            while (levels[level] != bytes[e * width + j]) level++;
            nibbles[e] += level * (width == 8 && j % 2 ? n_levels : 1) << shift;
            g->level[e * width + j] = level;
            g->value[e * width + j] = levels[level];
        }
        g->near[pattern_of(g, g->level + e * width)].start = -1 - e;
    }
    for (int p = 0; p < n_patterns; p++) {
        if (g->near[p].start < 0) continue;
        int count = entries_around(g, p, nibbles, few_shells, found, &g->near[p].few);
        if (used + count + VL > room) {
            int32_t *more = realloc(g->list, (room *= 2) * sizeof *more);
            if (!more) return free(g->list), free(g), NULL;
            g->list = more;
        }
        memcpy(g->list + used, found, count * sizeof *found);
        g->near[p].start = used;
        g->near[p].all = count;
        used += count;
    }
    for (int l = 0; l < VL; l++) g->list[used + l] = 0;    // the last list is read whole vectors at a time too
    return g;
}

// How ggml measures an entry: by the sum, coordinate after coordinate, of w (scale (level + shift) - x)^2.
typedef struct { const float *x; float scale, shift; } ggml_measure;
static float ggml_distance(const grid *g, int entry, const float *w, const nibble_levels *of, ggml_measure by) {
    float sum = 0;
    for (int j = 0; j < g->width; j++) {
        float off = by.scale * (of->low[g->level[entry * g->width + j]] + by.shift) - by.x[j];
        sum += w[j] * off * off;
    }
    return sum;
}

// The entry nearest to t (width), whose nearest levels are `level`, under the weights w. of: what the levels stand for.
// by: look as far as ggml does, and of entries that are equally near but for rounding take the one that is nearest as ggml rounds.
static int nearest_entry(const grid *g, const float *t, const uint8_t *level, const float *w, const nibble_levels *of, const ggml_measure *by) {
    const nearby *near = g->near + pattern_of(g, level);
    if (near->start < 0) return -1 - near->start;
    float cost[4][16];
    for (int k = 0; k < 4; k++) {
        const int j = g->width / 4 * k;
        for (int i = 0; i < 16; i += VL) {
            vf low = vf_load(of->low + i) - t[j], sum = w[j] * low * low;
            if (g->width == 8) {
                vf high = vf_load(of->high + i) - t[j + 1];
                sum += w[j + 1] * high * high;
            }
            vf_store(cost[k] + i, sum);
        }
    }
    const int32_t *list = g->list + near->start;
    float n = by ? near->few : near->all, distance[MAX_ENTRIES];
    vf least = vf_set(INFINITY), found = vf_set(n), place;
    for (int l = 0; l < VL; l++) place[l] = l;
    for (int k = 0; k < n; k += VL, place += (float)VL, list += VL) {
        vi at = vi_load(list);
        vf d = vf_lookup16(cost[0], at & 15) + vf_lookup16(cost[1], at >> 4 & 15)
             + (vf_lookup16(cost[2], at >> 8 & 15) + vf_lookup16(cost[3], at >> 12 & 15));
        if (by) vf_store(distance + k, d);
        vi better = (d < least) & (place < n);
        vf_keep(better, &found, place);
        vf_keep(better, &least, d);
    }
    float nearest = -vf_hmax(-least);
    int best = -vf_hmax(-vf_select(least == nearest, found, vf_set(n)));                // of equals the first
    if (best >= n) best = 0;
    if (by) {
        float own = INFINITY;
        for (int k = 0; k < n; k += VL)
            for (uint32_t close = vi_signs(vf_load(distance + k) <= nearest * 1.001f); close; close &= close - 1) {
                int at = k + __builtin_ctz(close);
                float d = at < n ? ggml_distance(g, g->list[near->start + at] >> 16, w, of, *by) : INFINITY;
                if (d < own) own = d, best = at;
            }
    }
    return g->list[near->start + best] >> 16;
}
