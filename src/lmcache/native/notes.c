/* The notes of the learned policy: what is remembered of chunks, in a hash table and in the order of access. */
#include "learning.h"

#define GHOSTS 16       /* accesses that are remembered for each chunk in the table */
#define LEAST_GHOSTS 1024
#define MOST_GHOSTS (1u << 22)

void lmcache_unlink_note(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (l->cursor == id)
        l->cursor = note->newer;
    lmcache_rival_unlinks(l, id);
    if (note->older != NONE)
        note_at(l, note->older)->newer = note->newer;
    else
        l->oldest = note->newer;
    if (note->newer != NONE)
        note_at(l, note->newer)->older = note->older;
    else
        l->newest = note->older;
}

void lmcache_append_note(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    note->access = ++l->accesses;
    note->flags &= (uint8_t)~PASSED_BY;
    note->older = l->newest;
    note->newer = NONE;
    if (l->newest != NONE)
        note_at(l, l->newest)->newer = id;
    else
        l->oldest = id;
    l->newest = id;
    if (l->cursor == NONE)
        l->cursor = id;
    lmcache_rival_appends(l, id);
}

uint32_t lmcache_new_note(table_t *t, const uint8_t *key)
{
    learned_t *l = t->learned;
    uint32_t id = take(&l->notes);
    note_t *note = note_at(l, id);
    memset(note, 0, sizeof *note);
    memcpy(note->keyed.key, key, KEY_BYTES);
    note->group = note->row = note->following = note->older = note->newer = NONE;
    l->known++;
    add_hashed(&l->hashed, &l->notes.segments, sizeof(note_t), id, l->known);
    return id;
}

void lmcache_forget(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    remove_hashed(&l->hashed, &l->notes.segments, sizeof(note_t), id);
    lmcache_leave_group(l, id, 0);
    lmcache_unlink_note(l, id);
    lmcache_rival_forgets(l, id);
    l->known--;
    give_back(&l->notes, id);
}

void lmcache_forget_old(table_t *t, size_t accesses)
{
    learned_t *l = t->learned;
    uint64_t most = (uint64_t)GHOSTS * l->rows;
    most = most < LEAST_GHOSTS ? LEAST_GHOSTS : most > MOST_GHOSTS ? MOST_GHOSTS : most;
    for (size_t left = 2 * accesses + 16; left > 0 && l->cursor != NONE; left--) {
        uint32_t id = l->cursor;
        note_t *note = note_at(l, id);
        if (l->accesses - note->access < most)
            break;
        if (note->row == NONE) {
            lmcache_forget(t, id);
        } else {
            note->flags |= PASSED_BY;
            l->cursor = note->newer;
        }
    }
}

size_t lmcache_find_path(table_t *t, const uint8_t *keys, size_t count)
{
    learned_t *l = t->learned;
    size_t known = 0;
    for (size_t first = 0; first < count; first += BATCH) {
        const uint32_t *buckets[BATCH];
        size_t batch = count - first < BATCH ? count - first : BATCH;
        for (size_t i = 0; i < batch; i++) {
            buckets[i] = bucket_of(&l->hashed, keys + (first + i) * KEY_BYTES);
            PREFETCH(buckets[i]);
        }
        for (size_t i = 0; i < batch; i++)
            if (*buckets[i] != NONE)
                PREFETCH(note_at(l, *buckets[i]));
        for (size_t i = 0; i < batch; i++) {
            uint32_t id = find_from(&l->notes.segments, sizeof(note_t), *buckets[i], keys + (first + i) * KEY_BYTES);
            l->path[first + i] = id;
            if (id != NONE && known == first + i)
                known++;
            if (id != NONE)
                PREFETCH(group_at(l, note_at(l, id)->group));
        }
    }
    return known;
}
