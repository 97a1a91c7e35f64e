/* The learned policy of eviction: evicts the chunk whose chance of a use is least for the time that it would be held.
 *
 * It learns from prompts as lookups name them (`asked`), not from touches. So a prompt counts once, whoever stores its chunks and
 * how often. A prompt waits in a short queue until the server is idle, or something depends on it; neither changes the result.
 *
 * A *note* is what is remembered of a chunk: of each chunk in the table, and of those that left it within the last GHOSTS
 * accesses for each chunk in the table. A *group* is the chunks of one prompt with the same kind (habits.h); they have been used
 * at the same time, and are therefore worth the same. Groups of one age stand in a list, oldest first, so that the only thing that
 * happens to them as time goes by is that the first ones move to the next list. A chunk that may be evictable is a *candidate*,
 * and groups with candidates stand in a pairing heap for each kind and age, the oldest one on top. Therefore the victim is
 * exactly the one that a search through all chunks would find: the least worth of all kinds and ages, then the one used before the
 * others. While LRU finds more (rival.c), it is the oldest of all.
 */
#include "learning.h"
#include "learned.h"

#include <math.h>

#define HOT 32          /* nothing is left behind at a chunk that was used more often: other prompts still go there */
#define AT_ONCE 2048    /* chunks that are learned from in one call, some 0.2 ms */
#define AGAIN_SECONDS 0.05 /* the same prompt within so short a time is one prompt, for example of two ranks */

/* Learning from prompts */

/* Learns from a prompt, which has come at `now`. Without memory the prompt is ignored. */
static void learn(table_t *t, double now, const uint8_t *keys, size_t count)
{
    learned_t *l = t->learned;
    if (now > l->now)
        l->now = now;
    lmcache_grow_older(l);
    if (count > l->path_room) {
        uint32_t *grown = realloc(l->path, count * sizeof(uint32_t));
        if (!grown)
            return;
        l->path = grown;
        l->path_room = count;
    }
    if (!count || prepare(&l->notes, count) < 0 || prepare(&l->groups, 1 + COUNTS * 2) < 0)
        return;
    size_t known = lmcache_find_path(t, keys, count);
    lmcache_rival_asked(l, l->path, count, known);
    unsigned turn = 1;
    if (known) {
        uint32_t deepest = l->path[known - 1];
        const group_t *before = group_at(l, note_at(l, deepest)->group);
        if (known == count && before->path == count && l->now - before->time < AGAIN_SECONDS)
            return;
        if (known >= 2 && known + (before->path > 8 ? 2 : 1) >= before->path)
            turn = before->turn < TURNS ? before->turn + 1u : TURNS;
        if (known < count && note_at(l, deepest)->count <= HOT)
            lmcache_leave_behind(l, deepest);
    }
    uint32_t made[COUNTS * 2], prompt = ++l->prompts, candidates = NONE, following = NONE;
    memset(made, 0xff, sizeof made);
    for (size_t i = count; i-- > 0;) { /* the end of the prompt first, so that it is the older one */
        uint32_t id = l->path[i];
        int candidate = 0;
        if (id == NONE)
            id = find_note(l, keys + i * KEY_BYTES);
        if (id == NONE) {
            id = lmcache_new_note(t, keys + i * KEY_BYTES);
        } else if (group_at(l, note_at(l, id)->group)->prompt != prompt) {
            candidate = lmcache_leave_group(l, id, 1);
            lmcache_unlink_note(l, id);
        } else {
            continue; /* the prompt names a chunk twice */
        }
        note_t *note = note_at(l, id);
        note->count += note->count < UINT16_MAX;
        unsigned last = i + 1 == count, coarse = count_code(note->count) * 2 + last;
        if (made[coarse] == NONE) {
            unsigned kind = kind_of(note->count, (int)last, turn, (uint32_t)(count - known));
            made[coarse] = lmcache_new_group(l, kind, turn, (uint32_t)count, prompt);
        }
        join_group(l, id, made[coarse]);
        lmcache_append_note(l, id);
        note->following = following;
        following = id;
        if (candidate) {
            note->candidate_after = candidates;
            candidates = id;
        }
    }
    uint32_t previous = NONE;
    for (unsigned coarse = 0; coarse < COUNTS * 2; coarse++)
        if (made[coarse] != NONE) {
            group_at(l, made[coarse])->previous_of_prompt = previous;
            if (previous != NONE)
                group_at(l, previous)->next_of_prompt = made[coarse];
            previous = made[coarse];
            lmcache_enter_age(l, made[coarse], 0);
        }
    lmcache_become_candidates(l, candidates);
    lmcache_forget_old(t, count);
    lmcache_habits_prompt(l->habits);
}

/* Learns how long the answer to a prompt was, unless the last chunk of the prompt has been used again. */
static void learn_answer(table_t *t, double now, const uint8_t *key, uint32_t tokens)
{
    learned_t *l = t->learned;
    if (now > l->now)
        l->now = now;
    lmcache_grow_older(l);
    uint32_t note = find_note(l, key), last = note == NONE ? NONE : note_at(l, note)->group;
    for (uint32_t id = last; id != NONE; id = group_at(l, id)->previous_of_prompt)
        lmcache_change_kind(l, id, tokens);
    for (uint32_t id = last == NONE ? NONE : group_at(l, last)->next_of_prompt; id != NONE;
         id = group_at(l, id)->next_of_prompt)
        lmcache_change_kind(l, id, tokens);
}

static size_t chunks_of(const news_t *news)
{
    return news->answered < 0 ? (size_t)PyBytes_Size(news->hashes) / KEY_BYTES : 0;
}

static void learn_first(table_t *t)
{
    learned_t *l = t->learned;
    news_t first = l->waiting[0];
    const uint8_t *keys = (const uint8_t *)PyBytes_AsString(first.hashes);
    l->waiting_count--;
    l->waiting_chunks -= chunks_of(&first);
    memmove(l->waiting, l->waiting + 1, l->waiting_count * sizeof first);
    if (first.answered < 0)
        learn(t, first.now, keys, chunks_of(&first));
    else
        learn_answer(t, first.now, keys, (uint32_t)first.answered);
    Py_DECREF(first.hashes);
}

/* Learns all that waits, since something depends on it: AT_ONCE chunks at most, and one prompt. */
static void settle(table_t *t)
{
    while (t->learned->waiting_count)
        learn_first(t);
}

/* The functions of the policy */

/* Learns while nobody waits: AT_ONCE chunks at most, or one prompt. Each prompt that waits brings a call of its own. */
static void learned_settled(table_t *t)
{
    learned_t *l = t->learned;
    size_t chunks = 0;
    while (l->waiting_count && (!chunks || chunks + chunks_of(l->waiting) <= AT_ONCE)) {
        chunks += chunks_of(l->waiting);
        learn_first(t);
    }
}

static void put_off(table_t *t, double now, PyObject *hashes, int64_t answered)
{
    learned_t *l = t->learned;
    while (l->waiting_count == WAITING || l->waiting_chunks > AT_ONCE)
        learn_first(t);
    news_t news = {now, hashes, answered};
    Py_INCREF(hashes);
    l->waiting_chunks += chunks_of(&news);
    l->waiting[l->waiting_count++] = news;
}

static void learned_asked(table_t *t, double now, PyObject *hashes)
{
    put_off(t, now, hashes, -1);
}

static void learned_answered(table_t *t, double now, PyObject *hash, uint32_t tokens)
{
    put_off(t, now, hash, tokens);
}

/* Makes the note of a chunk that is stored and that no prompt has named, such as the text that a model has answered. */
static uint32_t note_unasked(table_t *t, const record_t *r)
{
    learned_t *l = t->learned;
    if (prepare(&l->notes, 1) < 0 || prepare(&l->groups, 1) < 0)
        return NONE;
    uint32_t parent = r->parent == NONE ? NONE : at(t, r->parent)->older, id = lmcache_new_note(t, r->keyed.key);
    const group_t *above = parent == NONE ? NULL : group_at(l, note_at(l, parent)->group);
    unsigned turn = above ? above->turn : 1;
    note_at(l, id)->count = 1;
    if (above && note_at(l, parent)->group == l->growing && above->time == l->now) {
        l->habits->live[above->kind][above->age] -= (double)above->left / above->size;
        join_group(l, id, l->growing);
        l->habits->live[above->kind][above->age] += (double)above->left / above->size;
    } else {
        l->growing = lmcache_new_group(l, kind_of(1, 0, turn, 1), turn, above ? above->path : 1, ++l->prompts);
        join_group(l, id, l->growing);
        lmcache_enter_age(l, l->growing, 0);
    }
    lmcache_append_note(l, id);
    lmcache_forget_old(t, 1);
    return id;
}

static void learned_inserted(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    settle(t);
    l->rows++;
    lmcache_rival_inserts(l);
    record_t *r = at(t, id);
    uint32_t note = find_note(l, r->keyed.key);
    if (note == NONE)
        note = note_unasked(t, r);
    r->older = note;
    if (note == NONE) {
        l->unknown++;
        return;
    }
    note_at(l, note)->row = id;
    lmcache_become_candidate(l, note);
    if (r->parent != NONE && at(t, r->parent)->older != NONE)
        lmcache_end_candidate(l, at(t, r->parent)->older);
}

static void learned_touched(table_t *t, const uint8_t *ids, size_t count)
{
    (void)t, (void)ids, (void)count; /* it is prompts that count */
}

static void learned_touched_path(table_t *t, uint32_t id)
{
    (void)t, (void)id;
}

static void learned_unblocked(table_t *t, uint32_t id)
{
    if (at(t, id)->older != NONE)
        lmcache_become_candidate(t->learned, at(t, id)->older);
}

static void learned_removed(table_t *t, uint32_t id)
{
    learned_t *l = t->learned;
    uint32_t note = at(t, id)->older;
    settle(t);
    l->rows--;
    if (note == NONE) {
        l->unknown--;
        return;
    }
    lmcache_end_candidate(l, note);
    note_at(l, note)->row = NONE;
    if (note_at(l, note)->flags & PASSED_BY)
        lmcache_forget(t, note);
}

/* Returns an evictable record that has no note, or NONE. */
static uint32_t evictable_unknown(const table_t *t)
{
    for (uint32_t id = 1; t->learned->unknown && id < t->next_id; id++)
        if (is_evictable(at(t, id)) && at(t, id)->older == NONE)
            return id;
    return NONE;
}

static int learned_victim(table_t *t, uint32_t *id)
{
    learned_t *l = t->learned;
    settle(t);
    lmcache_rival_evicts(l);
    lmcache_grow_older(l);
    lmcache_note_new_worths(l);
    for (uint32_t chosen; (chosen = l->rival.leads ? lmcache_oldest_group(l) : lmcache_least_group(l)) != NONE;) {
        uint32_t note = group_at(l, chosen)->candidates;
        *id = note_at(l, note)->row;
        if (is_evictable(at(t, *id)))
            return 0;
        lmcache_end_candidate(l, note);
    }
    *id = evictable_unknown(t);
    return 0;
}

/* The order of all records: groups by worth, unless LRU leads, then by age; within a group, later records first. */

typedef struct {
    float worth;
    uint32_t prompt, group, records;
    double time;
} place_t;

static int compare_places(const void *a, const void *b)
{
    const place_t *one = a, *other = b;
    if (one->worth != other->worth)
        return one->worth < other->worth ? -1 : 1;
    if (one->time != other->time)
        return one->time < other->time ? -1 : 1;
    return one->prompt < other->prompt ? -1 : one->prompt > other->prompt;
}

static int learned_order(table_t *t, uint32_t *ids)
{
    learned_t *l = t->learned;
    size_t groups = 0, at_place = 0;
    uint32_t begin = 0;
    settle(t);
    uint32_t *place_of = calloc((size_t)l->groups.next + 1, sizeof(uint32_t));
    place_t *places = malloc(((size_t)l->groups.next + 1) * sizeof(place_t));
    if (!place_of || !places) {
        free(place_of);
        free(places);
        PyErr_NoMemory();
        return -1;
    }
    for (int age = 0; age < AGES; age++)
        for (uint32_t id = l->first[age]; id != NONE; id = group_at(l, id)->after) {
            const group_t *group = group_at(l, id);
            float worth = l->rival.leads ? 0 : l->habits->worth[KINDS_AT + group->kind][age];
            place_t place = {worth, group->prompt, id, 0, group->used};
            places[groups++] = place;
        }
    qsort(places, groups, sizeof(place_t), compare_places);
    for (size_t i = 0; i < groups; i++)
        place_of[places[i].group] = (uint32_t)i;
    for (uint32_t id = 1; id < t->next_id; id++) {
        const record_t *r = at(t, id);
        if (!(r->flags & ATTACHED))
            continue;
        if (r->older == NONE)
            ids[begin++] = id;
        else
            places[place_of[note_at(l, r->older)->group]].records++;
    }
    for (; at_place < groups; at_place++) { /* `records` becomes where the records of the group begin */
        uint32_t records = places[at_place].records;
        places[at_place].records = begin;
        begin += records;
    }
    for (uint32_t id = t->next_id; id-- > 1;) {
        const record_t *r = at(t, id);
        if ((r->flags & ATTACHED) && r->older != NONE)
            ids[places[place_of[note_at(l, r->older)->group]].records++] = id;
    }
    free(place_of);
    free(places);
    return 0;
}

static int learned_memory_bytes(table_t *t, size_t *size)
{
    const learned_t *l = t->learned;
    *size = sizeof *l + KINDS * sizeof *l->roots + pool_memory(&l->notes) + pool_memory(&l->groups) + hashed_memory(&l->hashed) +
            l->path_room * sizeof(uint32_t);
    return 0;
}

static void free_learned(learned_t *l)
{
    for (unsigned i = 0; i < l->waiting_count; i++)
        Py_DECREF(l->waiting[i].hashes);
    for (int age = 0; age < AGES; age++)
        while (l->first[age] != NONE)
            lmcache_leave_age(l, l->first[age]);
    free_segments(&l->notes.segments);
    free_segments(&l->groups.segments);
    free_hashed(&l->hashed);
    free(l->roots);
    free(l->path);
    Py_DECREF((PyObject *)l->habits);
    free(l);
}

static void learned_ended(table_t *t)
{
    free_learned(t->learned);
}

int lmcache_learned_leaves_it_to_lru(const learned_t *l)
{
    return l->rival.leads;
}

learned_t *lmcache_new_learned(PyObject *habits, const uint64_t seed[2])
{
    learned_t *l = calloc(1, sizeof *l);
    if (!l) {
        PyErr_NoMemory();
        return NULL;
    }
    Py_INCREF(habits);
    l->habits = (habits_t *)habits;
    l->notes.item = sizeof(note_t);
    l->groups.item = sizeof(group_t);
    l->notes.free_head = l->groups.free_head = l->oldest = l->newest = l->cursor = l->growing = NONE;
    memset(l->first, 0xff, sizeof l->first);
    memset(l->last, 0xff, sizeof l->last);
    for (unsigned kind = 0; kind < KINDS; kind++)
        l->least[kind] = INFINITY;
    l->version = l->habits->version;
    lmcache_begin_rival(&l->rival);
    l->notes.segments.shift = l->groups.segments.shift = NOTES_SHIFT;
    memcpy(l->hashed.seed, seed, sizeof l->hashed.seed);
    l->roots = calloc(KINDS, sizeof *l->roots);
    if (!l->roots || begin_hashed(&l->hashed) < 0) {
        free_learned(l);
        PyErr_NoMemory();
        return NULL;
    }
    return l;
}

const policy_t lmcache_learned = {
    .inserted = learned_inserted,
    .asked = learned_asked,
    .answered = learned_answered,
    .touched = learned_touched,
    .touched_path = learned_touched_path,
    .unblocked = learned_unblocked,
    .removed = learned_removed,
    .victim = learned_victim,
    .order = learned_order,
    .memory_bytes = learned_memory_bytes,
    .settled = learned_settled,
    .ended = learned_ended,
};
