/* Copies between paged KV and extents, in one call without the GIL.
 *
 * A plane (K or V of one layer) is a set of axes: token group, token, head, dim group, dim. Each axis has a stride in
 * paged memory and one in the extent. Axes that step alike on both sides are fused, until one of two patterns is left:
 *   rows        runs of bytes that are contiguous on both sides: copied with non-temporal stores where they are long,
 *               because nobody reads the target soon and a normal store would read it from memory first;
 *   transpose   single items, one axis dense in paged memory and another one in the extent (K stored [dim][token],
 *               pairs of tokens or dims for matrix units): square tiles in registers.
 * So the same few lines copy every layout correctly, and the usual layouts fast.
 *
 * A plane can be filled from several extents, each of which has some of its heads (the shards of another parallel split). Block
 * by block, one after the other is copied: the pages of a block are then written while the TLB holds their addresses.
 *
 * Planes that extents hold rounded (`form`) go through the rows of int8.c. Where the values of a head do not lie side by side in paged
 * memory, the tokens are first copied to a small buffer, in an extent's order, by the same patterns.
 *
 * `copy` does not check bounds; its callers use `runs_fit` (transfer/bounds.py). Nothing but that buffer is allocated here.
 */
#include "native.h"

#include <stddef.h>
#include <stdlib.h>

#include "kernels.h"
#if defined(__x86_64__)
#include "kernels_x86.h"
#elif defined(__aarch64__)
#include "kernels_neon.h"
#endif

enum { MAX_AXES = 5, CLAIM_BYTES = 256 << 10, BUFFER_BYTES = 32 << 10 };

/* A row of CpuCopier's packed planes. */
typedef struct {
    PLANE_NUMBERS(FIELD)
} Plane;

typedef struct {
    int64_t count, paged, extent;
} Axis;

typedef struct {
    Axis axes[MAX_AXES]; /* outermost first; the last two of a transpose: dense in the extent, dense in paged memory */
    int count;
    int transpose;
    int64_t item; /* bytes that are contiguous on both sides */
} Pattern;

/* Ordered from the slowest to the fastest. */
static const Isa isas[] = {
    {"plain", rows_plain, transpose_2_plain, transpose_4_plain},
#if defined(__x86_64__)
    {"avx2", rows_avx2, transpose_2_avx2, transpose_4_avx2},
    {"avx512", rows_avx2, transpose_2_avx512, transpose_4_avx512},
#elif defined(__aarch64__)
    {"neon", rows_plain, transpose_2_neon, transpose_4_neon},
#endif
};

static int isa_supported(int64_t i)
{
#if defined(__x86_64__)
    if (i == 1)
        return __builtin_cpu_supports("avx2");
    if (i == 2)
        return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
    return i >= 0 && i < (int64_t)(sizeof isas / sizeof *isas);
}

/* Makes non-temporal stores visible to threads and processes that learn of the end of the copy in any way. */
static void finish_streams(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#elif defined(__aarch64__)
    __asm__ volatile("dmb ishst" ::: "memory");
#endif
}

/* ---- Patterns ------------------------------------------------------------ */

static void remove_axis(Pattern *p, int i)
{
    for (p->count--; i < p->count; i++)
        p->axes[i] = p->axes[i + 1];
}

/* Fuses one axis. Returns 1 when it did, 0 when no axis can be fused. */
static int fuse(Pattern *p)
{
    for (int i = 0; i < p->count; i++) {
        Axis a = p->axes[i];
        if (a.count == 1 || (a.paged == p->item && a.extent == p->item)) {
            p->item *= a.count;
            remove_axis(p, i);
            return 1;
        }
        for (int j = 0; j < p->count; j++) {
            Axis *b = &p->axes[j];
            if (i != j && a.paged == b->paged * b->count && a.extent == b->extent * b->count) {
                b->count *= a.count;
                remove_axis(p, i);
                return 1;
            }
        }
    }
    return 0;
}

/* Sorts the axes, outermost the widest steps on one side: the extent's (by_extent) or paged memory's. */
static void sort_axes(Pattern *p, int by_extent)
{
    for (int i = 1; i < p->count; i++)
        for (int j = i; j > 0; j--) {
            Axis *a = &p->axes[j - 1], *b = &p->axes[j], swap = *a;
            if ((by_extent ? a->extent : a->paged) >= (by_extent ? b->extent : b->paged))
                break;
            *a = *b;
            *b = swap;
        }
}

/* Moves the axis that is dense on one side to position `to`. Returns 0 where there is none. */
static int move_dense(Pattern *p, int extent_side, int to)
{
    for (int i = 0; i <= to; i++) {
        Axis a = p->axes[i];
        if ((extent_side ? a.extent : a.paged) == p->item) {
            p->axes[i] = p->axes[to];
            p->axes[to] = a;
            return 1;
        }
    }
    return 0;
}

/* Returns the pattern of `groups` token groups of `tokens` tokens each, in a plane of items of `item` bytes. */
static Pattern make_pattern(const Plane *plane, int64_t item, int64_t groups, int64_t tokens, int scatter)
{
    int64_t head = plane->dims * item, row = plane->extent_row;
    Pattern p = {
        .axes = {{groups, plane->group_stride, plane->token_group * row},
                 {tokens, plane->token_stride, row},
                 {plane->heads, plane->head_stride, head},
                 {plane->dims / plane->dim_group, plane->dim_group_stride, plane->dim_group * item},
                 {plane->dim_group, plane->dim_stride, item}},
        .count = MAX_AXES,
        .item = item,
    };
    while (fuse(&p))
        ;
    if (p.count >= 2 && (p.item == 1 || p.item == 2 || p.item == 4 || p.item == 8))
        p.transpose = move_dense(&p, 0, p.count - 1) && move_dense(&p, 1, p.count - 2);
    /* Complete lines may be written in any order, so read in order; parts of lines are better written in order. */
    if (!p.transpose)
        sort_axes(&p, p.item % LINE == 0 ? scatter : !scatter);
    return p;
}

static void run_inner(const Pattern *p, const Isa *isa, char *paged, char *extent, int scatter, const char *next)
{
    char *to = scatter ? paged : extent;
    const char *from = scatter ? extent : paged;
    if (p->transpose) {
        Axis s = p->axes[p->count - 2], d = p->axes[p->count - 1];
        TransposeKernel kernel = p->item == 4   ? isa->transpose_4
                                 : p->item == 2 ? isa->transpose_2
                                 : p->item == 1 ? transpose_1_plain
                                                : transpose_8_plain;
        if (scatter)
            kernel(to, s.paged, from, d.extent, d.count, s.count);
        else
            kernel(to, d.extent, from, s.paged, s.count, d.count);
    } else {
        Steps steps[2] = {{1, 0, 0}, {1, 0, 0}}; /* outer, inner */
        for (int i = 1, at = p->count - 1; i >= 0 && at >= 0; i--, at--) {
            Axis a = p->axes[at];
            steps[i] = (Steps){a.count, scatter ? a.paged : a.extent, scatter ? a.extent : a.paged};
        }
        isa->rows(to, from, p->item, steps[0], steps[1], next);
    }
}

/* Walks the outer axes; the kernels walk the two inner ones. */
static void run_pattern(const Pattern *p, const Isa *isa, char *paged, char *extent, int scatter, const char *next)
{
    int outer = p->count > 2 ? p->count - 2 : 0;
    int64_t at[MAX_AXES] = {0};
    for (;;) {
        const char *soon = next; /* what is read after this */
        if (outer && at[outer - 1] + 1 < p->axes[outer - 1].count)
            soon = scatter ? extent + p->axes[outer - 1].extent : paged + p->axes[outer - 1].paged;
        run_inner(p, isa, paged, extent, scatter, soon);
        int i = outer - 1;
        for (; i >= 0; i--) {
            const Axis *a = &p->axes[i];
            paged += a->paged;
            extent += a->extent;
            if (++at[i] < a->count)
                break;
            paged -= a->paged * a->count;
            extent -= a->extent * a->count;
            at[i] = 0;
        }
        if (i < 0)
            return;
    }
}

/* ---- Runs ------------------------------------------------------------ */

typedef struct {
    int scatter;
    const Isa *isa;
    const Plane *planes; /* [plane_count][sources] */
    int64_t plane_count, sources, item, block_tokens;
    char *base;
    const int32_t *blocks;
    const Run *runs; /* [run_count][sources], which differ in the offset of the extent only */
    int64_t run_count;
    int64_t *claimed; /* number of pieces taken so far, shared by the threads of one call */
} Job;

/* What a thread keeps between pieces. The last pattern made is usually the next one too: most pieces are complete blocks of one
 * plane. failed: a value could not be rounded (1), or there is no memory for the buffer (2). */
typedef struct {
    const Plane *plane;
    int64_t groups, tokens;
    Pattern pattern;
    char *buffer;
    int64_t buffer_bytes;
    int failed;
} Memo;

/* Returns whether both planes have the same pattern. */
static int alike(const Plane *a, const Plane *b)
{
    size_t first = offsetof(Plane, token_group), end = offsetof(Plane, extent_offset);
    return a == b || (a->extent_row == b->extent_row && memcmp((const char *)a + first, (const char *)b + first, end - first) == 0);
}

static void copy_part(const Job *job, Memo *memo, const Plane *plane, int64_t groups, int64_t tokens, char *paged,
                      char *extent, const char *next)
{
    if (memo->groups != groups || memo->tokens != tokens || !alike(memo->plane, plane)) {
        memo->plane = plane;
        memo->groups = groups;
        memo->tokens = tokens;
        memo->pattern = make_pattern(plane, job->item, groups, tokens, job->scatter);
    }
    run_pattern(&memo->pattern, job->isa, paged, extent, job->scatter, next);
}

/* Copies tokens [token, token + count) of one block. Only the first and the last token group can be partial. */
static void copy_in_block(const Job *job, Memo *memo, const Plane *plane, char *block, int64_t token, int64_t count,
                          char *extent, const char *next)
{
    int64_t group = plane->token_group, row = plane->extent_row;
    if (group == 1) {
        copy_part(job, memo, plane, count, 1, block + token * plane->group_stride, extent, next);
        return;
    }
    while (count > 0) {
        char *paged = block + token / group * plane->group_stride + token % group * plane->token_stride;
        int64_t rest = group - token % group, groups = 1, tokens = rest < count ? rest : count;
        if (rest == group && count >= group) {
            groups = count / group;
            tokens = group;
        }
        copy_part(job, memo, plane, groups, tokens, paged, extent, next);
        token += groups * tokens;
        count -= groups * tokens;
        extent += groups * tokens * row;
    }
}

/* Whether the values of a head of a token lie side by side in paged memory. */
static int is_dense(const Plane *plane, int64_t item)
{
    return plane->dim_stride == item && (plane->dim_group == plane->dims || plane->dim_group_stride == plane->dim_group * item);
}

/* Rounds the heads of `tokens` tokens, which are `token_step` bytes apart, or restores them. Consecutive heads are `head_step`
 * bytes apart. */
static void round_tokens(const Job *job, Memo *memo, const Plane *plane, char *values, int64_t token_step, int64_t head_step,
                         int64_t tokens, char *extent)
{
    int plain = job->isa == isas, form = (int)plane->form, kind = (int)plane->kind;
    for (; tokens > 0; tokens--, values += token_step, extent += plane->extent_row) {
        if (job->scatter)
            lmcache_restore_rows(plain, form, kind, (uint8_t *)extent, plane->heads, plane->dims, (uint8_t *)values, head_step);
        else if (!lmcache_round_rows(plain, form, kind, (uint8_t *)values, head_step, plane->heads, plane->dims, (uint8_t *)extent))
            memo->failed |= 1;
    }
}

/* Makes room for at least one token in the buffer. Returns how many have room, 0 if there is no memory. */
static int64_t room_in_buffer(Memo *memo, int64_t token_bytes)
{
    int64_t wanted = token_bytes > BUFFER_BYTES ? token_bytes : BUFFER_BYTES;
    if (memo->buffer_bytes < wanted) {
        free(memo->buffer);
        memo->buffer = malloc((size_t)wanted);
        memo->buffer_bytes = memo->buffer == NULL ? 0 : wanted;
    }
    memo->failed |= memo->buffer == NULL ? 2 : 0;
    return memo->buffer_bytes / token_bytes;
}

/* As copy_in_block, for a plane that extents hold rounded. */
static void round_in_block(const Job *job, Memo *memo, const Plane *plane, char *block, int64_t token, int64_t count, char *extent)
{
    int64_t group = plane->token_group, head = plane->dims * job->item, row = plane->heads * head, some;
    if (is_dense(plane, job->item)) {
        for (int64_t end = token + count; token < end; token += some, extent += some * plane->extent_row) {
            char *values = block + token / group * plane->group_stride + token % group * plane->token_stride;
            some = group == 1 ? end - token : group - token % group < end - token ? group - token % group : end - token;
            int64_t step = group == 1 ? plane->group_stride : plane->token_stride;
            round_tokens(job, memo, plane, values, step, plane->head_stride, some, extent);
        }
        return;
    }
    Plane ordered = *plane;
    Isa cached = *job->isa; /* what passes the caches by would have to come back at once */
    Job copying = *job;
    ordered.form = FORM_EXACT;
    ordered.extent_row = row;
    if (!job->scatter) {
        cached.rows = rows_plain;
        copying.isa = &cached;
    }
    int64_t room = room_in_buffer(memo, row);
    for (int64_t end = token + count; room && token < end; token += some, extent += some * plane->extent_row) {
        some = room < end - token ? room : end - token;
        if (job->scatter)
            round_tokens(job, memo, plane, memo->buffer, row, head, some, extent);
        memo->groups = 0; /* the pattern that is remembered is of another plane at the same address */
        copy_in_block(&copying, memo, &ordered, block, token, some, memo->buffer, memo->buffer);
        memo->groups = 0;
        if (!job->scatter)
            round_tokens(job, memo, plane, memo->buffer, row, head, some, extent);
    }
}

static char *block_at(const Job *job, const Plane *plane, int64_t index)
{
    return (char *)(intptr_t)plane->address + job->blocks[index] * plane->block_stride;
}

static char *extent_at(const Job *job, const Plane *plane, const Run *run, int64_t token)
{
    return job->base + run->extent_offset + plane->extent_offset + token * plane->extent_row;
}

/* Copies one run of one plane. planes, runs: one for each source. */
static void copy_run(const Job *job, Memo *memo, const Plane *planes, const Run *runs)
{
    int64_t index = runs->first_token / job->block_tokens, in_block = runs->first_token % job->block_tokens;
    int64_t in_extent = runs->token_in_extent, end = in_extent + runs->tokens, count;
    for (; in_extent < end; in_extent += count, index++, in_block = 0) {
        count = job->block_tokens - in_block;
        if (count > end - in_extent)
            count = end - in_extent;
        for (int64_t i = 0; i < job->sources; i++) {
            int64_t last = i + 1 == job->sources, then = last ? 0 : i + 1; /* the next source, in the next block behind the last */
            const char *next = extent_at(job, &planes[then], &runs[then], last ? in_extent + count : in_extent);
            if (!job->scatter)
                next = block_at(job, &planes[then], last && in_extent + count < end ? index + 1 : index);
            char *block = block_at(job, &planes[i], index), *extent = extent_at(job, &planes[i], &runs[i], in_extent);
            if (planes[i].form == FORM_EXACT)
                copy_in_block(job, memo, &planes[i], block, in_block, count, extent, next);
            else
                round_in_block(job, memo, &planes[i], block, in_block, count, extent);
        }
    }
}

/* Takes pieces of (run, plane) and copies them until none is left. Returns what has failed, see Memo. */
static int work(const Job *job)
{
    int64_t pieces = job->run_count * job->plane_count;
    int64_t piece_bytes = job->runs[0].tokens * job->planes[0].heads * job->planes[0].dims * job->item * job->sources + 1;
    int64_t batch = 1 + CLAIM_BYTES / piece_bytes;
    Memo memo = {.plane = job->planes};
    for (;;) {
        int64_t piece = __atomic_fetch_add(job->claimed, batch, __ATOMIC_RELAXED), end = piece + batch;
        for (; piece < end && piece < pieces; piece++)
            copy_run(job, &memo, &job->planes[piece % job->plane_count * job->sources],
                     &job->runs[piece / job->plane_count * job->sources]);
        if (piece >= pieces)
            break;
    }
    finish_streams();
    free(memo.buffer);
    return memo.failed;
}

/* ---- Python ------------------------------------------------------------ */

enum { ISA_COUNT = sizeof isas / sizeof *isas };

static int best_isa(void)
{
    int best = 0;
    for (int i = 0; i < ISA_COUNT; i++)
        if (isa_supported(i))
            best = i;
    return best;
}

static PyObject *copy(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[12];
    int failed = 0;
    (void)module;
    if (lmcache_integers("copy", args, nargs, n, 12) < 0)
        return NULL;
    if (n[1] >= 0 && !isa_supported(n[1])) {
        PyErr_Format(PyExc_ValueError, "this CPU has no instruction set number %lld", (long long)n[1]);
        return NULL;
    }
    Job job = {
        .scatter = n[0] != 0,
        .isa = &isas[n[1] < 0 ? best_isa() : n[1]],
        .planes = (const Plane *)(intptr_t)n[2],
        .plane_count = n[3],
        .sources = n[4],
        .item = n[5],
        .block_tokens = n[6],
        .base = (char *)(intptr_t)n[7],
        .blocks = (const int32_t *)(intptr_t)n[8],
        .runs = (const Run *)(intptr_t)n[9],
        .run_count = n[10],
        .claimed = (int64_t *)(intptr_t)n[11],
    };
    if (job.run_count > 0 && job.plane_count > 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = work(&job);
        Py_END_ALLOW_THREADS
    }
    if (failed & 2)
        return PyErr_NoMemory();
    return PyBool_FromLong(!failed);
}

/* Checks the bounds of all runs. Each term is bounded before terms are added, so that no sum can overflow. */
static int fits(const int32_t *blocks, int64_t block_count, const Run *runs, int64_t run_count, int64_t chunk_tokens,
                int64_t block_tokens, int64_t num_blocks, int64_t farthest_extent)
{
    int64_t table_tokens = block_count * block_tokens, first = table_tokens, end = 0;
    for (const Run *run = runs; run < runs + run_count; run++) {
        if (run->extent_offset < 0 || run->first_token < 0 || run->tokens < 0 || run->token_in_extent < 0)
            return 0;
        if (run->tokens > chunk_tokens || run->token_in_extent > chunk_tokens - run->tokens)
            return 0;
        if (run->first_token > table_tokens || run->tokens > table_tokens - run->first_token)
            return 0;
        if (run->extent_offset > farthest_extent)
            return 0;
        if (run->first_token < first)
            first = run->first_token;
        if (run->first_token + run->tokens > end)
            end = run->first_token + run->tokens;
    }
    for (int64_t i = first / block_tokens; i * block_tokens < end; i++)
        if (blocks[i] < 0 || blocks[i] >= num_blocks)
            return 0;
    return 1;
}

static PyObject *runs_fit(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    int64_t n[8];
    (void)module;
    if (lmcache_integers("runs_fit", args, nargs, n, 8) < 0)
        return NULL;
    if (n[5] < 1) {
        PyErr_Format(PyExc_ValueError, "block_tokens is %lld; it must be at least 1", (long long)n[5]);
        return NULL;
    }
    return PyBool_FromLong(fits((const int32_t *)(intptr_t)n[0], n[1], (const Run *)(intptr_t)n[2], n[3], n[4], n[5], n[6], n[7]));
}

static PyObject *copy_isas(PyObject *module, PyObject *ignored)
{
    (void)module;
    (void)ignored;
    PyObject *names = PyDict_New();
    for (int i = 0; names != NULL && i < ISA_COUNT; i++) {
        if (!isa_supported(i))
            continue;
        PyObject *number = PyLong_FromLong(i);
        if (number == NULL || PyDict_SetItemString(names, isas[i].name, number) < 0)
            Py_CLEAR(names);
        Py_XDECREF(number);
    }
    return names;
}

PyMethodDef lmcache_copy_methods[] = {
    {"copy", (PyCFunction)(void (*)(void))copy, METH_FASTCALL,
     "copy(scatter, isa, planes, plane_count, sources, item_bytes, block_tokens, base, blocks, runs, run_count, claimed) "
     "-> bool\n\n"
     "Copy paged tokens into extents (scatter=0) or extents into paged memory (1). planes, base, blocks, runs and claimed\n"
     "are addresses; the caller keeps them alive and has checked all bounds. There are `sources` rows for each plane and for\n"
     "each run, one behind the other. isa: a value of copy_isas(), or -1 for the fastest. Return False if a value could not be\n"
     "rounded; what was written is then of no use."},
    {"runs_fit", (PyCFunction)(void (*)(void))runs_fit, METH_FASTCALL,
     "runs_fit(blocks, block_count, runs, run_count, chunk_tokens, block_tokens, num_blocks, farthest_extent) -> bool\n\n"
     "Return whether all runs stay within the block table, the tokens of an extent and offsets up to farthest_extent, and\n"
     "all blocks from the first to the last that they touch exist in the paged KV. blocks (int32) and runs (int64\n"
     "[runs, 4]) are addresses."},
    {"copy_isas", copy_isas, METH_NOARGS, "Return the instruction sets of this CPU as {name: number}, the fastest last."},
    {NULL, NULL, 0, NULL},
};
