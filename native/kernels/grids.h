// Nearest entries of the I-quant codebooks: exact, VL entries at a time.
//
// An entry is 8 coordinates of three levels, or 4 of eight, kept as four nibbles: each says which combination of levels two coordinates (or
// one) have. The weighted distance of a group to an entry is the sum of four terms, looked up in tables that are filled for the group.
#pragma once

enum { MAX_ENTRIES = 2048, MAX_LEVELS = 8 };

typedef struct grid_index {
    int     width, n_levels, n;               // coordinates, levels per coordinate, entries
    float   levels[MAX_LEVELS];
    int32_t nibbles[MAX_ENTRIES];
} grid_index;

// codebook: n entries of `width` bytes, n a multiple of VL
static void grid_build(grid_index *g, const void *codebook, int n, int width, const float *levels, int n_levels) {
    const int8_t *bytes = codebook;
    g->width = width;
    g->n_levels = n_levels;
    g->n = n;
    memcpy(g->levels, levels, n_levels * sizeof *levels);
    for (int e = 0; e < n; e++) {
        g->nibbles[e] = 0;
        for (int j = 0; j < width; j++) {
            int level = 0, shift = width == 8 ? j / 2 * 4 : j * 4;
            while (levels[level] != bytes[e * width + j]) level++;
            g->nibbles[e] += level * (width == 8 && j % 2 ? n_levels : 1) << shift;
        }
    }
}

// The codebook entry nearest to t (width) under the weights w; its weighted squared distance goes to *distance.
static int nearest_entry(const grid_index *g, const float *t, const float *w, float *distance) {
    float cost[4][16] = {{0}}, step[8][MAX_LEVELS];
    for (int j = 0; j < g->width; j++)
        for (int l = 0; l < g->n_levels; l++) step[j][l] = w[j] * (g->levels[l] - t[j]) * (g->levels[l] - t[j]);
    for (int k = 0; k < 4; k++) {
        if (g->width == 4) memcpy(cost[k], step[k], sizeof step[k]);
        else for (int b = 0; b < 3; b++)
            for (int a = 0; a < 3; a++) cost[k][3 * b + a] = step[2 * k][a] + step[2 * k + 1][b];
    }
    vf least = vf_set(INFINITY);
    vi found = {0}, lane;
    for (int l = 0; l < VL; l++) lane[l] = l;
    for (int e = 0; e < g->n; e += VL) {
        vi nibbles = vi_load(g->nibbles + e);
        vf d = vf_lookup16(cost[0], nibbles & 15) + vf_lookup16(cost[1], nibbles >> 4 & 15)
             + (vf_lookup16(cost[2], nibbles >> 8 & 15) + vf_lookup16(cost[3], nibbles >> 12));
        vi better = d < least;
        found = (found & ~better) | ((lane + e) & better);
        least = vf_min(d, least);
    }
    *distance = -vf_hmax(-least);
    int at = 0;
    while (at < VL - 1 && least[at] != *distance) at++;
    return found[at];
}
