"""Random hand-overs of NumPy engines: several that compute and several that decode, which give their requests the same ids, abort
them, end without a word and start again. KV is right, no wait lasts, every token is accounted for, and nothing is left held."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from engine_process import Engine
from lmcache.engine import Hit, Loading
from servers import PATIENCE, Server, eventually
from test_engine import prompt
from test_requests import CHUNK, Bed

Servers, Engines = Callable[..., Server], Callable[..., Engine]


@pytest.mark.parametrize("seed", range(3))
def test_random_hand_overs(server: Servers, engine: Engines, seed: int) -> None:
    one, dice, names = server(chunk=CHUNK), random.Random(seed), itertools.count()
    asked = 0

    def started(**roles: bool) -> Bed:
        name = f"engine {next(names)}"
        bed = Bed(engine(one, instance=name), name=name, **roles)
        bed.requests.prefill.tokens_per_second = 1e4  # so no wait takes longer than milliseconds
        return bed

    gives, takes = ([started(**roles) for _ in range(2)] for roles in ({"loads": False}, {"stores": False}))
    for number in range(60):
        ids, name = prompt(seed * 1000 + number, dice.randrange(2, 300)), f"r{number % 3}"
        first, second = dice.choice(gives), dice.choice(takes)
        computed = dice.choice(
            (len(ids), len(ids), dice.randrange(1, len(ids)))
        )  # of which another request was aborted
        request = first.open(name, tail_leaves=1, stores_tail=True)
        first.requests.find(request, ids)
        if dice.random() < 0.5:
            first.store(request, ids[:computed], ends=computed == len(ids))
            first.requests.finish(name)
        other = second.open(name, tail_leaves=1)
        found: Any = second.requests.find(other, ids)
        if isinstance(found, Loading) and dice.random() < 0.3:  # it is aborted while it waits
            second.requests.finish(name)
            second.requests.open.pop(name, None)
            other = second.open(name, tail_leaves=1)
            found = second.requests.find(other, ids)
        if request.id in first.requests.open and dice.random() < 0.7:
            first.store(request, ids[:computed], ends=computed == len(ids))

        def answered(bed: Bed = second, request: Any = other, ids: list[int] = ids) -> Any:
            bed.now += 0.05
            got = bed.requests.find(request, ids)
            return None if isinstance(got, Loading) else (got,)

        (found,) = eventually(answered, PATIENCE)
        asked += len(ids)
        if isinstance(found, Hit):
            end = min(other.found_tokens, len(ids) - 1)
            if end > 0 and dice.random() < 0.8:
                second.engine.poison()
                copy = second.copies.load(second.requests.load(other, 0, end), second.engine.table(len(ids)))
                assert second.copies.settle([copy], PATIENCE) and second.engine.right(ids, 0, end)
        if dice.random() < 0.8:
            first.requests.finish(name)
        second.requests.finish(name)
        if dice.random() < 0.1:  # one ends without a word, and another one takes its place
            side = dice.choice((gives, takes))
            at = dice.randrange(2)
            side[at].engine.close()
            side[at] = started(**({"loads": False} if side is gives else {"stores": False}))
    for bed in gives + takes:
        for name in list(bed.requests.open):
            bed.requests.finish(str(name))

    def rests() -> bool:
        counters = one.counters()
        return not any(counters[name] for name in ("promised_chunks", "leases", "reservations", "fetches_open"))

    eventually(rests)

    def accounted() -> bool:
        counters = one.counters()
        parts = [
            value for name, value in counters.items() if name.startswith(("lookup_tokens_total", "missed_tokens_total"))
        ]
        assert counters["requested_tokens_total"] == sum(parts) <= asked
        return sum(parts) == asked

    eventually(accounted)
