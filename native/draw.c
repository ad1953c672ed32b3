// The next token by llama.cpp's default chain of samplers. pyggml/sampling.py says what each step means and does all others; this is the
// way that is taken for most tokens of most people, where a dozen numpy calls would take as long as a layer of a small model.
#include <math.h>
#include "api.h"

enum { BLOCK = 16 };                    // logits looked at together: few of them are among the largest

typedef struct { int n; float logit[PYG_MOST_TOP_K]; int32_t id[PYG_MOST_TOP_K]; } ranking;    // largest first, of equal ones the lowest id

static void insert(ranking *r, int k, float x, int32_t id) {
    int at = r->n < k ? r->n++ : k - 1;
    for (; at > 0 && r->logit[at - 1] < x; at--) r->logit[at] = r->logit[at - 1], r->id[at] = r->id[at - 1];
    r->logit[at] = x;
    r->id[at] = id;
}

// The k largest of n logits; those of -infinity are left out. 0 when one is NaN.
static int rank(const float *logits, int32_t n, int k, ranking *r) {
    float least = -INFINITY;
    r->n = 0;
    for (int32_t from = 0; from < n; from += BLOCK) {
        const int count = n - from < BLOCK ? n - from : BLOCK;
        int any = 0;
        for (int i = 0; i < count; i++) any |= !(logits[from + i] <= least);
        for (int i = 0; any && i < count; i++) {
            const float x = logits[from + i];
            if (x <= least) continue;
            if (x != x) return 0;
            insert(r, k, x, from + i);
            if (r->n == k) least = r->logit[k - 1];
        }
    }
    return 1;
}

int32_t pyg_draw(const float *logits, int32_t n, int32_t top_k, float top_p, float min_p, int32_t min_keep, float temp, double u) {
    ranking r;
    double weight[PYG_MOST_TOP_K], total = 0, sum = 0;
    if (!rank(logits, n, top_k, &r) || r.n == 0 || !isfinite(r.logit[0])) return -1;
    if (top_p < 1) {
        for (int i = 0; i < r.n; i++) total += weight[i] = exp((double)r.logit[i] - r.logit[0]);
        int keep = 0;
        while (keep < r.n && sum < top_p * total) sum += weight[keep++];
        keep = keep > min_keep ? keep : min_keep;
        r.n = keep < 1 ? 1 : keep < r.n ? keep : r.n;
    }
    if (min_p > 0) {
        const float least = r.logit[0] + logf(min_p);
        int keep = 0;
        while (keep < r.n && (r.logit[keep] >= least || keep < min_keep)) keep++;
        r.n = keep;
    }
    total = sum = 0;
    for (int i = 0; i < r.n; i++) total += weight[i] = exp(((double)r.logit[i] - r.logit[0]) / temp);
    for (int i = 0; i < r.n; i++)
        if ((sum += weight[i]) > u * total) return r.id[i];
    return r.id[0];                     // rounding put the point behind the end
}
