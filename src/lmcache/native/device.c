/* The pieces of a copy between a device's paged KV and slots, handed to the driver one after the other, without Python.
 *
 * From Python a piece costs six calls and a tenth of a millisecond, in which the engine's own threads wait for the GIL. The
 * driver's functions come as addresses (CUDA's and HIP's take the same parameters): nothing of it is needed to build this.
 */
#include "native.h"

enum { MAX_PLACES = 64, KERNEL_PARAMETERS = 6, SPARE_PARAMETERS = 4 };

/* As `lmcache.transfer.launch` lays it out: 64-bit numbers, in this order. */
typedef struct {
    int64_t launch, upload, download, record, wait; /* addresses in the driver */
    int64_t kernel, threads, shared_bytes;
    int64_t kernels, copies; /* streams */
    int64_t to_host;
    int64_t bases, ring, places, place_bytes;
    int64_t plane_bytes, word_bytes;
    int64_t chunk_tokens, tile_tokens, row_tiles;
    int64_t yield_bytes, slab_bytes;
    int64_t pieces_begun, unyielded_bytes; /* kept from copy to copy */
    int64_t filled[MAX_PLACES], emptied[MAX_PLACES]; /* events */
} Lane;

/* One copy, or some of its planes. */
typedef struct {
    int64_t runs, run_count; /* int64 [slot offset, first token, tokens, token in slot] */
    int64_t base;
    int64_t slabs_from; /* where registrations with the driver begin; 0: base is not registered */
    int64_t blocks, meta; /* on the device */
    int64_t table_host, table_device, table_bytes; /* uploaded before anything else; 0 bytes: they are there */
    int64_t first_plane, end_plane, planes_in_piece, runs_in_piece;
} Copy;

typedef struct {
    int64_t slot_offset, first_token, tokens, token_in_slot;
} Run;

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

static int record(const Lane *lane, int64_t event, int64_t stream)
{
    return ((RecordEvent)POINTER(lane->record))(POINTER(event), POINTER(stream));
}

static int wait_event(const Lane *lane, int64_t stream, int64_t event)
{
    return ((WaitEvent)POINTER(lane->wait))(POINTER(stream), POINTER(event), 0);
}

static int launch(const Lane *lane, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes, uint64_t staging)
{
    const Run *runs = POINTER(copy->runs);
    int64_t longest = lane->to_host ? lane->chunk_tokens : 1; /* a store fills whole slots */
    for (int64_t i = first; i < first + count; i++)
        if (runs[i].tokens > longest)
            longest = runs[i].tokens;
    unsigned tiles = (unsigned)((longest + lane->tile_tokens - 1) / lane->tile_tokens * lane->row_tiles);
    uint64_t bases = (uint64_t)lane->bases, blocks = (uint64_t)copy->blocks;
    uint64_t meta = (uint64_t)copy->meta + 24 * (uint64_t)first, none = 0;
    int32_t first_plane = (int32_t)plane, piece_words = (int32_t)(planes * lane->plane_bytes / lane->word_bytes);
    /* Triton gives kernels some scratch pointers behind their own parameters, as many as its release likes. */
    void *parameters[KERNEL_PARAMETERS + SPARE_PARAMETERS] = {&bases, &blocks,      &meta,        &staging, &first_plane,
                                                            &piece_words, &none, &none, &none,    &none};
    return ((LaunchKernel)POINTER(lane->launch))(POINTER(lane->kernel), tiles, (unsigned)planes, (unsigned)count,
                                                 (unsigned)lane->threads, 1, 1, (unsigned)lane->shared_bytes,
                                                 POINTER(lane->kernels), parameters, NULL);
}

/* One DMA; two where registrations meet, since the driver takes no copy across them. */
static int dma(const Lane *lane, const Copy *copy, int64_t offset, int64_t length, uint64_t staged)
{
    while (length > 0) {
        int64_t size = length, address = copy->base + offset;
        if (copy->slabs_from) {
            int64_t rest = lane->slab_bytes - (address - copy->slabs_from) % lane->slab_bytes;
            size = rest < size ? rest : size;
        }
        if (lane->to_host)
            CHECK(((Download)POINTER(lane->download))(POINTER(address), staged, (size_t)size, POINTER(lane->copies)));
        else
            CHECK(((Upload)POINTER(lane->upload))(staged, POINTER(address), (size_t)size, POINTER(lane->copies)));
        offset += size;
        staged += (uint64_t)size;
        length -= size;
    }
    return 0;
}

/* The piece's chunks, one DMA each; neighbours in the arena go together. */
static int dmas(const Lane *lane, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes, uint64_t staged)
{
    const Run *runs = (const Run *)POINTER(copy->runs) + first;
    int64_t length = planes * lane->plane_bytes, at = 0;
    while (at < count) {
        int64_t end = at + 1;
        while (end < count && runs[end].slot_offset == runs[end - 1].slot_offset + length)
            end++;
        CHECK(dma(lane, copy, runs[at].slot_offset + plane * lane->plane_bytes, (end - at) * length,
                  staged + (uint64_t)(at * length)));
        at = end;
    }
    return 0;
}

/* Planes [plane, plane + planes) of some runs through the next place of the ring, once that is empty. */
static int piece(Lane *lane, const Copy *copy, int64_t first, int64_t count, int64_t plane, int64_t planes)
{
    int64_t place = lane->pieces_begun++ % lane->places, before = (place + lane->places - 1) % lane->places;
    uint64_t staging = (uint64_t)(lane->ring + place * lane->place_bytes);
    lane->unyielded_bytes += planes * lane->plane_bytes * count;
    if (lane->unyielded_bytes > lane->yield_bytes) {
        lane->unyielded_bytes = 0;
        CHECK(wait_event(lane, lane->to_host ? lane->kernels : lane->copies, lane->emptied[before]));
    }
    if (lane->to_host) {
        CHECK(wait_event(lane, lane->kernels, lane->emptied[place]));
        CHECK(launch(lane, copy, first, count, plane, planes, staging));
        CHECK(record(lane, lane->filled[place], lane->kernels));
        CHECK(wait_event(lane, lane->copies, lane->filled[place]));
        CHECK(dmas(lane, copy, first, count, plane, planes, staging));
        return record(lane, lane->emptied[place], lane->copies);
    }
    CHECK(wait_event(lane, lane->copies, lane->emptied[place]));
    CHECK(dmas(lane, copy, first, count, plane, planes, staging));
    CHECK(record(lane, lane->filled[place], lane->copies));
    CHECK(wait_event(lane, lane->kernels, lane->filled[place]));
    CHECK(launch(lane, copy, first, count, plane, planes, staging));
    return record(lane, lane->emptied[place], lane->kernels);
}

static int pieces(Lane *lane, const Copy *copy)
{
    /* Before the first DMA: they share a copy engine, which goes on with one queue for as long as that need not wait. */
    if (copy->table_bytes)
        CHECK(((Upload)POINTER(lane->upload))((uint64_t)copy->table_device, POINTER(copy->table_host),
                                              (size_t)copy->table_bytes, POINTER(lane->kernels)));
    for (int64_t first = 0; first < copy->run_count; first += copy->runs_in_piece)
        for (int64_t plane = copy->first_plane; plane < copy->end_plane; plane += copy->planes_in_piece) {
            int64_t count = copy->run_count - first, planes = copy->end_plane - plane;
            CHECK(piece(lane, copy, first, count < copy->runs_in_piece ? count : copy->runs_in_piece, plane,
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
    Lane *lane = POINTER(n[0]);
    const Copy *copy = POINTER(n[2]);
    if (n[1] != sizeof *lane || n[3] != sizeof *copy) {
        PyErr_SetString(PyExc_ValueError, "a lane and a copy of another release's layout");
        return NULL;
    }
    if (lane->places < 1 || lane->places > MAX_PLACES || copy->planes_in_piece < 1 || copy->runs_in_piece < 1) {
        PyErr_SetString(PyExc_ValueError, "a lane of 1 to 64 places, and pieces of at least one plane and run");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    error = pieces(lane, copy);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(error);
}

PyMethodDef lmcache_device_methods[] = {
    {"launch_copy", (PyCFunction)(void (*)(void))launch_copy, METH_FASTCALL,
     "launch_copy(lane, lane_bytes, copy, copy_bytes) -> int\n\n"
     "Hand all pieces of a copy to the driver: addresses of a lane and a copy as lmcache.transfer.launch lays them out, in a\n"
     "thread whose device is the lane's. Returns the driver's error, 0 for none; pieces before it are under way."},
    {NULL, NULL, 0, NULL},
};
