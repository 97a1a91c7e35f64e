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

/* Structs of int64 that Python fills in are made from lists of their fields, and so is `layouts` of the module, by which Python
 * makes or checks its own. */
#define FIELD(name) int64_t name;
#define NAME_OF(name) #name,

/* A plane of paged KV: Plane of lmcache.transfer.paged, where the plane begins in an extent, and the step from token to token there.
 * Strides and offsets are in bytes. form: how extents hold the plane; kind: of its values, where they are rounded. */
/* clang-format off */
#define PLANE_NUMBERS(X)                                   \
    X(address) X(block_stride)                             \
    X(token_group) X(group_stride) X(token_stride)         \
    X(heads) X(head_stride)                                \
    X(dims) X(dim_group) X(dim_group_stride) X(dim_stride) \
    X(form) X(kind)                                        \
    X(extent_offset) X(extent_row)
/* clang-format on */

/* A row of `runs`. */
typedef struct {
    int64_t extent_offset, first_token, tokens, token_in_extent;
} Run;

/* How extents hold the head of a token: as it is, or as a row that int8.c rounds. The numbers are those of `Form` in Python. */
enum { FORM_EXACT, FORM_INT8, FORM_INT4 };

/* int8.c: rounds rows of `row` values of a kind, which begin `step` bytes apart, to rows that lie one behind the other, and restores
 * them. plain: without AVX2. Returns 0 if a value is not finite or is the largest float32; the target is then of no use. */
int lmcache_round_rows(int plain, int form, int kind, const uint8_t *raw, int64_t step, int64_t rows, int64_t row, uint8_t *to);
void lmcache_restore_rows(int plain, int form, int kind, const uint8_t *from, int64_t rows, int64_t row, uint8_t *raw, int64_t step);

/* copy.c: paged KV <-> extents. Ends with a zero entry. */
extern PyMethodDef lmcache_copy_methods[];

/* exchange.c: round trips and posts on a Unix socket. Ends with a zero entry. */
extern PyMethodDef lmcache_exchange_methods[];

/* device.c: launches of a copy's pieces through a device's driver. Ends with a zero entry. */
extern PyMethodDef lmcache_device_methods[];

/* device.c: adds `layouts`, the fields of the structs that Python fills in, to the module. 0, or -1 with a Python error set. */
int lmcache_add_layouts(PyObject *module);

/* frames.c: reads of a disk tier's frames. Ends with a zero entry. */
extern PyMethodDef lmcache_frames_methods[];

/* pack12.c: the codec of that name. Ends with a zero entry. */
extern PyMethodDef lmcache_pack12_methods[];

/* int8.c: the codec of that name. Ends with a zero entry. */
extern PyMethodDef lmcache_int8_methods[];

/* module.c: adds the type to the module, and keeps a reference to it in `kept`, unless that is NULL. 0, or -1 with a Python error
 * set. */
int lmcache_add_type(PyObject *module, PyType_Spec *spec, PyObject **kept);

/* table.c: adds the `Table` type to the module. Returns 0, or -1 with a Python error set. */
int lmcache_add_table(PyObject *module);

/* sample.c: adds the `Sample` type to the module. Returns 0, or -1 with a Python error set. */
int lmcache_add_sample(PyObject *module);

#endif
