"""What came from a tier whose chunks are not kept leaves L1 when an engine has read it, and not before."""

from __future__ import annotations

import random

import pytest

from lmcache.cache import SERVER, Event
from lmcache.cache.events import LET_GO
from lmcache.cache.letting_go import LET_GO_AT_ONCE, MOST_UNFINISHED
from lmcache.cache.lifetimes import Lifetimes
from lmcache.cache.managing import Managing
from lmcache.chunks import split_hashes

SECTOR = 4096
PROMPT = random.Random(1).randbytes(16 * 6)


class Parts:
    """A heart with two engines and a fleeting tier."""

    def __init__(self, reach: int = 0, chunks: int = 64) -> None:
        self.heart = Managing(chunks * SECTOR)
        self.heart.fleeting_tiers.add("peers")
        for process in (1, 2):
            self.heart.join(process, f"engine {process}")
            self.space = self.heart.open_space(process, b"space".ljust(16), 1, 0, SECTOR, reach_chunks=reach)
        self.told: list[Event] = []
        self.heart.events.listen(["evicted"], self.told.append)

    def fill(self, hashes: bytes, first: int = 0, process: int = SERVER, tier: str = "peers") -> None:
        parent = hashes[16 * (first - 1) : 16 * first] if first else b""
        grant = self.heart.reserve(0.0, process, self.space, 0, parent, not first, hashes[16 * first :], tier)
        self.heart.commit(0.0, process, grant.reservation, True)

    def look_up(self, hashes: bytes = PROMPT, process: int = 1, have: int = 0) -> int:
        """The lease of a hit of everything."""
        hit = self.heart.lookup(0.0, process, self.space, hashes, have)
        assert hit.chunks == len(hashes) // 16
        return hit.lease

    def end(self, lease: int, process: int = 1) -> None:
        self.heart.release(process, lease)

    @property
    def left(self) -> int:
        return self.heart.chunks


@pytest.mark.parametrize("reach", [0, 2])
def test_it_leaves_after_its_use(reach: int) -> None:
    one = Parts(reach)
    one.fill(PROMPT)
    lease = one.look_up()
    assert one.left == 6
    one.end(lease)
    assert one.left == (4 if reach else 0), "of a window only what is in reach was read"
    assert sum(event.chunks for event in one.told) == 6 - one.left and one.heart.used_bytes() == one.left * SECTOR
    assert {event.reason for event in one.told} == {LET_GO}
    assert one.heart.events.counters["evicted"] + one.left == one.heart.events.counters["stored"]


def test_what_others_have_brought_stays() -> None:
    one = Parts()
    one.fill(PROMPT[:32], process=1, tier="")
    one.fill(PROMPT[:64], 2, tier="disk")
    one.fill(PROMPT, 4)
    one.end(one.look_up())
    assert one.left == 4 and one.heart.lookup(0.0, 1, one.space, PROMPT).chunks == 4


def test_it_stays_until_the_last_reader_has_ended() -> None:
    one = Parts()
    one.fill(PROMPT)
    first, second = one.look_up(), one.look_up(process=2)
    held, _, _ = one.heart.hold(0.0, one.space, PROMPT, "disk")
    one.end(first)
    one.end(second, 2)
    assert one.left == 6, "it is being written to a nearer tier"
    one.end(held, SERVER)
    assert one.left == 0


def test_what_only_the_server_and_peers_have_read_stays() -> None:
    one = Parts()
    one.fill(PROMPT)
    held, _, _ = one.heart.hold(0.0, one.space, PROMPT, "disk")
    one.end(held, SERVER)
    one.heart.join(3, "another server")
    lent = one.heart.lend(0.0, 3, b"space".ljust(16), 1, 0, PROMPT)
    one.end(lent.lease, 3)
    assert one.left == 6
    one.end(one.look_up())
    assert one.left == 0


def test_what_a_reader_behind_it_needs_goes_with_that_reader() -> None:
    """The second engine has the beginning itself, so its lease does not name it."""
    one = Parts()
    one.fill(PROMPT)
    first, second = one.look_up(PROMPT[:64]), one.look_up(process=2, have=4)
    one.end(first)
    assert one.left == 6
    one.end(second, 2)
    assert one.left == 0


def test_it_stays_while_an_engine_has_stored_what_follows_it() -> None:
    one = Parts()
    one.fill(PROMPT[:64])
    lease = one.look_up(PROMPT[:64])
    one.fill(PROMPT, 4, process=1, tier="")
    one.end(lease)
    assert one.left == 6


def test_the_end_of_an_engine_is_the_end_of_its_reading() -> None:
    one = Parts()
    one.fill(PROMPT)
    one.look_up()
    one.heart.leave(1)
    assert one.left == 0


def test_a_clear_amid_a_read_forgets_it() -> None:
    one = Parts()
    one.fill(PROMPT)
    lease = one.look_up()
    one.heart.clear()
    one.fill(PROMPT, tier="disk")
    one.end(lease)
    assert one.left == 6 and not one.heart._fleeting, "what is there now came from the disk"
    assert one.heart.used_bytes() == 6 * SECTOR


def test_nothing_is_remembered_of_what_has_gone() -> None:
    """Random reads and loads in a small arena: the memory of what is fleeting names chunks of the index only, and what an engine
    stores afterwards under the same name is its own."""
    dice, one = random.Random(7), Parts()
    prompts = [random.Random(seed).randbytes(16 * 12) for seed in range(12)]
    leases: list[int] = []
    for _ in range(3000):
        chosen = dice.choice(prompts)[: 16 * dice.randrange(1, 13)]
        if dice.random() < 0.5:
            process = dice.choice((SERVER, 1))
            grant = one.heart.reserve(0.0, process, one.space, 0, b"", True, chosen, "" if process else "peers")
            if grant.reservation:
                one.heart.commit(0.0, process, grant.reservation, dice.random() < 0.8)
        elif (hit := one.heart.lookup(0.0, 1, one.space, chosen)).lease:
            leases.append(hit.lease)
        while leases and (len(leases) > 3 or dice.random() < 0.3):
            one.end(leases.pop(dice.randrange(len(leases))))
        if dice.random() < 0.01:
            one.heart.clear()
        table = one.heart.spaces[0].table
        assert all(table.get(key) >= 0 for _, key in one.heart._fleeting)
        counted = one.heart.events.counters
        whole = counted["stored"] - counted["evicted"] - counted["cleared"]
        assert whole == one.heart.spaces[0].complete
    assert one.heart.events.counters["evicted:let go"] > 100 and one.heart.events.counters["evicted:room"] > 100


def test_its_age_is_not_measured() -> None:
    one = Parts()
    lives = Lifetimes(one.heart.events, lambda: 0.0)
    hashes = bytes(15) + b"\1" + bytes(15) + b"\2"
    one.fill(hashes)
    assert len(lives) == 2
    one.end(one.look_up(hashes))
    assert not len(lives) and lives.counters()["chunk_eviction_age_seconds_count"] == 0


def test_what_an_engine_stores_after_a_deletion_stays() -> None:
    one = Parts()
    one.fill(PROMPT)
    one.end(one.look_up())
    one.fill(PROMPT)
    assert one.heart.remove([one.space], PROMPT).chunks == 6 and one.left == 0
    assert one.told[-1].reason == "deleted" and one.told[-1].hashes == b"".join(reversed(split_hashes(PROMPT)))
    one.fill(PROMPT, process=1, tier="")
    one.end(one.look_up())
    assert one.left == 6, "the engine has computed it, and no peer has brought it"


LONG = random.Random(2).randbytes(16 * 1000)


@pytest.mark.parametrize("reach", [0, 1000])
def test_a_long_prompt_leaves_in_many_calls_of_bounded_work(reach: int) -> None:
    one, asked = Parts(reach, chunks=1024), list[int]()
    one.heart.on_unfinished = lambda: asked.append(one.left)
    one.fill(LONG)
    one.end(one.look_up(LONG))
    calls = 0
    while one.left:
        assert len(asked) == calls + 1, "it asks for another call while something is left"
        before = one.left
        one.heart.let_go()
        assert 0 < before - one.left <= LET_GO_AT_ONCE
        calls += 1
    assert len(asked) >= calls and 1000 // LET_GO_AT_ONCE <= calls + 1 <= 1000 // LET_GO_AT_ONCE + 2
    assert {event.reason for event in one.told} == {LET_GO} and sum(event.chunks for event in one.told) == 1000
    assert one.told[0].hashes.startswith(LONG[-16:]), "the end goes first"
    assert one.heart.used_bytes() == 0 and not one.heart._fleeting and not one.heart._unfinished


def test_what_has_not_left_yet_is_found_and_then_stays_for_its_reader() -> None:
    one = Parts(chunks=1024)
    one.fill(LONG)
    one.end(one.look_up(LONG))
    found = one.left
    assert 0 < found < 1000
    lease = one.look_up(LONG[: 16 * found], process=2)
    for _ in range(1000):
        one.heart.let_go()
    assert one.left == found and not one.heart._unfinished
    one.end(lease, 2)
    while one.heart._unfinished:
        one.heart.let_go()
    assert one.left == 0


def test_the_beginning_that_an_earlier_reader_has_left_goes_in_bounded_calls_too() -> None:
    one = Parts(chunks=1024)
    one.fill(LONG)
    first, second = one.look_up(LONG), one.look_up(LONG, process=2, have=990)
    one.end(first)
    while one.heart._unfinished:
        one.heart.let_go()
    assert one.left == 1000
    one.end(second, 2)
    assert 1000 - one.left <= LET_GO_AT_ONCE
    for _ in range(2 * 1000 // LET_GO_AT_ONCE):
        before = one.left
        one.heart.tick(0.0)
        assert before - one.left <= LET_GO_AT_ONCE
    assert one.left == 0


def test_a_clear_ends_what_has_begun() -> None:
    one = Parts(chunks=1024)
    one.fill(LONG)
    one.end(one.look_up(LONG))
    one.heart.clear()
    assert one.left == 0 and one.heart.used_bytes() == 0 and not one.heart._unfinished
    one.fill(LONG, process=1, tier="")
    one.heart.let_go()
    assert one.left == 1000
    assert one.heart.lookup(0.0, 1, one.space, LONG).chunks == 1000


def test_leases_that_end_faster_than_chunks_leave_are_not_kept_without_bound() -> None:
    one, ends = Parts(chunks=1024), MOST_UNFINISHED + 10
    one.fill(LONG)
    for lease in [one.look_up(LONG) for _ in range(ends)]:
        one.end(lease)
    assert len(one.heart._unfinished) == MOST_UNFINISHED
    while one.heart._unfinished:
        one.heart.let_go()
    assert one.left == 0, "whoever ends last has read it, too"
