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
typedef struct {
    int     width, n_levels, n;                            // coordinates, levels per coordinate, entries
    float   levels[MAX_LEVELS];
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

// The entry nearest to t (width), whose nearest levels are `level`, under the weights w. levels: what the levels stand for; few: as far as
// ggml looks.
static int nearest_entry(const grid *g, const float *t, const uint8_t *level, const float *w, const float *levels, int few) {
    const nearby *near = g->near + pattern_of(g, level);
    if (near->start < 0) return -1 - near->start;
    float cost[4][16] = {{0}}, step[8][MAX_LEVELS];
    for (int j = 0; j < g->width; j++)
        for (int l = 0; l < g->n_levels; l++) step[j][l] = w[j] * (levels[l] - t[j]) * (levels[l] - t[j]);
    for (int k = 0; k < 4; k++) {
        if (g->width == 4) memcpy(cost[k], step[k], sizeof step[k]);
        else for (int b = 0; b < 3; b++)
            for (int a = 0; a < 3; a++) cost[k][3 * b + a] = step[2 * k][a] + step[2 * k + 1][b];
    }
    int n = few ? near->few : near->all, best = n;
    const int32_t *list = g->list + near->start;
    vf least = vf_set(INFINITY);
    vi found = vi_set(n), lane;
    for (int l = 0; l < VL; l++) lane[l] = l;
    for (int e = 0; e < n; e += VL) {
        vi at = vi_load(list + e);
        vf d = vf_lookup16(cost[0], at & 15) + vf_lookup16(cost[1], at >> 4 & 15)
             + (vf_lookup16(cost[2], at >> 8 & 15) + vf_lookup16(cost[3], at >> 12 & 15));
        vi better = (d < least) & (lane + e < n);
        found = (found & ~better) | ((lane + e) & better);
        least = vf_select(better, d, least);
    }
    float distance = -vf_hmax(-least);
    for (int l = 0; l < VL; l++)
        if (least[l] == distance && found[l] < best) best = found[l];       // of equals the first
    return list[best < n ? best : 0] >> 16;
}
