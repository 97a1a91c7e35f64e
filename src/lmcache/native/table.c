/* The type `Table`: the index of one space. lmcache/_native.pyi documents every method; PyTable of tests/py_table.py does the
 * same, and tests compare the two. This comment describes the data structure.
 *
 * Records lie in segments that never move, so the table grows without a pause. A record has 64 bytes, one cache line; the
 * sectors and states of all shards, 5 bytes a shard, follow the records of a segment.
 *
 * The hash table is a linear one (Litwin 1980): buckets are heads of chains through the records, and while there are fewer
 * than two buckets a record, each insert splits the next two. It is never rebuilt. Clients choose the hashes, so a secret is
 * mixed into the number of the bucket.
 *
 * A policy, a `policy_t` here, decides the order of eviction: `lru` keeps its list in the records, `lmcache_learned` (learned.c)
 * goes by what was learned from earlier prompts, and `plugged` calls an object in Python. The table itself decides which records are evictable.
 *
 * LRU finds a victim with a cursor that walks from the oldest end of the list and passes records that are not evictable. A record
 * that was passed and becomes evictable later enters a heap ordered by age; all records in the heap are older than the cursor. A
 * record is passed once for each touch, so finding a victim costs O(1) in ordinary use and O(log n) at worst, amortised.
 */
#include "habits.h"
#include "learned.h"
#include "table.h"

static inline uint32_t *segment_sectors(const table_t *t, size_t segment)
{
    return (uint32_t *)(t->segments[segment] + segment_records(t) * sizeof(record_t));
}

static inline uint8_t *segment_states(const table_t *t, size_t segment)
{
    return (uint8_t *)(segment_sectors(t, segment) + segment_records(t) * t->shards);
}

static inline uint32_t *sectors_of(const table_t *t, uint32_t id)
{
    return segment_sectors(t, id >> t->shift) + (id & (segment_records(t) - 1)) * t->shards;
}

static inline uint8_t *states_of(const table_t *t, uint32_t id)
{
    return segment_states(t, id >> t->shift) + (id & (segment_records(t) - 1)) * t->shards;
}

static size_t segment_size(const table_t *t)
{
    size_t size = segment_records(t) * (sizeof(record_t) + (size_t)5 * t->shards);
    return (size + 63) & ~(size_t)63;
}

/* Makes room for one more pointer in a growing array of pointers. */
static int reserve_pointer(void **array, size_t count, size_t *room)
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

/* Returns an unused id, or NONE with an error set. The record is not initialised. */
static uint32_t take_id(table_t *t)
{
    if (t->free_head != NONE) {
        uint32_t id = t->free_head;
        t->free_head = at(t, id)->next;
        return id;
    }
    if (t->next_id == MAX_RECORDS) {
        PyErr_Format(PyExc_ValueError, "the table is full: %u records; free some first", MAX_RECORDS);
        return NONE;
    }
    size_t segment = t->next_id >> t->shift;
    while (segment >= t->segment_count) {
        uint8_t *made = NULL;
        if (reserve_pointer((void **)&t->segments, t->segment_count, &t->segment_room) == 0)
            made = aligned_alloc(64, segment_size(t));
        if (!made) {
            PyErr_NoMemory();
            return NONE;
        }
        t->segments[t->segment_count++] = made;
        memset(segment_states(t, t->segment_count - 1), EMPTY, segment_records(t) * t->shards);
    }
    return t->next_id++;
}

/* The hash table */

static inline uint32_t *bucket_at(const table_t *t, uint64_t bucket)
{
    return &t->pieces[bucket >> BUCKET_SHIFT][bucket & ((1u << BUCKET_SHIFT) - 1)];
}

static inline uint32_t *bucket_of(const table_t *t, const uint8_t *key)
{
    uint64_t hash = mix(t, key), bucket = hash & (2 * t->low_mask + 1);
    return bucket_at(t, bucket < t->buckets ? bucket : hash & t->low_mask);
}

static inline uint32_t find_from(const table_t *t, uint32_t id, const uint8_t *key)
{
    while (id != NONE) {
        const record_t *r = at(t, id);
        if (memcmp(r->key, key, KEY_BYTES) == 0)
            break;
        id = r->next;
    }
    return id;
}

static int add_piece(table_t *t)
{
    if (reserve_pointer((void **)&t->pieces, t->piece_count, &t->piece_room) < 0)
        return -1;
    uint32_t *piece = malloc(sizeof(uint32_t) << BUCKET_SHIFT);
    if (!piece)
        return -1;
    memset(piece, 0xff, sizeof(uint32_t) << BUCKET_SHIFT);
    t->pieces[t->piece_count++] = piece;
    return 0;
}

/* Adds one bucket, which takes part of the chain of the bucket to split next. Without memory the chains only get longer. */
static void split_bucket(table_t *t)
{
    uint64_t made = t->buckets;
    if (made >> BUCKET_SHIFT == t->piece_count && add_piece(t) < 0)
        return;
    uint32_t *low = bucket_at(t, made & t->low_mask), *high = bucket_at(t, made), id = *low;
    uint64_t bit = t->low_mask + 1;
    t->buckets++;
    if (t->buckets == 2 * bit)
        t->low_mask = 2 * t->low_mask + 1;
    *low = NONE;
    while (id != NONE) {
        record_t *r = at(t, id);
        uint32_t *head = mix(t, r->key) & bit ? high : low, next = r->next;
        r->next = *head;
        *head = id;
        id = next;
    }
}

static void remove_from_bucket(table_t *t, uint32_t id)
{
    uint32_t *link = bucket_of(t, at(t, id)->key);
    while (*link != id)
        link = &at(t, *link)->next;
    *link = at(t, id)->next;
}

/* Evictability */

/* Reports the record to the policy if it has become evictable. */
static inline void unblock(table_t *t, uint32_t id)
{
    if (is_evictable(at(t, id)))
        t->policy->unblocked(t, id);
}

/* LRU */

static inline void unlink_age(table_t *t, record_t *r, uint32_t id)
{
    if (t->cursor == id)
        t->cursor = r->newer;
    if (r->older != NONE)
        at(t, r->older)->newer = r->newer;
    else
        t->oldest = r->newer;
    if (r->newer != NONE)
        at(t, r->newer)->older = r->older;
    else
        t->newest = r->older;
}

static inline void append_age(table_t *t, record_t *r, uint32_t id)
{
    r->stamp = ++t->clock;
    r->flags &= ~(uint64_t)(PASSED | QUEUED);
    r->older = t->newest;
    r->newer = NONE;
    if (t->newest != NONE)
        at(t, t->newest)->newer = id;
    else
        t->oldest = id;
    t->newest = id;
    if (t->cursor == NONE)
        t->cursor = id;
}

static void lru_inserted(table_t *t, uint32_t id)
{
    append_age(t, at(t, id), id);
}

static inline void touch_one(table_t *t, uint32_t id)
{
    record_t *r = at(t, id);
    unlink_age(t, r, id);
    append_age(t, r, id);
}

static void lru_touched(table_t *t, const uint8_t *ids, size_t count)
{
    while (count-- > 0) {
        if (count >= 8) { /* its neighbours in the list, which are about to be joined */
            const record_t *ahead = at(t, read_u32(ids + 4 * (count - 8)));
            if ((ahead->flags & ATTACHED) && ahead->older != NONE)
                PREFETCH(at(t, ahead->older));
            if ((ahead->flags & ATTACHED) && ahead->newer != NONE)
                PREFETCH(at(t, ahead->newer));
        }
        uint32_t id = read_u32(ids + 4 * count);
        if (at(t, id)->flags & ATTACHED)
            touch_one(t, id);
    }
}

static void lru_touched_path(table_t *t, uint32_t id)
{
    for (; id != NONE; id = at(t, id)->parent)
        touch_one(t, id);
}

static void lru_removed(table_t *t, uint32_t id)
{
    unlink_age(t, at(t, id), id);
}

/* Restarts the walk of the cursor. Used if the heap cannot grow. */
static void forget_passed(table_t *t)
{
    for (uint32_t id = t->oldest; id != t->cursor; id = at(t, id)->newer)
        at(t, id)->flags &= ~(uint64_t)(PASSED | QUEUED);
    t->cursor = t->oldest;
    t->heap_count = 0;
}

/* Adds the record to the heap if the cursor has passed it. */
static void lru_unblocked(table_t *t, uint32_t id)
{
    record_t *r = at(t, id);
    if (!(r->flags & PASSED) || (r->flags & QUEUED))
        return;
    if (t->heap_count == t->heap_room) {
        size_t room = t->heap_room ? 2 * t->heap_room : 64;
        waiting_t *grown = realloc(t->heap, room * sizeof(waiting_t));
        if (!grown) {
            forget_passed(t);
            return;
        }
        t->heap = grown;
        t->heap_room = room;
    }
    r->flags |= QUEUED;
    size_t place = t->heap_count++;
    for (size_t above; place > 0 && t->heap[above = (place - 1) / 2].stamp > r->stamp; place = above)
        t->heap[place] = t->heap[above];
    t->heap[place].stamp = r->stamp;
    t->heap[place].id = id;
}

static void pop_heap(table_t *t)
{
    waiting_t last = t->heap[--t->heap_count];
    size_t place = 0, below;
    while ((below = 2 * place + 1) < t->heap_count) {
        if (below + 1 < t->heap_count && t->heap[below + 1].stamp < t->heap[below].stamp)
            below++;
        if (t->heap[below].stamp >= last.stamp)
            break;
        t->heap[place] = t->heap[below];
        place = below;
    }
    t->heap[place] = last;
}

static int lru_victim(table_t *t, uint32_t *id)
{
    while (t->heap_count) {
        *id = t->heap[0].id;
        record_t *r = at(t, *id);
        if (r->stamp == t->heap[0].stamp && (r->flags & QUEUED)) {
            if (is_evictable(r))
                return 0;
            r->flags &= ~(uint64_t)QUEUED;
        }
        pop_heap(t);
    }
    while ((*id = t->cursor) != NONE) {
        record_t *r = at(t, *id);
        if (is_evictable(r))
            break;
        r->flags |= PASSED;
        t->cursor = r->newer;
    }
    return 0;
}

static int lru_order(table_t *t, uint32_t *ids)
{
    for (uint32_t id = t->oldest; id != NONE; id = at(t, id)->newer)
        *ids++ = id;
    return 0;
}

static int lru_memory_bytes(table_t *t, size_t *size)
{
    *size = t->heap_room * sizeof(waiting_t);
    return 0;
}

/* Does nothing with a prompt. What LRU goes by is touches. */
static void lru_asked(table_t *t, double now, PyObject *hashes)
{
    (void)t, (void)now, (void)hashes;
}

static void lru_answered(table_t *t, double now, PyObject *hash, uint32_t tokens)
{
    (void)t, (void)now, (void)hash, (void)tokens;
}

static void lru_settled(table_t *t)
{
    (void)t;
}

static void lru_ended(table_t *t)
{
    free(t->heap);
}

static const policy_t lru = {
    .inserted = lru_inserted,
    .touched = lru_touched,
    .touched_path = lru_touched_path,
    .unblocked = lru_unblocked,
    .removed = lru_removed,
    .victim = lru_victim,
    .order = lru_order,
    .memory_bytes = lru_memory_bytes,
    .asked = lru_asked,
    .answered = lru_answered,
    .settled = lru_settled,
    .ended = lru_ended,
};

/* Parsing of arguments. Each function returns -1 with an error set if the argument is invalid. */

static int to_number(PyObject *value, long long *number)
{
    int overflow;
    *number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow) {
        PyErr_SetString(PyExc_ValueError, "a number beyond 64 bits; ids, shards and sectors are small");
        return -1;
    }
    return *number == -1 && PyErr_Occurred() ? -1 : 0;
}

static inline int is_used(const table_t *t, uint32_t id)
{
    return id - 1 < t->next_id - 1 && (at(t, id)->flags & USED); /* 0 is none */
}

static int no_record(long long id)
{
    PyErr_Format(PyExc_ValueError, "no record has the id %lld; it was freed or never made", id);
    return -1;
}

static int to_id(const table_t *t, PyObject *value, uint32_t *id)
{
    long long number;
    if (to_number(value, &number) < 0)
        return -1;
    if (number < 1 || number >= MAX_RECORDS || !is_used(t, (uint32_t)number))
        return no_record(number);
    *id = (uint32_t)number;
    return 0;
}

static int to_shard(const table_t *t, PyObject *value, uint32_t *shard)
{
    long long number;
    if (to_number(value, &number) < 0)
        return -1;
    if (number < 0 || number >= t->shards) {
        PyErr_Format(PyExc_ValueError, "shard %lld is not one of the %u of this table", number, t->shards);
        return -1;
    }
    *shard = (uint32_t)number;
    return 0;
}

static int to_items(PyObject *value, size_t item, const char *what, const uint8_t **data, size_t *count)
{
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(value, &bytes, &size) < 0)
        return -1;
    if ((size_t)size % item) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of %s; each takes %zu", size, what, item);
        return -1;
    }
    *data = (const uint8_t *)bytes;
    *count = (size_t)size / item;
    return 0;
}

/* Parses ids of existing records. */
static int to_ids(const table_t *t, PyObject *value, const uint8_t **data, size_t *count)
{
    if (to_items(value, 4, "ids", data, count) < 0)
        return -1;
    for (size_t i = 0; i < *count; i++) {
        if (i + 8 < *count) {
            uint32_t ahead = read_u32(*data + 4 * (i + 8));
            if (ahead < t->next_id)
                PREFETCH(at(t, ahead));
        }
        uint32_t id = read_u32(*data + 4 * i);
        if (!is_used(t, id))
            return no_record(id);
    }
    return 0;
}

static int to_key(PyObject *value, const uint8_t **key)
{
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(value, &bytes, &size) < 0)
        return -1;
    if (size != KEY_BYTES) {
        PyErr_Format(PyExc_ValueError, "the hash has %zd bytes; a hash has %d", size, KEY_BYTES);
        return -1;
    }
    *key = (const uint8_t *)bytes;
    return 0;
}

static int has_arguments(Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%zd arguments given, %zd wanted", given, wanted);
    return 0;
}

static PyObject *id_or_none(uint32_t id)
{
    return PyLong_FromLongLong(id == NONE ? -1 : (long long)id);
}

/* A policy in Python. An error in a notification is written to standard error, and the table stays consistent. */

/* Ends a notification. */
static void drop_answer(table_t *t, PyObject *answer)
{
    if (!answer)
        PyErr_WriteUnraisable(t->plug);
    Py_XDECREF(answer);
}

static void plugged_inserted(table_t *t, uint32_t id)
{
    const record_t *r = at(t, id);
    uint32_t parent = r->parent == NONE ? 0 : r->parent;
    drop_answer(t, PyObject_CallMethod(t->plug, "inserted", "Iy#I", id, r->key, (Py_ssize_t)KEY_BYTES, parent));
}

/* Appends a row to the list and returns the list, or NULL with an error set. */
static PyObject *append_row(PyObject *rows, uint32_t id)
{
    PyObject *row = rows ? PyLong_FromUnsignedLong(id) : NULL;
    if (rows && (!row || PyList_Append(rows, row) < 0))
        Py_CLEAR(rows);
    Py_XDECREF(row);
    return rows;
}

static void notify_touched(table_t *t, PyObject *rows)
{
    drop_answer(t, rows ? PyObject_CallMethod(t->plug, "touched", "O", rows) : NULL);
    Py_XDECREF(rows);
}

static void plugged_touched(table_t *t, const uint8_t *ids, size_t count)
{
    PyObject *rows = PyList_New(0);
    while (count-- > 0) {
        uint32_t id = read_u32(ids + 4 * count);
        if (at(t, id)->flags & ATTACHED)
            rows = append_row(rows, id);
    }
    notify_touched(t, rows);
}

static void plugged_touched_path(table_t *t, uint32_t id)
{
    PyObject *rows = PyList_New(0);
    for (; id != NONE; id = at(t, id)->parent)
        rows = append_row(rows, id);
    notify_touched(t, rows);
}

static void plugged_unblocked(table_t *t, uint32_t id)
{
    drop_answer(t, PyObject_CallMethod(t->plug, "unblocked", "I", id));
}

static void plugged_removed(table_t *t, uint32_t id)
{
    drop_answer(t, PyObject_CallMethod(t->plug, "removed", "I", id));
}

static int plugged_victim(table_t *t, uint32_t *id)
{
    PyObject *evictable = PyObject_GetAttrString((PyObject *)t, "evictable");
    PyObject *row = evictable ? PyObject_CallMethod(t->plug, "victim", "O", evictable) : NULL;
    long long number;
    int failed = !row || to_number(row, &number) < 0;
    Py_XDECREF(evictable);
    Py_XDECREF(row);
    if (failed)
        return -1;
    *id = number ? (uint32_t)number : NONE;
    if (number && (number < 0 || number >= MAX_RECORDS || !is_used(t, *id) || !is_evictable(at(t, *id)))) {
        PyErr_Format(PyExc_ValueError, "the policy chose record %lld as victim, which is not evictable now", number);
        return -1;
    }
    return 0;
}

static int plugged_order(table_t *t, uint32_t *ids)
{
    uint32_t room = t->attached, count = 0, id;
    int right = 1; /* each record is attached, and was not named before */
    PyObject *order = PyObject_GetIter(t->plug), *row;
    while (order && right && (row = PyIter_Next(order))) {
        right = to_id(t, row, &id) == 0 && (at(t, id)->flags & (ATTACHED | SEEN)) == ATTACHED && count < room;
        if (right) {
            at(t, id)->flags |= SEEN;
            ids[count++] = id;
        }
        Py_DECREF(row);
    }
    Py_XDECREF(order);
    for (uint32_t i = 0; i < count; i++)
        at(t, ids[i])->flags &= ~(uint64_t)SEEN;
    if (PyErr_Occurred())
        return -1;
    if (right && count == room)
        return 0;
    PyErr_Format(PyExc_ValueError, "the policy does not order exactly the %u attached records", room);
    return -1;
}

static int plugged_memory_bytes(table_t *t, size_t *size)
{
    long long number = 0;
    PyObject *answer = PyObject_CallMethod(t->plug, "memory_bytes", NULL);
    int failed = !answer || to_number(answer, &number) < 0;
    Py_XDECREF(answer);
    *size = (size_t)number;
    return failed ? -1 : 0;
}

static void plugged_asked(table_t *t, double now, PyObject *hashes)
{
    drop_answer(t, PyObject_CallMethod(t->plug, "asked", "dO", now, hashes));
}

static const policy_t plugged = {
    .inserted = plugged_inserted,
    .touched = plugged_touched,
    .touched_path = plugged_touched_path,
    .unblocked = plugged_unblocked,
    .removed = plugged_removed,
    .victim = plugged_victim,
    .order = plugged_order,
    .memory_bytes = plugged_memory_bytes,
    .asked = plugged_asked,
    .answered = lru_answered,
    .settled = lru_settled,
    .ended = lru_ended,
};

/* Returns bytes with the first `count` of these ids. */
static PyObject *shortened(PyObject *ids, size_t count)
{
    if (PyBytes_Size(ids) == (Py_ssize_t)(4 * count))
        return ids;
    PyObject *shorter = PyBytes_FromStringAndSize(PyBytes_AsString(ids), (Py_ssize_t)(4 * count));
    Py_DECREF(ids);
    return shorter;
}

/* Methods: the index */

static PyObject *table_match(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    const uint8_t *keys;
    size_t count, found = 0;
    if (to_items(arg, KEY_BYTES, "hashes", &keys, &count) < 0)
        return NULL;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * count));
    if (!result)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(result);
    for (size_t first = 0; first == found && first < count; first += BATCH) {
        /* Memory latency dominates: prefetch all buckets of a batch, then all records, and compare only after that. */
        const uint32_t *buckets[BATCH];
        uint32_t heads[BATCH];
        size_t batch = count - first < BATCH ? count - first : BATCH;
        const uint8_t *batch_keys = keys + first * KEY_BYTES;
        for (size_t i = 0; i < batch; i++) {
            buckets[i] = bucket_of(t, batch_keys + i * KEY_BYTES);
            PREFETCH(buckets[i]);
        }
        for (size_t i = 0; i < batch; i++) {
            heads[i] = *buckets[i];
            if (heads[i] != NONE)
                PREFETCH(at(t, heads[i]));
        }
        for (size_t i = 0; i < batch; i++) {
            uint32_t id = find_from(t, heads[i], batch_keys + i * KEY_BYTES);
            if (id == NONE || at(t, id)->done != t->shards)
                break;
            write_u32(out + 4 * found++, id);
        }
    }
    return shortened(result, found);
}

static PyObject *table_get(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    const uint8_t *key;
    if (to_key(arg, &key) < 0)
        return NULL;
    return id_or_none(find_from(t, *bucket_of(t, key), key));
}

static PyObject *table_insert(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    const uint8_t *key;
    long long number;
    if (!has_arguments(nargs, 2) || to_key(args[0], &key) < 0 || to_number(args[1], &number) < 0)
        return NULL;
    if (find_from(t, *bucket_of(t, key), key) != NONE) {
        PyErr_SetString(PyExc_ValueError, "this hash is in the table already; get it instead");
        return NULL;
    }
    uint32_t parent = NONE;
    if (number != -1) {
        if (to_id(t, args[1], &parent) < 0)
            return NULL;
        if (!(at(t, parent)->flags & ATTACHED)) {
            PyErr_Format(PyExc_ValueError, "parent %u is detached; insert it anew first", parent);
            return NULL;
        }
    }
    uint32_t id = take_id(t);
    if (id == NONE)
        return NULL;
    record_t *r = at(t, id);
    memset(r, 0, sizeof *r);
    memcpy(r->key, key, KEY_BYTES);
    r->flags = USED | ATTACHED;
    r->parent = parent;
    r->first_child = r->next_sibling = r->previous_sibling = NONE;
    t->attached++;
    for (int i = 0; i < BUCKETS_A_RECORD && t->buckets < (uint64_t)BUCKETS_A_RECORD * t->attached; i++)
        split_bucket(t);
    uint32_t *bucket = bucket_of(t, key);
    r->next = *bucket;
    *bucket = id;
    if (parent != NONE) {
        record_t *above = at(t, parent);
        r->next_sibling = above->first_child;
        if (above->first_child != NONE)
            at(t, above->first_child)->previous_sibling = id;
        above->first_child = id;
        above->children++;
    }
    t->policy->inserted(t, id);
    return id_or_none(id);
}

static void leave_parent(table_t *t, uint32_t id)
{
    record_t *r = at(t, id), *above = at(t, r->parent);
    if (r->previous_sibling != NONE)
        at(t, r->previous_sibling)->next_sibling = r->next_sibling;
    else
        above->first_child = r->next_sibling;
    if (r->next_sibling != NONE)
        at(t, r->next_sibling)->previous_sibling = r->previous_sibling;
    above->children--;
}

typedef struct {
    uint32_t *ids;
    size_t count, room;
} list_t;

static int append_id(list_t *list, uint32_t id)
{
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 256;
        uint32_t *grown = realloc(list->ids, room * sizeof(uint32_t));
        if (!grown) {
            PyErr_NoMemory();
            return -1;
        }
        list->ids = grown;
        list->room = room;
    }
    list->ids[list->count++] = id;
    return 0;
}

/* Collects the record and all its descendants, ancestors first, the newest child first. */
static int collect_family(const table_t *t, uint32_t id, list_t *family)
{
    if (append_id(family, id) < 0)
        return -1;
    for (size_t i = 0; i < family->count; i++) {
        uint32_t child = at(t, family->ids[i])->first_child;
        for (; child != NONE; child = at(t, child)->next_sibling)
            if (append_id(family, child) < 0)
                return -1;
    }
    return 0;
}

static PyObject *table_detach(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    uint32_t root;
    if (to_id(t, arg, &root) < 0)
        return NULL;
    if (!(at(t, root)->flags & ATTACHED)) {
        PyErr_Format(PyExc_ValueError, "record %u is detached already", root);
        return NULL;
    }
    list_t family = {NULL, 0, 0};
    PyObject *result = NULL;
    if (collect_family(t, root, &family) == 0)
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * family.count));
    if (result) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(result);
        uint32_t parent = at(t, root)->parent;
        if (parent != NONE)
            leave_parent(t, root);
        t->attached -= (uint32_t)family.count;
        for (size_t i = family.count; i-- > 0; out += 4) {
            uint32_t id = family.ids[i];
            record_t *r = at(t, id);
            write_u32(out, id);
            remove_from_bucket(t, id);
            r->flags = USED;
            r->children = 0;
            r->parent = r->first_child = r->next_sibling = r->previous_sibling = NONE;
            t->policy->removed(t, id);
        }
        if (parent != NONE)
            unblock(t, parent);
    }
    free(family.ids);
    return result;
}

static PyObject *table_free(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    uint32_t id;
    if (to_id(t, arg, &id) < 0)
        return NULL;
    record_t *r = at(t, id);
    if ((r->flags & ATTACHED) || !is_idle(r)) {
        PyErr_Format(PyExc_ValueError, "record %u cannot be freed yet: attached %d, pins %u, filling %d", id,
                     (r->flags & ATTACHED) != 0, r->pins, (int)r->filling);
        return NULL;
    }
    memset(states_of(t, id), EMPTY, t->shards);
    r->flags = 0;
    r->stamp = 0;
    r->next = t->free_head;
    t->free_head = id;
    Py_RETURN_NONE;
}

/* Methods: the order of eviction */

static PyObject *table_touch(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    const uint8_t *ids;
    size_t count;
    if (to_ids(t, arg, &ids, &count) < 0)
        return NULL;
    t->policy->touched(t, ids, count);
    Py_RETURN_NONE;
}

static PyObject *table_touch_path(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    uint32_t id;
    if (to_id(t, arg, &id) < 0)
        return NULL;
    if (at(t, id)->flags & ATTACHED)
        t->policy->touched_path(t, id);
    Py_RETURN_NONE;
}

static PyObject *table_asked(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    const uint8_t *keys;
    size_t count;
    if (!has_arguments(nargs, 2))
        return NULL;
    double now = PyFloat_AsDouble(args[0]);
    if ((now == -1.0 && PyErr_Occurred()) || to_items(args[1], KEY_BYTES, "hashes", &keys, &count) < 0)
        return NULL;
    t->policy->asked(t, now, args[1]);
    Py_RETURN_NONE;
}

static PyObject *table_answered(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    const uint8_t *key;
    long long tokens;
    if (!has_arguments(nargs, 3))
        return NULL;
    double now = PyFloat_AsDouble(args[0]);
    if ((now == -1.0 && PyErr_Occurred()) || to_key(args[1], &key) < 0 || to_number(args[2], &tokens) < 0)
        return NULL;
    if (tokens < 0 || tokens > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "an answer of %lld tokens; give 0 to %u", tokens, UINT32_MAX);
        return NULL;
    }
    t->policy->answered(t, now, args[1], (uint32_t)tokens);
    Py_RETURN_NONE;
}

static PyObject *table_settle(PyObject *self, PyObject *unused)
{
    table_t *t = (table_t *)self;
    (void)unused;
    t->policy->settled(t);
    Py_RETURN_NONE;
}

static PyObject *table_victim(PyObject *self, PyObject *unused)
{
    table_t *t = (table_t *)self;
    uint32_t id;
    (void)unused;
    return t->policy->victim(t, &id) < 0 ? NULL : id_or_none(id);
}

static PyObject *table_evictable(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyBool_FromLong(is_evictable(at(t, id)));
}

/* Methods: pins and fills */

static PyObject *table_pin(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    const uint8_t *ids;
    size_t count;
    if (to_ids(t, arg, &ids, &count) < 0)
        return NULL;
    for (size_t i = 0; i < count; i++) {
        uint32_t id = read_u32(ids + 4 * i);
        if (at(t, id)->pins + (uint64_t)count > UINT32_MAX) {
            PyErr_Format(PyExc_ValueError, "record %u has %u pins, which is too many", id, at(t, id)->pins);
            return NULL;
        }
    }
    for (size_t i = 0; i < count; i++)
        at(t, read_u32(ids + 4 * i))->pins++;
    Py_RETURN_NONE;
}

static PyObject *table_unpin(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    const uint8_t *ids;
    size_t count, done, released = 0;
    if (to_ids(t, arg, &ids, &count) < 0)
        return NULL;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * count));
    if (!result)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(result);
    for (done = 0; done < count && at(t, read_u32(ids + 4 * done))->pins; done++) {
        record_t *r = at(t, read_u32(ids + 4 * done));
        r->pins--;
        if (!(r->flags & ATTACHED) && is_idle(r))
            write_u32(out + 4 * released++, read_u32(ids + 4 * done));
    }
    if (done < count) {
        PyErr_Format(PyExc_ValueError, "record %u has no pin left to remove; unpin what was pinned, once",
                     read_u32(ids + 4 * done));
        while (done-- > 0)
            at(t, read_u32(ids + 4 * done))->pins++;
        Py_DECREF(result);
        return NULL;
    }
    for (size_t i = 0; i < count; i++)
        unblock(t, read_u32(ids + 4 * i));
    return shortened(result, released);
}

static PyObject *table_begin_fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    uint32_t id, shard;
    long long sector;
    if (!has_arguments(nargs, 3) || to_id(t, args[0], &id) < 0 || to_shard(t, args[1], &shard) < 0 ||
        to_number(args[2], &sector) < 0)
        return NULL;
    if (sector < 0 || sector >= NONE) {
        PyErr_Format(PyExc_ValueError, "sector %lld is out of range; sectors are 0 to %u", sector, NONE - 1);
        return NULL;
    }
    record_t *r = at(t, id);
    uint8_t *state = states_of(t, id) + shard;
    if (!(r->flags & ATTACHED) || *state != EMPTY) {
        PyErr_Format(PyExc_ValueError, "shard %u of record %u cannot be filled: attached %d, state %d", shard, id,
                     (r->flags & ATTACHED) != 0, (int)*state);
        return NULL;
    }
    *state = FILLING;
    sectors_of(t, id)[shard] = (uint32_t)sector;
    r->filling++;
    Py_RETURN_NONE;
}

static PyObject *table_end_fill(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    uint32_t id, shard;
    if (!has_arguments(nargs, 3) || to_id(t, args[0], &id) < 0 || to_shard(t, args[1], &shard) < 0)
        return NULL;
    int ok = PyObject_IsTrue(args[2]);
    if (ok < 0)
        return NULL;
    record_t *r = at(t, id);
    uint8_t *state = states_of(t, id) + shard;
    if (*state != FILLING) {
        PyErr_Format(PyExc_ValueError, "shard %u of record %u is not being filled: state %d", shard, id, (int)*state);
        return NULL;
    }
    *state = ok ? DONE : EMPTY;
    r->done += (uint16_t)ok;
    r->filling--;
    if (r->flags & ATTACHED) {
        unblock(t, id);
        return PyLong_FromLong(r->done == t->shards ? COMPLETED : 0);
    }
    return PyLong_FromLong(is_idle(r) ? RELEASED : 0);
}

/* Methods: queries */

static PyObject *table_state(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const table_t *t = (const table_t *)self;
    uint32_t id, shard;
    if (!has_arguments(nargs, 2) || to_id(t, args[0], &id) < 0 || to_shard(t, args[1], &shard) < 0)
        return NULL;
    return PyLong_FromLong(states_of(t, id)[shard]);
}

static PyObject *table_extent(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const table_t *t = (const table_t *)self;
    uint32_t id, shard;
    if (!has_arguments(nargs, 2) || to_id(t, args[0], &id) < 0 || to_shard(t, args[1], &shard) < 0)
        return NULL;
    return id_or_none(states_of(t, id)[shard] == EMPTY ? NONE : sectors_of(t, id)[shard]);
}

static PyObject *table_extents(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    const uint8_t *ids;
    size_t count;
    if (to_ids(t, arg, &ids, &count) < 0)
        return NULL;
    if (count > (size_t)PY_SSIZE_T_MAX / 4 / t->shards)
        return PyErr_NoMemory();
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * count * t->shards));
    if (!result)
        return NULL;
    uint8_t *out = (uint8_t *)PyBytes_AsString(result);
    for (size_t i = 0; i < count; i++) {
        if (i + 8 < count) {
            uint32_t ahead = read_u32(ids + 4 * (i + 8));
            PREFETCH(sectors_of(t, ahead));
            PREFETCH(states_of(t, ahead));
        }
        uint32_t id = read_u32(ids + 4 * i);
        const uint32_t *sectors = sectors_of(t, id);
        const uint8_t *states = states_of(t, id);
        for (uint32_t shard = 0; shard < t->shards; shard++, out += 4)
            write_u32(out, states[shard] == EMPTY ? NONE : sectors[shard]);
    }
    return result;
}

static int has_sector_in(const table_t *t, const uint32_t *sectors, const uint8_t *states, long long first, long long end)
{
    for (uint32_t shard = 0; shard < t->shards; shard++)
        if (states[shard] != EMPTY && sectors[shard] >= first && sectors[shard] < end)
            return 1;
    return 0;
}

static PyObject *table_in_sectors(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const table_t *t = (const table_t *)self;
    long long first, end;
    if (!has_arguments(nargs, 2) || to_number(args[0], &first) < 0 || to_number(args[1], &end) < 0)
        return NULL;
    list_t found = {NULL, 0, 0};
    for (uint32_t id = 1; id < t->next_id; id++)
        if (has_sector_in(t, sectors_of(t, id), states_of(t, id), first, end) && (at(t, id)->flags & ATTACHED) &&
            append_id(&found, id) < 0) {
            free(found.ids);
            return NULL;
        }
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * found.count));
    if (result) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(result);
        for (size_t i = 0; i < found.count; i++)
            write_u32(out + 4 * i, found.ids[i]);
    }
    free(found.ids);
    return result;
}

/* The attached records with first <= id < first + count, and the id to go on with; 0 behind the last record. */
static PyObject *table_numbered(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    const table_t *t = (const table_t *)self;
    long long first, count;
    if (!has_arguments(nargs, 2) || to_number(args[0], &first) < 0 || to_number(args[1], &count) < 0)
        return NULL;
    list_t found = {NULL, 0, 0};
    uint32_t id = first < 1 ? 1 : first < t->next_id ? (uint32_t)first : t->next_id;
    for (long long left = count; id < t->next_id && left > 0; id++, left--)
        if ((at(t, id)->flags & ATTACHED) && append_id(&found, id) < 0) {
            free(found.ids);
            return NULL;
        }
    PyObject *packed = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * found.count));
    if (packed) {
        uint8_t *out = (uint8_t *)PyBytes_AsString(packed);
        for (size_t i = 0; i < found.count; i++)
            write_u32(out + 4 * i, found.ids[i]);
    }
    free(found.ids);
    return packed ? Py_BuildValue("(NI)", packed, id < t->next_id ? (unsigned int)id : 0U) : NULL;
}

/* Returns i, even, of the range bounds[i] <= sector < bounds[i + 1] that contains this sector, or -1. */
static long long range_of(const uint8_t *bounds, size_t count, uint32_t sector)
{
    size_t low = 0, high = count; /* bounds before low are <= sector, bounds from high on are greater */
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (read_u32(bounds + 4 * middle) <= sector)
            low = middle + 1;
        else
            high = middle;
    }
    return low % 2 ? (long long)(low - 1) : -1;
}

/* Marks the attached records that are in use, and all their ancestors. */
static void mark_held(const table_t *t)
{
    for (uint32_t id = 1; id < t->next_id; id++) /* in the order of memory, which is faster than the policy's order */
        if ((at(t, id)->flags & ATTACHED) && !is_idle(at(t, id)))
            for (uint32_t up = id; up != NONE && !(at(t, up)->flags & SEEN); up = at(t, up)->parent)
                at(t, up)->flags |= SEEN;
}

/* Writes to `found` two numbers for each range, as `survey` returns them. */
static void look_through(const table_t *t, const uint32_t *order, uint32_t records, const uint8_t *bounds, size_t count,
                         uint32_t *found)
{
    mark_held(t);
    for (uint32_t i = 0; i < records; i++) {
        if (i + 8 < records) {
            PREFETCH(at(t, order[i + 8]));
            PREFETCH(states_of(t, order[i + 8]));
            PREFETCH(sectors_of(t, order[i + 8]));
        }
        record_t *r = at(t, order[i]);
        const uint8_t *states = states_of(t, order[i]);
        uint32_t place = i + 1;
        if (r->flags & SEEN) { /* held */
            place = NONE;
            r->flags &= ~(uint64_t)SEEN;
        }
        for (uint32_t shard = 0; shard < t->shards; shard++) {
            long long range = states[shard] == EMPTY ? -1 : range_of(bounds, count, sectors_of(t, order[i])[shard]);
            if (range < 0)
                continue;
            found[range]++;
            found[range + 1] = found[range + 1] == NONE ? NONE : place;
        }
    }
}

static PyObject *table_survey(PyObject *self, PyObject *arg)
{
    table_t *t = (table_t *)self;
    const uint8_t *bounds;
    size_t count;
    if (to_items(arg, 4, "bounds", &bounds, &count) < 0)
        return NULL;
    int ascending = count % 2 == 0;
    for (size_t i = 1; i < count; i++)
        ascending &= read_u32(bounds + 4 * (i - 1)) <= read_u32(bounds + 4 * i);
    if (!ascending) {
        PyErr_Format(PyExc_ValueError, "%zu bounds of ranges; give pairs, ascending", count);
        return NULL;
    }
    uint32_t records = t->attached;
    uint32_t *found = calloc(count + 1, sizeof(uint32_t)), *order = malloc(((size_t)records + 1) * sizeof(uint32_t));
    PyObject *result = found && order ? PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(4 * count)) : PyErr_NoMemory();
    if (result && t->policy->order(t, order) < 0)
        Py_CLEAR(result);
    if (result) {
        look_through(t, order, records, bounds, count, found);
        uint8_t *out = (uint8_t *)PyBytes_AsString(result);
        for (size_t i = 0; i < count; i++)
            write_u32(out + 4 * i, found[i]);
    }
    free(found);
    free(order);
    return result;
}

static PyObject *table_key(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    if (to_id(t, arg, &id) < 0)
        return NULL;
    return PyBytes_FromStringAndSize((const char *)at(t, id)->key, KEY_BYTES);
}

static PyObject *table_parent(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : id_or_none(at(t, id)->parent);
}

static PyObject *table_children(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyLong_FromUnsignedLong(at(t, id)->children);
}

static PyObject *table_only_child(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    if (to_id(t, arg, &id) < 0)
        return NULL;
    const record_t *r = at(t, id);
    return PyLong_FromLongLong(r->children == 1 ? (long long)r->first_child : -1);
}

static PyObject *table_pins(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyLong_FromUnsignedLong(at(t, id)->pins);
}

static PyObject *table_filling(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyLong_FromUnsignedLong(at(t, id)->filling);
}

static PyObject *table_complete(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyBool_FromLong(at(t, id)->done == t->shards);
}

static PyObject *table_attached(PyObject *self, PyObject *arg)
{
    const table_t *t = (const table_t *)self;
    uint32_t id;
    return to_id(t, arg, &id) < 0 ? NULL : PyBool_FromLong((at(t, id)->flags & ATTACHED) != 0);
}

static Py_ssize_t table_length(PyObject *self)
{
    return (Py_ssize_t)((table_t *)self)->attached;
}

static PyObject *table_memory_bytes(PyObject *self, PyObject *unused)
{
    table_t *t = (table_t *)self;
    size_t order;
    (void)unused;
    if (t->policy->memory_bytes(t, &order) < 0)
        return NULL;
    return PyLong_FromSize_t(sizeof *t + t->segment_count * segment_size(t) + t->segment_room * sizeof(void *) +
                             t->piece_count * (sizeof(uint32_t) << BUCKET_SHIFT) + t->piece_room * sizeof(void *) + order);
}

/* Construction and destruction */

static int draw_seed(table_t *t)
{
    PyObject *os = PyImport_ImportModule("os");
    PyObject *random = os ? PyObject_CallMethod(os, "urandom", "i", (int)sizeof t->seed) : NULL;
    char *bytes;
    Py_ssize_t size;
    int failed = !random || PyBytes_AsStringAndSize(random, &bytes, &size) < 0;
    if (!failed)
        memcpy(t->seed, bytes, sizeof t->seed);
    Py_XDECREF(random);
    Py_XDECREF(os);
    return failed ? -1 : 0;
}

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    PyObject *value, *plug = Py_None;
    long long shards;
    if (named && PyDict_Size(named) > 0) {
        PyErr_SetString(PyExc_TypeError, "Table takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "O|O:Table", &value, &plug) || to_number(value, &shards) < 0)
        return NULL;
    if (shards < 1 || shards > MAX_SHARDS) {
        PyErr_Format(PyExc_ValueError, "%lld shards a chunk; give 1 to %d", shards, MAX_SHARDS);
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    table_t *t = (table_t *)allocate(type, 0); /* zeroed */
    if (!t)
        return NULL;
    t->policy = plug == Py_None ? &lru : &plugged;
    if (lmcache_is_habits(plug)) {
        t->learned = lmcache_new_learned(plug);
        if (!t->learned) {
            Py_DECREF(t);
            return NULL;
        }
        t->policy = &lmcache_learned;
    }
    Py_INCREF(plug);
    t->plug = plug;
    t->next_id = 1;
    t->shards = (uint32_t)shards;
    t->shift = SEGMENT_SHIFT;
    while (t->shift > 0 && segment_size(t) > SEGMENT_BYTES)
        t->shift--;
    t->free_head = t->oldest = t->newest = t->cursor = NONE;
    t->buckets = 1u << BUCKET_SHIFT;
    t->low_mask = t->buckets - 1;
    if (draw_seed(t) < 0 || (add_piece(t) < 0 && PyErr_NoMemory() == NULL)) {
        Py_DECREF(t);
        return NULL;
    }
    return (PyObject *)t;
}

static void table_dealloc(PyObject *self)
{
    table_t *t = (table_t *)self;
    PyTypeObject *type = Py_TYPE(self);
    for (size_t i = 0; i < t->segment_count; i++)
        free(t->segments[i]);
    for (size_t i = 0; i < t->piece_count; i++)
        free(t->pieces[i]);
    free(t->segments);
    free(t->pieces);
    if (t->policy)
        t->policy->ended(t);
    Py_XDECREF(t->plug);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define ONE(name) {#name, table_##name, METH_O, NULL}
#define NOTHING(name) {#name, table_##name, METH_NOARGS, NULL}
#define SEVERAL(name) {#name, (PyCFunction)(void (*)(void))table_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    ONE(match),         ONE(get),           SEVERAL(insert),    ONE(detach),    ONE(free),       ONE(touch),
    SEVERAL(asked),     NOTHING(settle),    SEVERAL(answered),  ONE(touch_path), NOTHING(victim), ONE(evictable),
    ONE(pin),           ONE(unpin),         SEVERAL(begin_fill), SEVERAL(end_fill), SEVERAL(state), SEVERAL(extent),
    ONE(extents),       ONE(key),           SEVERAL(in_sectors), SEVERAL(numbered),
    ONE(parent),        ONE(children),      ONE(only_child),    ONE(pins),          ONE(filling),   ONE(complete),
    ONE(attached),      NOTHING(memory_bytes), ONE(survey),     {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Table(shards[, policy]): the index of one space; see lmcache/_native.pyi."},
    {Py_tp_new, table_new},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, methods},
    {Py_sq_length, table_length},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "lmcache._native.Table",
    .basicsize = sizeof(table_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

int lmcache_add_table(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&type_spec);
    if (!type)
        return -1;
    int added = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return added;
}
