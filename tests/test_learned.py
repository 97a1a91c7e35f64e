"""The learned policy of eviction: against a search through everything, and against what it promises."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.cache import Heart
from lmcache.cache.table import COMPLETED, Habits, Table, pack, unpack
from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.server.eviction import Eviction
from py_learned import AGES, KINDS, Learned, age_of, kind_of
from servers import Raw, Server, free_port


def key_of(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def worths_of(habits: Habits) -> array[float]:
    """What a chunk is worth, [kind][age]."""
    worths = array("f", habits.worths())
    assert len(worths) == KINDS * AGES
    return worths


class World:
    """A table of `room` chunks, and the search through everything beside it. settles: how often the table may do at once what it
    has put off; that must change nothing."""

    def __init__(self, seed: int, room: int, settles: float = 0.3) -> None:
        self.dice, self.settling, self.settles = random.Random(seed), random.Random(seed + 1), settles
        self.habits, self.room = Habits(), room
        self.table, self.slow = Table(1, self.habits), Learned()
        self.now, self.names = 0.0, 0
        self.rows: dict[bytes, int] = {}
        self.parent: dict[bytes, bytes] = {}
        self.pinned: list[bytes] = []
        self.prompts: list[list[bytes]] = []
        self.victims: list[bytes] = []

    def new_prompt(self) -> list[bytes]:
        """Goes on from an earlier prompt, from a part of one, or begins anew."""
        begin: list[bytes] = []
        if self.prompts and self.dice.random() < 0.75:
            begin = self.prompts[-1 - int(len(self.prompts) * self.dice.random() ** 3)]
            if self.dice.random() < 0.4:
                begin = begin[: self.dice.randint(0, len(begin))]
        more = 0 if begin and self.dice.random() < 0.15 else self.dice.choice([1, 2, 3, 5, 12])
        names = [key_of(f"{self.names + at}") for at in range(more)]
        self.names += more
        return [*begin, *names][:40]

    def step(self) -> None:
        self.now += 10 ** self.dice.uniform(-3, 2.5)
        if self.pinned and self.dice.random() < 0.5:
            self.unpin(self.dice.choice(self.pinned))
        prompt = self.new_prompt()
        self.prompts.append(prompt)
        self.table.asked(self.now, b"".join(prompt))
        self.slow.asked(self.now, prompt)
        self.maybe_settle()
        if self.dice.random() < 0.9:
            self.store(prompt)
        if self.dice.random() < 0.3:  # the answer is stored, too
            self.now += 0.01
            answer = [key_of(f"{self.names + at} answer") for at in range(self.dice.randint(1, 3))]
            self.names += len(answer)
            self.store([*prompt, *answer])
        if self.dice.random() < 0.6:
            tokens = int(10 ** self.dice.uniform(0, 4))
            last = self.dice.choice(self.prompts[-5:])[-1]
            self.table.answered(self.now, last, tokens)
            self.slow.answered(self.now, last, tokens)
        self.maybe_settle()

    def maybe_settle(self) -> None:
        if self.settling.random() < self.settles:
            self.table.settle()

    def store(self, prompt: list[bytes]) -> None:
        parent, path = b"", list[bytes]()
        for name in prompt:
            if name not in self.rows:
                if len(self.rows) == self.room and not self.evict():
                    break
                if parent and parent not in self.rows:
                    break
                row = self.rows[name] = self.table.insert(name, self.rows[parent] if parent else -1)
                self.slow.inserted(name, parent)
                self.parent[name] = parent
                self.table.begin_fill(row, 0, 0)
                assert self.table.end_fill(row, 0, True) == COMPLETED
            self.table.pin(pack([self.rows[name]]))
            self.pinned.append(name)
            path.append(name)
            parent = name
        for name in path if self.dice.random() < 0.8 else path[:-1]:
            self.unpin(name)
        while len(self.pinned) > self.room // 4:
            self.unpin(self.dice.choice(self.pinned))

    def unpin(self, name: bytes) -> None:
        self.table.unpin(pack([self.rows[name]]))
        self.pinned.remove(name)

    def settle(self) -> None:
        for _ in range(16):  # a call may leave something for the next one
            self.table.settle()

    def evict(self) -> bool:
        self.settle()
        self.slow.evicts()
        assert self.table.follows_lru() == self.slow.rival.leads
        worth = worths_of(self.habits)
        above, pinned = {self.parent[name] for name in self.rows}, set(self.pinned)
        places = {name: self.slow.place(name, worth) for name in self.rows if name not in above and name not in pinned}
        victim = self.table.victim()
        if victim < 0:
            assert not places
            return False
        name = self.table.key(victim)
        assert places[name] == min(places.values())
        assert self.table.victim() == victim
        self.table.free(*unpack(self.table.detach(victim)))
        del self.rows[name]
        self.slow.removed(name)
        self.victims.append(name)
        return True


@pytest.mark.parametrize("seed", range(8))
def test_it_evicts_what_a_search_through_everything_finds(seed: int) -> None:
    world = World(seed, room=random.Random(seed).choice([12, 40, 120]))
    for _ in range(400):
        world.step()
    assert len(world.victims) > 100 and world.slow.accesses > 2000
    order = unpack(world.table.survey(pack([0, 1])))
    assert order[0] == len(world.rows)  # every record has a place in the order
    assert world.slow.rival.asked_in_total > 1000  # what LRU would find was compared, and `evict` has checked who leads
    used = array("d", world.habits.saved()[: KINDS * AGES * 8])
    assert sum(used) == pytest.approx(sum(world.slow.used.values()), rel=0.1)  # it forgets a little


def test_when_it_learns_changes_nothing() -> None:
    seldom, often = World(5, 40, settles=0), World(5, 40, settles=1)
    for world in (seldom, often):
        for _ in range(300):
            world.step()
        world.settle()
    assert seldom.victims == often.victims and seldom.habits.saved() == often.habits.saved()


def found(prompts: list[tuple[float, list[bytes]]], room: int, table: Table) -> tuple[int, int]:
    """Replay prompts in a table of so many chunks; return how many chunks it found, and how many prompts it met as LRU."""
    held = hits = by_lru = 0
    for now, names in prompts:
        hashes = b"".join(names)
        ids = table.match(hashes)
        table.asked(now, hashes)
        table.touch(ids)
        hits += len(ids) // 4
        path = list(unpack(ids))
        table.pin(ids)
        for name in names[len(path) :]:
            if held == room:
                table.free(*unpack(table.detach(table.victim())))
                held -= 1
            path.append(table.insert(name, path[-1] if path else -1))
            held += 1
            table.begin_fill(path[-1], 0, 0)
            table.end_fill(path[-1], 0, True)
            table.pin(pack([path[-1]]))
        table.unpin(pack(path))
        table.touch(pack(path))
        by_lru += table.follows_lru()
    return hits, by_lru


def changing(seed: int) -> list[tuple[float, list[bytes]]]:
    """Prompts whose habits change: recent ones are used again for a while, and any of them with equal chance after that."""
    dice, now, names = random.Random(seed), 0.0, 0
    prompts = list[tuple[float, list[bytes]]]()
    for phase in range(8):
        pool = [[key_of(f"{phase} {one} {at}") for at in range(dice.randint(5, 15))] for one in range(60)]
        for _ in range(400):
            now += dice.expovariate(1.0)
            if phase % 2:
                prompts.append((now, dice.choice(pool)))
                continue
            chosen = pool.pop(min(59, int(dice.expovariate(1 / 6))))
            names += 1
            pool.insert(0, [*chosen, key_of(f"more {names}")][-40:] if len(chosen) < 40 else chosen)
            prompts.append((now, pool[0]))
    return prompts


def test_it_evicts_as_lru_does_where_it_finds_less() -> None:
    prompts = changing(9)
    asked = sum(len(names) for _, names in prompts)
    for room in (60, 150, 300):
        (learned, by_lru), (lru, _) = found(prompts, room, Table(1, Habits())), found(prompts, room, Table(1))
        assert learned - lru > -0.003 * asked
        assert 0 < by_lru < len(prompts)  # it has given way, and was not given up


def test_it_does_not_give_way_to_lru_where_it_finds_more() -> None:
    """Of prompts that come round and round LRU finds none."""
    prompts = [(float(at), [key_of(f"{at % 40} {one}") for one in range(10)]) for at in range(1200)]
    (learned, by_lru), (lru, _) = found(prompts, 200, Table(1, Habits())), found(prompts, 200, Table(1))
    assert lru == 0 and learned > 2000 and by_lru == 0


def test_one_call_learns_from_a_bounded_number_of_chunks() -> None:
    habits = Habits()
    table = Table(1, habits)

    def prompt(number: int, chunks: int) -> bytes:
        return b"".join(key_of(f"{number} {at}") for at in range(chunks))

    for number in range(2):
        table.asked(1.0, prompt(number, 1500))
    for learned in (1, 2, 2):
        table.settle()
        assert habits.prompts() == learned
    for number in range(2, 12):
        table.asked(1.0, prompt(number, 100))
    table.settle()  # short ones in one call
    assert habits.prompts() == 12
    for number in range(12, 16):  # nobody is idle: what waits is bounded, too
        table.asked(1.0, prompt(number, 1500))
    assert habits.prompts() == 14


def test_what_is_used_again_after_a_pause_is_kept_over_it() -> None:
    """Going by the rate of uses at the present age would evict it at once: nothing was ever used again so soon."""
    habits, pause = Habits(), 60.0
    table, now = Table(1, habits), 0.0
    for at in range(3000):
        now += pause / 20
        conversation = key_of(f"c{at % 20}"), key_of(f"d{at % 20}")
        table.asked(now, b"".join(conversation))
        table.asked(now + 0.01, key_of(f"once {at}") + key_of(f"never {at}"))
        table.settle()
    worth = worths_of(habits)
    returning, once = kind_of(3000 // 20, True, 5, 0), kind_of(1, True, 1, 2)
    soon = age_of(1.0)
    assert worth[returning * AGES + soon] > 0.5 / pause
    assert worth[once * AGES + soon] < 0.2 / pause


def test_nothing_learned_is_lru() -> None:
    learned, lru = Table(1, Habits()), Table(1)
    for table in (learned, lru):
        for at in range(7):
            table.asked(float(at), key_of(str(at)))
            row = table.insert(key_of(str(at)), -1)
            table.begin_fill(row, 0, at)
            table.end_fill(row, 0, True)
        gone = []
        while len(table):
            gone.append(table.key(table.victim()))
            table.detach(table.victim())
        assert gone == [key_of(str(at)) for at in range(7)]


def test_odd_prompts_do_no_harm() -> None:
    table = Table(1, Habits())
    one, two = key_of("one"), key_of("two")
    for hashes in (one + one, one + two + one, b"", two + one, one + one + one + two):
        table.asked(1.0, hashes)
        table.settle()
    for name in (one, two):
        row = table.insert(name, -1)
        table.begin_fill(row, 0, 0)
        table.end_fill(row, 0, True)
    table.answered(0.5, one, 1 << 31)  # earlier than what it knows
    table.answered(2.0, key_of("unknown"), 7)
    assert {table.key(table.victim())} <= {one, two}
    for wrong in ((1.0, b"short"), ("now", one)):
        with pytest.raises((ValueError, TypeError)):
            table.asked(*wrong)
    with pytest.raises(ValueError, match="an answer of -1 tokens"):
        table.answered(1.0, one, -1)
    assert table.memory_bytes() > 0


def test_memory_is_bounded_by_what_is_in_the_table() -> None:
    """A hundred thousand prompts that nobody stores are not all remembered."""
    table, before = Table(1, Habits()), 0
    for at in range(100_000):
        table.asked(float(at), key_of(f"{at}"))
        if at == 20_000:
            table.settle()
            before = table.memory_bytes()
    table.settle()
    assert table.memory_bytes() == before


def test_groups_of_a_model_are_evicted_by_lru() -> None:
    """A hit needs what all groups have, so all of them have the same order."""
    eviction = Eviction("learned")
    heart = Heart(64 * SECTOR_BYTES, new_table=eviction.new_table, group_table=eviction.group_table)
    heart.join(1, "engine")
    alone = heart.open_space(1, b"a" * 32, 1, 0, 100)
    whole = heart.open_space(1, b"b" * 32, 1, 0, 100, share=0.5)
    window = heart.open_space(1, b"c" * 32, 1, 0, 100, reach_chunks=2, share=0.5, main=whole)
    keys = key_of("x") + key_of("y")
    for space in (alone, whole, window):
        heart.lookup(1.0, 1, space, keys)
        heart.settle(space)
    assert eviction.prompts == 1
    heart.clear()
    heart.lookup(2.0, 1, alone, keys)
    heart.lookup(2.0, 1, window, keys)
    for space in (alone, whole, window):
        heart.settle(space)
    assert eviction.prompts == 2


# What is kept between starts


def learned_from(prompts: int, path: Path | None = None) -> Eviction:
    eviction = Eviction("learned", path)
    table = eviction.new_table(1)
    for at in range(prompts):
        table.asked(float(at), key_of(str(at % 50)))
    table.settle()
    return eviction


def habits_of(eviction: Eviction) -> bytes:
    assert eviction.habits is not None
    return eviction.habits.saved()


def test_what_was_learned_is_there_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "habits-1"
    first = learned_from(400, path)
    first.save()
    assert [one.name for one in tmp_path.iterdir()] == ["habits-1"] and path.stat().st_mode & 0o777 == 0o600
    caplog.clear()
    second = Eviction("learned", path)
    learned = array("d", habits_of(first))
    assert sum(map(abs, learned)) > 10 and array("d", habits_of(second)) == pytest.approx(learned, rel=0.01)
    assert second.habits is not None and second.habits.worths() != Habits().worths()
    assert "goes on from what an earlier server has learned" in caplog.text


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (damaged, "it is damaged"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "it is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "of another version, or no file of LMCache"),
    "another file": (lambda path: path.write_bytes(b"hello\n" * 9), "of another version, or no file of LMCache"),
    "a link": (lambda path: path.rename(path.with_name("x")) and path.symlink_to("x"), "Too many levels"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_trusted_is_a_line_in_the_log(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, (change, said) = tmp_path / "habits-1", FILES[name]
    learned_from(400, path).save()
    change(path)
    caplog.clear()
    eviction = Eviction("learned", path)
    assert habits_of(eviction) == bytes(len(habits_of(eviction)))
    (line,) = caplog.messages
    assert str(path) in line and said in line and "learns from the beginning" in line


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "habits-1"
    path.write_bytes(b"before")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("lmcache.server.eviction.os.replace", lambda *_: (_ for _ in ()).throw(full))
    learned_from(10, path).save()
    assert path.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir()] == ["habits-1"]
    assert "is not kept: No space left on device" in caplog.text


def test_wrong_habits_are_refused() -> None:
    habits = Habits()
    saved = habits.saved()
    for wrong in (saved[:-8], b"", saved[:-8] + array("d", [float("nan")]).tobytes()):
        with pytest.raises(ValueError, match="no saved habits"):
            habits.restore(wrong)
    with pytest.raises(ValueError, match="no saved habits"):
        habits.restore(array("d", [-0.5]).tobytes() + saved[8:])  # used less than never
    habits.restore(saved)


# In the server


def test_the_server_says_which_policy_it_runs_and_goes_on_after_a_restart(
    server: Callable[..., Server], tmp_path: Path
) -> None:
    port = free_port()
    for start in range(2):
        cache = server(l1=4, chunk=16, port=port, flags=("--eviction-policy", "learned"))
        engine = Raw(cache, shard_bytes=64 << 10)
        for at in range(30):
            engine.store(key_of(f"{start} {at}"))
            engine.hits(key_of(f"{start} {at}"))
        told = cache.status()["eviction"]
        assert told["policy"] == "learned"
        assert [one["evicts_as_lru"] for one in cache.status()["index"]["spaces"]] == [False]
        assert cache.counters()['eviction_policy{policy="learned"}'] == 1
        said = "".join(cache.log)
        assert "learned eviction" in said
        assert ("goes on from what an earlier server has learned" in said) == (start == 1)
        engine.close()
        assert cache.end() == 0
