/* What table.c and the policies in C share: records, and the functions of a policy. table.c describes the data structure. */
#ifndef LMCACHE_TABLE_H
#define LMCACHE_TABLE_H

#include "native.h"

#include "hashed.h"

#define MAX_SHARDS 65535
#define MAX_RECORDS UINT32_MAX
#define SEGMENT_BYTES (1u << 20) /* the most bytes of a segment, approximately */
#define SEGMENT_SHIFT 12         /* the most records in a segment, as a power of two */
#define BATCH 64

enum { EMPTY, FILLING, DONE };
enum { COMPLETED = 1, RELEASED = 2 };

enum {
    USED = 1,     /* not on the free list */
    ATTACHED = 2, /* in the index */
    PASSED = 4,   /* LRU: the cursor has passed it */
    QUEUED = 8,   /* LRU: waits in the heap with its present stamp */
    SEEN = 16,    /* in the policy's order, or it or a descendant is in use; set while `survey` runs */
};

typedef struct {
    keyed_t keyed;
    uint32_t parent;
    uint64_t stamp : 56; /* LRU: of the last touch; no two are equal */
    uint64_t flags : 8;
    uint32_t first_child, next_sibling, previous_sibling;
    uint32_t older, newer; /* LRU */
    uint32_t pins;
    uint32_t children;
    uint16_t done, filling; /* shards */
} record_t;

_Static_assert(sizeof(record_t) == 64, "a record is one cache line");

typedef struct {
    uint64_t stamp;
    uint32_t id;
} waiting_t;

typedef struct table table_t;

/* Decides the order of eviction. `Policy` in lmcache/memory/order.py has the same functions and documents them. */
typedef struct {
    void (*inserted)(table_t *t, uint32_t id);
    void (*touched)(table_t *t, const uint8_t *ids, size_t count); /* u32 each, the last one first; detached ones are skipped */
    void (*touched_path)(table_t *t, uint32_t id);                 /* an attached record and its ancestors */
    void (*unblocked)(table_t *t, uint32_t id);
    void (*removed)(table_t *t, uint32_t id);
    int (*victim)(table_t *t, uint32_t *id);      /* NONE when there is none; -1 with an error set */
    int (*order)(table_t *t, uint32_t *ids);      /* those of all attached records; -1 with an error set */
    int (*memory_bytes)(table_t *t, size_t *size); /* beside the records; -1 with an error set */
    /* These are NULL where there is nothing to do. */
    void (*asked)(table_t *t, double now, PyObject *hashes); /* bytes, KEY_BYTES for each chunk of a prompt */
    void (*answered)(table_t *t, double now, PyObject *hash, uint32_t tokens); /* the last chunk of a prompt */
    void (*settled)(table_t *t); /* nobody waits: do now what was put off */
    void (*ended)(table_t *t); /* frees what the policy has allocated */
} policy_t;

struct table {
    PyObject_HEAD
    const policy_t *policy;
    struct learned *learned; /* of the learned policy */
    PyObject *plug; /* the object that `plugged` calls; it must not refer to the table */
    uint32_t shards;
    segments_t segments;
    hashed_t hashed;
    uint32_t next_id, free_head;
    uint32_t attached;
    uint64_t clock; /* LRU: the last stamp given */
    uint32_t oldest, newest, cursor;
    waiting_t *heap;
    size_t heap_count, heap_room;
};

/* lru.c and plugged.c. Those of learned.c are in learned.h. */
extern const policy_t lmcache_lru, lmcache_plugged;

/* Access to little-endian u32 in Python bytes objects. */

static inline uint32_t read_u32(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static inline void write_u32(uint8_t *to, uint32_t value)
{
    to[0] = (uint8_t)value;
    to[1] = (uint8_t)(value >> 8);
    to[2] = (uint8_t)(value >> 16);
    to[3] = (uint8_t)(value >> 24);
}

/* Records */

static inline size_t segment_records(const table_t *t)
{
    return (size_t)1 << t->segments.shift;
}

static inline record_t *at(const table_t *t, uint32_t id)
{
    return (record_t *)t->segments.all[id >> t->segments.shift] + (id & (segment_records(t) - 1));
}

/* Returns the attached record with this key, or NONE. */
static inline uint32_t find(const table_t *t, const uint8_t *key)
{
    return find_from(&t->segments, sizeof(record_t), *bucket_of(&t->hashed, key), key);
}

/* Evictability */

static inline int is_idle(const record_t *r)
{
    return r->pins == 0 && r->filling == 0;
}

static inline int is_evictable(const record_t *r)
{
    return (r->flags & ATTACHED) && is_idle(r) && r->children == 0;
}

#endif
