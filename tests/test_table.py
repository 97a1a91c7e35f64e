"""The two tables against each other, against naive models of two policies, and against what they promise."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from lmcache.cache.table import COMPLETED, DONE, EMPTY, FILLING, RELEASED, Table, pack, unpack
from lmcache.memory.order import LRU, Policy
from lmcache.memory.slabs import NO_EXTENT
from policies import TwoQueues
from py_table import PyTable

both = pytest.mark.parametrize("table_type", [PyTable, Table])
NewTable = Callable[..., Table]


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def filled(table: Table, key: int, parent: int = -1, sector: int = 0) -> int:
    """A complete record of a table with one shard."""
    record = table.insert(key_of(key), parent)
    table.begin_fill(record, 0, sector)
    assert table.end_fill(record, 0, True) == COMPLETED
    return record


def places(table: Table, records: list[int]) -> list[int]:
    """Each one's place in the order of eviction, 0 for a detached one. Each record has a page of its own."""
    sectors = {record: table.extent(record, 0) for record in records}
    found = {sector: unpack(table.survey(pack([sector, sector + 1])))[1] for sector in sectors.values()}
    return [found[sectors[record]] for record in records]


def chain(table: Table, first_key: int, length: int) -> list[int]:
    records: list[int] = []
    for number in range(length):
        records.append(filled(table, first_key + number, records[-1] if records else -1, first_key + number))
    return records


# Promises, one by one


@both
def test_match_ends_at_the_first_chunk_that_is_absent_or_incomplete(table_type: NewTable) -> None:
    table = table_type(1)
    records = chain(table, 0, 200)
    keys = b"".join(map(key_of, range(200)))
    assert unpack(table.match(keys)) == tuple(records)
    assert unpack(table.match(keys[: 16 * 130] + key_of(999) + keys[16 * 131 :])) == tuple(records[:130])
    assert unpack(table.match(b"")) == ()
    table.detach(records[150])
    assert unpack(table.match(keys)) == tuple(records[:150])
    half = table.insert(key_of(150), records[149])
    assert unpack(table.match(keys)) == tuple(records[:150])
    table.begin_fill(half, 0, 7)
    assert unpack(table.match(keys)) == tuple(records[:150])
    table.end_fill(half, 0, True)
    assert unpack(table.match(keys)) == (*records[:150], half)


@both
def test_a_chunk_is_complete_with_its_last_shard(table_type: NewTable) -> None:
    table = table_type(3)
    record = table.insert(key_of(1), -1)
    for shard in range(3):
        table.begin_fill(record, shard, 10 + shard)
    assert table.filling(record) == 3
    assert table.end_fill(record, 2, True) == 0
    assert table.end_fill(record, 0, False) == 0
    assert unpack(table.extents(pack([record]))) == (NO_EXTENT, 11, 12)
    assert [table.extent(record, shard) for shard in range(3)] == [-1, 11, 12]
    assert [table.state(record, shard) for shard in range(3)] == [EMPTY, FILLING, DONE]
    assert table.end_fill(record, 1, True) == 0
    table.begin_fill(record, 0, 20)
    assert not table.complete(record)
    assert table.end_fill(record, 0, True) == COMPLETED
    assert table.complete(record) and unpack(table.extents(pack([record]))) == (20, 11, 12)


@both
def test_detached_records_are_released_by_their_last_user(table_type: NewTable) -> None:
    table = table_type(1)
    root = filled(table, 1)
    child = table.insert(key_of(2), root)
    table.begin_fill(child, 0, 5)
    table.pin(pack([root, root, child]))
    assert unpack(table.detach(root)) == (child, root)
    assert len(table) == 0 and table.parent(child) == -1
    assert unpack(table.unpin(pack([child, root]))) == ()
    with pytest.raises(ValueError):
        table.free(child)
    assert table.end_fill(child, 0, True) == RELEASED
    assert table.extent(child, 0) == 5
    assert unpack(table.unpin(pack([root]))) == (root,)
    table.free(child)
    table.free(root)
    assert {table.insert(key_of(3), -1), table.insert(key_of(4), -1)} == {root, child}


@both
def test_a_prefix_goes_tail_first(table_type: NewTable) -> None:
    table = table_type(1)
    records = chain(table, 0, 5)
    other = chain(table, 100, 3)
    table.touch(pack(records))
    order = []
    while (record := table.victim()) >= 0:
        order.append(record)
        assert unpack(table.detach(record)) == (record,)
        table.free(record)
    assert order == other[::-1] + records[::-1]


@both
def test_touch_path_makes_the_root_the_newest(table_type: NewTable) -> None:
    table = table_type(1)
    first, second = chain(table, 0, 3), chain(table, 10, 3)
    table.touch_path(first[-1])
    assert places(table, [*second, *first[::-1]]) == [1, 2, 3, 4, 5, 6]
    table.detach(second[0])
    table.touch(pack([second[0]]))  # detached: it has no place
    assert places(table, [second[0], *first[::-1]]) == [0, 1, 2, 3] and table.victim() == first[-1]


@both
def test_pinned_ones_at_the_old_end_come_back_in_their_order(table_type: NewTable) -> None:
    table = table_type(1)
    records = [filled(table, number) for number in range(100)]
    pinned = records[:50]
    table.pin(pack(pinned))
    assert table.victim() == records[50]
    for record in random.Random(1).sample(pinned, 50):
        table.unpin(pack([record]))
    order = []
    while (record := table.victim()) >= 0:
        order.append(record)
        table.detach(record)
    assert order == records


@both
def test_victims_are_exact_under_heavy_pinning(table_type: NewTable) -> None:
    """Few records, each pinned, unpinned and touched again and again: the oldest without a pin is always found."""
    dice, table = random.Random(3), table_type(1)
    age = dict.fromkeys(filled(table, number) for number in range(12))  # oldest first
    pins = dict.fromkeys(age, 0)
    for _ in range(20_000):
        record, deed = dice.choice(list(age)), dice.random()
        if deed < 0.1:
            table.touch(pack([record]))
            del age[record]
            age[record] = None
        elif deed < 0.55:
            table.pin(pack([record]))
            pins[record] += 1
        elif pins[record]:
            table.unpin(pack([record] * pins[record]))
            pins[record] = 0
        if dice.random() < 0.7:
            assert table.victim() == next((one for one in age if not pins[one]), -1)


@both
def test_in_sectors_names_attached_records_with_an_extent_there(table_type: NewTable) -> None:
    table = table_type(2)
    a, b, c = (table.insert(key_of(number), -1) for number in range(3))
    table.begin_fill(a, 0, 10)
    table.begin_fill(a, 1, 90)
    table.begin_fill(b, 1, 20)
    table.begin_fill(c, 0, 19)
    table.end_fill(a, 0, True)
    assert unpack(table.in_sectors(10, 20)) == (a, c)
    assert unpack(table.in_sectors(0, 2**32)) == (a, b, c)
    assert unpack(table.in_sectors(91, 2**32)) == unpack(table.in_sectors(20, 20)) == ()
    table.end_fill(c, 0, False)
    table.detach(a)
    assert unpack(table.in_sectors(0, 2**32)) == (b,)


@both
def test_attached_records_are_listed_by_their_numbers_page_by_page(table_type: NewTable) -> None:
    table = table_type(1)
    a, b, c = (table.insert(key_of(number), -1) for number in range(3))
    table.detach(b)
    assert [(*unpack(ids), rest) for ids, rest in (table.numbered(0, 2), table.numbered(3, 2))] == [(a, 3), (c, 0)]
    assert table.numbered(0, 9) == (pack([a, c]), 0) and table.numbered(9, 9) == (b"", 0)


@both
def test_a_survey_tells_what_goes_with_a_range_of_sectors(table_type: NewTable) -> None:
    table = table_type(1)
    first = [filled(table, number, sector=number) for number in range(4)]
    tail = filled(table, 9, first[1], 50)
    bounds = pack([0, 2, 2, 4, 10, 60])
    assert unpack(table.survey(bounds)) == (2, 2, 2, 4, 1, 5)  # first[0] is the oldest of five, the tail the youngest
    table.touch(pack([first[0]]))
    assert unpack(table.survey(bounds)) == (2, 5, 2, 3, 1, 4)
    table.pin(pack([tail]))
    assert unpack(table.survey(bounds)) == (
        2,
        NO_EXTENT,
        2,
        3,
        1,
        NO_EXTENT,
    )  # the tail needs first[1], which is in 0..2
    table.unpin(pack([tail]))
    table.begin_fill(table.insert(key_of(10), first[3]), 0, 70)
    assert unpack(table.survey(bounds)) == (2, 5, 2, NO_EXTENT, 1, 4)
    assert table.survey(b"") == b""


@both
def test_a_refused_call_changes_nothing(table_type: NewTable) -> None:
    table = table_type(2)
    a, b, gone = (table.insert(key_of(number), -1) for number in range(3))
    table.pin(pack([a]))
    table.begin_fill(a, 0, 1)
    table.begin_fill(b, 0, 2)
    table.end_fill(b, 0, True)
    table.detach(gone)
    refused: list[Callable[[], object]] = [
        lambda: table.match(b"x" * 17),
        lambda: table.get(b"x"),
        lambda: table.insert(key_of(0), -1),
        lambda: table.insert(b"short", -1),
        lambda: table.insert(key_of(9), gone),
        lambda: table.insert(key_of(9), 77),
        lambda: table.insert(key_of(9), -2),
        lambda: table.touch(pack([a, 77])),
        lambda: table.touch(b"123"),
        lambda: table.touch_path(-1),
        lambda: table.touch_path(0),
        lambda: table.evictable(77),
        lambda: table.pin(pack([a, 77])),
        lambda: table.unpin(pack([a, a])),
        lambda: table.unpin(pack([a, b])),
        lambda: table.unpin(pack([a, 2**32 - 1])),
        lambda: table.begin_fill(a, 0, 3),
        lambda: table.begin_fill(b, 0, 3),
        lambda: table.begin_fill(b, 2, 3),
        lambda: table.begin_fill(b, -1, 3),
        lambda: table.begin_fill(b, 1, -1),
        lambda: table.begin_fill(b, 1, NO_EXTENT),
        lambda: table.begin_fill(gone, 0, 3),
        lambda: table.end_fill(a, 1, True),
        lambda: table.end_fill(b, 0, True),
        lambda: table.state(a, 2),
        lambda: table.extent(2**70, 0),
        lambda: table.extents(pack([a, 77])),
        lambda: table.detach(gone),
        lambda: table.free(a),
        lambda: table.free(b),
        lambda: table.key(77),
        lambda: table.survey(pack([1, 2, 3])),
        lambda: table.survey(pack([5, 4])),
    ]
    before = snapshot(table, [a, b, gone])
    for call in refused:
        with pytest.raises(ValueError):
            call()
        assert snapshot(table, [a, b, gone]) == before
    table.free(gone)
    with pytest.raises(ValueError):
        table.free(gone)
    for shards in (0, -1, 65536):
        with pytest.raises(ValueError):
            table_type(shards)


@both
def test_many_shards(table_type: NewTable) -> None:
    table = table_type(65535)
    first, second = table.insert(key_of(1), -1), table.insert(key_of(2), -1)
    table.begin_fill(first, 65534, 3)
    table.begin_fill(second, 0, 4)
    assert table.end_fill(first, 65534, True) == 0
    assert [table.extent(first, 65534), table.extent(second, 0), table.extent(second, 65534)] == [3, 4, -1]


@both
def test_a_policy_hears_of_every_change(table_type: NewTable) -> None:
    heard: list[object] = []

    class Listener(LRU):
        def inserted(self, row: int, key: bytes, parent: int) -> None:
            heard.append(("inserted", row, key, parent))
            super().inserted(row, key, parent)

        def touched(self, rows: Sequence[int]) -> None:
            heard.append(("touched", list(rows)))
            super().touched(rows)

        def unblocked(self, row: int) -> None:
            heard.append(("unblocked", row))

        def removed(self, row: int) -> None:
            heard.append(("removed", row))
            super().removed(row)

    table = table_type(1, Listener())
    a = table.insert(key_of(1), -1)
    b = table.insert(key_of(2), a)
    table.begin_fill(b, 0, 5)
    table.end_fill(b, 0, True)
    table.pin(pack([a, b]))
    table.touch(pack([a, b]))
    table.unpin(pack([a, b]))  # b still hangs on a
    table.touch_path(b)
    table.detach(b)
    table.touch(pack([a, b]))
    assert heard == [
        ("inserted", a, key_of(1), 0),
        ("inserted", b, key_of(2), a),
        ("unblocked", b),
        ("touched", [b, a]),
        ("unblocked", b),
        ("touched", [b, a]),
        ("removed", b),
        ("unblocked", a),
        ("touched", [a]),
    ]
    assert table.memory_bytes() > table_type(1).memory_bytes()


@both
def test_a_policy_cannot_choose_a_record_that_may_not_go(table_type: NewTable) -> None:
    class Wrong(LRU):
        chosen = 0

        def victim(self, evictable: Callable[[int], bool]) -> int:
            return self.chosen

    policy = Wrong()
    table = table_type(1, policy)
    a, b = chain(table, 1, 2)
    for policy.chosen in (a, 77, -1, 2**70):
        with pytest.raises(ValueError):
            table.victim()
    policy.chosen = b
    assert table.victim() == b
    policy.chosen = 0
    assert table.victim() == -1


@both
def test_a_survey_needs_each_attached_record_once(table_type: NewTable) -> None:
    class Wrong(LRU):
        order: Sequence[int] = ()

        def __iter__(self) -> Iterator[int]:
            return iter(self.order)

    policy = Wrong()
    table = table_type(1, policy)
    a, b, gone = (filled(table, number, sector=number) for number in range(3))
    table.detach(gone)
    for policy.order in ([a], [a, a], [a, b, a], [a, b, gone], [a, 77], [a, b, 0]):
        with pytest.raises(ValueError):
            table.survey(pack([0, 10]))
    policy.order = [b, a]
    assert unpack(table.survey(pack([0, 1, 1, 2]))) == (1, 2, 1, 1)


def snapshot(table: Table, records: list[int]) -> object:
    """All that can be asked of a table and of these of its records."""
    described = [
        (
            record,
            table.key(record),
            table.parent(record),
            table.children(record),
            table.only_child(record),
            table.pins(record),
            table.filling(record),
            table.complete(record),
            table.attached(record),
            table.evictable(record),
            table.get(table.key(record)),
            table.extents(pack([record])),
            table.state(record, 0),
            table.extent(record, 0),
        )
        for record in records
    ]
    keys = b"".join(map(table.key, records))
    ends = table.match(keys), table.victim(), table.in_sectors(0, 2**32)
    return described, len(table), ends, table.survey(pack([0, 10, 10, 35, 40, 60]))


# All at once, against a model of the order


class Twins(RuleBasedStateMachine):
    """Every call goes to both tables; after each step they must tell the same, and keep the promises. With LRU there is a third
    one: the native table that asks an LRU in Python. With 2Q the model of the order is a policy of its own."""

    records: Bundle[int] = Bundle("records")

    @initialize(shards=st.integers(1, 3), lru=st.booleans())
    def begin(self, shards: int, lru: bool) -> None:
        self.shards = shards
        new_policy = LRU if lru else TwoQueues
        self.tables: list[Any] = [PyTable(shards, new_policy())]
        self.tables += [Table(shards, new_policy())] + [Table(shards)] * lru
        self.live: set[int] = set()
        self.order: Policy = Ages() if lru else TwoQueues()
        self.attached: set[int] = set()

    def ask(self, name: str, *arguments: object) -> object:
        """The one answer of both, or ValueError from both."""
        answers = []
        for table in self.tables:
            try:
                answers.append(getattr(table, name)(*arguments))
            except ValueError:
                answers.append(ValueError)
        assert all(answer == answers[0] for answer in answers), (name, arguments, answers)
        return answers[0]

    @rule(target=records, parent=st.none() | records, key=st.integers(1, 40))
    def insert(self, parent: int | None, key: int) -> int | MultipleResults[int]:
        """Few keys, so that some come back."""
        record = self.ask("insert", key_of(key), -1 if parent is None else parent)
        if not isinstance(record, int):
            return multiple()
        self.live.add(record)
        self.attached.add(record)
        self.order.inserted(record, key_of(key), 0 if parent is None else parent)
        return record

    @rule(record=records)
    def insert_again(self, record: int) -> None:
        if record in self.attached:
            assert self.ask("insert", self.tables[0].key(record), -1) is ValueError

    @rule(records=st.lists(records, max_size=5))
    def touch(self, records: list[int]) -> None:
        if self.ask("touch", pack(records)) is None:
            self.order.touched([record for record in reversed(records) if record in self.attached])

    @rule(record=records)
    def touch_path(self, record: int) -> None:
        if self.ask("touch_path", record) is None and record in self.attached:
            while record != -1:
                self.order.touched([record])
                record = self.tables[0].parent(record)

    @rule(records=st.lists(records, max_size=4))
    def pin(self, records: list[int]) -> None:
        self.ask("pin", pack(records))

    @rule(records=st.lists(records, max_size=4))
    def unpin(self, records: list[int]) -> None:
        released = self.ask("unpin", pack(records))
        if isinstance(released, bytes):
            for record in unpack(released):
                assert not self.tables[0].attached(record)
                assert not self.tables[0].pins(record) and not self.tables[0].filling(record)

    @rule(record=records, shard=st.integers(0, 2), sector=st.integers(0, 50))
    def begin_fill(self, record: int, shard: int, sector: int) -> None:
        self.ask("begin_fill", record, shard, sector)

    @rule(record=records, shard=st.integers(0, 2), ok=st.booleans())
    def end_fill(self, record: int, shard: int, ok: bool) -> None:
        outcome = self.ask("end_fill", record, shard, ok)
        if outcome == COMPLETED:
            assert record in self.attached and self.tables[0].complete(record)
        if outcome == RELEASED:
            assert record not in self.attached

    @rule(record=records)
    def detach(self, record: int) -> None:
        parent_of = {one: self.tables[0].parent(one) for one in self.live}
        gone = self.ask("detach", record)
        if not isinstance(gone, bytes):
            return
        family = unpack(gone)
        assert family[-1] == record and len(set(family)) == len(family)
        for place, member in enumerate(family[:-1]):
            assert parent_of[member] in family[place + 1 :]
        for member in family:
            self.removed(member)
        assert not any(parent_of[one] in family for one in self.attached)

    def removed(self, record: int) -> None:
        self.attached.remove(record)
        self.order.removed(record)

    @rule(record=consumes(records))
    def free(self, record: int) -> None:
        if self.ask("free", record) is None:
            self.live.discard(record)

    @rule()
    def evict(self) -> None:
        record = self.tables[0].victim()
        if record >= 0:
            assert self.ask("detach", record) == pack([record])
            self.removed(record)
            if self.ask("free", record) is None:
                self.live.discard(record)

    @rule(first=st.integers(0, 50), length=st.integers(0, 50))
    def in_sectors(self, first: int, length: int) -> None:
        self.ask("in_sectors", first, first + length)

    @rule(first=st.integers(-2, 30), count=st.integers(-1, 30))
    def numbered(self, first: int, count: int) -> None:
        self.ask("numbered", first, count)

    @rule(records=st.lists(records, max_size=6))
    def match(self, records: list[int]) -> None:
        known = [record for record in records if record in self.live]
        self.ask("match", b"".join(map(self.tables[0].key, known)))

    @invariant()
    def both_tell_the_same(self) -> None:
        records = sorted(self.live)
        told = [snapshot(table, records) for table in self.tables]
        assert all(one == told[0] for one in told)

    @invariant()
    def the_victim_is_the_first_that_may_go(self) -> None:
        table, order = self.tables[0], list(self.order)
        assert set(order) == self.attached
        may_go = [
            record
            for record in order
            if not table.pins(record) and not table.filling(record) and not table.children(record)
        ]
        assert self.ask("victim") == (may_go[0] if may_go else -1)


class Ages(Policy):
    """LRU in the plainest way: when each was used."""

    def __init__(self) -> None:
        self.age: dict[int, int] = {}
        self.clock = 0

    def inserted(self, row: int, key: bytes, parent: int) -> None:
        self.touched([row])

    def touched(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.clock += 1
            self.age[row] = self.clock

    def removed(self, row: int) -> None:
        del self.age[row]

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.age, key=self.age.__getitem__))

    def memory_bytes(self) -> int:
        return 0


TestTwins = Twins.TestCase
TestTwins.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("policy", [None, LRU, lambda: TwoQueues(2000, 5000)], ids=["built in", "lru", "2q"])
def test_both_agree_over_a_long_random_life(policy: Callable[[], Policy] | None) -> None:
    """What small examples do not reach: growth of the hash table, ids reused, the heap behind the victim's cursor."""
    plug = [] if policy is None else [policy()], [] if policy is None else [policy()]
    dice, tables = random.Random(7), [PyTable(1, *plug[0]), Table(1, *plug[1])]
    python, native = tables
    pinned: list[int] = []
    recent: list[int] = []
    for number in range(30_000):
        parent = dice.choice(recent) if recent and dice.random() < 0.7 else -1
        if parent >= 0 and not python.attached(parent):
            parent = -1
        record, same = (filled(table, number, parent, number) for table in tables)
        assert record == same
        recent = [*recent[-30:], record]
        if dice.random() < 0.05:
            pinned.append(record)
            for table in tables:
                table.pin(pack([record]))
        if pinned and dice.random() < 0.05:
            record = pinned.pop(dice.randrange(len(pinned)))
            freed, same_freed = (table.unpin(pack([record])) for table in tables)
            assert freed == same_freed
            for one in unpack(freed):
                for table in tables:
                    table.free(one)
        if dice.random() < 0.3:
            path = recent[-dice.randrange(1, 9) :]
            for table in tables:
                table.touch(pack(path))
        while len(python) > 9_000:
            victim = native.victim()
            assert victim == python.victim()
            assert [table.detach(victim) for table in tables] == [pack([victim])] * 2
            for table in tables:
                table.free(victim)
            recent = [one for one in recent if one != victim]
    assert len(python) == len(native)


@pytest.mark.parametrize(("shards", "most"), [(1, 150), (2, 158), (8, 206)])
def test_memory_a_record(shards: int, most: int) -> None:
    table, count = Table(shards), 40_000
    records = [table.insert(key_of(number), -1) for number in range(count)]
    table.pin(pack(records))
    assert table.victim() == -1
    for record in records:
        table.unpin(pack([record]))  # the heap behind the victim's cursor is as large as it can be now
    assert table.memory_bytes() / count <= most
