/* The index table's native half. */
#include "native.h"

int lmcache_add_table(PyObject *module)
{
    (void)module;
    return 0;
}
