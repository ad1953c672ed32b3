// Text to token ids: a table of texts, and the merging of adjacent symbols that SentencePiece's BPE and byte-level BPE share.
//
// A word starts as one symbol per character (or byte). The best pair of neighbours is merged until no pair is left to merge:
// the best is the one whose token has the highest score (SPM), or whose merge has the lowest rank (BPE), and among equals
// the leftmost. A heap holds the candidates; those whose symbols have changed since are dropped when they come up.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "api.h"

// ---- a table of texts ------------------------------------------------------------------------------------------------------
typedef struct { uint32_t hash; int32_t id; uint32_t start, size; } table_slot;      // id -1: free; text at bytes[start]

struct pyg_table {
    char       *bytes;                  // the texts, one after another
    int64_t    *start;                  // n + 1 of them
    int32_t     n, room;                // texts held, texts there is room for
    int64_t     bytes_room;
    table_slot *slots;
    uint32_t    mask;                   // slots - 1; at least a third of the slots is free
};

static uint32_t hash_text(const char *text, int64_t n) {
    const uint64_t k = 0x9E3779B97F4A7C15ull;
    uint64_t h = (uint64_t)n * k, word;
    for (; n >= 8; n -= 8, text += 8) {
        memcpy(&word, text, 8);
        h = (h ^ word) * k;
        h ^= h >> 29;
    }
    if (n) {
        word = 0;
        memcpy(&word, text, n);
        h = (h ^ word) * k;
    }
    return (uint32_t)(h >> 32) ^ (uint32_t)(h >> 15);
}

static table_slot *find_slot(const pyg_table *t, const char *text, int64_t n, uint32_t hash) {
    for (uint32_t i = hash & t->mask;; i = (i + 1) & t->mask) {
        table_slot *s = &t->slots[i];
        if (s->id < 0) return s;
        if (s->hash == hash && s->size == n && !memcmp(t->bytes + s->start, text, n)) return s;
    }
}

int32_t pyg_table_find(const pyg_table *t, const char *text, int64_t n) { return find_slot(t, text, n, hash_text(text, n))->id; }

// Enter text `id`, which the table holds: the id of an equal text that came before it, or -1.
static int32_t enter(pyg_table *t, int32_t id) {
    int64_t start = t->start[id], n = t->start[id + 1] - start;
    if (!n) return -1;
    uint32_t hash = hash_text(t->bytes + start, n);
    table_slot *s = find_slot(t, t->bytes + start, n, hash);
    if (s->id >= 0) return s->id;
    *s = (table_slot){hash, id, (uint32_t)start, (uint32_t)n};
    return -1;
}

static int resize_slots(pyg_table *t, int64_t texts) {
    uint64_t size = 16;
    while (2 * size < 3 * (uint64_t)texts) size *= 2;
    table_slot *slots = malloc(size * sizeof *slots);
    if (!slots) return 0;
    memset(slots, -1, size * sizeof *slots);
    free(t->slots);
    t->slots = slots;
    t->mask = (uint32_t)(size - 1);
    for (int32_t id = 0; id < t->n; id++) enter(t, id);
    return 1;
}

// Append a text that is not in the table: its id, or -1 without memory.
static int32_t add_text(pyg_table *t, const char *text, int64_t n) {
    int64_t end = t->start[t->n];
    if (end + n > t->bytes_room) {
        char *grown = realloc(t->bytes, 2 * (end + n));
        if (!grown) return -1;
        t->bytes = grown;
        t->bytes_room = 2 * (end + n);
    }
    if (t->n == t->room) {
        int64_t *grown = realloc(t->start, (2 * (size_t)t->room + 2) * sizeof *grown);
        if (!grown) return -1;
        t->start = grown;
        t->room = 2 * t->room + 1;
    }
    memcpy(t->bytes + end, text, n);
    t->start[t->n + 1] = end + n;
    int32_t id = t->n++;
    if (3 * (uint64_t)t->n > 2 * ((uint64_t)t->mask + 1)) return resize_slots(t, 2 * (int64_t)t->n) ? id : -1;
    enter(t, id);
    return id;
}

static int32_t find_or_add(pyg_table *t, const char *text, int64_t n, uint32_t hash) {
    int32_t id = find_slot(t, text, n, hash)->id;
    return id >= 0 ? id : add_text(t, text, n);
}

// GPT-2's byte alphabet: printable bytes are their own character, the others are the characters from U+0100 on, in order.
static int shown_byte(int b) { return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; }

static void byte_alphabet(uint8_t of_char[0x200], uint8_t known[0x200]) {
    memset(known, 0, 0x200);
    for (int b = 0, next = 0x100; b < 256; b++) {
        int c = shown_byte(b) ? b : next++;
        of_char[c] = (uint8_t)b;
        known[c] = 1;
    }
}

// The bytes that a text in that alphabet stands for: their number, or -1 when a character is not of the alphabet.
static int64_t from_alphabet(const uint8_t *of_char, const uint8_t *known, const char *text, int64_t n, char *out) {
    int64_t m = 0;
    for (int64_t i = 0; i < n; m++) {
        unsigned c = (uint8_t)text[i++];
        if (c >= 0x80) {
            if (c < 0xC2 || c > 0xC7 || i == n) return -1;
            c = (c & 0x1F) << 6 | ((uint8_t)text[i++] & 0x3F);
        }
        if (c >= 0x200 || !known[c]) return -1;
        out[m] = (char)of_char[c];
    }
    return m;
}

pyg_table *pyg_table_new(const char *bytes, const int64_t *offsets, int64_t prefix, int32_t n, int byte_level, int32_t *duplicate) {
    pyg_table *t = calloc(1, sizeof *t);
    *duplicate = -1;
    if (!t) return NULL;
    t->room = n;
    t->bytes_room = offsets[n] - offsets[0] + 1;
    t->bytes = malloc(t->bytes_room);
    t->start = malloc(((size_t)n + 1) * sizeof *t->start);
    if (!t->bytes || !t->start || !resize_slots(t, n)) { pyg_table_free(t); return NULL; }
    uint8_t of_char[0x200], known[0x200];
    byte_alphabet(of_char, known);
    t->start[0] = 0;
    for (int32_t id = 0; id < n; id++) {
        const char *text = bytes + offsets[id] + prefix;
        int64_t size = offsets[id + 1] - offsets[id] - prefix;
        char *to = t->bytes + t->start[id];
        if (byte_level) {
            size = from_alphabet(of_char, known, text, size, to);
            if (size < 0) size = 0;             // no text can be spelled so: the token is found by its own name only
        } else {
            memcpy(to, text, size);
        }
        t->start[id + 1] = t->start[id] + size;
        t->n = id + 1;
        if (enter(t, id) >= 0 && *duplicate < 0) *duplicate = id;
    }
    return t;
}

void pyg_table_free(pyg_table *t) {
    if (!t) return;
    free(t->bytes);
    free(t->start);
    free(t->slots);
    free(t);
}

// ---- what merges with what --------------------------------------------------------------------------------------------------
typedef struct { int32_t left, right, rank, result; } pair;          // left -1: free

struct pyg_merger {
    const pyg_table *table;             // texts of symbols; those from n_vocab on are no tokens but occur in merges
    int32_t   n_vocab;
    int       by_char, whole_words;
    int32_t   fallback[256];            // token of a byte that no token covers, or -1: nothing
    uint32_t *order;                    // SPM: per token, smaller is better
    uint8_t   joins[256];               // SPM: some token holds this byte followed by U+2581
    pair     *pairs;                    // BPE: hash table
    uint32_t  mask;
};

static uint32_t hash_pair(int32_t left, int32_t right) {
    uint64_t h = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15ull;
    return (uint32_t)(h >> 32) ^ (uint32_t)(h >> 12);
}

static pair *find_pair(const pyg_merger *m, int32_t left, int32_t right) {
    for (uint32_t i = hash_pair(left, right) & m->mask;; i = (i + 1) & m->mask) {
        pair *p = &m->pairs[i];
        if (p->left < 0 || (p->left == left && p->right == right)) return p;
    }
}

static const char LOWER_BLOCK[] = "\xE2\x96\x81";                   // U+2581, SentencePiece's space

static pyg_merger *new_merger(const pyg_table *table, int32_t n_vocab, const int32_t *fallback) {
    pyg_merger *m = calloc(1, sizeof *m);
    if (!m) return NULL;
    m->table = table;
    m->n_vocab = n_vocab;
    memcpy(m->fallback, fallback, sizeof m->fallback);
    return m;
}

pyg_merger *pyg_merger_spm(const pyg_table *table, const float *scores, const int32_t *fallback) {
    pyg_merger *m = new_merger(table, table->n, fallback);
    if (!m || !(m->order = malloc((size_t)table->n * sizeof *m->order))) { pyg_merger_free(m); return NULL; }
    m->by_char = 1;
    for (int32_t id = 0; id < table->n; id++) {
        float score = scores[id] + 0.0f;        // -0 and 0 are equal
        uint32_t bits;
        memcpy(&bits, &score, 4);
        m->order[id] = bits >> 31 ? bits : ~(bits | 0x80000000u);
    }
    for (int64_t i = 0; i + 3 < table->start[table->n]; i++)        // over text borders too: that only joins more
        if (!memcmp(table->bytes + i + 1, LOWER_BLOCK, 3)) m->joins[(uint8_t)table->bytes[i]] = 1;
    return m;
}

// The two texts of a merge, and their joined text: hashed first and looked up later, so that the memory is on its way.
typedef struct { const char *text; int64_t left, right; uint32_t hash[3]; } spelled_merge;
enum { AHEAD = 16 };

static spelled_merge spell_merge(const pyg_table *t, const char *merge, int64_t n, const uint8_t *of_char, const uint8_t *known, char *to) {
    spelled_merge m = {.text = to};
    const char *space = n > 2 ? memchr(merge + 1, ' ', n - 1) : NULL;
    if (!space) return m;
    m.left = space - merge;
    m.right = n - m.left - 1;
    if (of_char) {
        m.left = from_alphabet(of_char, known, merge, m.left, to);
        m.right = m.left < 0 ? -1 : from_alphabet(of_char, known, space + 1, m.right, to + m.left);
    } else {
        memcpy(to, merge, m.left);
        memcpy(to + m.left, space + 1, m.right);
    }
    if (m.left <= 0 || m.right <= 0) { m.left = 0; return m; }
    m.hash[0] = hash_text(to, m.left);
    m.hash[1] = hash_text(to + m.left, m.right);
    m.hash[2] = hash_text(to, m.left + m.right);
    for (int i = 0; i < 3; i++) __builtin_prefetch(&t->slots[m.hash[i] & t->mask]);
    return m;
}

pyg_merger *pyg_merger_bpe(pyg_table *table, const char *bytes, const int64_t *offsets, int64_t prefix, int32_t n, int byte_level,
                           int whole_words, const int32_t *fallback) {
    pyg_merger *m = new_merger(table, table->n, fallback);
    uint64_t size = 16;
    while (2 * size < 3 * (uint64_t)n) size *= 2;
    int64_t longest = 1;
    for (int32_t i = 0; i < n; i++)
        if (offsets[i + 1] - offsets[i] > longest) longest = offsets[i + 1] - offsets[i];
    char *text = malloc(AHEAD * longest);
    if (!m || !text || !(m->pairs = malloc(size * sizeof *m->pairs))) goto no_memory;
    memset(m->pairs, -1, size * sizeof *m->pairs);
    m->mask = (uint32_t)(size - 1);
    m->by_char = !byte_level;
    m->whole_words = whole_words;
    uint8_t of_char[0x200], known[0x200];
    byte_alphabet(of_char, known);
    for (int32_t first = 0; first < n; first += AHEAD) {
        int32_t here = n - first < AHEAD ? n - first : AHEAD;
        spelled_merge spelled[AHEAD];
        pair found[AHEAD];
        for (int32_t i = 0; i < here; i++) {
            int64_t at = offsets[first + i] + prefix, size = offsets[first + i + 1] - at;
            spelled[i] = spell_merge(table, bytes + at, size, byte_level ? of_char : NULL, known, text + i * longest);
        }
        for (int32_t i = 0; i < here; i++) {
            const spelled_merge *s = &spelled[i];
            found[i].left = -1;
            if (!s->left) continue;             // spells no text
            found[i] = (pair){find_or_add(table, s->text, s->left, s->hash[0]), find_or_add(table, s->text + s->left, s->right, s->hash[1]),
                              first + i, find_or_add(table, s->text, s->left + s->right, s->hash[2])};
            if (found[i].left < 0 || found[i].right < 0 || found[i].result < 0) goto no_memory;
            __builtin_prefetch(&m->pairs[hash_pair(found[i].left, found[i].right) & m->mask], 1);
        }
        for (int32_t i = 0; i < here; i++) {
            if (found[i].left < 0) continue;
            pair *p = find_pair(m, found[i].left, found[i].right);
            if (p->left < 0) *p = found[i];
        }
    }
    free(text);
    return m;
no_memory:
    free(text);
    pyg_merger_free(m);
    return NULL;
}

void pyg_merger_free(pyg_merger *m) {
    if (!m) return;
    free(m->order);
    free(m->pairs);
    free(m);
}

// ---- merging one word -------------------------------------------------------------------------------------------------------
typedef struct { int32_t prev, next, start, size, id; } symbol;      // size 0: merged into its left neighbour; id -1: no text of the table
typedef struct { uint64_t key; int32_t right, size, result; } candidate;   // key: how good it is, then the left symbol; smaller first

typedef struct {
    const pyg_merger *merger;
    const char *text;                   // of the word
    symbol     *symbols;
    candidate  *heap;
    int32_t     n_heap, room;           // room: symbols that fit; the heap holds three times as many
} workspace;

static void push(workspace *w, candidate c) {
    int32_t i = w->n_heap++;
    for (int32_t up; i && w->heap[up = (i - 1) / 2].key > c.key; i = up) w->heap[i] = w->heap[up];
    w->heap[i] = c;
}

static candidate pop(workspace *w) {
    candidate top = w->heap[0], last = w->heap[--w->n_heap];
    int32_t i = 0;
    for (int32_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && w->heap[child + 1].key < w->heap[child].key) child++;
        if (w->heap[child].key >= last.key) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = last;
    return top;
}

static void consider(workspace *w, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const pyg_merger *m = w->merger;
    const symbol *a = &w->symbols[left], *b = &w->symbols[right];
    uint64_t better;
    int32_t result;
    if (m->order) {
        result = pyg_table_find(m->table, w->text + a->start, a->size + b->size);
        if (result < 0) return;
        better = m->order[result];
    } else {
        if (a->id < 0 || b->id < 0) return;
        const pair *p = find_pair(m, a->id, b->id);
        if (p->left < 0) return;
        result = p->result;
        better = (uint32_t)p->rank;
    }
    push(w, (candidate){better << 32 | (uint32_t)left, right, a->size + b->size, result});
}

// Bytes of the character at the start of n > 0 bytes: fewer than its first byte promises where it is cut short.
static int32_t char_size(const char *text, int64_t n) {
    uint8_t lead = (uint8_t)text[0];
    int32_t promised = lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4, size = 1;
    while (size < promised && size < n && ((uint8_t)text[size] & 0xC0) == 0x80) size++;
    return size;
}

static int reserve(workspace *w, int32_t symbols) {
    if (symbols <= w->room) return 1;
    free(w->symbols);
    free(w->heap);
    w->room = symbols + symbols / 2 + 64;
    w->symbols = malloc((size_t)w->room * sizeof *w->symbols);
    w->heap = malloc((size_t)w->room * 3 * sizeof *w->heap);
    return w->symbols && w->heap;
}

static int all_newlines(const char *text, int32_t n) {
    while (n && text[n - 1] == '\n') n--;
    return !n;
}

// The ids of one word of n bytes: how many were written (at most n), or -1 without memory.
static int32_t merge_word(workspace *w, const char *text, int32_t n, int32_t *ids) {
    const pyg_merger *m = w->merger;
    if (m->whole_words == WHOLE_ALWAYS || (m->whole_words == WHOLE_NEWLINES && all_newlines(text, n))) {
        int32_t id = pyg_table_find(m->table, text, n);
        if (id >= 0 && id < m->n_vocab) { ids[0] = id; return 1; }
    }
    if (!reserve(w, n)) return -1;
    w->text = text;
    w->n_heap = 0;
    int32_t count = 0;
    for (int32_t at = 0; at < n; count++) {
        int32_t size = m->by_char ? char_size(text + at, n - at) : 1;
        w->symbols[count] = (symbol){count - 1, at + size < n ? count + 1 : -1, at, size, pyg_table_find(m->table, text + at, size)};
        at += size;
    }
    for (int32_t i = 1; i < count; i++) consider(w, i - 1, i);
    while (w->n_heap) {
        candidate c = pop(w);
        int32_t i = (int32_t)(uint32_t)c.key;
        symbol *left = &w->symbols[i], *right = &w->symbols[c.right];
        if (!left->size || !right->size || left->size + right->size != c.size) continue;
        left->size = c.size;
        left->id = c.result;
        left->next = right->next;
        right->size = 0;
        if (right->next >= 0) w->symbols[right->next].prev = i;
        consider(w, left->prev, i);
        consider(w, i, left->next);
    }
    int32_t written = 0;
    for (int32_t i = 0; i >= 0; i = w->symbols[i].next) {
        const symbol *s = &w->symbols[i];
        if (s->id >= 0 && s->id < m->n_vocab) { ids[written++] = s->id; continue; }
        for (int32_t j = 0; j < s->size; j++) {
            int32_t id = m->fallback[(uint8_t)text[s->start + j]];
            if (id >= 0) ids[written++] = id;
        }
    }
    return written;
}

// Where the SPM word that starts at `text` ends: before a space that no token joins to what stands before it.
static int64_t spm_word(const pyg_merger *m, const char *text, int64_t n) {
    for (int64_t i = 1; i + 2 < n; i++) {
        const char *at = memchr(text + i, LOWER_BLOCK[0], n - 2 - i);
        if (!at) break;
        i = at - text;
        if (!memcmp(at, LOWER_BLOCK, 3) && !m->joins[(uint8_t)at[-1]]) return i;
    }
    return n;
}

int64_t pyg_merge(const pyg_merger *m, const char *text, int64_t n, const int32_t *words, int64_t n_words, int32_t *ids) {
    workspace w = {.merger = m};
    int64_t written = 0, word = 0;
    for (int64_t at = 0, size; at < n; at += size) {
        if (m->order) {
            size = spm_word(m, text + at, n - at);
        } else {
            int32_t chars = word < n_words ? words[word++] : INT32_MAX;
            for (size = 0; chars && at + size < n; chars--) size += char_size(text + at + size, n - at - size);
        }
        if (!size) continue;
        int32_t more = merge_word(&w, text + at, (int32_t)size, ids + written);
        if (more < 0) { written = -1; break; }
        written += more;
    }
    free(w.symbols);
    free(w.heap);
    return written;
}
