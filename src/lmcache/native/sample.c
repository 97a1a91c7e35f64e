/* The type `Sample`: a sample of the chunks that lookups use, from which hit ratios of other sizes of L1 are estimated.
 * lmcache/_native.pyi documents the methods, and lmcache/sizing/curve.py what is made of the numbers.
 *
 * Spatially hashed sampling with a sample of fixed size (SHARDS: Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST
 * 2015): a chunk is in the sample if its hash, mixed, is below a threshold, so of a chunk all uses are seen or none. When the sample
 * is full, the threshold is lowered. The sampled chunks are kept in their order of use. The bytes of those used since a chunk's last
 * use, divided by the sampling rate, are its stack distance: LRU with as much memory still has the chunk.
 *
 * The order is an array of slots, a new one for each use, with a Fenwick tree of the bytes in them. When the slots are used up,
 * they are numbered anew. Chunks beyond the largest size of interest leave the sample.
 *
 * How many chunks are new is counted among all chunks, by a HyperLogLog of which each change adds the inverse of its probability
 * (Ting, "Streamed Approximate Counting of Distinct Elements", KDD 2014), so that it is known in which call they came.
 */
#include "native.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX
#define KEY_BYTES 16
#define MAX_SIZES 16
#define GROUPS 8 /* disjoint parts of the sample, from whose differences its error follows */
#define REGISTER_BITS 16
#define REGISTERS (1u << REGISTER_BITS)
#define EAGER 4 /* the first rate is so much higher than what the largest size would need if it was full */

typedef struct {
    uint64_t key;
    double bytes; /* 0 while it is not stored: it has been looked up, and keeps its place in the order */
    uint32_t value; /* compared with the threshold */
    uint32_t slot;
    uint32_t next; /* in the chain of its bucket, or on the free list */
} entry_t;

typedef struct {
    PyObject_HEAD
    uint32_t most, count, free_head, buckets; /* buckets, slots: powers of two */
    uint32_t slots, first_slot, next_slot;
    uint64_t threshold; /* of 2^32; 0 until the first chunk is put in */
    entry_t *entries;
    uint32_t *heads, *in_slot;
    double *tree; /* [slots + 1] */
    double bytes; /* of all chunks in the sample */
    uint32_t size_count;
    double sizes[MAX_SIZES]; /* ascending */
    double asked, found, fresh, change; /* found: by the server; change: the probability that a new chunk changes a register */
    double seen[GROUPS], hit[GROUPS][MAX_SIZES];
    uint8_t *registers;
} sample_t;

static inline uint64_t mixed(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static inline uint64_t key_at(const uint8_t *hashes, Py_ssize_t chunk)
{
    uint64_t a, b;
    memcpy(&a, hashes + chunk * KEY_BYTES, 8);
    memcpy(&b, hashes + chunk * KEY_BYTES + 8, 8);
    return mixed(a + 0x9e3779b97f4a7c15u) ^ b;
}

static inline uint32_t value_of(uint64_t key)
{
    return (uint32_t)(mixed(key) >> 32);
}

static inline double rate(const sample_t *s)
{
    return (double)s->threshold / 4294967296.0;
}

/* The order of use */

static inline void add_at(sample_t *s, uint32_t slot, double bytes)
{
    for (uint32_t at = slot + 1; at <= s->slots; at += at & -at)
        s->tree[at] += bytes;
}

static inline double bytes_after(const sample_t *s, uint32_t slot)
{
    double before = 0;
    for (uint32_t at = slot + 1; at; at &= at - 1)
        before += s->tree[at];
    return s->bytes - before;
}

/* Numbers the slots anew, without gaps. */
static void renumber(sample_t *s)
{
    uint32_t count = 0;
    memset(s->tree, 0, (s->slots + 1) * sizeof(double));
    s->bytes = 0;
    for (uint32_t slot = s->first_slot; slot < s->next_slot; slot++) {
        uint32_t entry = s->in_slot[slot];
        if (entry == NONE)
            continue;
        s->in_slot[count] = entry;
        s->entries[entry].slot = count;
        s->tree[++count] = s->entries[entry].bytes;
        s->bytes += s->entries[entry].bytes;
    }
    for (uint32_t at = 1; at <= s->slots; at++) {
        uint32_t above = at + (at & -at);
        if (above <= s->slots)
            s->tree[above] += s->tree[at];
    }
    s->first_slot = 0;
    s->next_slot = count;
}

static void take_slot(sample_t *s, uint32_t entry)
{
    if (s->next_slot == s->slots)
        renumber(s);
    s->entries[entry].slot = s->next_slot;
    s->in_slot[s->next_slot] = entry;
    add_at(s, s->next_slot++, s->entries[entry].bytes);
    s->bytes += s->entries[entry].bytes;
}

static void leave_slot(sample_t *s, uint32_t entry)
{
    add_at(s, s->entries[entry].slot, -s->entries[entry].bytes);
    s->in_slot[s->entries[entry].slot] = NONE;
    s->bytes -= s->entries[entry].bytes;
}

/* The chunks in the sample */

static inline uint32_t *link_to(sample_t *s, uint64_t key)
{
    uint32_t *link = &s->heads[key & (s->buckets - 1)];
    while (*link != NONE && s->entries[*link].key != key)
        link = &s->entries[*link].next;
    return link;
}

static void remove_entry(sample_t *s, uint32_t entry)
{
    leave_slot(s, entry);
    *link_to(s, s->entries[entry].key) = s->entries[entry].next;
    s->entries[entry].next = s->free_head;
    s->free_head = entry;
    s->count--;
}

static void remove_oldest(sample_t *s)
{
    while (s->first_slot < s->next_slot && s->in_slot[s->first_slot] == NONE)
        s->first_slot++;
    if (s->first_slot < s->next_slot)
        remove_entry(s, s->in_slot[s->first_slot]);
}

static void lower_threshold(sample_t *s)
{
    s->threshold -= s->threshold / 4;
    for (uint32_t slot = s->first_slot; slot < s->next_slot; slot++)
        if (s->in_slot[slot] != NONE && s->entries[s->in_slot[slot]].value >= s->threshold)
            remove_entry(s, s->in_slot[slot]);
    renumber(s); /* also takes back what has been lost by rounding */
}

/* Notes the use of a chunk, which is put in if it is new. present: whether it is stored; else it may be. */
static void touch(sample_t *s, uint64_t key, uint32_t value, int present, double bytes)
{
    uint32_t entry = *link_to(s, key);
    if (entry != NONE) {
        leave_slot(s, entry);
        if (present || s->entries[entry].bytes > 0)
            s->entries[entry].bytes = bytes;
        take_slot(s, entry);
        return;
    }
    while (s->count == s->most)
        lower_threshold(s);
    if (value >= s->threshold)
        return;
    entry = s->free_head;
    s->free_head = s->entries[entry].next;
    uint32_t *head = &s->heads[key & (s->buckets - 1)];
    s->entries[entry] = (entry_t){.key = key, .bytes = present ? bytes : 0, .value = value, .next = *head};
    *head = entry;
    s->count++;
    take_slot(s, entry);
    double most = s->sizes[s->size_count - 1] * rate(s);
    while (s->count > 1 && s->bytes > most + bytes)
        remove_oldest(s);
}

/* The number of chunks that this one adds to all that there have been: 0, or the inverse of the probability of not being 0. */
static double news(sample_t *s, uint64_t key)
{
    uint64_t hash = mixed(key ^ 0xd6e8feb86659fd93u), rest = hash >> REGISTER_BITS;
    uint8_t *known = &s->registers[hash & (REGISTERS - 1)], rank = 1;
    while (rank < 48 && !(rest & 1)) {
        rest >>= 1;
        rank++;
    }
    if (rank <= *known)
        return 0;
    double adds = 1 / s->change;
    s->change -= (1.0 / (double)(1ull << *known) - 1.0 / (double)(1ull << rank)) / REGISTERS;
    *known = rank;
    return adds;
}

static int arguments_of(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, uint8_t **hashes, Py_ssize_t *chunks)
{
    char *bytes;
    Py_ssize_t size;
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments, not %zd", wanted, given);
        return -1;
    }
    if (PyBytes_AsStringAndSize(args[0], &bytes, &size) < 0)
        return -1;
    if (size % KEY_BYTES) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of hashes; each takes 16", size);
        return -1;
    }
    *hashes = (uint8_t *)bytes;
    *chunks = size / KEY_BYTES;
    return 0;
}

static double chunk_bytes_of(sample_t *s, PyObject *given)
{
    double bytes = PyFloat_AsDouble(given);
    if (bytes <= 0 && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "a chunk takes more than 0 bytes");
    if (!s->threshold && bytes > 0) {
        double first = EAGER * s->most * bytes / s->sizes[s->size_count - 1];
        s->threshold = first < 1 ? (uint64_t)(first * 4294967296.0) : 1ull << 32;
        if (s->threshold < 1024)
            s->threshold = 1024;
    }
    return bytes;
}

static PyObject *sample_looked_up(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    sample_t *s = (sample_t *)self;
    uint8_t *hashes;
    Py_ssize_t chunks;
    if (arguments_of(args, count, 3, &hashes, &chunks) < 0)
        return NULL;
    Py_ssize_t found = PyLong_AsSsize_t(args[1]);
    double bytes = chunk_bytes_of(s, args[2]), nearest = -1, scale = 1 / rate(s);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS /* only the thread that owns the sample calls its methods */
    s->asked += (double)chunks;
    s->found += (double)found;
    for (Py_ssize_t at = chunks; at-- > 0;) {
        uint64_t key = key_at(hashes, at);
        s->fresh += news(s, key);
        uint32_t value = value_of(key), entry;
        if (value >= s->threshold)
            continue;
        uint32_t group = key % GROUPS;
        s->seen[group] += scale;
        if ((entry = *link_to(s, key)) == NONE || s->entries[entry].bytes <= 0)
            continue;
        /* Whoever has a chunk has used all those before it since. */
        double distance = bytes_after(s, s->entries[entry].slot) * scale + bytes;
        if (nearest < 0 || distance < nearest)
            nearest = distance;
        for (uint32_t size = s->size_count; size-- > 0 && nearest <= s->sizes[size];)
            s->hit[group][size] += scale;
    }
    for (Py_ssize_t at = chunks; at-- > 0;) {
        uint64_t key = key_at(hashes, at);
        uint32_t value = value_of(key);
        if (value < s->threshold)
            touch(s, key, value, at < found, bytes);
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *sample_stored(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    sample_t *s = (sample_t *)self;
    uint8_t *hashes;
    Py_ssize_t chunks;
    if (arguments_of(args, count, 2, &hashes, &chunks) < 0)
        return NULL;
    double bytes = chunk_bytes_of(s, args[1]);
    if (PyErr_Occurred())
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t at = chunks; at-- > 0;) {
        uint64_t key = key_at(hashes, at);
        uint32_t value = value_of(key);
        news(s, key);
        if (value >= s->threshold)
            continue;
        uint32_t entry = *link_to(s, key);
        if (entry == NONE) {
            touch(s, key, value, 1, bytes);
        } else if (s->entries[entry].bytes <= 0) { /* stays behind the chunks before it, which were looked up with it */
            s->entries[entry].bytes = bytes;
            add_at(s, s->entries[entry].slot, bytes);
            s->bytes += bytes;
        }
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *sample_clear(PyObject *self, PyObject *ignored)
{
    sample_t *s = (sample_t *)self;
    while (s->count)
        remove_oldest(s);
    s->first_slot = s->next_slot = 0;
    Py_RETURN_NONE;
}

/* A list of `count` floats; NULL with an error set. */
static PyObject *floats(const double *values, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t at = 0; list && at < count; at++) {
        PyObject *value = PyFloat_FromDouble(values[at]);
        if (!value || PyList_SetItem(list, at, value) < 0)
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *sample_counts(PyObject *self, PyObject *ignored)
{
    sample_t *s = (sample_t *)self;
    double first[] = {s->asked, s->found, s->fresh, s->threshold ? rate(s) : 1, s->count};
    PyObject *seen = floats(s->seen, GROUPS), *hit = PyList_New(GROUPS), *head = floats(first, 5);
    for (Py_ssize_t group = 0; hit && group < GROUPS; group++) {
        PyObject *row = floats(s->hit[group], s->size_count);
        if (!row || PyList_SetItem(hit, group, row) < 0)
            Py_CLEAR(hit);
    }
    PyObject *result = seen && hit && head ? PyTuple_Pack(3, head, seen, hit) : NULL;
    Py_XDECREF(seen);
    Py_XDECREF(hit);
    Py_XDECREF(head);
    return result;
}

static PyObject *sample_memory_bytes(PyObject *self, PyObject *ignored)
{
    sample_t *s = (sample_t *)self;
    size_t size = sizeof(*s) + s->most * sizeof(entry_t) + (s->buckets + s->slots) * sizeof(uint32_t);
    return PyLong_FromSize_t(size + (s->slots + 1) * sizeof(double) + REGISTERS);
}

static void sample_dealloc(PyObject *self)
{
    sample_t *s = (sample_t *)self;
    PyTypeObject *type = Py_TYPE(self);
    free(s->entries);
    free(s->heads);
    free(s->in_slot);
    free(s->tree);
    free(s->registers);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *sample_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    unsigned int most;
    PyObject *sizes;
    static char *names[] = {"", "", NULL};
    if (!PyArg_ParseTupleAndKeywords(args, named, "IO", names, &most, &sizes))
        return NULL;
    Py_ssize_t count = PySequence_Size(sizes);
    if (count < 0)
        return NULL;
    if (most < 16 || most > 1u << 24 || count < 1 || count > MAX_SIZES) {
        PyErr_Format(PyExc_ValueError, "16 to 2^24 chunks and 1 to %d sizes, not %u and %zd", MAX_SIZES, most, count);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    sample_t *s = (sample_t *)alloc(type, 0);
    if (!s)
        return NULL;
    s->size_count = (uint32_t)count;
    for (Py_ssize_t at = 0; at < count; at++) {
        PyObject *size = PySequence_GetItem(sizes, at);
        s->sizes[at] = size ? PyFloat_AsDouble(size) : -1;
        Py_XDECREF(size);
        if (!PyErr_Occurred() && s->sizes[at] <= (at ? s->sizes[at - 1] : 0))
            PyErr_SetString(PyExc_ValueError, "the sizes must be ascending");
        if (PyErr_Occurred()) {
            Py_DECREF(s);
            return NULL;
        }
    }
    s->most = most;
    for (s->slots = 16; s->slots < 2 * most;)
        s->slots *= 2;
    s->buckets = s->slots;
    s->change = 1;
    s->entries = malloc(most * sizeof(entry_t));
    s->heads = malloc(s->buckets * sizeof(uint32_t));
    s->in_slot = malloc(s->slots * sizeof(uint32_t));
    s->tree = calloc(s->slots + 1, sizeof(double));
    s->registers = calloc(REGISTERS, 1);
    if (!s->entries || !s->heads || !s->in_slot || !s->tree || !s->registers) {
        Py_DECREF(s);
        return PyErr_NoMemory();
    }
    memset(s->heads, 0xff, s->buckets * sizeof(uint32_t));
    for (uint32_t at = 0; at < most; at++)
        s->entries[at].next = at + 1 < most ? at + 1 : NONE;
    return (PyObject *)s;
}

static PyMethodDef methods[] = {
    {"looked_up", (PyCFunction)(void (*)(void))sample_looked_up, METH_FASTCALL, NULL},
    {"stored", (PyCFunction)(void (*)(void))sample_stored, METH_FASTCALL, NULL},
    {"clear", sample_clear, METH_NOARGS, NULL},
    {"counts", sample_counts, METH_NOARGS, NULL},
    {"memory_bytes", sample_memory_bytes, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Sample(most, sizes): a sample of the chunks that lookups use; see lmcache/_native.pyi."},
    {Py_tp_new, sample_new},
    {Py_tp_dealloc, sample_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "lmcache._native.Sample",
    .basicsize = sizeof(sample_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

int lmcache_add_sample(PyObject *module)
{
    return lmcache_add_type(module, &type_spec, NULL);
}
