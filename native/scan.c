// Walking the length-prefixed strings of a GGUF string array: the one part of reading metadata whose cost grows with the vocabulary.
#include <string.h>
#include "api.h"

static uint64_t length_at(const uint8_t *p, int wide, int swap) {
    if (wide) {
        uint64_t n;
        memcpy(&n, p, 8);
        return swap ? __builtin_bswap64(n) : n;
    }
    uint32_t n;
    memcpy(&n, p, 4);
    return swap ? __builtin_bswap32(n) : n;
}

int64_t pyg_scan_strings(const uint8_t *data, int64_t pos, int64_t end, int64_t count, int wide, int swap, int64_t limit, int64_t *starts) {
    const int64_t prefix = wide ? 8 : 4;
    for (int64_t i = 0; i < count; i++) {
        if (end - pos < prefix) return -pos - 1;
        uint64_t n = length_at(data + pos, wide, swap);
        if (n > (uint64_t)limit || n > (uint64_t)(end - pos - prefix)) return -pos - 1;
        if (starts) starts[i] = pos;
        pos += prefix + (int64_t)n;
    }
    if (starts) starts[count] = pos;
    return pos;
}
