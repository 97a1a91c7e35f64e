/* Habits: at which age chunks of each kind are used again, as learned from what happened. habits.c explains it. */
#ifndef LMCACHE_HABITS_H
#define LMCACHE_HABITS_H

#include "native.h"

#include <stdint.h>

#define AGES 64 /* an age is the number of a stretch of time since the last use; three to an octave, from 50 ms to 29 hours */

enum { COUNTS = 7, TURNS = 5, ANSWERS = 6, SIZES = 8 };
enum {
    COARSE = COUNTS * 2,     /* how often a chunk was used, and whether it was the last one of its prompt */
    MIDDLE = COARSE * TURNS * ANSWERS, /* and which turn of a conversation that was, and how long the answer */
    FINE = MIDDLE * SIZES,   /* and how much of the prompt was new */
    LEFT = COUNTS * SIZES,   /* how often the chunk was used at which a later prompt went another way, and how many were left */
    KINDS = FINE + LEFT,
    LEFT_AT = 1 + COARSE, /* rows of groups of kinds */
    MIDDLE_AT = LEFT_AT + COUNTS,
    KINDS_AT = MIDDLE_AT + MIDDLE,
    ROWS = KINDS_AT + KINDS,
};

typedef struct {
    PyObject_HEAD
    /* By kind and age, in weights; the chunks of one prompt that are of one kind weigh 1 together. */
    double used[KINDS][AGES];  /* used again at this age */
    double ended[KINDS][AGES]; /* no longer watched at this age: used again, left behind, or forgotten; those
                                  that were watched only from an age on, as another kind before, count negatively at that age */
    double live[KINDS][AGES];  /* watched, and of this age now */
    uint8_t seen[KINDS];       /* whether there is or was any of this kind */
    /* By row: 0 stands for all kinds, KINDS_AT and following for one kind each, the others for groups of kinds. */
    double sums[KINDS_AT][2][AGES]; /* while they are added up: uses, and ends of any kind with what is live */
    double rates[KINDS_AT][AGES];   /* uses a second */
    float worth[ROWS][AGES];
    uint32_t step;    /* of the computation of rates and worths, which goes round and round */
    uint64_t version; /* how many rows have been derived, which happens in the order of rows */
    uint64_t prompts; /* learned from */
} habits_t;

/* Adds the `Habits` type to the module, and returns whether an object is of that type. */
int lmcache_add_habits(PyObject *module);
int lmcache_is_habits(PyObject *object);

/* The end of each age in seconds; the last one has none. */
extern double lmcache_age_ends[AGES];

static inline int age_of(double seconds)
{
    int low = 0, high = AGES - 1;
    while (low < high) {
        int middle = (low + high) / 2;
        if (seconds <= lmcache_age_ends[middle])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static inline unsigned size_code(uint32_t size) /* floor(log2(size)), below SIZES; `size` is not 0 */
{
    unsigned code = 0;
    while (code + 1 < SIZES && size >> (code + 1))
        code++;
    return code;
}

static inline unsigned count_code(uint32_t count)
{
    return count < 4 ? (count ? count - 1 : 0) : count < 6 ? 3 : count < 10 ? 4 : count < 33 ? 5 : 6;
}

static inline unsigned kind_of(uint32_t count, int last, unsigned turn, uint32_t new_chunks)
{
    return ((count_code(count) * 2 + (last != 0)) * TURNS + turn - 1) * ANSWERS * SIZES + size_code(1 + new_chunks);
}

/* The same kind, with an answer of so many tokens. */
static inline unsigned answered_kind(unsigned kind, uint32_t tokens)
{
    unsigned code = 1;
    for (tokens >>= 4; tokens && code + 1 < ANSWERS; tokens >>= 2)
        code++;
    return kind - kind / SIZES % ANSWERS * SIZES + code * SIZES;
}

static inline unsigned left_kind(uint32_t count, uint32_t left)
{
    return FINE + count_code(count) * SIZES + size_code(left);
}

/* Notes that another prompt has come, and goes on with the computation: all rows within 256 prompts, at first
 * within 16. */
void lmcache_habits_prompt(habits_t *habits);

#endif
