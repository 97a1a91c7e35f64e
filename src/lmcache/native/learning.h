/* What the files of the learned policy share. learned.c explains the terms. */
#ifndef LMCACHE_LEARNING_H
#define LMCACHE_LEARNING_H

#include "habits.h"
#include "table.h"

#define NOTES_SHIFT 12  /* notes and groups in a segment, as a power of two */
#define WAITING 16      /* prompts in the queue */

enum {
    CANDIDATE = 1,
    PASSED_BY = 2, /* no longer remembered once it has left the table */
    IN_LRU = 4,    /* LRU would have it */
};

typedef struct {
    keyed_t keyed;
    uint32_t older, newer; /* by access */
    uint32_t access;       /* number of the last access */
    uint32_t group;
    uint32_t row;       /* in the table, or NONE */
    uint32_t following; /* the note after this one in the last prompt */
    uint32_t candidate_before, candidate_after; /* in its group */
    uint16_t count;     /* of accesses */
    uint8_t flags;
} note_t;

typedef struct {
    double time; /* since when it ages */
    double used; /* when its chunks were used: earlier than `time` if they were left behind */
    uint32_t prompt; /* the number of what made it: larger ones came later */
    uint32_t path;   /* length of the prompt, in chunks */
    uint32_t size, left;   /* chunks at first, and those that have not been used since */
    uint32_t before, after; /* in the list of its age; `after` also of the free list */
    uint32_t child, sibling, back; /* in the heap; `back` is the parent or the sibling before */
    uint32_t candidates;
    uint32_t next_of_prompt, previous_of_prompt;
    uint16_t kind;
    uint8_t turn, age;
} group_t;

typedef struct {
    double now;
    PyObject *hashes;
    int64_t answered; /* tokens of an answer to the prompt that ends with the one hash, or -1 for a new prompt */
} news_t;

typedef struct {
    segments_t segments;
    size_t item, available;
    uint32_t next, free_head;
} pool_t;

/* What LRU would find in as much memory: rival.c explains it. All but the first line is in chunks. */
typedef struct {
    uint32_t edge, held, room; /* the oldest note that LRU would have, how many it would have, and how many fit; NONE if any */
    int filled; /* chunks have been inserted since the last eviction */
    int leads;  /* evict as LRU does */
    uint64_t times; /* that this has begun */
    double recently, asked_recently, in_total, asked_in_total; /* found, less what LRU would have found; and asked for */
    double since; /* asked for since LRU leads */
} rival_t;

typedef struct learned {
    habits_t *habits;
    double now;
    pool_t notes, groups;
    hashed_t hashed; /* the notes */
    uint64_t known;  /* notes */
    uint32_t oldest, newest, cursor;   /* notes by access; the cursor is the oldest one that is not PASSED_BY */
    uint32_t accesses, prompts;
    uint32_t first[AGES], last[AGES];
    uint32_t (*roots)[AGES]; /* of the heaps, by kind and age: the group and 1, so that unused pages take no memory */
    uint64_t kinds[KINDS / 64 + 1]; /* a bit for each kind that has a heap which is not empty */
    uint64_t filled[KINDS];         /* likewise for each age of the kind */
    float least[KINDS];      /* the least worth among those */
    uint8_t least_age[KINDS];
    uint64_t version; /* of the habits that `least` was computed from */
    news_t waiting[WAITING];
    unsigned waiting_count;
    size_t waiting_chunks; /* of the prompts in the queue */
    uint32_t *path; /* room for the notes of a prompt */
    size_t path_room;
    uint32_t growing; /* the group of the last chunks that were stored without a lookup, or NONE */
    uint32_t rows;    /* in the table, when all prompts that wait have been learned from */
    uint32_t unknown; /* rows without a note, because memory was short */
    rival_t rival;
} learned_t;

/* Pools of notes and groups, which never move */

static inline note_t *note_at(const learned_t *l, uint32_t id)
{
    return (note_t *)l->notes.segments.all[id >> NOTES_SHIFT] + (id & ((1u << NOTES_SHIFT) - 1));
}

static inline group_t *group_at(const learned_t *l, uint32_t id)
{
    return (group_t *)l->groups.segments.all[id >> NOTES_SHIFT] + (id & ((1u << NOTES_SHIFT) - 1));
}

/* Allocates memory for so many more items. Returns -1 if there is none. */
static inline int prepare(pool_t *pool, size_t items)
{
    while (pool->available < items) {
        if (pool->segments.count >= (NONE >> NOTES_SHIFT) - 1 || add_segment(&pool->segments, pool->item << NOTES_SHIFT) < 0)
            return -1;
        pool->available += (size_t)1 << NOTES_SHIFT;
    }
    return 0;
}

/* Returns an unused item, not initialised, of those that `prepare` has allocated. */
static inline uint32_t take(pool_t *pool)
{
    pool->available--;
    if (pool->free_head == NONE)
        return pool->next++;
    uint32_t id = pool->free_head;
    memcpy(&pool->free_head, item_at(&pool->segments, pool->item, id), sizeof id);
    return id;
}

static inline void give_back(pool_t *pool, uint32_t id)
{
    memcpy(item_at(&pool->segments, pool->item, id), &pool->free_head, sizeof id);
    pool->free_head = id;
    pool->available++;
}

static inline size_t pool_memory(const pool_t *pool)
{
    return (pool->segments.count * pool->item << NOTES_SHIFT) + pool->segments.room * sizeof(void *);
}

static inline uint32_t find_note(const learned_t *l, const uint8_t *key)
{
    return find_from(&l->notes.segments, sizeof(note_t), *bucket_of(&l->hashed, key), key);
}

static inline void join_group(learned_t *l, uint32_t id, uint32_t group)
{
    note_at(l, id)->group = group;
    group_at(l, group)->size++;
    group_at(l, group)->left++;
}

static inline int is_before(const group_t *a, const group_t *b)
{
    return a->used < b->used || (a->used == b->used && a->prompt < b->prompt);
}

static inline uint32_t root_of(const learned_t *l, unsigned kind, unsigned age)
{
    return l->roots[kind][age] ? l->roots[kind][age] - 1 : NONE;
}

/* notes.c */

void lmcache_unlink_note(learned_t *l, uint32_t id);
void lmcache_append_note(learned_t *l, uint32_t id);
/* Returns a note of a chunk that is not known, without a group, and in no order of access. */
uint32_t lmcache_new_note(table_t *t, const uint8_t *key);
/* Forgets a chunk that is not in the table. */
void lmcache_forget(table_t *t, uint32_t id);
/* Forgets chunks that left the table and were used too long ago, a few more than `accesses`. */
void lmcache_forget_old(table_t *t, size_t accesses);
/* Writes the notes of these chunks to l->path, NONE for those that are not known. Returns how many of the first are known. */
size_t lmcache_find_path(table_t *t, const uint8_t *keys, size_t count);

/* groups.c */

void lmcache_leave_age(learned_t *l, uint32_t id);
void lmcache_enter_age(learned_t *l, uint32_t id, int age);
/* Moves groups that have become older to the lists of their ages, at most MOST_MOVES; the next call goes on. */
void lmcache_grow_older(learned_t *l);
/* Returns a group without chunks, which is in no list yet. */
uint32_t lmcache_new_group(learned_t *l, unsigned kind, unsigned turn, uint32_t path, uint32_t prompt);
/* The note leaves its group, since the chunk was used again, or is not watched any more. Returns whether it was a candidate. */
int lmcache_leave_group(learned_t *l, uint32_t id, int used);
/* The prompt before this one that used chunk `fork` went on with other chunks. They are left behind, and age anew. */
void lmcache_leave_behind(learned_t *l, uint32_t fork);
/* The chunks of a group are of another kind, since their prompt has been answered: from their present age on. */
void lmcache_change_kind(learned_t *l, uint32_t id, uint32_t tokens);

/* rival.c: what happens to notes and rows, before it does; `appends` and `inserts` after it. */

void lmcache_begin_rival(rival_t *r);
void lmcache_rival_appends(learned_t *l, uint32_t note);
void lmcache_rival_unlinks(learned_t *l, uint32_t note);
void lmcache_rival_forgets(learned_t *l, uint32_t note);
void lmcache_rival_inserts(learned_t *l);
void lmcache_rival_evicts(learned_t *l);
/* A prompt of `count` chunks has come; `path` has the notes of the first `known`, and nothing is changed for it yet. */
void lmcache_rival_asked(learned_t *l, const uint32_t *path, size_t count, size_t known);

/* heaps.c */

void lmcache_enter_heap(learned_t *l, uint32_t id);
void lmcache_leave_heap(learned_t *l, uint32_t id);
void lmcache_become_candidate(learned_t *l, uint32_t id);
/* Returns whether it was one. */
int lmcache_end_candidate(learned_t *l, uint32_t id);
/* Becomes candidates again; the first one names the next one in `candidate_after`, and so on. */
void lmcache_become_candidates(learned_t *l, uint32_t id);
/* Rows are derived one after the other, so those that have changed since the last call are the last ones. */
void lmcache_note_new_worths(learned_t *l);
/* The group with candidates that is worth least, or the oldest one; NONE without any. */
uint32_t lmcache_least_group(const learned_t *l);
uint32_t lmcache_oldest_group(const learned_t *l);

#endif
