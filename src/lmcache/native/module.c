/* The module lmcache._native, assembled from the functions and types of the other files. */
#include "habits.h"
#include "native.h"

int lmcache_add_type(PyObject *module, PyType_Spec *spec, PyObject **kept)
{
    PyObject *type = PyType_FromSpec(spec);
    if (!type)
        return -1;
    int added = PyModule_AddType(module, (PyTypeObject *)type);
    if (kept && added == 0)
        *kept = type;
    else
        Py_DECREF(type);
    return added;
}

static int execute(PyObject *module)
{
    if (PyModule_AddFunctions(module, lmcache_copy_methods) < 0)
        return -1;
    if (PyModule_AddFunctions(module, lmcache_exchange_methods) < 0)
        return -1;
    if (PyModule_AddFunctions(module, lmcache_device_methods) < 0)
        return -1;
    if (PyModule_AddFunctions(module, lmcache_frames_methods) < 0)
        return -1;
    if (PyModule_AddFunctions(module, lmcache_int8_methods) < 0)
        return -1;
    if (PyModule_AddFunctions(module, lmcache_pack12_methods) < 0)
        return -1;
    if (lmcache_add_layouts(module) < 0 || lmcache_add_habits(module) < 0 || lmcache_add_table(module) < 0)
        return -1;
    return lmcache_add_sample(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "lmcache._native",
    .m_doc = "Native code of LMCache: copies between paged KV and extents, launches of copies on a device, the index table, a\n"
             "round trip, reads of frames, a codec, and a sample of chunks.",
    .m_size = 0,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
