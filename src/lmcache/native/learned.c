/* The learned policy of eviction: evicts the chunk whose chance of a use is least for the time that it would be held.
 *
 * It learns from prompts as lookups name them (`asked`), not from touches. So a prompt counts once, whoever stores its chunks and
 * how often. A prompt waits in a short queue until the server is idle, or something depends on it; neither changes the result.
 *
 * A *note* is what is remembered of a chunk: of each chunk in the table, and of those that left it within the last GHOSTS
 * accesses for each chunk in the table. A *group* is the chunks of one prompt with the same kind (habits.h); they have been used
 * at the same time, and are therefore worth the same. Groups of one age stand in a list, oldest first, so that the only thing that
 * happens to them as time goes by is that the first ones move to the next list. A chunk that may be evictable is a *candidate*,
 * and groups with candidates stand in a pairing heap for each kind and age, the oldest one on top. Therefore the victim is
 * exactly the one that a search through all chunks would find: the least worth of all kinds and ages, then the oldest.
 */
#include "learned.h"
#include "habits.h"

#include <math.h>

#define NOTES_SHIFT 12  /* notes and groups in a segment, as a power of two */
#define PIECE_SHIFT 12  /* buckets in one piece of their array, likewise */
#define GHOSTS 16       /* accesses that are remembered for each chunk in the table */
#define LEAST_GHOSTS 1024
#define MOST_GHOSTS (1u << 22)
#define WAITING 16      /* prompts in the queue */
#define MOST_MOVES 256  /* groups that move to another age in one call */
#define HOT 32          /* nothing is left behind at a chunk that was used more often: other prompts still go there */
#define AGAIN_SECONDS 0.05 /* the same prompt within so short a time is one prompt, for example of two ranks */

enum { CANDIDATE = 1, PASSED_BY = 2 /* no longer remembered once it has left the table */ };

typedef struct {
    uint8_t key[KEY_BYTES];
    uint32_t chain;        /* in the bucket, or of the free list */
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
    double time;
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
    uint8_t **segments;
    size_t count, room, item, available;
    uint32_t next, free_head;
} pool_t;

struct learned {
    habits_t *habits;
    double now;
    pool_t notes, groups;
    uint32_t **pieces;
    size_t piece_count, piece_room;
    uint64_t buckets, low_mask, known; /* `known`: notes */
    uint32_t oldest, newest, cursor;   /* notes by access; the cursor is the oldest one that is not PASSED_BY */
    uint32_t accesses, prompts;
    uint32_t first[AGES], last[AGES];
    uint32_t (*roots)[AGES]; /* of the heaps, by kind and age: the group and 1, so that unused pages take no memory */
    uint64_t kinds[KINDS / 64 + 1]; /* a bit for each kind that has a heap which is not empty */
    uint64_t filled[KINDS];         /* likewise for each age of the kind */
    float least[KINDS];      /* the least worth among those */
    uint8_t least_age[KINDS];
    uint32_t version; /* of the habits that `least` was computed from */
    news_t waiting[WAITING];
    unsigned waiting_count;
    uint32_t *path; /* room for the notes of a prompt */
    size_t path_room;
    uint32_t growing; /* the group of the last chunks that were stored without a lookup, or NONE */
    uint32_t rows;    /* in the table, when all prompts that wait have been learned from */
    uint32_t unknown; /* rows without a note, because memory was short */
};

typedef struct learned learned_t;

/* Pools of notes and groups, which never move */

static int reserve(void **array, size_t count, size_t *room)
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

static inline void *item_at(const pool_t *pool, uint32_t id)
{
    return pool->segments[id >> NOTES_SHIFT] + (id & ((1u << NOTES_SHIFT) - 1)) * pool->item;
}

static inline note_t *note_at(const learned_t *l, uint32_t id)
{
    return (note_t *)item_at(&l->notes, id);
}

static inline group_t *group_at(const learned_t *l, uint32_t id)
{
    return (group_t *)item_at(&l->groups, id);
}

/* Allocates memory for so many more items. Returns -1 if there is none. */
static int prepare(pool_t *pool, size_t items)
{
    while (pool->available < items) {
        uint8_t *made = NULL;
        if (pool->count < (NONE >> NOTES_SHIFT) - 1 && reserve((void **)&pool->segments, pool->count, &pool->room) == 0)
            made = malloc(pool->item << NOTES_SHIFT);
        if (!made)
            return -1;
        pool->segments[pool->count++] = made;
        pool->available += (size_t)1 << NOTES_SHIFT;
    }
    return 0;
}

/* Returns an unused item, not initialised, of those that `prepare` has allocated. */
static uint32_t take(pool_t *pool)
{
    pool->available--;
    if (pool->free_head == NONE)
        return pool->next++;
    uint32_t id = pool->free_head;
    memcpy(&pool->free_head, item_at(pool, id), sizeof id);
    return id;
}

static void give_back(pool_t *pool, uint32_t id)
{
    memcpy(item_at(pool, id), &pool->free_head, sizeof id);
    pool->free_head = id;
    pool->available++;
}

static void free_pool(pool_t *pool)
{
    for (size_t i = 0; i < pool->count; i++)
        free(pool->segments[i]);
    free(pool->segments);
}

/* The hash table of notes, a linear one as in table.c */

static inline uint32_t *bucket_at(const learned_t *l, uint64_t bucket)
{
    return &l->pieces[bucket >> PIECE_SHIFT][bucket & ((1u << PIECE_SHIFT) - 1)];
}

static inline uint32_t *bucket_of(const table_t *t, const uint8_t *key)
{
    const learned_t *l = t->learned;
    uint64_t hash = mix(t, key), bucket = hash & (2 * l->low_mask + 1);
    return bucket_at(l, bucket < l->buckets ? bucket : hash & l->low_mask);
}

static inline uint32_t find_from(const learned_t *l, uint32_t id, const uint8_t *key)
{
    while (id != NONE && memcmp(note_at(l, id)->key, key, KEY_BYTES) != 0)
        id = note_at(l, id)->chain;
    return id;
}

static int add_piece(learned_t *l)
{
    if (reserve((void **)&l->pieces, l->piece_count, &l->piece_room) < 0)
        return -1;
    uint32_t *piece = malloc(sizeof(uint32_t) << PIECE_SHIFT);
    if (!piece)
        return -1;
    memset(piece, 0xff, sizeof(uint32_t) << PIECE_SHIFT);
    l->pieces[l->piece_count++] = piece;
    return 0;
}

static void split_bucket(table_t *t)
{
    learned_t *l = t->learned;
    uint64_t made = l->buckets, bit = l->low_mask + 1;
    if (made >> PIECE_SHIFT == l->piece_count && add_piece(l) < 0)
        return;
    uint32_t *low = bucket_at(l, made & l->low_mask), *high = bucket_at(l, made), id = *low;
    l->buckets++;
    if (l->buckets == 2 * bit)
        l->low_mask = 2 * l->low_mask + 1;
    *low = NONE;
    while (id != NONE) {
        note_t *note = note_at(l, id);
        uint32_t *head = mix(t, note->key) & bit ? high : low, next = note->chain;
        note->chain = *head;
        *head = id;
        id = next;
    }
}

/* Pairing heaps of groups, the oldest one on top */

static inline int is_before(const group_t *a, const group_t *b)
{
    return a->time < b->time || (a->time == b->time && a->prompt < b->prompt);
}

/* Joins two heaps; either may be NONE. */
static uint32_t join(learned_t *l, uint32_t a, uint32_t b)
{
    if (a == NONE || b == NONE)
        return a == NONE ? b : a;
    if (is_before(group_at(l, b), group_at(l, a))) {
        uint32_t other = a;
        a = b;
        b = other;
    }
    group_t *top = group_at(l, a), *below = group_at(l, b);
    below->sibling = top->child;
    below->back = a;
    if (top->child != NONE)
        group_at(l, top->child)->back = b;
    top->child = b;
    return a;
}

/* Joins siblings: pairs from the first to the last, then all of these from the last to the first. */
static uint32_t join_siblings(learned_t *l, uint32_t first)
{
    uint32_t pairs = NONE, heap = NONE;
    while (first != NONE) {
        uint32_t a = first, b = group_at(l, a)->sibling;
        first = b == NONE ? NONE : group_at(l, b)->sibling;
        group_at(l, a)->sibling = NONE;
        if (b != NONE)
            group_at(l, b)->sibling = NONE;
        a = join(l, a, b);
        group_at(l, a)->sibling = pairs;
        pairs = a;
    }
    while (pairs != NONE) {
        uint32_t next = group_at(l, pairs)->sibling;
        group_at(l, pairs)->sibling = NONE;
        heap = join(l, heap, pairs);
        pairs = next;
    }
    return heap;
}

static void find_least(learned_t *l, unsigned kind)
{
    const float *worth = l->habits->worth[KINDS_AT + kind];
    l->least[kind] = INFINITY;
    for (uint64_t left = l->filled[kind]; left; left &= left - 1) {
        int age = __builtin_ctzll(left);
        if (worth[age] <= l->least[kind]) { /* of equals the older one */
            l->least[kind] = worth[age];
            l->least_age[kind] = (uint8_t)age;
        }
    }
}

static void set_root(learned_t *l, const group_t *group, uint32_t root)
{
    unsigned kind = group->kind;
    uint64_t ages = l->filled[kind], age = (uint64_t)1 << group->age;
    l->roots[kind][group->age] = root == NONE ? 0 : root + 1;
    if (root != NONE)
        group_at(l, root)->back = NONE;
    l->filled[kind] = root == NONE ? ages & ~age : ages | age;
    if (l->filled[kind] == ages)
        return;
    find_least(l, kind);
    if (l->filled[kind])
        l->kinds[kind / 64] |= (uint64_t)1 << kind % 64;
    else
        l->kinds[kind / 64] &= ~((uint64_t)1 << kind % 64);
}

static inline uint32_t root_of(const learned_t *l, unsigned kind, unsigned age)
{
    return l->roots[kind][age] ? l->roots[kind][age] - 1 : NONE;
}

static void enter_heap(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    group->child = group->sibling = group->back = NONE;
    set_root(l, group, join(l, root_of(l, group->kind, group->age), id));
}

static void leave_heap(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    uint32_t root = root_of(l, group->kind, group->age), rest = join_siblings(l, group->child);
    if (root == id) {
        root = rest;
    } else {
        group_t *back = group_at(l, group->back);
        if (back->child == id)
            back->child = group->sibling;
        else
            back->sibling = group->sibling;
        if (group->sibling != NONE)
            group_at(l, group->sibling)->back = group->back;
        root = join(l, root, rest);
    }
    set_root(l, group, root);
}

/* Candidates */

static void become_candidate(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (note->flags & CANDIDATE)
        return;
    group_t *group = group_at(l, note->group);
    note->flags |= CANDIDATE;
    note->candidate_before = NONE;
    note->candidate_after = group->candidates;
    if (group->candidates != NONE)
        note_at(l, group->candidates)->candidate_before = id;
    group->candidates = id;
    if (note->candidate_after == NONE)
        enter_heap(l, note->group);
}

/* Returns whether it was one. */
static int end_candidate(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (!(note->flags & CANDIDATE))
        return 0;
    group_t *group = group_at(l, note->group);
    note->flags &= (uint8_t)~CANDIDATE;
    if (note->candidate_before != NONE)
        note_at(l, note->candidate_before)->candidate_after = note->candidate_after;
    else
        group->candidates = note->candidate_after;
    if (note->candidate_after != NONE)
        note_at(l, note->candidate_after)->candidate_before = note->candidate_before;
    if (group->candidates == NONE)
        leave_heap(l, note->group);
    return 1;
}

/* Groups and their ages */

static void leave_age(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    if (group->before != NONE)
        group_at(l, group->before)->after = group->after;
    else
        l->first[group->age] = group->after;
    if (group->after != NONE)
        group_at(l, group->after)->before = group->before;
    else
        l->last[group->age] = group->before;
    l->habits->live[group->kind][group->age] -= (double)group->left / group->size;
}

static void enter_age(learned_t *l, uint32_t id, int age)
{
    group_t *group = group_at(l, id);
    group->age = (uint8_t)age;
    group->before = l->last[age];
    group->after = NONE;
    if (group->before != NONE)
        group_at(l, group->before)->after = id;
    else
        l->first[age] = id;
    l->last[age] = id;
    l->habits->live[group->kind][age] += (double)group->left / group->size;
}

/* Moves groups that have become older to the lists of their ages, at most MOST_MOVES; the next call goes on. */
static void grow_older(learned_t *l)
{
    int left = MOST_MOVES;
    for (int age = AGES - 2; age >= 0; age--)
        for (uint32_t id; (id = l->first[age]) != NONE && left > 0; left--) {
            group_t *group = group_at(l, id);
            int now = age_of(l->now - group->time);
            if (now <= age)
                break;
            int in_heap = group->candidates != NONE;
            if (in_heap)
                leave_heap(l, id);
            leave_age(l, id);
            enter_age(l, id, now);
            if (in_heap)
                enter_heap(l, id);
        }
}

/* Returns a group without chunks, which is in no list yet. */
static uint32_t new_group(learned_t *l, unsigned kind, unsigned turn, uint32_t path, uint32_t prompt)
{
    uint32_t id = take(&l->groups);
    group_t *group = group_at(l, id);
    memset(group, 0, sizeof *group);
    group->time = l->now;
    group->prompt = prompt;
    group->path = path;
    group->kind = (uint16_t)kind;
    group->turn = (uint8_t)turn;
    group->before = group->after = group->child = group->sibling = group->back = group->candidates = NONE;
    group->next_of_prompt = group->previous_of_prompt = NONE;
    return id;
}

/* The note leaves its group, since the chunk was used again, or is not watched any more. Returns whether it was a candidate. */
static int leave_group(learned_t *l, uint32_t id, int used)
{
    note_t *note = note_at(l, id);
    uint32_t number = note->group;
    group_t *group = group_at(l, number);
    int candidate = end_candidate(l, id), age = age_of(l->now - group->time);
    double weight = 1.0 / group->size;
    l->habits->ended[group->kind][age] += weight;
    if (used)
        l->habits->used[group->kind][age] += weight;
    l->habits->live[group->kind][group->age] -= weight;
    note->group = NONE;
    if (--group->left == 0) {
        if (l->growing == number)
            l->growing = NONE;
        if (group->previous_of_prompt != NONE)
            group_at(l, group->previous_of_prompt)->next_of_prompt = group->next_of_prompt;
        if (group->next_of_prompt != NONE)
            group_at(l, group->next_of_prompt)->previous_of_prompt = group->previous_of_prompt;
        leave_age(l, number);
        give_back(&l->groups, number);
    }
    return candidate;
}

static void join_group(learned_t *l, uint32_t id, uint32_t group)
{
    note_at(l, id)->group = group;
    group_at(l, group)->size++;
    group_at(l, group)->left++;
}

/* Notes */

static void unlink_note(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (l->cursor == id)
        l->cursor = note->newer;
    if (note->older != NONE)
        note_at(l, note->older)->newer = note->newer;
    else
        l->oldest = note->newer;
    if (note->newer != NONE)
        note_at(l, note->newer)->older = note->older;
    else
        l->newest = note->older;
}

static void append_note(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    note->access = ++l->accesses;
    note->flags &= (uint8_t)~PASSED_BY;
    note->older = l->newest;
    note->newer = NONE;
    if (l->newest != NONE)
        note_at(l, l->newest)->newer = id;
    else
        l->oldest = id;
    l->newest = id;
    if (l->cursor == NONE)
        l->cursor = id;
}

/* Returns a note of a chunk that is not known, without a group, and in no order of access. */
static uint32_t new_note(table_t *t, const uint8_t *key)
{
    learned_t *l = t->learned;
    uint32_t id = take(&l->notes);
    note_t *note = note_at(l, id);
    memset(note, 0, sizeof *note);
    memcpy(note->key, key, KEY_BYTES);
    note->group = note->row = note->following = note->older = note->newer = NONE;
    l->known++;
    for (int i = 0; i < 2 && l->buckets < 2 * l->known; i++)
        split_bucket(t);
    uint32_t *bucket = bucket_of(t, key);
    note->chain = *bucket;
    *bucket = id;
    return id;
}

static void forget(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    uint32_t *link = bucket_of(t, note_at(l, id)->key);
    while (*link != id)
        link = &note_at(l, *link)->chain;
    *link = note_at(l, id)->chain;
    leave_group(l, id, 0);
    unlink_note(l, id);
    l->known--;
    give_back(&l->notes, id);
}

/* Forgets chunks that left the table and were used too long ago, a few more than `accesses`. */
static void forget_old(table_t *t, size_t accesses)
{
    learned_t *l = t->learned;
    uint64_t most = (uint64_t)GHOSTS * l->rows;
    most = most < LEAST_GHOSTS ? LEAST_GHOSTS : most > MOST_GHOSTS ? MOST_GHOSTS : most;
    for (size_t left = 2 * accesses + 16; left > 0 && l->cursor != NONE; left--) {
        uint32_t id = l->cursor;
        note_t *note = note_at(l, id);
        if (l->accesses - note->access < most)
            break;
        if (note->row == NONE) {
            forget(t, id);
        } else {
            note->flags |= PASSED_BY;
            l->cursor = note->newer;
        }
    }
}

/* Learning from prompts */

/* Writes the notes of these chunks to l->path, NONE for those that are not known. Returns how many of the first are known. */
static size_t find_path(table_t *t, const uint8_t *keys, size_t count)
{
    learned_t *l = t->learned;
    size_t known = 0;
    for (size_t first = 0; first < count; first += BATCH) {
        const uint32_t *buckets[BATCH];
        size_t batch = count - first < BATCH ? count - first : BATCH;
        for (size_t i = 0; i < batch; i++) {
            buckets[i] = bucket_of(t, keys + (first + i) * KEY_BYTES);
            PREFETCH(buckets[i]);
        }
        for (size_t i = 0; i < batch; i++)
            if (*buckets[i] != NONE)
                PREFETCH(note_at(l, *buckets[i]));
        for (size_t i = 0; i < batch; i++) {
            uint32_t id = find_from(l, *buckets[i], keys + (first + i) * KEY_BYTES);
            l->path[first + i] = id;
            if (id != NONE && known == first + i)
                known++;
            if (id != NONE)
                PREFETCH(group_at(l, note_at(l, id)->group));
        }
    }
    return known;
}

/* Becomes candidates again; the first one names the next one in `candidate_after`, and so on. */
static void become_candidates(learned_t *l, uint32_t id)
{
    while (id != NONE) {
        uint32_t next = note_at(l, id)->candidate_after;
        become_candidate(l, id);
        id = next;
    }
}

/* The prompt before this one that used chunk `fork` went on with other chunks. They are left behind, and age anew. */
static void leave_behind(learned_t *l, uint32_t fork)
{
    const note_t *at_fork = note_at(l, fork);
    uint32_t prompt = group_at(l, at_fork->group)->prompt, length = 0;
    for (uint32_t id = at_fork->following; id != NONE; id = note_at(l, id)->following, length++) {
        uint32_t group = note_at(l, id)->group; /* the note may have been given to another chunk meanwhile */
        if (group == NONE || group_at(l, group)->prompt != prompt)
            break;
    }
    if (!length)
        return;
    const group_t *before = group_at(l, at_fork->group);
    uint32_t left =
        new_group(l, left_kind(at_fork->count, length), before->turn, before->path, ++l->prompts);
    uint32_t id = at_fork->following, candidates = NONE;
    for (uint32_t i = 0; i < length; i++, id = note_at(l, id)->following) {
        int candidate = leave_group(l, id, 0);
        join_group(l, id, left);
        if (candidate) {
            note_at(l, id)->candidate_after = candidates;
            candidates = id;
        }
    }
    enter_age(l, left, 0);
    become_candidates(l, candidates);
}

/* Learns from a prompt, which has come at `now`. Without memory the prompt is ignored. */
static void learn(table_t *t, double now, const uint8_t *keys, size_t count)
{
    learned_t *l = t->learned;
    if (now > l->now)
        l->now = now;
    grow_older(l);
    if (count > l->path_room) {
        uint32_t *grown = realloc(l->path, count * sizeof(uint32_t));
        if (!grown)
            return;
        l->path = grown;
        l->path_room = count;
    }
    if (!count || prepare(&l->notes, count) < 0 || prepare(&l->groups, 1 + COUNTS * 2) < 0)
        return;
    size_t known = find_path(t, keys, count);
    unsigned turn = 1;
    if (known) {
        uint32_t deepest = l->path[known - 1];
        const group_t *before = group_at(l, note_at(l, deepest)->group);
        if (known == count && before->path == count && l->now - before->time < AGAIN_SECONDS)
            return;
        if (known >= 2 && known + (before->path > 8 ? 2 : 1) >= before->path)
            turn = before->turn < TURNS ? before->turn + 1u : TURNS;
        if (known < count && note_at(l, deepest)->count <= HOT)
            leave_behind(l, deepest);
    }
    uint32_t made[COUNTS * 2], prompt = ++l->prompts, candidates = NONE, following = NONE;
    memset(made, 0xff, sizeof made);
    for (size_t i = count; i-- > 0;) { /* the end of the prompt first, so that it is the older one */
        uint32_t id = l->path[i];
        int candidate = 0;
        if (id == NONE)
            id = find_from(l, *bucket_of(t, keys + i * KEY_BYTES), keys + i * KEY_BYTES);
        if (id == NONE) {
            id = new_note(t, keys + i * KEY_BYTES);
        } else if (group_at(l, note_at(l, id)->group)->prompt != prompt) {
            candidate = leave_group(l, id, 1);
            unlink_note(l, id);
        } else {
            continue; /* the prompt names a chunk twice */
        }
        note_t *note = note_at(l, id);
        note->count += note->count < UINT16_MAX;
        unsigned last = i + 1 == count, coarse = count_code(note->count) * 2 + last;
        if (made[coarse] == NONE) {
            unsigned kind = kind_of(note->count, (int)last, turn, (uint32_t)(count - known));
            made[coarse] = new_group(l, kind, turn, (uint32_t)count, prompt);
        }
        join_group(l, id, made[coarse]);
        append_note(l, id);
        note->following = following;
        following = id;
        if (candidate) {
            note->candidate_after = candidates;
            candidates = id;
        }
    }
    uint32_t previous = NONE;
    for (unsigned coarse = 0; coarse < COUNTS * 2; coarse++)
        if (made[coarse] != NONE) {
            group_at(l, made[coarse])->previous_of_prompt = previous;
            if (previous != NONE)
                group_at(l, previous)->next_of_prompt = made[coarse];
            previous = made[coarse];
            enter_age(l, made[coarse], 0);
        }
    become_candidates(l, candidates);
    forget_old(t, count);
    lmcache_habits_prompt(l->habits);
}

/* The chunks of a group are of another kind, since their prompt has been answered: from their present age on. */
static void change_kind(learned_t *l, uint32_t id, uint32_t tokens)
{
    group_t *group = group_at(l, id);
    double weight = (double)group->left / group->size;
    int in_heap = group->candidates != NONE;
    if (group->kind >= FINE)
        return;
    if (in_heap)
        leave_heap(l, id);
    l->habits->live[group->kind][group->age] -= weight;
    l->habits->ended[group->kind][group->age] += weight;
    group->kind = (uint16_t)answered_kind(group->kind, tokens);
    l->habits->live[group->kind][group->age] += weight;
    l->habits->ended[group->kind][group->age] -= weight;
    if (in_heap)
        enter_heap(l, id);
}

/* Learns how long the answer to a prompt was, unless the last chunk of the prompt has been used again. */
static void learn_answer(table_t *t, double now, const uint8_t *key, uint32_t tokens)
{
    learned_t *l = t->learned;
    if (now > l->now)
        l->now = now;
    grow_older(l);
    uint32_t note = find_from(l, *bucket_of(t, key), key), last = note == NONE ? NONE : note_at(l, note)->group;
    for (uint32_t id = last; id != NONE; id = group_at(l, id)->previous_of_prompt)
        change_kind(l, id, tokens);
    for (uint32_t id = last == NONE ? NONE : group_at(l, last)->next_of_prompt; id != NONE;
         id = group_at(l, id)->next_of_prompt)
        change_kind(l, id, tokens);
}

static void learn_first(table_t *t)
{
    learned_t *l = t->learned;
    news_t first = l->waiting[0];
    const uint8_t *keys = (const uint8_t *)PyBytes_AsString(first.hashes);
    l->waiting_count--;
    memmove(l->waiting, l->waiting + 1, l->waiting_count * sizeof first);
    if (first.answered < 0)
        learn(t, first.now, keys, (size_t)PyBytes_Size(first.hashes) / KEY_BYTES);
    else
        learn_answer(t, first.now, keys, (uint32_t)first.answered);
    Py_DECREF(first.hashes);
}

static void settle(table_t *t)
{
    while (t->learned->waiting_count)
        learn_first(t);
}

/* The functions of the policy */

static void put_off(table_t *t, double now, PyObject *hashes, int64_t answered)
{
    learned_t *l = t->learned;
    if (l->waiting_count == WAITING)
        learn_first(t);
    news_t news = {now, hashes, answered};
    Py_INCREF(hashes);
    l->waiting[l->waiting_count++] = news;
}

static void learned_asked(table_t *t, double now, PyObject *hashes)
{
    put_off(t, now, hashes, -1);
}

static void learned_answered(table_t *t, double now, PyObject *hash, uint32_t tokens)
{
    put_off(t, now, hash, tokens);
}

/* Makes the note of a chunk that is stored and that no prompt has named, such as the text that a model has answered. */
static uint32_t note_unasked(table_t *t, const record_t *r)
{
    learned_t *l = t->learned;
    if (prepare(&l->notes, 1) < 0 || prepare(&l->groups, 1) < 0)
        return NONE;
    uint32_t parent = r->parent == NONE ? NONE : at(t, r->parent)->older, id = new_note(t, r->key);
    const group_t *above = parent == NONE ? NULL : group_at(l, note_at(l, parent)->group);
    unsigned turn = above ? above->turn : 1;
    note_at(l, id)->count = 1;
    if (above && note_at(l, parent)->group == l->growing && above->time == l->now) {
        l->habits->live[above->kind][above->age] -= (double)above->left / above->size;
        join_group(l, id, l->growing);
        l->habits->live[above->kind][above->age] += (double)above->left / above->size;
    } else {
        l->growing = new_group(l, kind_of(1, 0, turn, 1), turn, above ? above->path : 1, ++l->prompts);
        join_group(l, id, l->growing);
        enter_age(l, l->growing, 0);
    }
    append_note(l, id);
    forget_old(t, 1);
    return id;
}

static void learned_inserted(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    settle(t);
    l->rows++;
    record_t *r = at(t, id);
    uint32_t note = find_from(l, *bucket_of(t, r->key), r->key);
    if (note == NONE)
        note = note_unasked(t, r);
    r->older = note;
    if (note == NONE) {
        l->unknown++;
        return;
    }
    note_at(l, note)->row = id;
    become_candidate(l, note);
    if (r->parent != NONE && at(t, r->parent)->older != NONE)
        end_candidate(l, at(t, r->parent)->older);
}

static void learned_touched(table_t *t, const uint8_t *ids, size_t count)
{
    (void)t, (void)ids, (void)count; /* it is prompts that count */
}

static void learned_touched_path(table_t *t, uint32_t id)
{
    (void)t, (void)id;
}

static void learned_unblocked(table_t *t, uint32_t id)
{
    if (at(t, id)->older != NONE)
        become_candidate(t->learned, at(t, id)->older);
}

static void learned_removed(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    uint32_t note = at(t, id)->older;
    settle(t);
    l->rows--;
    if (note == NONE) {
        l->unknown--;
        return;
    }
    end_candidate(l, note);
    note_at(l, note)->row = NONE;
    if (note_at(l, note)->flags & PASSED_BY)
        forget(t, note);
}

/* Returns an evictable record that has no note, or NONE. */
static uint32_t evictable_unknown(const table_t *t)
{
    for (uint32_t id = 1; t->learned->unknown && id < t->next_id; id++)
        if (is_evictable(at(t, id)) && at(t, id)->older == NONE)
            return id;
    return NONE;
}

static int learned_victim(table_t *t, uint32_t *id)
{
    learned_t *l = t->learned;
    settle(t);
    grow_older(l);
    int changed = l->version != l->habits->version;
    for (unsigned word = 0; changed && word < KINDS / 64 + 1; word++)
        for (uint64_t left = l->kinds[word]; left; left &= left - 1)
            find_least(l, 64 * word + (unsigned)__builtin_ctzll(left));
    l->version = l->habits->version;
    for (;;) {
        uint32_t chosen = NONE;
        float least = INFINITY;
        for (unsigned word = 0; word < KINDS / 64 + 1; word++)
            for (uint64_t left = l->kinds[word]; left; left &= left - 1) {
                unsigned kind = 64 * word + (unsigned)__builtin_ctzll(left);
                if (l->least[kind] > least)
                    continue;
                uint32_t oldest = root_of(l, kind, l->least_age[kind]);
                if (l->least[kind] < least || is_before(group_at(l, oldest), group_at(l, chosen)))
                    chosen = oldest;
                least = l->least[kind];
            }
        if (chosen == NONE)
            break;
        uint32_t note = group_at(l, chosen)->candidates;
        *id = note_at(l, note)->row;
        if (is_evictable(at(t, *id)))
            return 0;
        end_candidate(l, note);
    }
    *id = evictable_unknown(t);
    return 0;
}

/* The order of all records: groups by worth, then by age; within a group, later records first. */

typedef struct {
    float worth;
    uint32_t prompt, group, records;
    double time;
} place_t;

static int compare_places(const void *a, const void *b)
{
    const place_t *one = a, *other = b;
    if (one->worth != other->worth)
        return one->worth < other->worth ? -1 : 1;
    if (one->time != other->time)
        return one->time < other->time ? -1 : 1;
    return one->prompt < other->prompt ? -1 : one->prompt > other->prompt;
}

static int learned_order(table_t *t, uint32_t *ids)
{
    learned_t *l = t->learned;
    size_t groups = 0, at_place = 0;
    uint32_t begin = 0;
    settle(t);
    uint32_t *place_of = calloc((size_t)l->groups.next + 1, sizeof(uint32_t));
    place_t *places = malloc(((size_t)l->groups.next + 1) * sizeof(place_t));
    if (!place_of || !places) {
        free(place_of);
        free(places);
        PyErr_NoMemory();
        return -1;
    }
    for (int age = 0; age < AGES; age++)
        for (uint32_t id = l->first[age]; id != NONE; id = group_at(l, id)->after) {
            const group_t *group = group_at(l, id);
            place_t place = {l->habits->worth[KINDS_AT + group->kind][age], group->prompt, id, 0, group->time};
            places[groups++] = place;
        }
    qsort(places, groups, sizeof(place_t), compare_places);
    for (size_t i = 0; i < groups; i++)
        place_of[places[i].group] = (uint32_t)i;
    for (uint32_t id = 1; id < t->next_id; id++) {
        const record_t *r = at(t, id);
        if (!(r->flags & ATTACHED))
            continue;
        if (r->older == NONE)
            ids[begin++] = id;
        else
            places[place_of[note_at(l, r->older)->group]].records++;
    }
    for (; at_place < groups; at_place++) { /* `records` becomes where the records of the group begin */
        uint32_t records = places[at_place].records;
        places[at_place].records = begin;
        begin += records;
    }
    for (uint32_t id = t->next_id; id-- > 1;) {
        const record_t *r = at(t, id);
        if ((r->flags & ATTACHED) && r->older != NONE)
            ids[places[place_of[note_at(l, r->older)->group]].records++] = id;
    }
    free(place_of);
    free(places);
    return 0;
}

static int learned_memory_bytes(table_t *t, size_t *size)
{
    const learned_t *l = t->learned;
    *size = sizeof *l + KINDS * sizeof *l->roots + (l->notes.count * l->notes.item << NOTES_SHIFT) +
            (l->groups.count * l->groups.item << NOTES_SHIFT) + (l->notes.room + l->groups.room + l->piece_room) * sizeof(void *) +
            l->piece_count * (sizeof(uint32_t) << PIECE_SHIFT) + l->path_room * sizeof(uint32_t);
    return 0;
}

static void free_learned(learned_t *l)
{
    for (unsigned i = 0; i < l->waiting_count; i++)
        Py_DECREF(l->waiting[i].hashes);
    for (int age = 0; age < AGES; age++)
        while (l->first[age] != NONE)
            leave_age(l, l->first[age]);
    free_pool(&l->notes);
    free_pool(&l->groups);
    for (size_t i = 0; i < l->piece_count; i++)
        free(l->pieces[i]);
    free(l->pieces);
    free(l->roots);
    free(l->path);
    Py_DECREF((PyObject *)l->habits);
    free(l);
}

static void learned_ended(table_t *t)
{
    free_learned(t->learned);
}

learned_t *lmcache_new_learned(PyObject *habits)
{
    learned_t *l = calloc(1, sizeof *l);
    if (!l) {
        PyErr_NoMemory();
        return NULL;
    }
    Py_INCREF(habits);
    l->habits = (habits_t *)habits;
    l->notes.item = sizeof(note_t);
    l->groups.item = sizeof(group_t);
    l->notes.free_head = l->groups.free_head = l->oldest = l->newest = l->cursor = l->growing = NONE;
    memset(l->first, 0xff, sizeof l->first);
    memset(l->last, 0xff, sizeof l->last);
    for (unsigned kind = 0; kind < KINDS; kind++)
        l->least[kind] = INFINITY;
    l->version = l->habits->version;
    l->buckets = 1u << PIECE_SHIFT;
    l->low_mask = l->buckets - 1;
    l->roots = calloc(KINDS, sizeof *l->roots);
    if (!l->roots || add_piece(l) < 0) {
        free_learned(l);
        PyErr_NoMemory();
        return NULL;
    }
    return l;
}

const policy_t lmcache_learned = {
    .inserted = learned_inserted,
    .asked = learned_asked,
    .answered = learned_answered,
    .touched = learned_touched,
    .touched_path = learned_touched_path,
    .unblocked = learned_unblocked,
    .removed = learned_removed,
    .victim = learned_victim,
    .order = learned_order,
    .memory_bytes = learned_memory_bytes,
    .settled = settle,
    .ended = learned_ended,
};
