/* The groups of the learned policy: the chunks of one prompt that are of one kind, in a list for each age, oldest first. */
#include "learning.h"

#define MOST_MOVES 256  /* groups that move to another age in one call */

void lmcache_leave_age(learned_t *l, uint32_t id)
{
    group_t *group = group_at(l, id);
    if (group->before != NONE)
        group_at(l, group->before)->after = group->after;
    else
        l->first[group->age] = group->after;
    if (group->after != NONE)
        group_at(l, group->after)->before = group->before;
    else
        l->last[group->age] = group->before;
    l->habits->live[group->kind][group->age] -= (double)group->left / group->size;
}

void lmcache_enter_age(learned_t *l, uint32_t id, int age)
{
    group_t *group = group_at(l, id);
    group->age = (uint8_t)age;
    group->before = l->last[age];
    group->after = NONE;
    if (group->before != NONE)
        group_at(l, group->before)->after = id;
    else
        l->first[age] = id;
    l->last[age] = id;
    l->habits->seen[group->kind] = 1;
    l->habits->live[group->kind][age] += (double)group->left / group->size;
}

void lmcache_grow_older(learned_t *l)
{
    int left = MOST_MOVES;
    for (int age = AGES - 2; age >= 0; age--)
        for (uint32_t id; (id = l->first[age]) != NONE && left > 0; left--) {
            group_t *group = group_at(l, id);
            int now = age_of(l->now - group->time);
            if (now <= age)
                break;
            int in_heap = group->candidates != NONE;
            if (in_heap)
                lmcache_leave_heap(l, id);
            lmcache_leave_age(l, id);
            lmcache_enter_age(l, id, now);
            if (in_heap)
                lmcache_enter_heap(l, id);
        }
}

uint32_t lmcache_new_group(learned_t *l, unsigned kind, unsigned turn, uint32_t path, uint32_t prompt)
{
    uint32_t id = take(&l->groups);
    group_t *group = group_at(l, id);
    memset(group, 0, sizeof *group);
    group->time = group->used = l->now;
    group->prompt = prompt;
    group->path = path;
    group->kind = (uint16_t)kind;
    group->turn = (uint8_t)turn;
    group->before = group->after = group->child = group->sibling = group->back = group->candidates = NONE;
    group->next_of_prompt = group->previous_of_prompt = NONE;
    return id;
}

int lmcache_leave_group(learned_t *l, uint32_t id, int used)
{
    note_t *note = note_at(l, id);
    uint32_t number = note->group;
    group_t *group = group_at(l, number);
    int candidate = lmcache_end_candidate(l, id), age = age_of(l->now - group->time);
    double weight = 1.0 / group->size;
    l->habits->ended[group->kind][age] += weight;
    if (used)
        l->habits->used[group->kind][age] += weight;
    l->habits->live[group->kind][group->age] -= weight;
    note->group = NONE;
    if (--group->left == 0) {
        if (l->growing == number)
            l->growing = NONE;
        if (group->previous_of_prompt != NONE)
            group_at(l, group->previous_of_prompt)->next_of_prompt = group->next_of_prompt;
        if (group->next_of_prompt != NONE)
            group_at(l, group->next_of_prompt)->previous_of_prompt = group->previous_of_prompt;
        lmcache_leave_age(l, number);
        give_back(&l->groups, number);
    }
    return candidate;
}

void lmcache_leave_behind(learned_t *l, uint32_t fork)
{
    const note_t *at_fork = note_at(l, fork);
    uint32_t prompt = group_at(l, at_fork->group)->prompt, length = 0;
    for (uint32_t id = at_fork->following; id != NONE; id = note_at(l, id)->following, length++) {
        uint32_t group = note_at(l, id)->group; /* the note may have been given to another chunk meanwhile */
        if (group == NONE || group_at(l, group)->prompt != prompt)
            break;
    }
    if (!length)
        return;
    const group_t *before = group_at(l, at_fork->group);
    double used = before->used;
    uint32_t left =
        lmcache_new_group(l, left_kind(at_fork->count, length), before->turn, before->path, ++l->prompts);
    uint32_t id = at_fork->following, candidates = NONE;
    group_at(l, left)->used = used;
    for (uint32_t i = 0; i < length; i++, id = note_at(l, id)->following) {
        int candidate = lmcache_leave_group(l, id, 0);
        join_group(l, id, left);
        if (candidate) {
            note_at(l, id)->candidate_after = candidates;
            candidates = id;
        }
    }
    lmcache_enter_age(l, left, 0);
    lmcache_become_candidates(l, candidates);
}

void lmcache_change_kind(learned_t *l, uint32_t id, uint32_t tokens)
{
    group_t *group = group_at(l, id);
    double weight = (double)group->left / group->size;
    int in_heap = group->candidates != NONE;
    if (group->kind >= FINE)
        return;
    if (in_heap)
        lmcache_leave_heap(l, id);
    l->habits->live[group->kind][group->age] -= weight;
    l->habits->ended[group->kind][group->age] += weight;
    group->kind = (uint16_t)answered_kind(group->kind, tokens);
    l->habits->seen[group->kind] = 1;
    l->habits->live[group->kind][group->age] += weight;
    l->habits->ended[group->kind][group->age] -= weight;
    if (in_heap)
        lmcache_enter_heap(l, id);
}
