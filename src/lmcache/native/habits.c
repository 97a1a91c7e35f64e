/* The type `Habits`: what a server has learned about when chunks are used again. lmcache/_native.pyi documents its methods.
 *
 * The kinds of chunks form a tree: each kind belongs to a middle group, that one to a coarse group, and that one to all chunks.
 * The rate at which chunks of an age are used again is estimated for each row of the tree: uses, divided by the time that
 * chunks were watched at that age. As many seconds as PRIOR says are added with the rate of the group above, so that what is
 * seldom seen is judged like what is like it.
 *
 * The worth of a chunk is the greatest, over all horizons, of the chance that it is used before the horizon, divided by the time
 * that it is held until the use or the horizon (Gittins' index). Going by the rate at the present age alone would evict whatever
 * has just been used and is used again after a pause.
 *
 * The computation goes round the rows for ever, a few with each prompt: first from the kinds to the root to add up, then back
 * to derive rates and worths. So no call takes long, and the result depends on the order of prompts alone.
 */
#include "habits.h"

#include <math.h>
#include <string.h>

#define FIRST_SECONDS 0.05
#define AGES_AN_OCTAVE 3
#define FORGOTTEN 0.002 /* of what was learned, at each round */

static const double PRIOR_RATE = 0.3;                                   /* divided by the age: of nothing in particular */
static const double PRIOR_OF_ALL = 20, PRIOR_COARSE = 1, PRIOR = 100; /* weights watched for the length of an age */

double lmcache_age_ends[AGES];
static double lengths[AGES], middles[AGES];
static PyObject *habits_type;

static unsigned above(unsigned row)
{
    if (row >= KINDS_AT + FINE)
        return LEFT_AT + (row - KINDS_AT - FINE) / SIZES;
    if (row >= KINDS_AT)
        return MIDDLE_AT + (row - KINDS_AT) / SIZES;
    return row >= MIDDLE_AT ? 1 + (row - MIDDLE_AT) / (TURNS * ANSWERS) : 0;
}

/* Adds what is known of a row to the sums of the row above. */
static void add_up(habits_t *h, unsigned row)
{
    double(*sums)[AGES] = h->sums[above(row)];
    if (row < KINDS_AT) {
        for (int age = 0; age < AGES; age++) {
            sums[0][age] += h->sums[row][0][age];
            sums[1][age] += h->sums[row][1][age];
        }
        return;
    }
    if (!h->seen[row - KINDS_AT])
        return;
    double *used = h->used[row - KINDS_AT], *ended = h->ended[row - KINDS_AT];
    const double *live = h->live[row - KINDS_AT];
    for (int age = 0; age < AGES; age++) {
        used[age] *= 1 - FORGOTTEN;
        ended[age] *= 1 - FORGOTTEN;
        sums[0][age] += used[age];
        sums[1][age] += ended[age] + live[age];
    }
}

/* Adds half of each neighbour. */
static void smooth(const double *from, double *to)
{
    for (int age = 0; age < AGES; age++)
        to[age] = from[age] + 0.5 * ((age ? from[age - 1] : 0) + (age + 1 < AGES ? from[age + 1] : 0));
}

/* The worth at an age is the greatest slope from its point to the point of a later age, on the curve of the chance of a use by the
 * time held. The points that matter are the corners of the curve's upper hull, which is built from its end. */
static void derive_worth(const double *rates, float *worth)
{
    double lasting[AGES + 1], rest[AGES + 1]; /* chance to last until an age, and expected time from there on, times that chance */
    double held[AGES];
    int corners[AGES + 1], count = 0;
    lasting[0] = 1;
    for (int age = 0; age < AGES; age++) {
        double uses = rates[age] * lengths[age], through = exp(-uses);
        held[age] = uses > 1e-9 ? (1 - through) / rates[age] : lengths[age];
        lasting[age + 1] = lasting[age] * (through > 1e-4 ? through : 1e-4); /* 0 would have no slope */
    }
    rest[AGES] = 0;
    corners[count++] = AGES;
    for (int age = AGES; age-- > 0;) {
        rest[age] = rest[age + 1] + lasting[age] * held[age];
        double slope = (lasting[age] - lasting[corners[count - 1]]) / (rest[age] - rest[corners[count - 1]]), next;
        for (; count > 1; count--, slope = next) { /* along the hull slopes grow to the greatest one */
            next = (lasting[age] - lasting[corners[count - 2]]) / (rest[age] - rest[corners[count - 2]]);
            if (next < slope)
                break;
        }
        worth[age] = (float)slope;
        corners[count++] = age;
    }
}

static void derive(habits_t *h, unsigned row)
{
    if (row >= KINDS_AT && !h->seen[row - KINDS_AT]) {
        h->version++;
        memcpy(h->worth[row], h->worth[above(row)], sizeof h->worth[row]);
        return;
    }
    double ends[AGES], uses[AGES], watched[AGES], smooth_uses[AGES], smooth_watched[AGES], total = 0;
    for (int age = 0; age < AGES; age++) {
        const double *live = row < KINDS_AT ? NULL : h->live[row - KINDS_AT];
        uses[age] = live ? h->used[row - KINDS_AT][age] : h->sums[row][0][age];
        ends[age] = live ? h->ended[row - KINDS_AT][age] + live[age] : h->sums[row][1][age];
        total += fabs(ends[age]);
    }
    if (row < KINDS_AT)
        memset(h->sums[row], 0, sizeof h->sums[row]);
    h->version++;
    if (row && total < 1e-6) { /* nothing is known but what holds for the group above */
        if (row < KINDS_AT)
            memcpy(h->rates[row], h->rates[above(row)], sizeof h->rates[row]);
        memcpy(h->worth[row], h->worth[above(row)], sizeof h->worth[row]);
        return;
    }
    double beyond = 0;
    for (int age = AGES; age-- > 0; beyond += ends[age]) {
        double there = beyond + 0.5 * ends[age];
        watched[age] = there > 0 ? there * lengths[age] : 0;
    }
    smooth(uses, smooth_uses);
    smooth(watched, smooth_watched);
    double weight = !row ? PRIOR_OF_ALL : row < MIDDLE_AT ? PRIOR_COARSE : PRIOR, own[AGES];
    double *rates = row < KINDS_AT ? h->rates[row] : own;
    for (int age = 0; age < AGES; age++) {
        double prior = row ? h->rates[above(row)][age] : PRIOR_RATE / middles[age];
        rates[age] = (smooth_uses[age] + weight * lengths[age] * prior) / (smooth_watched[age] + weight * lengths[age]);
    }
    derive_worth(rates, h->worth[row]);
}

static void advance(habits_t *h, unsigned steps)
{
    for (; steps > 0; steps--) {
        if (h->step < ROWS - 1)
            add_up(h, ROWS - 1 - h->step);
        else
            derive(h, h->step - (ROWS - 1));
        h->step = (h->step + 1) % (2 * ROWS - 1);
    }
}

void lmcache_habits_prompt(habits_t *h)
{
    unsigned prompts = h->prompts < 256 ? 16 : h->prompts < 4096 ? 128 : 256;
    h->prompts++;
    advance(h, (2 * ROWS - 1 + prompts - 1) / prompts);
}

/* The type */

static PyObject *habits_new(PyTypeObject *type, PyObject *args, PyObject *named)
{
    if (PyTuple_Size(args) || (named && PyDict_Size(named))) {
        PyErr_SetString(PyExc_TypeError, "Habits takes no arguments");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    habits_t *h = (habits_t *)allocate(type, 0); /* zeroed */
    if (h)
        advance(h, 2 * ROWS - 1);
    return (PyObject *)h;
}

static void habits_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyObject *habits_saved(PyObject *self, PyObject *unused)
{
    const habits_t *h = (const habits_t *)self;
    PyObject *result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(sizeof h->used + sizeof h->ended));
    (void)unused;
    if (result) {
        memcpy(PyBytes_AsString(result), h->used, sizeof h->used);
        memcpy(PyBytes_AsString(result) + sizeof h->used, h->ended, sizeof h->ended);
    }
    return result;
}

static PyObject *habits_restore(PyObject *self, PyObject *arg)
{
    habits_t *h = (habits_t *)self;
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(arg, &bytes, &size) < 0)
        return NULL;
    int fits = size == (Py_ssize_t)(sizeof h->used + sizeof h->ended);
    for (Py_ssize_t at = 0; fits && at < size; at += (Py_ssize_t)sizeof(double)) {
        double weight;
        memcpy(&weight, bytes + at, sizeof weight);
        fits = fabs(weight) < 1e12; /* false for what is not a number, too */
        fits = fits && (weight >= 0 || at >= (Py_ssize_t)sizeof h->used); /* rates must not be negative */
    }
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "these are no saved habits of this version");
        return NULL;
    }
    memcpy(h->used, bytes, sizeof h->used);
    memcpy(h->ended, bytes + sizeof h->used, sizeof h->ended);
    memset(h->seen, 1, sizeof h->seen);
    memset(h->sums, 0, sizeof h->sums);
    h->step = 0;
    h->prompts = 256;
    advance(h, 2 * ROWS - 1);
    Py_RETURN_NONE;
}

static PyObject *habits_worths(PyObject *self, PyObject *unused)
{
    const habits_t *h = (const habits_t *)self;
    (void)unused;
    return PyBytes_FromStringAndSize((const char *)h->worth[KINDS_AT], (Py_ssize_t)(KINDS * sizeof h->worth[0]));
}

static PyObject *habits_prompts(PyObject *self, PyObject *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((const habits_t *)self)->prompts);
}

#define NOTHING(name) {#name, habits_##name, METH_NOARGS, NULL}

static PyMethodDef methods[] = {
    NOTHING(saved), {"restore", habits_restore, METH_O, NULL}, NOTHING(worths), NOTHING(prompts), {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "Habits(): when chunks are used again; see lmcache/_native.pyi."},
    {Py_tp_new, habits_new},
    {Py_tp_dealloc, habits_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "lmcache._native.Habits",
    .basicsize = sizeof(habits_t),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

int lmcache_is_habits(PyObject *object)
{
    return habits_type && PyObject_TypeCheck(object, (PyTypeObject *)habits_type);
}

int lmcache_add_habits(PyObject *module)
{
    double begin = 0, end = FIRST_SECONDS;
    for (int age = 0; age < AGES; age++) {
        lmcache_age_ends[age] = end;
        lengths[age] = end - begin;
        middles[age] = sqrt((begin ? begin : end / 2) * end);
        begin = end;
        end = FIRST_SECONDS * exp2((age + 1.0) / AGES_AN_OCTAVE);
    }
    return lmcache_add_type(module, &type_spec, &habits_type);
}
