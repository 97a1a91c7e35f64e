/* Hands the pieces of a copy between a device's paged KV and extents to the driver, one after the other, without Python.
 *
 * From Python a piece costs six calls and a tenth of a millisecond, in which the engine's own threads wait for the GIL. The
 * driver's functions are passed as addresses (CUDA's and HIP's take the same parameters), so the build needs no driver.
 */
#include "native.h"

enum { MAX_PLACES = 64, KERNEL_PARAMETERS = 6, SPARE_PARAMETERS = 4 };

/* The fields that describe a ring, then those of one copy or of some of its planes. The structs here and the NumPy layouts of
 * lmcache.transfer.gpu.launch are both made from these lists, so they cannot differ. */
/* clang-format off */
#define RING_NUMBERS(X)                                                                         \
    X(launch) X(upload) X(download) X(record) X(wait) /* addresses of the driver's functions */ \
    X(kernel) X(threads) X(shared_bytes)                                                        \
    X(kernels) X(copies) /* streams */                                                          \
    X(to_host)                                                                                  \
    X(bases) X(ring) X(places) X(place_bytes)                                                   \
    X(plane_bytes) X(word_bytes)                                                                \
    X(chunk_tokens) X(tile_tokens) X(row_tiles)                                                 \
    X(yield_bytes) X(registration_bytes)                                                        \
    X(pieces_begun) X(unyielded_bytes) /* kept from copy to copy */
#define COPY_NUMBERS(X)                                                                         \
    X(runs) X(run_count) /* int64 [extent offset, first token, tokens, token in extent] */      \
    X(base)                                                                                     \
    X(registered_from) /* where registrations with the driver begin; 0: base is not registered */ \
    X(blocks) X(meta) /* on the device */                                                       \
    X(table_host) X(table_device) X(table_bytes) /* uploaded before anything else, if not 0 */  \
    X(first_plane) X(end_plane) X(planes_in_piece) X(runs_in_piece)
/* clang-format on */

typedef struct {
    RING_NUMBERS(FIELD)
    int64_t filled[MAX_PLACES], emptied[MAX_PLACES]; /* events */
} Ring;

typedef struct {
    COPY_NUMBERS(FIELD)
} Copy;

typedef int (*LaunchKernel)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                            void **);
typedef int (*Upload)(uint64_t, const void *, size_t, void *);
typedef int (*Download)(void *, uint64_t, size_t, void *);
typedef int (*RecordEvent)(void *, void *);
typedef int (*WaitEvent)(void *, void *, unsigned);

#define POINTER(number) ((void *)(intptr_t)(number))
#define CHECK(call)       \
    do {                  \
        int error = call; \
        if (error)        \
            return error; \
    } while (0)

static int record(const Ring *ring, int64_t event, int64_t stream)
{
    return ((RecordEvent)POINTER(ring->record))(POINTER(event), POINTER(stream));
}

static int wait_event(const Ring *ring, int64_t stream, int64_t event)
{
    return ((WaitEvent)POINTER(ring->wait))(POINTER(stream), POINTER(event), 0);
}

static int launch(const Ring *ring, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes, uint64_t staging)
{
    const Run *runs = POINTER(copy->runs);
    int64_t longest = ring->to_host ? ring->chunk_tokens : 1; /* a store fills complete extents */
    for (int64_t i = first; i < first + count; i++)
        if (runs[i].tokens > longest)
            longest = runs[i].tokens;
    unsigned tiles = (unsigned)((longest + ring->tile_tokens - 1) / ring->tile_tokens * ring->row_tiles);
    uint64_t bases = (uint64_t)ring->bases, blocks = (uint64_t)copy->blocks;
    uint64_t meta = (uint64_t)copy->meta + 24 * (uint64_t)first, none = 0;
    int32_t first_plane = (int32_t)plane, piece_words = (int32_t)(planes * ring->plane_bytes / ring->word_bytes);
    /* Triton appends scratch pointers to a kernel's own parameters; their number depends on its release. */
    void *parameters[KERNEL_PARAMETERS + SPARE_PARAMETERS] = {&bases, &blocks,      &meta,        &staging, &first_plane,
                                                            &piece_words, &none, &none, &none,    &none};
    return ((LaunchKernel)POINTER(ring->launch))(POINTER(ring->kernel), tiles, (unsigned)planes, (unsigned)count,
                                                 (unsigned)ring->threads, 1, 1, (unsigned)ring->shared_bytes,
                                                 POINTER(ring->kernels), parameters, NULL);
}

/* Makes one DMA, or several where it crosses from one registration to the next, since the driver refuses such a copy. */
static int dma(const Ring *ring, const Copy *copy, int64_t offset, int64_t length, uint64_t staged)
{
    while (length > 0) {
        int64_t size = length, address = copy->base + offset;
        if (copy->registered_from) {
            int64_t rest = ring->registration_bytes - (address - copy->registered_from) % ring->registration_bytes;
            size = rest < size ? rest : size;
        }
        if (ring->to_host)
            CHECK(((Download)POINTER(ring->download))(POINTER(address), staged, (size_t)size, POINTER(ring->copies)));
        else
            CHECK(((Upload)POINTER(ring->upload))(staged, POINTER(address), (size_t)size, POINTER(ring->copies)));
        offset += size;
        staged += (uint64_t)size;
        length -= size;
    }
    return 0;
}

/* Transfers the piece's chunks by one DMA each; neighbours in the arena share one. */
static int dmas(const Ring *ring, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes, uint64_t staged)
{
    const Run *runs = (const Run *)POINTER(copy->runs) + first;
    int64_t length = planes * ring->plane_bytes, at = 0;
    while (at < count) {
        int64_t end = at + 1;
        while (end < count && runs[end].extent_offset == runs[end - 1].extent_offset + length)
            end++;
        CHECK(dma(ring, copy, runs[at].extent_offset + plane * ring->plane_bytes, (end - at) * length,
                  staged + (uint64_t)(at * length)));
        at = end;
    }
    return 0;
}

/* Passes planes [plane, plane + planes) of some runs through the next place of the ring, once that place is empty. */
static int piece(Ring *ring, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes)
{
    int64_t place = ring->pieces_begun++ % ring->places, before = (place + ring->places - 1) % ring->places;
    uint64_t staging = (uint64_t)(ring->ring + place * ring->place_bytes);
    ring->unyielded_bytes += planes * ring->plane_bytes * count;
    if (ring->unyielded_bytes > ring->yield_bytes) {
        ring->unyielded_bytes = 0;
        CHECK(wait_event(ring, ring->to_host ? ring->kernels : ring->copies, ring->emptied[before]));
    }
    if (ring->to_host) {
        CHECK(wait_event(ring, ring->kernels, ring->emptied[place]));
        CHECK(launch(ring, copy, first, count, plane, planes, staging));
        CHECK(record(ring, ring->filled[place], ring->kernels));
        CHECK(wait_event(ring, ring->copies, ring->filled[place]));
        CHECK(dmas(ring, copy, first, count, plane, planes, staging));
        return record(ring, ring->emptied[place], ring->copies);
    }
    CHECK(wait_event(ring, ring->copies, ring->emptied[place]));
    CHECK(dmas(ring, copy, first, count, plane, planes, staging));
    CHECK(record(ring, ring->filled[place], ring->copies));
    CHECK(wait_event(ring, ring->kernels, ring->filled[place]));
    CHECK(launch(ring, copy, first, count, plane, planes, staging));
    return record(ring, ring->emptied[place], ring->kernels);
}

static int pieces(Ring *ring, const Copy *copy)
{
    /* The tables go first: DMAs share one copy engine, which serves one queue for as long as that queue need not wait. */
    if (copy->table_bytes)
        CHECK(((Upload)POINTER(ring->upload))((uint64_t)copy->table_device, POINTER(copy->table_host),
                                              (size_t)copy->table_bytes, POINTER(ring->kernels)));
    for (int64_t first = 0; first < copy->run_count; first += copy->runs_in_piece)
        for (int64_t plane = copy->first_plane; plane < copy->end_plane; plane += copy->planes_in_piece) {
            int64_t count = copy->run_count - first, planes = copy->end_plane - plane;
            CHECK(piece(ring, copy, first, count < copy->runs_in_piece ? count : copy->runs_in_piece, plane,
                        planes < copy->planes_in_piece ? planes : copy->planes_in_piece));
        }
    return 0;
}

static PyObject *launch_copy(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[4];
    int error;
    (void)module;
    if (lmcache_integers("launch_copy", args, nargs, n, 4) < 0)
        return NULL;
    Ring *ring = POINTER(n[0]);
    const Copy *copy = POINTER(n[2]);
    if (n[1] != sizeof *ring || n[3] != sizeof *copy) {
        PyErr_SetString(PyExc_ValueError, "the ring or the copy has another layout than this native module's");
        return NULL;
    }
    if (ring->places < 1 || ring->places > MAX_PLACES || copy->planes_in_piece < 1 || copy->runs_in_piece < 1) {
        PyErr_SetString(PyExc_ValueError, "a ring needs 1 to 64 places, and a piece at least one plane and run");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    error = pieces(ring, copy);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error);
}

PyMethodDef lmcache_device_methods[] = {
    {"launch_copy", (PyCFunction)(void (*)(void))launch_copy, METH_FASTCALL,
     "launch_copy(ring, ring_bytes, copy, copy_bytes) -> int\n\n"
     "Hand all pieces of a copy to the driver. ring and copy are addresses of structs in this module's `layouts`. The calling\n"
     "thread's device must be the ring's. Return the driver's error, 0 for none; the pieces before it are in flight."},
    {NULL, NULL, 0, NULL},
};

/* Returns (name, count of int64) for each field of a struct that Python fills in. */
static PyObject *fields_of(const char *const *names, size_t count, int arrays)
{
    PyObject *fields = PyList_New(0), *field;
    for (size_t i = 0; fields != NULL && i < count; i++) {
        field = Py_BuildValue("(si)", names[i], i + (size_t)arrays < count ? 1 : MAX_PLACES);
        if (field == NULL || PyList_Append(fields, field) < 0)
            Py_CLEAR(fields);
        Py_XDECREF(field);
    }
    return fields;
}

int lmcache_add_layouts(PyObject *module)
{
    static const char *const ring[] = {RING_NUMBERS(NAME_OF) "filled", "emptied"}, *const copy[] = {COPY_NUMBERS(NAME_OF)},
                      *const plane[] = {PLANE_NUMBERS(NAME_OF)};
    PyObject *layouts = Py_BuildValue("{sNsNsN}", "ring", fields_of(ring, sizeof ring / sizeof *ring, 2), "copy",
                                      fields_of(copy, sizeof copy / sizeof *copy, 0), "plane",
                                      fields_of(plane, sizeof plane / sizeof *plane, 0));
    int result = layouts == NULL ? -1 : PyModule_AddObjectRef(module, "layouts", layouts);
    Py_XDECREF(layouts);
    return result;
}
