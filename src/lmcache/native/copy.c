/* Paged KV <-> slots. */
#include "native.h"

PyMethodDef lmcache_copy_methods[] = {
    {NULL, NULL, 0, NULL},
};
