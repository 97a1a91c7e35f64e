"""KV that ranks of one parallel split have stored is read by ranks of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from engine_process import Engine
from lmcache.chunks import Split
from servers import Server
from test_engine import prompt

LAYERS, HEADS, DIMS, CHUNK = 6, 8, 16, 16
STAGES = ((), (3, 6), (1, 6), (2, 4, 6))
SPLITS = [Split(stages, heads * max(1, len(stages))) for stages in STAGES for heads in (1, 2, 4, 8)]
Servers = Callable[..., Server]


class Ranks:
    """All ranks of an engine, and its scheduler."""

    def __init__(self, cache: Server, name: str, split: Split, **more: object) -> None:
        shape = {"layers": LAYERS, "heads": HEADS, "dims": DIMS, "num_blocks": 40} | more
        self.ranks = [
            Engine(cache.address, name, shard=n, shards=split.count, stages=split.stages, scheduler=not n, **shape)  # type: ignore[arg-type]
            for n in range(split.count)
        ]
        self.first = self.ranks[0]
        for rank in self.ranks:
            rank.connect()

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()

    def store(self, ids: Sequence[int], first_chunk: int = 0) -> None:
        chain = self.first.chain(ids)
        jobs = [rank.submit_store(ids, first_chunk, chain) for rank in self.ranks]
        for rank, job in zip(self.ranks, jobs, strict=True):
            rank.wait(job)

    def load(self, ids: Sequence[int], start: int = 0, end: int | None = None) -> int:
        """Look up, load into all ranks and compare; return the tokens of the hit."""
        scheduler = self.first.scheduler
        assert scheduler is not None
        hit = self.first.lookup(ids, start)
        if hit is None:
            return 0
        found = hit.chunks * CHUNK
        end = end or found
        for rank in self.ranks:
            rank.poison()
        jobs = [rank.submit_load(hit, CHUNK, start, end, ids) for rank in self.ranks]
        for rank, job in zip(self.ranks, jobs, strict=True):
            assert rank.wait(job).ok
            assert rank.right(ids, start, end), "WRONG BYTES"
        scheduler.release(hit)
        return found


@pytest.fixture
def ranks() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(*arguments: object, **more: object) -> Ranks:
        made.append(Ranks(*arguments, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("mode", ["auto", "payload"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Split((), 1), Split((), 2)),
        (Split((), 4), Split((), 2)),
        (Split((2, 6), 4), Split((3, 6), 2)),
    ],
)
def test_each_split_reads_what_another_has_stored(server: Servers, ranks, one: Split, other: Split, mode: str) -> None:
    cache = server(chunk=CHUNK)
    first, second = ranks(cache, "first", one, mode=mode), ranks(cache, "second", other, mode=mode)
    there, back = prompt(1, 200), prompt(2, 200)
    first.store(there)
    second.store(back)
    assert second.load(there) == first.load(back) == 192
    assert second.load(there, 37, 101) == first.load(back, 16, 17) == 192
    assert cache.status()["index"]["leases"] == 0
