"""Who uses L1: the tenants of each model with their chunks, and the tokens that their lookups asked for and found.

Lookups are counted as they come (`cache.tenants`). Chunks are counted when somebody asks, in small steps of the loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from lmcache.cache.tenants import Use
from lmcache.server.loop import Loop
from lmcache.server.service import Service

SHOWN = 20
"""So many tenants have a row of their own."""
_COUNT_SECONDS = 8.0
"""How long chunks are counted at most; the answer says if there are more."""
_AT_ONCE = 32
"""Tenants or models that are looked at in one call of the loop, which takes some 100 us at most."""
_ENDED = object()
A = TypeVar("A")
B = TypeVar("B")
Key = tuple[str, bytes]
"""A model's name, and a tenant."""


@dataclass(slots=True)
class Row(Use):
    """The use of one tenant of one model."""

    chunks: int = 0
    bytes: int = 0

    def merge(self, other: Row) -> None:
        """Add the use of another tenant."""
        self.add(other)
        self.chunks += other.chunks
        self.bytes += other.bytes


def usage(loop: Loop, service: Service, tenant: bytes | None) -> dict[str, object]:
    """Return the tenants that use most, and the others together; one of them alone if `tenant` is given. Any thread but the
    loop's may call this."""
    counts, end = Counter[tuple[int, bytes]](), loop.now() + _COUNT_SECONDS
    spaces = loop.ask(lambda: service.l1.spaces)
    steps = service.tenants.count_chunks(spaces, counts)
    counted_all = False
    while not counted_all and loop.now() < end:
        counted_all = loop.ask(partial(next, steps, _ENDED)) is _ENDED
    sizes = {one.number: one.chunk_bytes for one in spaces}
    items, others = loop.ask(lambda: (list(service.tenants.uses.items()), _row_of(service.tenants.others)))
    looked_up = _in_steps(loop, lambda item: (item[0], _row_of(item[1])), items)
    numbers = list(dict.fromkeys(space for space, _ in (*(key for key, _ in looked_up), *counts)))
    models = dict(zip(numbers, _in_steps(loop, service.model_of, numbers), strict=True))
    return _report(_rows(looked_up, counts, sizes, models), others, tenant) | {"counted_all": counted_all}


def _in_steps(loop: Loop, of: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """Return `of` of each of these, which the loop's thread makes, a few in a call."""
    found: list[B] = []
    for first in range(0, len(items), _AT_ONCE):
        found += loop.ask(partial(list, map(of, items[first : first + _AT_ONCE])))
    return found


def _row_of(use: Use) -> Row:
    row = Row()
    row.add(use)
    return row


def _rows(
    looked_up: Iterable[tuple[tuple[int, bytes], Row]],
    counts: Counter[tuple[int, bytes]],
    sizes: dict[int, int],
    models: dict[int, str],
) -> dict[Key, Row]:
    """Join what was counted, by the name of the model."""
    rows = dict[Key, Row]()
    for (space, tenant), use in looked_up:
        rows.setdefault((models[space], tenant), Row()).merge(use)
    for (space, tenant), chunks in counts.items():
        rows.setdefault((models[space], tenant), Row()).merge(Row(chunks=chunks, bytes=chunks * sizes.get(space, 0)))
    return rows


def _report(rows: dict[Key, Row], others: Row, tenant: bytes | None) -> dict[str, object]:
    size, tokens = _sum(row.bytes for row in rows.values()), _sum(row.requested_tokens for row in rows.values())

    def share(row: Row) -> float:
        return max(row.bytes / size, row.requested_tokens / tokens)

    ordered = sorted(rows.items(), key=lambda one: share(one[1]), reverse=True)
    shown = ordered[:SHOWN] if tenant is None else [one for one in ordered if one[0][1] == tenant]
    told: dict[str, object] = {
        "tenants": [{"model": model, "tenant": name.hex(), **asdict(row)} for (model, name), row in shown]
    }
    if tenant is None:
        for _, row in ordered[SHOWN:]:
            others.merge(row)
        told["other"] = asdict(others) | {"rows": len(ordered[SHOWN:])}
    return told


def _sum(numbers: Iterable[int]) -> int:
    """Return the sum, and 1 instead of 0, since one divides by it."""
    return sum(numbers) or 1
