/* Declarations that the C files of lmcache._native share.
 *
 * The module uses the stable ABI of Python 3.10, so one build serves every later Python. The buffer protocol is not part of
 * that ABI, so only integers (addresses) and bytes cross from Python into C.
 */
#ifndef LMCACHE_NATIVE_H
#define LMCACHE_NATIVE_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Parses the arguments of `name`, which takes `count` integers. Returns 0, or -1 with a Python error set. */
static inline int lmcache_integers(const char *name, PyObject *const *args, Py_ssize_t nargs, int64_t *n, Py_ssize_t count)
{
    if (nargs != count) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd integers, not %zd arguments", name, count, nargs);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        n[i] = PyLong_AsLongLong(args[i]);
        if (n[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

/* copy.c: copies between paged KV and extents. Ends with a zero entry. */
extern PyMethodDef lmcache_copy_methods[];

/* exchange.c: one round trip on a Unix socket. Ends with a zero entry. */
extern PyMethodDef lmcache_exchange_methods[];

/* device.c: launches of a copy's pieces through a device's driver. Ends with a zero entry. */
extern PyMethodDef lmcache_device_methods[];

/* Adds `layouts`, the fields of the structs of device.c that Python fills in. Returns 0, or -1 with a Python error set. */
int lmcache_add_layouts(PyObject *module);

/* frames.c: reads of a disk tier's frames. Ends with a zero entry. */
extern PyMethodDef lmcache_frames_methods[];

/* table.c: adds the `Table` type to the module. Returns 0, or -1 with a Python error set. */
int lmcache_add_table(PyObject *module);

#endif
