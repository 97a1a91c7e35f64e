/* Which group of the learned policy is worth least: pairing heaps of groups, for each kind and age, the one on top that was used before
 * all others; and the candidates of each group, without which a group is in no heap.
 */
#include "learning.h"

#include <math.h>

/* Joins two heaps; either may be NONE. */
static uint32_t join(learned_t *l, uint32_t a, uint32_t b)
{
    if (a == NONE || b == NONE)
        return a == NONE ? b : a;
    if (is_before(group_at(l, b), group_at(l, a))) {
        uint32_t other = a;
        a = b;
        b = other;
    }
    group_t *top = group_at(l, a), *below = group_at(l, b);
    below->sibling = top->child;
    below->back = a;
    if (top->child != NONE)
        group_at(l, top->child)->back = b;
    top->child = b;
    return a;
}

/* Joins siblings: pairs from the first to the last, then all of these from the last to the first. */
static uint32_t join_siblings(learned_t *l, uint32_t first)
{
    uint32_t pairs = NONE, heap = NONE;
    while (first != NONE) {
        uint32_t a = first, b = group_at(l, a)->sibling;
        first = b == NONE ? NONE : group_at(l, b)->sibling;
        group_at(l, a)->sibling = NONE;
        if (b != NONE)
            group_at(l, b)->sibling = NONE;
        a = join(l, a, b);
        group_at(l, a)->sibling = pairs;
        pairs = a;
    }
    while (pairs != NONE) {
        uint32_t next = group_at(l, pairs)->sibling;
        group_at(l, pairs)->sibling = NONE;
        heap = join(l, heap, pairs);
        pairs = next;
    }
    return heap;
}

static void find_least(learned_t *l, unsigned kind)
{
    const float *worth = l->habits->worth[KINDS_AT + kind];
    l->least[kind] = INFINITY;
    for (uint64_t left = l->filled[kind]; left; left &= left - 1) {
        int age = __builtin_ctzll(left);
        if (worth[age] <= l->least[kind]) { /* of equals the older one */
            l->least[kind] = worth[age];
            l->least_age[kind] = (uint8_t)age;
        }
    }
}

static void set_root(learned_t *l, const group_t *group, uint32_t root)
{
    unsigned kind = group->kind;
    uint64_t ages = l->filled[kind], age = (uint64_t)1 << group->age;
    l->roots[kind][group->age] = root == NONE ? 0 : root + 1;
    if (root != NONE)
        group_at(l, root)->back = NONE;
    l->filled[kind] = root == NONE ? ages & ~age : ages | age;
    if (l->filled[kind] == ages)
        return;
    if (root == NONE) {
        if (l->least_age[kind] == group->age)
            find_least(l, kind);
    } else {
        float worth = l->habits->worth[KINDS_AT + kind][group->age];
        if (worth < l->least[kind] || (worth == l->least[kind] && group->age > l->least_age[kind])) {
            l->least[kind] = worth;
            l->least_age[kind] = group->age;
        }
    }
    if (l->filled[kind])
        l->kinds[kind / 64] |= (uint64_t)1 << kind % 64;
    else
        l->kinds[kind / 64] &= ~((uint64_t)1 << kind % 64);
}

void lmcache_enter_heap(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    group->child = group->sibling = group->back = NONE;
    set_root(l, group, join(l, root_of(l, group->kind, group->age), id));
}

void lmcache_leave_heap(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    uint32_t root = root_of(l, group->kind, group->age), rest = join_siblings(l, group->child);
    if (root == id) {
        root = rest;
    } else {
        group_t *back = group_at(l, group->back);
        if (back->child == id)
            back->child = group->sibling;
        else
            back->sibling = group->sibling;
        if (group->sibling != NONE)
            group_at(l, group->sibling)->back = group->back;
        root = join(l, root, rest);
    }
    set_root(l, group, root);
}

void lmcache_note_new_worths(learned_t *l)
{
    uint64_t changed = l->habits->version - l->version;
    unsigned row = (unsigned)((l->habits->version + ROWS - 1) % ROWS);
    for (changed = changed < ROWS ? changed : ROWS; changed > 0; changed--, row = row ? row - 1 : ROWS - 1)
        if (row >= KINDS_AT && l->filled[row - KINDS_AT])
            find_least(l, row - KINDS_AT);
    l->version = l->habits->version;
}

/* Candidates */

void lmcache_become_candidate(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (note->flags & CANDIDATE)
        return;
    group_t *group = group_at(l, note->group);
    note->flags |= CANDIDATE;
    note->candidate_before = NONE;
    note->candidate_after = group->candidates;
    if (group->candidates != NONE)
        note_at(l, group->candidates)->candidate_before = id;
    group->candidates = id;
    if (note->candidate_after == NONE)
        lmcache_enter_heap(l, note->group);
}

int lmcache_end_candidate(learned_t *l, uint32_t id)
{
    note_t *note = note_at(l, id);
    if (!(note->flags & CANDIDATE))
        return 0;
    group_t *group = group_at(l, note->group);
    note->flags &= (uint8_t)~CANDIDATE;
    if (note->candidate_before != NONE)
        note_at(l, note->candidate_before)->candidate_after = note->candidate_after;
    else
        group->candidates = note->candidate_after;
    if (note->candidate_after != NONE)
        note_at(l, note->candidate_after)->candidate_before = note->candidate_before;
    if (group->candidates == NONE)
        lmcache_leave_heap(l, note->group);
    return 1;
}

void lmcache_become_candidates(learned_t *l, uint32_t id)
{
    while (id != NONE) {
        uint32_t next = note_at(l, id)->candidate_after;
        lmcache_become_candidate(l, id);
        id = next;
    }
}

uint32_t lmcache_least_group(const learned_t *l)
{
    uint32_t chosen = NONE;
    float least = INFINITY;
    for (unsigned word = 0; word < KINDS / 64 + 1; word++)
        for (uint64_t left = l->kinds[word]; left; left &= left - 1) {
            unsigned kind = 64 * word + (unsigned)__builtin_ctzll(left);
            if (l->least[kind] > least)
                continue;
            uint32_t oldest = root_of(l, kind, l->least_age[kind]);
            if (l->least[kind] < least || is_before(group_at(l, oldest), group_at(l, chosen)))
                chosen = oldest;
            least = l->least[kind];
        }
    return chosen;
}

uint32_t lmcache_oldest_group(const learned_t *l)
{
    uint32_t chosen = NONE;
    for (unsigned word = 0; word < KINDS / 64 + 1; word++)
        for (uint64_t left = l->kinds[word]; left; left &= left - 1) {
            unsigned kind = 64 * word + (unsigned)__builtin_ctzll(left);
            uint64_t ages = l->filled[kind];
            if (kind < FINE) /* only what was left behind can have been used before what is older */
                ages = (uint64_t)1 << (AGES - 1 - __builtin_clzll(ages));
            for (; ages; ages &= ages - 1) {
                uint32_t oldest = root_of(l, kind, (unsigned)__builtin_ctzll(ages));
                if (chosen == NONE || is_before(group_at(l, oldest), group_at(l, chosen)))
                    chosen = oldest;
            }
        }
    return chosen;
}
