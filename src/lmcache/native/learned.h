/* The learned policy of eviction, for table.c. learned.c explains it. */
#ifndef LMCACHE_LEARNED_H
#define LMCACHE_LEARNED_H

#include "table.h"

extern const policy_t lmcache_learned;

/* Makes the policy's state of a table. `habits` is a Habits object, `seed` the table's. Returns NULL with an error set. */
struct learned *lmcache_new_learned(PyObject *habits, const uint64_t seed[2]);

/* Returns whether it evicts as LRU does, since LRU finds more. */
int lmcache_learned_leaves_it_to_lru(const struct learned *l);

#endif
