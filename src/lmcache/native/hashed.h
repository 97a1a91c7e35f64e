/* A hash table of items of one size that begin with a `keyed_t`, as table.c and notes.c have them.
 *
 * Items lie in segments that never move, so a table grows without a pause. The hash table is a linear one (Litwin 1980): buckets
 * are heads of chains through the items, and while there are fewer than two buckets an item, each new item splits the next two. It
 * is never rebuilt. Clients choose the keys, so a secret is mixed into the number of the bucket.
 *
 * `bytes` is the size of an item. It is an argument, and not a field, so that compilers know it.
 */
#ifndef LMCACHE_HASHED_H
#define LMCACHE_HASHED_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX /* no item */
#define KEY_BYTES 16
#define PIECE_SHIFT 12 /* the buckets in one piece of their array, as a power of two */
#define BUCKETS_AN_ITEM 2

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif

typedef struct {
    uint8_t key[KEY_BYTES];
    uint32_t next; /* in the chain of the bucket, or on the list of free items */
} keyed_t;

typedef struct {
    uint8_t **all;
    size_t count, room;
    uint32_t shift; /* the items in a segment, as a power of two */
} segments_t;

typedef struct {
    uint64_t seed[2];
    uint32_t **pieces; /* of the array of buckets */
    size_t piece_count, piece_room;
    uint64_t buckets, low_mask; /* low_mask + 1 <= buckets < 2 * (low_mask + 1) */
} hashed_t;

/* Makes room for one more pointer in a growing array of pointers. Returns -1 without memory, like all functions here. */
static inline int reserve_pointer(void **array, size_t count, size_t *room)
{
    if (count < *room)
        return 0;
    size_t wanted = *room ? 2 * *room : 16;
    void *grown = realloc(*array, wanted * sizeof(void *));
    if (!grown)
        return -1;
    *array = grown;
    *room = wanted;
    return 0;
}

/* Adds a segment of so many bytes, a multiple of 64, which is not initialised. */
static inline int add_segment(segments_t *segments, size_t bytes)
{
    uint8_t *made = NULL;
    if (reserve_pointer((void **)&segments->all, segments->count, &segments->room) == 0)
        made = aligned_alloc(64, bytes);
    if (!made)
        return -1;
    segments->all[segments->count++] = made;
    return 0;
}

static inline void free_segments(segments_t *segments)
{
    for (size_t i = 0; i < segments->count; i++)
        free(segments->all[i]);
    free(segments->all);
}

static inline void *item_at(const segments_t *segments, size_t bytes, uint32_t id)
{
    return segments->all[id >> segments->shift] + (id & (((size_t)1 << segments->shift) - 1)) * bytes;
}

static inline uint64_t mix(const hashed_t *h, const uint8_t *key)
{
    uint64_t a, b;
    memcpy(&a, key, 8);
    memcpy(&b, key + 8, 8);
    a ^= h->seed[0];
    b ^= h->seed[1];
#if defined(__SIZEOF_INT128__)
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
#else
    a *= 0x9e3779b97f4a7c15u;
    a ^= a >> 32;
    a = (a + b) * 0xd6e8feb86659fd93u;
    return a ^ a >> 32;
#endif
}

static inline uint32_t *bucket_at(const hashed_t *h, uint64_t bucket)
{
    return &h->pieces[bucket >> PIECE_SHIFT][bucket & ((1u << PIECE_SHIFT) - 1)];
}

static inline uint32_t *bucket_of(const hashed_t *h, const uint8_t *key)
{
    uint64_t hash = mix(h, key), bucket = hash & (2 * h->low_mask + 1);
    return bucket_at(h, bucket < h->buckets ? bucket : hash & h->low_mask);
}

/* Returns the item with this key in the chain that begins with `id`, or NONE. */
static inline uint32_t find_from(const segments_t *segments, size_t bytes, uint32_t id, const uint8_t *key)
{
    while (id != NONE) {
        const keyed_t *item = item_at(segments, bytes, id);
        if (memcmp(item->key, key, KEY_BYTES) == 0)
            break;
        id = item->next;
    }
    return id;
}

static inline int add_piece(hashed_t *h)
{
    if (reserve_pointer((void **)&h->pieces, h->piece_count, &h->piece_room) < 0)
        return -1;
    uint32_t *piece = malloc(sizeof(uint32_t) << PIECE_SHIFT);
    if (!piece)
        return -1;
    memset(piece, 0xff, sizeof(uint32_t) << PIECE_SHIFT);
    h->pieces[h->piece_count++] = piece;
    return 0;
}

/* Begins a hash table, of which only the seed is set. */
static inline int begin_hashed(hashed_t *h)
{
    h->buckets = 1u << PIECE_SHIFT;
    h->low_mask = h->buckets - 1;
    return add_piece(h);
}

/* Adds one bucket, which takes part of the chain of the bucket to split next. Without memory the chains only get longer. */
static inline void split_bucket(hashed_t *h, const segments_t *segments, size_t bytes)
{
    uint64_t made = h->buckets, bit = h->low_mask + 1;
    if (made >> PIECE_SHIFT == h->piece_count && add_piece(h) < 0)
        return;
    uint32_t *low = bucket_at(h, made & h->low_mask), *high = bucket_at(h, made), id = *low;
    h->buckets++;
    if (h->buckets == 2 * bit)
        h->low_mask = 2 * h->low_mask + 1;
    *low = NONE;
    while (id != NONE) {
        keyed_t *item = item_at(segments, bytes, id);
        uint32_t *head = mix(h, item->key) & bit ? high : low, next = item->next;
        item->next = *head;
        *head = id;
        id = next;
    }
}

/* Adds an item, whose key is set and not in the table. items: how many there are then. */
static inline void add_hashed(hashed_t *h, const segments_t *segments, size_t bytes, uint32_t id, uint64_t items)
{
    for (int i = 0; i < BUCKETS_AN_ITEM && h->buckets < BUCKETS_AN_ITEM * items; i++)
        split_bucket(h, segments, bytes);
    keyed_t *item = item_at(segments, bytes, id);
    uint32_t *bucket = bucket_of(h, item->key);
    item->next = *bucket;
    *bucket = id;
}

static inline void remove_hashed(const hashed_t *h, const segments_t *segments, size_t bytes, uint32_t id)
{
    const keyed_t *item = item_at(segments, bytes, id);
    uint32_t *link = bucket_of(h, item->key);
    while (*link != id)
        link = &((keyed_t *)item_at(segments, bytes, *link))->next;
    *link = item->next;
}

static inline void free_hashed(hashed_t *h)
{
    for (size_t i = 0; i < h->piece_count; i++)
        free(h->pieces[i]);
    free(h->pieces);
}

static inline size_t hashed_memory(const hashed_t *h)
{
    return h->piece_count * (sizeof(uint32_t) << PIECE_SHIFT) + h->piece_room * sizeof(void *);
}

#endif
