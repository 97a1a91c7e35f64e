"""KV that ranks of one parallel split have stored is read by ranks of another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pytest

from engine_process import PATIENCE, POISON, Engine, kv_of
from lmcache.chunks import Group, Layout, Split, shard_of_rank
from lmcache.engine import Copies, Hit, Request, Requests, SchedulerSession, WorkerSession
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.engine.requests import GroupTable
from lmcache.errors import LayoutError
from lmcache.transfer.cpu import CpuCopier
from lmcache.transfer.paged import PagedKV, Plane
from servers import Server, eventually
from test_engine import prompt

LAYERS, HEADS, DIMS, CHUNK = 6, 8, 16, 16
STAGES = ((), (3, 6), (1, 6), (2, 4, 6))
SPLITS = [Split(stages, heads * max(1, len(stages))) for stages in STAGES for heads in (1, 2, 4, 8)]
TWELVE = [Split(stages, heads * max(1, len(stages))) for stages in STAGES for heads in (1, 2, 3, 4, 6, 12)]
"""Splits of 12 heads. Those of 2 and 3 shards have unequal parts in common."""
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
    eventually(lambda: cache.status()["index"]["leases"] == 0)


def describe(kv: np.ndarray) -> PagedKV:  # type: ignore[type-arg]
    """kv: [layers, K and V, blocks, tokens of a block, heads, dims]."""
    planes = [
        Plane.strided(one.ctypes.data, *one.strides[:2], one.shape[2], one.strides[2], one.shape[3], one.strides[3])
        for one in kv.reshape(-1, *kv.shape[2:])
    ]
    return PagedKV(tuple(planes), kv.shape[3], kv.shape[2], kv.itemsize, kv)


@pytest.mark.parametrize(
    ("kind", "heads_of_all", "reader"),
    [
        *(("mha", HEADS, one) for one in SPLITS),
        *(("mha", 12, one) for one in TWELVE if one.stage_shards in (1, 2, 3)),
        *(("mla", 1, Split(stages, max(1, len(stages)))) for stages in STAGES),
    ],
    ids=str,
)
def test_every_split_is_put_together_from_every_other_one(
    kind: Literal["mha", "mla"], heads_of_all: int, reader: Split
) -> None:
    """Three chunks of 8 tokens, of which tokens 3 to 20 are loaded; block tables and extents are scattered."""
    chunk, block, tokens = 8, 4, 24
    layout = Layout("m", "bfloat16", LAYERS, heads_of_all, DIMS, chunk, kind)
    each = layout.planes_per_layer
    writers = [one for one in (TWELVE if heads_of_all == 12 else SPLITS) if heads_of_all % one.stage_shards == 0]
    whole = np.random.default_rng(3).integers(0, 1 << 16, (LAYERS, each, tokens, heads_of_all, DIMS), dtype=np.uint16)
    table = np.array([6, 1, 5, 0, 3, 2], dtype=np.int32)
    at = np.arange(3, 20)
    for writer, index in itertools.product(writers, range(reader.count)):
        own = reader.shard(layout, index)
        layers, heads = slice(own.first_layer, own.end_layer), slice(own.first_head, own.end_head)
        held = own.end_layer - own.first_layer, own.end_head - own.first_head
        kv = np.zeros((held[0], each, 7, block, held[1], DIMS), np.uint16)
        group, copier = RankGroup(lambda tokens: layout, own, describe(kv)), CpuCopier(describe(kv), chunk)
        copied = 0
        for first in range(0, writer.count, writer.stage_shards):
            overlaps, theirs = [], []
            for number in range(first, first + writer.stage_shards):
                overlap = group.overlap(writer, number, chunk)
                if overlap is not None:
                    other = writer.shard(layout, number)
                    assert overlap[1].size_bytes == other.shard_bytes(layout)
                    overlaps.append(overlap)
                    theirs.append(whole[other.first_layer : other.end_layer, :, :, other.first_head : other.end_head])
            if not overlaps:
                continue
            extents = np.stack([one[:, :, c * chunk : (c + 1) * chunk] for c in (2, 0, 1) for one in theirs])
            runs = np.repeat([[1, 3, 5, 3], [2, 8, 8, 0], [0, 16, 4, 0]], len(theirs), axis=0)
            runs[:, 0] = (runs[:, 0] * len(theirs) + list(range(len(theirs))) * 3) * extents[0].nbytes
            reading = copier.reader(*overlaps)
            reading.scatter(extents.ctypes.data, table, runs, arena_bytes=extents.nbytes)
            copied += sum(part.token_bytes for part, _ in overlaps)
            with pytest.raises(LayoutError, match="passes the arena's end"):
                reading.scatter(extents.ctypes.data, table, runs, arena_bytes=extents.nbytes - 1)
        assert copied == describe(kv).token_bytes, "every element comes from one shard"
        assert (kv[:, :, table[at // block], at % block] == whole[layers, :, 3:20, heads]).all(), writer
        kv[:, :, table[at // block], at % block] = 0
        assert not kv.any(), "something else was written"


def test_planes_that_hide_their_heads_are_not_filled_from_another_split() -> None:
    """A plane of one head that is as long as all of them has the right size, but no part of it is a KV head."""
    layout, split = Layout("m", "bfloat16", LAYERS, HEADS, DIMS, 8), Split((), 2)
    kv = np.zeros((LAYERS, 2, 7, 4, 1, HEADS // 2 * DIMS), np.uint16)
    group = RankGroup(lambda tokens: layout, split.shard(layout, 0), describe(kv))
    assert group.shard_bytes(8) == split.shard(layout, 0).shard_bytes(layout)
    for other in (Split((), 1), Split((), 8)):
        with pytest.raises(LayoutError, match="describe the 4 KV heads of 32 bytes"):
            group.overlap(other, 0, 8)


def test_a_split_numbers_its_shards_as_ranks_do() -> None:
    layout = Layout("m", "bfloat16", LAYERS, HEADS, DIMS, 8)
    for split in SPLITS:
        ends = split.stages or (LAYERS,)
        parts = split.count // len(ends)
        for stage, (first, end) in enumerate(itertools.pairwise((0, *ends))):
            for rank in range(parts):
                shard = shard_of_rank(layout, rank, parts, first, end, stage, len(ends))
                assert split.shard(layout, stage * parts + rank) == shard


@pytest.mark.parametrize(
    ("split", "index"),
    [
        (Split((), 3), 0),
        (Split((), 16), 0),
        (Split((), 2), 2),
        (Split((), 2), -1),
        (Split((3, 6), 3), 0),
        (Split((3, 6), 1), 0),
        (Split((3, 5), 2), 0),
        (Split((6, 3), 2), 0),
    ],
    ids=str,
)
def test_what_is_no_split_of_the_layout_is_refused(split: Split, index: int) -> None:
    with pytest.raises(LayoutError):
        split.shard(Layout("m", "bfloat16", LAYERS, HEADS, DIMS, 8), index)


def test_a_prefix_goes_on_where_another_split_has_more(server: Servers, ranks) -> None:  # type: ignore[no-untyped-def]
    """[one][two][one]: what is stored behind chunks of another split is found there, under one lease."""
    cache = server(chunk=CHUNK)
    one, two = ranks(cache, "one", Split((), 2)), ranks(cache, "two", Split((), 4))
    ids = prompt(3, 160)
    one.store(ids[:64])
    assert two.load(ids) == 64
    assert cache.counters()['hit_chunks_by_reason_total{reason="other split"}'] == 4
    two.store(ids[:112], first_chunk=4)
    assert one.load(ids) == two.load(ids) == 112
    one.store(ids, first_chunk=7)
    assert one.load(ids) == two.load(ids) == 160
    assert one.load(ids, 70, 150) == two.load(ids, 20, 90) == 160
    hit = one.first.lookup(ids)
    assert hit is not None and cache.status()["index"]["leases"] == 1
    assert [(part.first_chunk, part.split.count) for part in hit.foreign] == [(4, 4), (7, 2)]
    one.first.scheduler.release(hit)
    assert sum(space["chunks"] for space in cache.status()["index"]["spaces"]) == 10, "nothing is stored twice"


def test_what_an_engine_has_left_behind_is_read_by_one_with_another_split(server: Servers, ranks) -> None:  # type: ignore[no-untyped-def]
    cache, ids = server(chunk=CHUNK), prompt(4, 96)
    gone = ranks(cache, "gone", Split((2, 6), 4))
    gone.store(ids)
    gone.close()
    assert ranks(cache, "next", Split((), 8)).load(ids) == 96


def disk_flags(folder: object) -> tuple[str, ...]:
    """A disk tier whose loads are always waited for."""
    return "--l2", f"disk://{folder}?io=buffered&max_gb=1", "--worth", "always", "--l2-patience-seconds", "600"


@pytest.mark.parametrize("full", [False, True], ids=["free memory", "a full arena"])
def test_what_a_tier_has_of_another_split_is_loaded(server: Servers, ranks, folders, full: bool) -> None:  # type: ignore[no-untyped-def]
    """The engine that has stored it has gone, and L1 is empty, or full of what the reader has stored."""
    flags = disk_flags(folders("/tmp"))
    cache, ids = server(chunk=CHUNK, l1=4, flags=flags), prompt(5, 160)
    reader, gone = ranks(cache, "reader", Split((), 1)), ranks(cache, "gone", Split((3, 6), 4))
    gone.store(ids)
    eventually(lambda: cache.status()["tiers"][0]["counters"].get("kept_shards", 0) == 40)
    gone.close()
    assert gone.first.scheduler is not None and reader.first.scheduler is not None
    assert reader.first.scheduler.clear()
    for number in range(30 if full else 0):
        reader.store(prompt(10 + number, 160))
    assert not full or cache.counters()["evicted_chunks_total"] > 0
    assert reader.load(ids) == 160
    eventually(lambda: cache.status()["index"]["leases"] == 0)  # the release was posted


class HybridRanks:
    """All ranks of an engine whose model has full attention in some layers and a window of one block in the others."""

    LAYERS, REACH, CHUNK, BLOCK, HEADS = ((0, 1, 3, 4), (2, 5)), (0, 16), 32, 16, 4

    def __init__(self, cache: Server, name: str, count: int, mode: str) -> None:
        self.count = count
        kinds = [Group(layers, reach) for layers, reach in zip(self.LAYERS, self.REACH, strict=True)]
        layouts = [partial(Layout, "m", "bfloat16", len(layers), self.HEADS, 8) for layers in self.LAYERS]
        shapes = [GroupShape(layout, count, kind, 0.5) for layout, kind in zip(layouts, kinds, strict=True)]
        endpoint = Endpoint(cache.address, name, "scheduler", 0, PATIENCE, transfer_mode=mode)
        self.scheduler = SchedulerSession(endpoint, *shapes)
        own = self.HEADS // count
        self.kv = [
            [np.full((len(layers), 2, 40, self.BLOCK, own, 8), POISON, dtype=np.uint16) for layers in self.LAYERS]
            for _ in range(count)
        ]
        self.workers, self.copies = [], []
        self.requests: Requests[Request] = Requests(
            self.scheduler, groups=[GroupTable(self.BLOCK, reach) for reach in self.REACH], ranks=count
        )
        for rank, arrays in enumerate(self.kv):
            groups = [
                RankGroup(layout, shard_of_rank(layout(1), rank, count, 0, len(kind.layers)), describe(kv), kind, 0.5)
                for layout, kind, kv in zip(layouts, kinds, arrays, strict=True)
            ]
            endpoint = Endpoint(cache.address, name, "worker", rank, PATIENCE, transfer_mode=mode)
            self.workers.append(WorkerSession(endpoint, *groups))
            self.copies.append(Copies(self.workers[-1], [rank] * 2, requests=self.requests))
        assert all(session.wait_connected(PATIENCE) for session in (self.scheduler, *self.workers))
        self.tables = [np.random.default_rng(seed).permutation(40).tolist() for seed in (1, 2)]

    def close(self) -> None:
        for session in (*self.workers, self.scheduler):
            session.close()

    def at(self, rank: int, group: int, first: int, end: int) -> tuple[object, ...]:
        """Where tokens [first, end) are."""
        token = np.arange(first, end)
        return slice(None), slice(None), np.array(self.tables[group])[token // self.BLOCK], token % self.BLOCK

    def want(self, rank: int, group: int, ids: Sequence[int], first: int, end: int) -> np.ndarray:  # type: ignore[type-arg]
        heads = slice(rank * self.HEADS // self.count, (rank + 1) * self.HEADS // self.count)
        return kv_of(ids, 6, self.HEADS, 8)[list(self.LAYERS[group]), :, first:end, heads]

    def compute(self, ids: Sequence[int], have: int = 0) -> None:
        """Compute what the engine does not have, in steps of a chunk, and store what is new."""
        request = self.requests.open["store"] = Request("store")
        assert not isinstance(self.requests.find(request, ids, have, wait=True), Hit)
        for end in range(have + self.CHUNK, len(ids) + 1, self.CHUNK):
            request.stored = max(request.stored, have // self.CHUNK)
            request.blocks, *request.tables = [table[: -(-end // self.BLOCK)] for table in self.tables]
            for rank, group in itertools.product(range(self.count), range(2)):
                first = end - self.CHUNK
                self.kv[rank][group][self.at(rank, group, first, end)] = self.want(rank, group, ids, first, end)
            plan = self.requests.store(request, ids[:end], end, before=end - self.CHUNK)
            assert plan is not None
            running = [
                one.store(plan, plan.blocks, others=[part.blocks for part in plan.others]) for one in self.copies
            ]
            assert all(one.wait([copy], PATIENCE) and copy.ok for one, copy in zip(self.copies, running, strict=True))
        self.requests.finish("store")

    def load(self, ids: Sequence[int]) -> int:
        request = self.requests.open["load"] = Request("load")
        found = self.requests.find(request, ids, wait=True)
        if not isinstance(found, Hit):
            return 0
        request.blocks, *request.tables = self.tables
        end = request.found_tokens
        for arrays in self.kv:
            for kv in arrays:
                kv[...] = POISON
        plan = self.requests.load(request, 0, end)
        running = [one.load(plan, plan.blocks, others=[part.blocks for part in plan.others]) for one in self.copies]
        assert all(one.settle([copy], PATIENCE) for one, copy in zip(self.copies, running, strict=True))
        for rank, (group, reach) in itertools.product(range(self.count), enumerate(self.REACH)):
            kv, where = self.kv[rank][group], self.at(rank, group, end - reach if reach else 0, end)
            assert (kv[where] == self.want(rank, group, ids, end - reach if reach else 0, end)).all(), (rank, group)
            kv[where] = POISON
            assert (kv == POISON).all(), "something else was written"
        self.requests.finish("load")
        return end


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_model_with_a_window_is_read_with_another_split(server: Servers, mode: str) -> None:
    """Each group finds its chunks in whatever space has them, and a hit is one lease."""
    cache, ids = server(chunk=HybridRanks.CHUNK), prompt(6, 225)
    one, two, four = (HybridRanks(cache, str(count), count, mode) for count in (1, 2, 4))
    try:
        two.compute(ids[:96])
        assert one.load(ids) == four.load(ids) == 96
        four.compute(ids[:192], have=96)
        assert one.load(ids) == two.load(ids) == four.load(ids) == 192
        request = Request("held")
        found = one.requests.find(request, ids, wait=True)
        assert isinstance(found, Hit) and cache.status()["index"]["leases"] == 1
        one.requests.release(found)
    finally:
        for engine in (one, two, four):
            engine.close()


def test_a_restarted_server_finds_what_another_split_has_left_in_a_tier(server: Servers, ranks, folders) -> None:  # type: ignore[no-untyped-def]
    """The names of splits by heads are known without an engine that has one; those of pipeline stages are not."""
    flags = disk_flags(folders("/tmp"))
    first = server(chunk=CHUNK, flags=flags)
    by_heads, by_layers = prompt(7, 160), prompt(8, 160)
    for name, split, ids in (("heads", Split((), 4), by_heads), ("layers", Split((2, 6), 2), by_layers)):
        ranks(first, name, split).store(ids)
    eventually(lambda: first.status()["tiers"][0]["counters"].get("kept_shards", 0) == 60)
    first.end()
    second = server(chunk=CHUNK, flags=flags)
    reader = ranks(second, "reader", Split((), 2))
    assert reader.load(by_heads) == 160
    assert reader.load(by_layers) == 0
    assert len(second.status()["index"]["spaces"]) == 2
    stages = ranks(second, "stages", Split((2, 6), 2))
    assert reader.load(by_layers) == 160, "now the server knows the split"
    assert stages.load(by_heads) == 160
