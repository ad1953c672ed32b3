// XXH64, the 64-bit hash of the xxHash family (its specification: github.com/Cyan4973/xxHash, doc/xxhash_spec.md), fed piece by piece.
#include <string.h>
#include "api.h"

static const uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9, P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
enum { STRIPE = 32 };

static uint64_t rotate(uint64_t x, int n) { return x << n | x >> (64 - n); }
static uint64_t lane(uint64_t v, uint64_t word) { return rotate(v + word * P2, 31) * P1; }
static uint64_t word64(const uint8_t *p) { uint64_t x; memcpy(&x, p, 8); return x; }
static uint32_t word32(const uint8_t *p) { uint32_t x; memcpy(&x, p, 4); return x; }

void pyg_xxh64_start(pyg_xxh64 *h, uint64_t seed) {
    memset(h, 0, sizeof *h);
    h->lanes[0] = seed + P1 + P2;
    h->lanes[1] = seed + P2;
    h->lanes[2] = seed;
    h->lanes[3] = seed - P1;
    h->seed = seed;
}

static void stripe(pyg_xxh64 *h, const uint8_t *p) {
    for (int i = 0; i < 4; i++) h->lanes[i] = lane(h->lanes[i], word64(p + 8 * i));
}

void pyg_xxh64_add(pyg_xxh64 *h, const uint8_t *data, int64_t n) {
    int64_t held = h->total % STRIPE;               // bytes that wait for the rest of their stripe
    h->total += n;
    if (held && held + n >= STRIPE) {
        memcpy(h->rest + held, data, STRIPE - held);
        stripe(h, h->rest);
        data += STRIPE - held;
        n -= STRIPE - held;
        held = 0;
    }
    if (!held) for (; n >= STRIPE; n -= STRIPE, data += STRIPE) stripe(h, data);
    memcpy(h->rest + held, data, n);
}

uint64_t pyg_xxh64_end(const pyg_xxh64 *h) {
    const uint64_t *v = h->lanes;
    uint64_t x = h->seed + P5;
    if (h->total >= STRIPE) {
        x = rotate(v[0], 1) + rotate(v[1], 7) + rotate(v[2], 12) + rotate(v[3], 18);
        for (int i = 0; i < 4; i++) x = (x ^ lane(0, v[i])) * P1 + P4;
    }
    x += h->total;
    const uint8_t *p = h->rest, *end = p + h->total % STRIPE;
    for (; end - p >= 8; p += 8) x = rotate(x ^ lane(0, word64(p)), 27) * P1 + P4;
    for (; end - p >= 4; p += 4) x = rotate(x ^ word32(p) * P1, 23) * P2 + P3;
    for (; p < end; p++) x = rotate(x ^ *p * P5, 11) * P1;
    x = (x ^ x >> 33) * P2;
    x = (x ^ x >> 29) * P3;
    return x ^ x >> 32;
}
