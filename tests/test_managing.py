"""Pins and removals by name in the heart alone: a random life, and what groups and other splits make of them."""

from __future__ import annotations

import hashlib
import random
from array import array

import pytest

from lmcache.cache import Refusal
from lmcache.cache.managing import MAX_PINS, MOST_NAMED, Managing
from lmcache.chunks import Split, split_hashes

SECTOR = 4096
TOTAL = 64 * SECTOR


def names(seed: int, chunks: int, shared: bytes = b"") -> bytes:
    fresh = (hashlib.blake2b(f"{seed} {at}".encode(), digest_size=16).digest() for at in range(chunks))
    return shared + b"".join(fresh)


def heart(total: int = TOTAL, reach: int = 0) -> tuple[Managing, int]:
    one = Managing(total)
    one.join(1, "engine")
    return one, one.open_space(1, b"f" * 16, 1, 0, SECTOR, reach)


def store(one: Managing, space: int, hashes: bytes, now: float = 0.0) -> int:
    grant = one.reserve(now, 1, space, 0, b"", True, hashes)
    if grant.reservation:
        one.commit(now, 1, grant.reservation, True)
    return one.usable([space], hashes)


def test_a_random_life_keeps_the_promises_of_pins() -> None:
    dice, now = random.Random(7), 0.0
    one, space = heart()
    one.pinnable_bytes = 12 * SECTOR
    shared = names(0, 3)
    prompts = [names(seed, dice.randrange(1, 9), shared if seed % 2 else b"") for seed in range(1, 40)]
    held: dict[str, tuple[bytes, float]] = {}
    refused = removed = 0
    for step in range(3000):
        now += 0.1
        prompt = dice.choice(prompts)
        doing = dice.random()
        if doing < 0.5:
            store(one, space, prompt, now)
        elif doing < 0.7:
            try:
                pin = one.pin(now, str(step), [space], prompt, dice.choice([1.0, 20.0]))
            except Refusal as error:
                assert "may be" in str(error)
                refused += 1
            else:
                if pin.chunks:
                    held[str(step)] = prompt[: 16 * pin.chunks], pin.until
        elif doing < 0.8 and held:
            name = dice.choice(sorted(held))
            assert one.unpin(name) is not None and one.unpin(name) is None
            del held[name]
        elif doing < 0.9:
            before = one.usable([space], prompt)
            done = one.remove([space], prompt)
            removed += done.chunks
            assert done.size_bytes == SECTOR * done.chunks
            assert one.usable([space], prompt) + done.chunks == before, "from the end on"
        elif doing < 0.98:
            one.tick(now)
        elif doing < 0.99:
            one.clear()
            held.clear()
        left = {pin.name for pin in one.pins}
        for name in [name for name, (_, until) in held.items() if name not in left and until <= now]:
            del held[name]
        assert left == set(held)
        pinned = {key for prefix, _ in held.values() for key in split_hashes(prefix)}
        assert one.pinned_chunks == len(pinned) and one.pinned_bytes == SECTOR * len(pinned) <= one.pinnable_bytes
        for prefix, _ in held.values():
            assert one.usable([space], prefix) == len(prefix) // 16, "nothing that is pinned goes"
    assert refused > 10 and removed > 50 and one.events.counters["evicted:room"] > 100
    for name in held:
        one.unpin(name)
    for prompt in prompts:
        one.remove([space], prompt)
    assert one.used_bytes() == 0 and one.chunks == 0 and one.events.counters["failed_effects"] == 0


def test_of_a_group_with_a_reach_only_what_is_in_reach_of_the_end_is_pinned() -> None:
    one, whole = heart()
    window = one.open_space(1, b"w" * 16, 1, 0, SECTOR, 2, main=whole)
    prompt = names(1, 8)
    store(one, whole, prompt)
    assert one.pin(0.0, "early", [whole, window], prompt, 9.0).chunks == 0
    store(one, window, prompt)
    pin = one.pin(0.0, "both", [whole, window], prompt, 9.0)
    assert pin.chunks == 8 and one.pinned_chunks == 10 and pin.last == prompt[-16:]
    assert one.remove([whole, window], prompt).kept == {"pinned": 10}


def test_what_another_split_has_stored_is_found_pinned_and_removed() -> None:
    one = Managing(TOTAL)
    spaces = []
    for process, count in ((1, 1), (2, 2)):
        one.join(process, f"engine {count}")
        for shard in range(count):
            space = one.open_space(
                process, b"s" * 16, count, shard, 2 * SECTOR // count, family=b"s" * 16, split=Split((), count)
            )
        spaces.append(space)
    prompt = names(1, 4)
    store(one, spaces[0], prompt)
    assert one.usable([spaces[1]], prompt) == 4
    assert one.pin(0.0, "x", [spaces[1]], prompt, 9.0).size_bytes == one.pinned_bytes == 8 * SECTOR
    assert one.remove([spaces[1]], prompt).kept == {"pinned": 4}
    one.unpin("x")
    assert one.remove([spaces[1]], prompt).chunks == 4 and one.used_bytes() == 0


def test_what_is_being_filled_stays_and_a_reader_keeps_a_pinned_extent_over_a_clear() -> None:
    one, space = heart()
    prompt = names(1, 4)
    grant = one.reserve(0.0, 1, space, 0, b"", True, prompt)
    assert one.remove([space], prompt).kept == {"in_use": 4}
    one.commit(0.0, 1, grant.reservation, True)
    one.pin(0.0, "x", [space], prompt, 9.0)
    hit = one.lookup(0.0, 1, space, prompt)
    one.clear()
    assert one.pins == [] and one.used_bytes() == 4 * SECTOR, "the engine still reads"
    one.release(1, hit.lease)
    assert one.used_bytes() == 0


def test_the_bounds_have_names() -> None:
    one, space = heart()
    with pytest.raises(Refusal, match=f"{MOST_NAMED + 1} chunks"):
        one.usable([space], bytes(16 * (MOST_NAMED + 1)))
    with pytest.raises(Refusal, match="nothing of this model any more"):
        one.remove([99], b"")
    prompt = names(1, 1)
    store(one, space, prompt)
    for number in range(MAX_PINS):
        one.pin(0.0, str(number), [space], prompt, 5.0)
    with pytest.raises(Refusal, match=f"there are {MAX_PINS} pins"):
        one.pin(0.0, "one more", [space], prompt, 5.0)
    ticks = 0
    while one.pins:
        one.tick(6.0)
        ticks += 1
    assert ticks == MAX_PINS // 4, "a tick ends a few of them"
    found, rest = one.listed(space, 1, 10)
    assert [(entry.key, entry.pinned, entry.readers) for entry in found] == [(prompt, False, 0)] and rest == 0
    assert array("I", one.space(space).table.match(prompt))[0] == found[0].record  # type: ignore[union-attr]
