// What this processor does at best, for a roofline: dot products of bytes, fused multiply-adds, reading. Operands are what a matmul
// has: weights in registers, activations broadcast from the first-level cache.
enum { PEAK_SUMS = VREGS == 32 ? 16 : 8, PEAK_ROUNDS = 2048, PEAK_WORDS = 256 };

// What is computed is wanted: a copy, for what an assembler may look at in memory would be kept there all along.
#define PEAK_USE(sums)                                         \
    UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) {           \
        const __typeof__(sums[0]) last = sums[i];              \
        __asm__ volatile("" : : "m"(last));                    \
    }

static void peak_int8(const char *x) {               // weights of four bits, of which AVX2 has sums of eight products in 16 bits
    enum { STEPS = 8 };
    vi sum[PEAK_SUMS] = {{0}}, part[PEAK_SUMS];
    for (int r = 0; r < PEAK_ROUNDS / STEPS; r++) {
        const char *y = x + 4 * PEAK_SUMS * (r % (PEAK_WORDS / PEAK_SUMS));
        const vi w = vi_load(y) & 0x0f0f0f0f;
        UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) part[i] = mac_open(sum[i]);
        UNROLL(8) for (int t = 0; t < STEPS; t++)              // other bytes each time: equal products would be made once
            UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) part[i] = mac(part[i], w, vi_set4(y + 4 * (t * PEAK_SUMS + i)));
        UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) sum[i] = mac_close(sum[i], part[i], PAIR_OF_ONES);
    }
    PEAK_USE(sum)
}
static void peak_float(const char *x) {
    vf sum[PEAK_SUMS] = {{0}};
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        const char *y = x + 4 * PEAK_SUMS * (r % (PEAK_WORDS / PEAK_SUMS));
        const vf w = vf_load(y);
        UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) sum[i] = vf_fma(w, vf_set(((const float *)y)[i]), sum[i]);
    }
    PEAK_USE(sum)
}
// Four streams at once, as fetch_ahead has them; each begins at another place of its page, or all would end their pages together, where
// a core's own prefetch stops (measured on Sapphire Rapids: 34.1 instead of 31.8 GB/s). Returns how many bytes were read.
static int64_t peak_read(const char *x, int64_t bytes) {
    enum { PEAK_STREAMS = 4, SKEW = 17 };
    vi sum[PEAK_SUMS] = {{0}};
    const int64_t part = (bytes / LINE / PEAK_STREAMS - SKEW) * LINE;
    for (int64_t at = 0; at < part; at += LINE)
        EACH(stream, PEAK_STREAMS) {
            const char *line = x + stream * part + at;
            if (fetch_streams) __builtin_prefetch(line + AHEAD_BYTES);
            UNROLL(16) for (int i = 0; i < LINE / (4 * VL); i++) sum[stream] ^= vi_load(line + 4 * VL * i);
        }
    PEAK_USE(sum)
    return PEAK_STREAMS * part;
}

static void peak_pairs(const char *x) {
    vf sum[PEAK_SUMS] = {{0}};
    for (int r = 0; r < PEAK_ROUNDS; r++) {
        const char *y = x + 4 * PEAK_SUMS * (r % (PEAK_WORDS / PEAK_SUMS));
        const vf w = vf_load(y);
        UNROLL(16) for (int i = 0; i < PEAK_SUMS; i++) sum[i] = vf_dot_bf16(sum[i], w, vf_set(((const float *)y)[i]));
    }
    PEAK_USE(sum)
}
static void peak_matrix(char *memory) {            // all squares in the first-level cache
    const char *a[2] = {memory, memory + 4 * MATRIX_SQUARE}, *b[2] = {memory + 8 * MATRIX_SQUARE, memory + 12 * MATRIX_SQUARE};
    const matrix_sums sums = squares_at((float *)(memory + 16 * MATRIX_SQUARE));
    matrix_shape before;
    matrix_begin(&before);
    for (int i = 0; i < PEAK_ROUNDS / 4; i++) matrix_block(1, a, b, 4, NULL, &sums);
    matrix_end(&before);
}

// dst: what each chunk did, multiplications or bytes. src: chunks of bytes.
static void op_peak(worker *w, const pyg_step *s) {
    const pyg_view *dst = view_of(w, s->dst), *src = view_of(w, s->src[0]);
    for (int64_t chunk; (chunk = claim(w, dst->ne[0])) < dst->ne[0];) {
        float *done = (float *)dst->data + chunk;
        const char *x = row_at(src, chunk, 0, 0);
        switch (s->i[0]) {
        case PEAK_INT8: peak_int8(src->data); *done = (float)PEAK_ROUNDS * PEAK_SUMS * VL * 4; break;
        case PEAK_FLOAT: peak_float(src->data); *done = (float)PEAK_ROUNDS * PEAK_SUMS * VL; break;
        case PEAK_BF16:                              // nothing is done where floats are no slower
            *done = 0;
            if (MATRIX_UNIT) peak_matrix(w->scratch), *done = (float)PEAK_ROUNDS * 4 * MATRIX_SIDE * MATRIX_SIDE * MATRIX_DEPTH;
            else if (FAST_PAIRS) peak_pairs(src->data), *done = (float)PEAK_ROUNDS * PEAK_SUMS * VL * 2;
            break;
        case PEAK_READ: *done = (float)peak_read(x, src->ne[0]); break;
        }
    }
}
static int64_t scratch_peak(const pyg_plan *plan, const pyg_step *s) { (void)plan, (void)s; return 20 * MATRIX_SQUARE; }
