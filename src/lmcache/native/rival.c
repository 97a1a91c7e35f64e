/* When the learned policy evicts as LRU does, because LRU finds more.
 *
 * The notes are in the order of access, so LRU with as much memory would have the chunks of the newest ones, as many as the table
 * has room for. Of each prompt it is therefore known exactly, and at the cost of a flag in each note, how much LRU would have found
 * beside what the table has found. When the table has found less lately, the oldest chunk is evicted instead of the one worth least;
 * the policy goes on to learn. It is tried again when the loss in total allows for that. What it has gained it may lose in part.
 *
 * What a prompt loses beside LRU is counted with its sign, and fades as prompts come. Lengths of time are counted in chunks that
 * prompts ask for, in multiples of `room`, the chunks that fit into the table.
 */
#include "learning.h"

#include <math.h>

#define RECENTLY 8.0       /* rooms */
#define IN_TOTAL 256.0     /* rooms */
#define WORSE 0.005        /* of what was asked for recently: so much less is too little */
#define LOST 0.0018        /* of all that was asked for, likewise */
#define AGAIN 0.0013       /* the policy is tried again when less than that is lost in total, */
#define PAUSE 1.0          /* and LRU has had its way for so many rooms */
#define CHANCE 0.02        /* rooms: what does not count, since chance does that */
#define SPENT 0.5          /* of what was gained before */
#define LEAST_ROOM 64.0    /* chunks */
#define MOST_PASSED 4      /* chunks that leave LRU's memory in one call, when the table has become smaller */

void lmcache_begin_rival(rival_t *r)
{
    r->edge = NONE;
    r->room = NONE;
}

void lmcache_rival_appends(learned_t *l, uint32_t id)
{
    rival_t *r = &l->rival;
    r->held += !(note_at(l, id)->flags & IN_LRU);
    note_at(l, id)->flags |= IN_LRU;
    if (r->edge == NONE)
        r->edge = id;
    for (int left = MOST_PASSED; left > 0 && r->held > r->room; left--) {
        note_t *note = note_at(l, r->edge);
        note->flags &= (uint8_t)~IN_LRU;
        r->edge = note->newer;
        r->held--;
    }
}

void lmcache_rival_unlinks(learned_t *l, uint32_t id)
{
    if (l->rival.edge == id)
        l->rival.edge = note_at(l, id)->newer;
}

void lmcache_rival_forgets(learned_t *l, uint32_t id)
{
    l->rival.held -= (note_at(l, id)->flags & IN_LRU) != 0;
}

void lmcache_rival_inserts(learned_t *l)
{
    rival_t *r = &l->rival;
    r->filled = 1;
    if (r->room < l->rows)
        r->room = l->rows;
}

void lmcache_rival_evicts(learned_t *l)
{
    rival_t *r = &l->rival;
    if (r->filled)
        r->room = l->rows;
    r->filled = 0;
}

static void decide(rival_t *r, double room)
{
    double chance = CHANCE * room, gained = r->in_total - (r->recently < 0 ? r->recently : 0);
    if (r->leads) {
        r->leads = r->since <= PAUSE * room || r->in_total <= -AGAIN * r->asked_in_total;
        if (!r->leads)
            r->recently = r->asked_recently = 0;
        return;
    }
    double most = WORSE * r->asked_recently + chance + (gained > 0 ? SPENT * gained : 0);
    if (r->recently < -most || r->in_total < -LOST * r->asked_in_total - chance) {
        r->leads = 1;
        r->since = 0;
        r->times++;
    }
}

void lmcache_rival_asked(learned_t *l, const uint32_t *path, size_t count, size_t known)
{
    rival_t *r = &l->rival;
    size_t lru = 0, own = 0;
    if (r->room == NONE) /* nothing was ever evicted */
        return;
    while (lru < known && note_at(l, path[lru])->flags & IN_LRU)
        lru++;
    while (own < known && note_at(l, path[own])->row != NONE)
        own++;
    double room = r->room > LEAST_ROOM ? r->room : LEAST_ROOM, asked = (double)count, gained = (double)own - (double)lru;
    double recently = exp(-asked / (RECENTLY * room)), in_total = exp(-asked / (IN_TOTAL * room));
    r->recently = r->recently * recently + gained;
    r->asked_recently = r->asked_recently * recently + asked;
    r->in_total = r->in_total * in_total + gained;
    r->asked_in_total = r->asked_in_total * in_total + asked;
    r->since += asked;
    decide(r, room);
}
