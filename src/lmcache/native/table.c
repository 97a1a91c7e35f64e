/* The type `Table`: the index of one space. lmcache/_native.pyi documents every method; PyTable of tests/py_table.py does the
 * same, and tests compare the two. This comment describes the data structure.
 *
 * Records lie in segments that never move, so the table grows without a pause. A record has 64 bytes, one cache line; the
 * sectors and states of all shards, 5 bytes a shard, follow the records of a segment.
 *
 * hashed.h has the hash table.
 *
 * A policy, a `policy_t` here, decides the order of eviction: `lmcache_lru` (lru.c) goes by the last use, `lmcache_learned` (learned.c)
 * goes by what was learned from earlier prompts, and `lmcache_plugged` (plugged.c) calls an object in Python. The table itself decides which records are evictable.
 */
#include "arguments.h"
#include "habits.h"
#include "learned.h"

static inline uint32_t *segment_sectors(const table_t *t, size_t segment)
{
    return (uint32_t *)(t->segments.all[segment] + segment_records(t) * sizeof(record_t));
}

static inline uint8_t *segment_states(const table_t *t, size_t segment)
{
    return (uint8_t *)(segment_sectors(t, segment) + segment_records(t) * t->shards);
}

static inline uint32_t *sectors_of(const table_t *t, uint32_t id)
{
    return segment_sectors(t, id >> t->segments.shift) + (id & (segment_records(t) - 1)) * t->shards;
}

static inline uint8_t *states_of(const table_t *t, uint32_t id)
{
    return segment_states(t, id >> t->segments.shift) + (id & (segment_records(t) - 1)) * t->shards;
}

static size_t segment_size(const table_t *t)
{
    size_t size = segment_records(t) * (sizeof(record_t) + (size_t)5 * t->shards);
    return (size + 63) & ~(size_t)63;
}

/* Returns an unused id, or NONE with an error set. The record is not initialised. */
static uint32_t take_id(table_t *t)
{
    if (t->free_head != NONE) {
        uint32_t id = t->free_head;
        t->free_head = at(t, id)->keyed.next;
        return id;
    }
    if (t->next_id == MAX_RECORDS) {
        PyErr_Format(PyExc_ValueError, "the table is full: %u records; free some first", MAX_RECORDS);
        return NONE;
    }
    while (t->next_id >> t->segments.shift >= t->segments.count) {
        if (add_segment(&t->segments, segment_size(t)) < 0) {
            PyErr_NoMemory();
            return NONE;
        }
        memset(segment_states(t, t->segments.count - 1), EMPTY, segment_records(t) * t->shards);
    }
    return t->next_id++;
}

/* Evictability */

/* Reports the record to the policy if it has become evictable. */
static inline void unblock(table_t *t, uint32_t id)
{
    if (is_evictable(at(t, id)))
        t->policy->unblocked(t, id);
}

/* Parsing of arguments, as in arguments.h */

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
            buckets[i] = bucket_of(&t->hashed, batch_keys + i * KEY_BYTES);
            PREFETCH(buckets[i]);
        }
        for (size_t i = 0; i < batch; i++) {
            heads[i] = *buckets[i];
            if (heads[i] != NONE)
                PREFETCH(at(t, heads[i]));
        }
        for (size_t i = 0; i < batch; i++) {
            uint32_t id = find_from(&t->segments, sizeof(record_t), heads[i], batch_keys + i * KEY_BYTES);
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
    return id_or_none(find(t, key));
}

static PyObject *table_insert(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    table_t *t = (table_t *)self;
    const uint8_t *key;
    long long number;
    if (!has_arguments(nargs, 2) || to_key(args[0], &key) < 0 || to_number(args[1], &number) < 0)
        return NULL;
    if (find(t, key) != NONE) {
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
    memcpy(r->keyed.key, key, KEY_BYTES);
    r->flags = USED | ATTACHED;
    r->parent = parent;
    r->first_child = r->next_sibling = r->previous_sibling = NONE;
    t->attached++;
    add_hashed(&t->hashed, &t->segments, sizeof(record_t), id, t->attached);
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
            remove_hashed(&t->hashed, &t->segments, sizeof(record_t), id);
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
    r->keyed.next = t->free_head;
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
    if (t->policy->asked)
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
    if (t->policy->answered)
        t->policy->answered(t, now, args[1], (uint32_t)tokens);
    Py_RETURN_NONE;
}

static PyObject *table_settle(PyObject *self, PyObject *unused)
{
    table_t *t = (table_t *)self;
    (void)unused;
    if (t->policy->settled)
        t->policy->settled(t);
    Py_RETURN_NONE;
}

static PyObject *table_follows_lru(PyObject *self, PyObject *unused)
{
    const table_t *t = (const table_t *)self;
    (void)unused;
    return PyBool_FromLong(t->policy == &lmcache_lru || (t->learned && lmcache_learned_leaves_it_to_lru(t->learned)));
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
    return PyBytes_FromStringAndSize((const char *)at(t, id)->keyed.key, KEY_BYTES);
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
    return PyLong_FromSize_t(sizeof *t + t->segments.count * segment_size(t) + t->segments.room * sizeof(void *) +
                             hashed_memory(&t->hashed) + order);
}

/* Construction and destruction */

static int draw_seed(table_t *t)
{
    PyObject *os = PyImport_ImportModule("os");
    PyObject *random = os ? PyObject_CallMethod(os, "urandom", "i", (int)sizeof t->hashed.seed) : NULL;
    char *bytes;
    Py_ssize_t size;
    int failed = !random || PyBytes_AsStringAndSize(random, &bytes, &size) < 0;
    if (!failed)
        memcpy(t->hashed.seed, bytes, sizeof t->hashed.seed);
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
    if (draw_seed(t) < 0) {
        Py_DECREF(t);
        return NULL;
    }
    t->policy = plug == Py_None ? &lmcache_lru : &lmcache_plugged;
    if (lmcache_is_habits(plug)) {
        t->learned = lmcache_new_learned(plug, t->hashed.seed);
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
    t->segments.shift = SEGMENT_SHIFT;
    while (t->segments.shift > 0 && segment_size(t) > SEGMENT_BYTES)
        t->segments.shift--;
    t->free_head = t->oldest = t->newest = t->cursor = NONE;
    if (begin_hashed(&t->hashed) < 0) {
        Py_DECREF(t);
        return PyErr_NoMemory();
    }
    return (PyObject *)t;
}

static void table_dealloc(PyObject *self)
{
    table_t *t = (table_t *)self;
    PyTypeObject *type = Py_TYPE(self);
    free_segments(&t->segments);
    free_hashed(&t->hashed);
    if (t->policy && t->policy->ended)
        t->policy->ended(t);
    free(t->heap);
    Py_XDECREF(t->plug);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define ONE(name) {#name, table_##name, METH_O, NULL}
#define NOTHING(name) {#name, table_##name, METH_NOARGS, NULL}
#define SEVERAL(name) {#name, (PyCFunction)(void (*)(void))table_##name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    ONE(match),         ONE(get),           SEVERAL(insert),    ONE(detach),    ONE(free),       ONE(touch),
    SEVERAL(asked),     NOTHING(settle),    SEVERAL(answered),  ONE(touch_path), NOTHING(victim), NOTHING(follows_lru), ONE(evictable),
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
    return lmcache_add_type(module, &type_spec, NULL);
}
