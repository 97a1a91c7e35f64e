"""The order of use, against Python's own ordered dictionary; and that memory and disk let the same things go."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from lmcache.cache.table import ChunkTable, PyTable, pack
from lmcache.memory.order import OrderOfUse
from lmcache.tiers.disk.shard_index import ShardIndex


@pytest.mark.parametrize("begin", [0, 1, 40])
def test_the_order_is_that_of_an_ordered_dictionary(begin: int) -> None:
    dice, order = random.Random(begin), OrderOfUse(begin)
    plain: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, begin + 1))
    for _ in range(5000):
        row = dice.randint(1, 60)  # inserted in any order, with gaps
        if row not in plain:
            order.insert(row)
            plain[row] = None
        elif dice.random() < 0.4:
            order.remove(row)
            del plain[row]
        else:
            order.touch(row)
            plain.move_to_end(row)
        rows = list(plain)
        assert list(order) == rows and order.oldest() == (rows[0] if rows else 0)
    assert [order.newer(row) for row in rows] == [*rows[1:], 0]


def test_it_takes_eight_bytes_a_row() -> None:
    assert OrderOfUse(100_000).memory_bytes() <= 8 * 100_000 + 400


@pytest.mark.parametrize("table_type", [PyTable, ChunkTable])
def test_memory_and_disk_let_the_same_things_go_first(table_type: type[PyTable]) -> None:
    dice, table, index = random.Random(5), table_type(1), ShardIndex()
    keys = [dice.randbytes(36) for _ in range(200)]
    for key in keys:
        table.insert(key[:16], -1)
        index.insert(key, 1, 1)
    for key in dice.choices(keys, k=1000):
        table.touch(pack([table.get(key[:16])]))
        index.order.touch(index.find(key))
    for _ in keys:
        record, row = table.victim(), index.order.oldest()
        assert table.key(record) == index.key(row)[:16]
        table.detach(record)
        index.remove(row)
    assert table.victim() == -1 and index.order.oldest() == 0
