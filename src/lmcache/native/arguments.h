/* Parsing of numbers of a table's records. Each function returns -1 with an error set if the argument is invalid. */
#ifndef LMCACHE_ARGUMENTS_H
#define LMCACHE_ARGUMENTS_H

#include "table.h"

static inline int to_number(PyObject *value, long long *number)
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

static inline int no_record(long long id)
{
    PyErr_Format(PyExc_ValueError, "no record has the id %lld; it was freed or never made", id);
    return -1;
}

static inline int to_id(const table_t *t, PyObject *value, uint32_t *id)
{
    long long number;
    if (to_number(value, &number) < 0)
        return -1;
    if (number < 1 || number >= MAX_RECORDS || !is_used(t, (uint32_t)number))
        return no_record(number);
    *id = (uint32_t)number;
    return 0;
}

#endif
