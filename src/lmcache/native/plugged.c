/* A policy in Python. An error in a notification is written to standard error, and the table stays consistent. */
#include "arguments.h"

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
    drop_answer(t, PyObject_CallMethod(t->plug, "inserted", "Iy#I", id, r->keyed.key, (Py_ssize_t)KEY_BYTES, parent));
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

const policy_t lmcache_plugged = {
    .inserted = plugged_inserted,
    .touched = plugged_touched,
    .touched_path = plugged_touched_path,
    .unblocked = plugged_unblocked,
    .removed = plugged_removed,
    .victim = plugged_victim,
    .order = plugged_order,
    .memory_bytes = plugged_memory_bytes,
    .asked = plugged_asked,
};
