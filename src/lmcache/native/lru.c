/* LRU: evicts the record that has been unused for longest. Its list is in the records.
 *
 * LRU finds a victim with a cursor that walks from the oldest end of the list and passes records that are not evictable. A record
 * that was passed and becomes evictable later enters a heap ordered by age; all records in the heap are older than the cursor. A
 * record is passed once for each touch, so finding a victim costs O(1) in ordinary use and O(log n) at worst, amortised.
 */
#include "table.h"

static inline void unlink_age(table_t *t, record_t *r, uint32_t id)
{
    if (t->cursor == id)
        t->cursor = r->newer;
    if (r->older != NONE)
        at(t, r->older)->newer = r->newer;
    else
        t->oldest = r->newer;
    if (r->newer != NONE)
        at(t, r->newer)->older = r->older;
    else
        t->newest = r->older;
}

static inline void append_age(table_t *t, record_t *r, uint32_t id)
{
    r->stamp = ++t->clock;
    r->flags &= ~(uint64_t)(PASSED | QUEUED);
    r->older = t->newest;
    r->newer = NONE;
    if (t->newest != NONE)
        at(t, t->newest)->newer = id;
    else
        t->oldest = id;
    t->newest = id;
    if (t->cursor == NONE)
        t->cursor = id;
}

static void lru_inserted(table_t *t, uint32_t id)
{
    append_age(t, at(t, id), id);
}

static inline void touch_one(table_t *t, uint32_t id)
{
    record_t *r = at(t, id);
    unlink_age(t, r, id);
    append_age(t, r, id);
}

static void lru_touched(table_t *t, const uint8_t *ids, size_t count)
{
    while (count-- > 0) {
        if (count >= 8) { /* its neighbours in the list, which are about to be joined */
            const record_t *ahead = at(t, read_u32(ids + 4 * (count - 8)));
            if ((ahead->flags & ATTACHED) && ahead->older != NONE)
                PREFETCH(at(t, ahead->older));
            if ((ahead->flags & ATTACHED) && ahead->newer != NONE)
                PREFETCH(at(t, ahead->newer));
        }
        uint32_t id = read_u32(ids + 4 * count);
        if (at(t, id)->flags & ATTACHED)
            touch_one(t, id);
    }
}

static void lru_touched_path(table_t *t, uint32_t id)
{
    for (; id != NONE; id = at(t, id)->parent)
        touch_one(t, id);
}

static void lru_removed(table_t *t, uint32_t id)
{
    unlink_age(t, at(t, id), id);
}

/* Restarts the walk of the cursor. Used if the heap cannot grow. */
static void forget_passed(table_t *t)
{
    for (uint32_t id = t->oldest; id != t->cursor; id = at(t, id)->newer)
        at(t, id)->flags &= ~(uint64_t)(PASSED | QUEUED);
    t->cursor = t->oldest;
    t->heap_count = 0;
}

/* Adds the record to the heap if the cursor has passed it. */
static void lru_unblocked(table_t *t, uint32_t id)
{
    record_t *r = at(t, id);
    if (!(r->flags & PASSED) || (r->flags & QUEUED))
        return;
    if (t->heap_count == t->heap_room) {
        size_t room = t->heap_room ? 2 * t->heap_room : 64;
        waiting_t *grown = realloc(t->heap, room * sizeof(waiting_t));
        if (!grown) {
            forget_passed(t);
            return;
        }
        t->heap = grown;
        t->heap_room = room;
    }
    r->flags |= QUEUED;
    size_t place = t->heap_count++;
    for (size_t above; place > 0 && t->heap[above = (place - 1) / 2].stamp > r->stamp; place = above)
        t->heap[place] = t->heap[above];
    t->heap[place].stamp = r->stamp;
    t->heap[place].id = id;
}

static void pop_heap(table_t *t)
{
    waiting_t last = t->heap[--t->heap_count];
    size_t place = 0, below;
    while ((below = 2 * place + 1) < t->heap_count) {
        if (below + 1 < t->heap_count && t->heap[below + 1].stamp < t->heap[below].stamp)
            below++;
        if (t->heap[below].stamp >= last.stamp)
            break;
        t->heap[place] = t->heap[below];
        place = below;
    }
    t->heap[place] = last;
}

static int lru_victim(table_t *t, uint32_t *id)
{
    while (t->heap_count) {
        *id = t->heap[0].id;
        record_t *r = at(t, *id);
        if (r->stamp == t->heap[0].stamp && (r->flags & QUEUED)) {
            if (is_evictable(r))
                return 0;
            r->flags &= ~(uint64_t)QUEUED;
        }
        pop_heap(t);
    }
    while ((*id = t->cursor) != NONE) {
        record_t *r = at(t, *id);
        if (is_evictable(r))
            break;
        r->flags |= PASSED;
        t->cursor = r->newer;
    }
    return 0;
}

static int lru_order(table_t *t, uint32_t *ids)
{
    for (uint32_t id = t->oldest; id != NONE; id = at(t, id)->newer)
        *ids++ = id;
    return 0;
}

static int lru_memory_bytes(table_t *t, size_t *size)
{
    *size = t->heap_room * sizeof(waiting_t);
    return 0;
}

const policy_t lmcache_lru = {
    .inserted = lru_inserted,
    .touched = lru_touched,
    .touched_path = lru_touched_path,
    .unblocked = lru_unblocked,
    .removed = lru_removed,
    .victim = lru_victim,
    .order = lru_order,
    .memory_bytes = lru_memory_bytes,
};
