// Rows of one type to floats and back. The ISA's codecs take any number of blocks at once; here most get strips of them, so that what a strip
// reads and leaves is still in the first cache: lines are asked for ahead, floats are looked at where they just were, and large results leave
// past the caches.
#include "engine.h"

// floats: whole blocks of every type, whose bytes are a line at least and no more than the floats'; bytes to read ahead of a strip
enum { STRIP = 512, AHEAD = 2048 };

// Asks for `bytes` to be read or, with 1, to be written.
#define FETCH(from, bytes, write) \
    for (int64_t fetched = 0; fetched < (int64_t)(bytes); fetched += LINE) __builtin_prefetch((const char *)(from) + fetched, write)

// ---- results that leave past the caches --------------------------------------------------------------------------------------------

// Strips are made behind the first line of `room`, aligned as vectors like it, and go to `to` in whole lines of memory, which is not read before
// it is written so; bytes that do not fill a line wait before the next strip.
typedef struct {
    char *to;
    int64_t before, waiting;    // bytes to the first line's start, until they are written; bytes before the strip
    _Alignas(LINE) char room[LINE + STRIP * sizeof(float)];
} outlet;

static void outlet_open(outlet *o, void *dst) {
    o->to = dst;
    o->before = -(uintptr_t)dst % LINE;
    o->waiting = 0;
}
static char *outlet_strip(outlet *o) { return o->room + LINE; }
static void outlet_pass(outlet *o, int64_t bytes) {
    char *strip = outlet_strip(o);
    const char *from = strip - o->waiting, *end = strip + bytes;
    memcpy(o->to, from, o->before);
    o->to += o->before, from += o->before, o->before = 0;
    int64_t whole = (end - from) / LINE * LINE;
    kernels->stream(whole, from, o->to);
    o->to += whole, o->waiting = end - from - whole;
    memmove(strip - o->waiting, end - o->waiting, o->waiting);
}
static void outlet_close(outlet *o) {
    memcpy(o->to, outlet_strip(o) - o->waiting, o->waiting);
#if defined __x86_64__
    __builtin_ia32_sfence();    // such stores keep no order with the one that tells another thread of them
#endif
}

int pyg_streams_stores(void) { return stream_stores; }

// ---- decoding ----------------------------------------------------------------------------------------------------------------------

int pyg_dequantize(int type, int64_t n, const void *src, float *dst, int stream) {
    if (!kernels->dequantize[type]) return 1;
    stream &= n >= STRIP;
    if (!fetch_stores && !stream) {
        kernels->dequantize[type](n, src, dst);
        return 0;
    }
    const int64_t bytes = kernels->row_bytes(type, STRIP);
    const char *from = src;
    outlet o;
    outlet_open(&o, dst);
    for (; n > 0; n -= STRIP, from += bytes, dst += STRIP) {
        const int64_t strip = n < STRIP ? n : STRIP;
        if (stream) {
            FETCH(from + AHEAD, bytes, 0);
            kernels->dequantize[type](strip, from, (float *)outlet_strip(&o));
            outlet_pass(&o, strip * sizeof *dst);
        } else {
            if (n > 3 * STRIP) FETCH(dst + 2 * STRIP, STRIP * sizeof *dst, 1);
            kernels->dequantize[type](strip, from, dst);
        }
    }
    if (stream) outlet_close(&o);
    return 0;
}

// ---- encoding ----------------------------------------------------------------------------------------------------------------------

// Floats that are looked at and then encoded stay in a core's cache between the two. LANES of them, from whole rows, fill every lane of every
// encoder and lie in the first cache; where it takes more than PIECE to make whole rows of that, a piece has so many.
enum { LANES = 1 << 12, PIECE = 1 << 16 };
static int64_t rows_of_a_piece(int64_t n_per_row) {
    int64_t power = n_per_row & -n_per_row, rows = power < LANES ? LANES / power : 1;      // the fewest whose floats are a multiple of LANES
    return rows * n_per_row <= PIECE ? rows : PIECE > n_per_row ? PIECE / n_per_row : 1;
}

// Blocks that a formula makes know nothing of rows, and can be made of any floats: those are looked at when they have just come.
static int quantize_strips(int type, int64_t n, const float *src, char *dst, int checked, int stream) {
    stream &= n >= STRIP;
    if (!fetch_stores && !checked && !stream) {
        kernels->quantize[type](n, src, dst, NULL);
        return 0;
    }
    const int64_t bytes = kernels->row_bytes(type, STRIP);
    outlet o;
    outlet_open(&o, dst);
    for (; n > 0; n -= STRIP, src += STRIP, dst += bytes) {
        const int64_t strip = n < STRIP ? n : STRIP;
        void *to = stream ? outlet_strip(&o) : dst;
        if (stream) FETCH((const char *)src + AHEAD, STRIP * sizeof *src, 0);
        else if (fetch_stores && n >= 2 * STRIP) FETCH(dst + bytes, bytes, 1);
        if (checked && kernels->quantize_finite[type]) {
            if (!kernels->quantize_finite[type](strip, src, to)) return 2;
        } else {
            kernels->quantize[type](strip, src, to, NULL);
            if (checked && !kernels->finite(strip, src)) return 2;
        }
        if (stream) outlet_pass(&o, kernels->row_bytes(type, strip));
    }
    if (stream) outlet_close(&o);
    return 0;
}

// 0; 1: no such encoder, 2: a weight is not finite, 3: no memory for a codebook
int pyg_quantize(int type, int64_t n_rows, int64_t n_per_row, const float *src, void *dst, const float *importance, int search, int checked,
                 int stream) {
    if (!kernels->quantize[type]) return 1;
    int formula = !kernels->encode[type] || (kernels->formula[type] && !search && !importance);
    if (formula) return quantize_strips(type, n_rows * n_per_row, src, dst, checked, stream);
    int64_t row_bytes = kernels->row_bytes(type, n_per_row), step = rows_of_a_piece(n_per_row);
    for (int64_t done = 0; done < n_rows; done += step) {
        int64_t rows = n_rows - done < step ? n_rows - done : step;
        const float *x = src + done * n_per_row;
        char *to = (char *)dst + done * row_bytes;
        if (checked && !kernels->finite(rows * n_per_row, x)) return 2;
        if (kernels->encode[type](rows, n_per_row, x, to, importance, search)) return 3;
    }
    return 0;
}
