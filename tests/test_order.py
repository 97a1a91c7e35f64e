"""LRU against an ordered dictionary, and the indexes of memory and disk against each other: the same things go."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable

import pytest

from lmcache.cache.table import Table, pack
from lmcache.memory.order import LRU, Policy
from lmcache.tiers.disk.shard_index import ShardIndex
from policies import TwoQueues
from py_table import PyTable


@pytest.mark.parametrize("begin", [0, 1, 40])
def test_lru_is_the_order_of_an_ordered_dictionary(begin: int) -> None:
    dice, order = random.Random(begin), LRU()
    order.restored(begin, lambda row: b"")
    plain: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, begin + 1))
    for _ in range(5000):
        row = dice.randint(1, 60)  # inserted in any order, with gaps
        if row not in plain:
            order.inserted(row, b"", 0)
            plain[row] = None
        elif dice.random() < 0.4:
            order.removed(row)
            del plain[row]
        else:
            rows = dice.sample(list(plain), dice.randint(0, min(3, len(plain))))
            order.touched(rows)
            for row in rows:
                plain.move_to_end(row)
        assert list(order) == list(plain)
        assert order.victim(lambda row: row % 3 == 0) == next((row for row in plain if row % 3 == 0), 0)


def test_lru_takes_eight_bytes_a_row() -> None:
    order = LRU()
    order.restored(100_000, lambda row: b"")
    assert order.memory_bytes() <= 8 * 100_000 + 400


@pytest.mark.parametrize("table_type", [PyTable, Table])
@pytest.mark.parametrize("policy", [LRU, TwoQueues])
def test_memory_and_disk_let_the_same_things_go_first(
    table_type: Callable[..., Table], policy: Callable[[], Policy]
) -> None:
    dice, table, index = random.Random(5), table_type(1, policy()), ShardIndex(policy=policy())
    keys = [dice.randbytes(16) + bytes(20) for _ in range(200)]
    gone = []
    for _ in range(3000):
        key = dice.choice(keys)
        record, row = table.get(key[:16]), index.find(key)
        if row:
            table.touch(pack([record]))
            index.order.touched([row])
            continue
        while len(table) >= 50:
            victim, row = table.victim(), next(iter(index.order))
            assert table.key(victim) == index.key(row)[:16]
            gone.append(victim)
            table.detach(victim)
            table.free(victim)
            index.remove(row)
        table.insert(key[:16], -1)
        index.insert(key, 1, 1)
    assert len(set(gone)) > 40


@pytest.mark.parametrize("policy", [LRU, TwoQueues])
def test_a_disk_index_comes_back_in_its_order(policy: Callable[[], Policy]) -> None:
    dice, index = random.Random(6), ShardIndex(policy=policy())
    for _ in range(100):
        index.insert(dice.randbytes(36), 1, 1)
    index.order.touched([dice.randint(1, 100) for _ in range(300)])
    for row in dice.sample(range(1, 101), 30):
        index.remove(row)
    records = index.records()
    assert ShardIndex(records, policy()).records().tobytes() == records.tobytes()
