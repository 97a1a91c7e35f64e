"""Models with several kinds of KV: what groups store, what a hit needs of each, and what goes first when memory is short."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from lmcache.cache import Heart, Refusal
from lmcache.cache.index import MAX_SISTERS
from lmcache.cache.table import Table
from lmcache.chunks import Group, Layout, Split, shard_of_rank
from lmcache.engine import Copies, Hit, Request, Requests, SchedulerSession, WorkerSession
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape, RankGroup, shares
from lmcache.engine.requests import GroupTable
from lmcache.errors import LayoutError
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import StepPlan
from lmcache.integration.vllm.worker import WorkerSide
from lmcache.transfer.paged import PagedKV, Plane
from lmcache.wire import messages as m
from servers import PATIENCE, Server, eventually

SECTOR = 4096
CHUNK, BLOCK, BLOCKS = 32, 16, 200
NULL = 0
"""The block that the engine names where it keeps nothing, as vLLM does."""
POISON = 0xDEAD
Servers = Callable[..., Server]


@dataclass(frozen=True)
class Kind:
    """One group of the test's model. reach: in tokens; 0 for everything. state: whether it is a state in place of tokens. local:
    whether attention is in chunks of `reach` tokens."""

    layers: tuple[int, ...]
    reach: int = 0
    state: bool = False
    local: bool = False

    def needed_from(self, end: int) -> int:
        """The first token that the engine keeps when it has computed `end` tokens."""
        return end // self.reach * self.reach if self.local else max(0, end - self.reach) if self.reach else 0

    @property
    def group(self) -> Group:
        return Group(self.layers, self.reach)

    def layout(self, chunk_tokens: int) -> Layout:
        if self.state:
            return Layout("model", "uint8", len(self.layers), 1, 24, chunk_tokens, kind="state")
        return Layout("model", "bfloat16", len(self.layers), 2, 8, chunk_tokens)


FULL, SHORT, LONG, STATE = Kind((0, 5)), Kind((1, 4), 16), Kind((2,), 48), Kind((3,), 1, state=True)
LOCAL = Kind((1, 2), 64, local=True)
MODEL = (FULL, SHORT, LONG, STATE)


class HybridEngine:
    """An engine with all kinds of KV. Every element follows from the kind, its layer and all tokens up to its own.

    It computes prompts in steps, as vLLM does: blocks out of a window's reach are given to others after each step, and a state is
    kept only where a step ends.
    """

    def __init__(self, address: str, kinds: Sequence[Kind] = MODEL, mode: str = "auto", name: str = "engine") -> None:
        self.kinds = kinds
        self.kv = [self._memory(kind) for kind in kinds]
        self.blocks = [np.random.default_rng(at).permutation(np.arange(1, BLOCKS)).tolist() for at in range(len(kinds))]
        endpoint = Endpoint(address, name, "scheduler", 0, PATIENCE, transfer_mode=mode)
        parts = shares([(1 if kind.state else len(kind.layers), kind.reach) for kind in kinds])
        shapes = [GroupShape(kind.layout, 1, kind.group, share) for kind, share in zip(kinds, parts, strict=True)]
        self.scheduler = SchedulerSession(endpoint, *shapes)
        ranks = [
            RankGroup(
                *(kind.layout, shard_of_rank(kind.layout(1), 0, 1, 0, len(kind.layers)), self._paged(kind, memory)),
                *(kind.group, share, BLOCK if kind.state else 0),
                local_tokens=kind.reach if kind.local else 0,
            )
            for kind, memory, share in zip(kinds, self.kv, parts, strict=True)
        ]
        self.worker = WorkerSession(Endpoint(address, name, "worker", 0, PATIENCE, transfer_mode=mode), *ranks)
        assert self.scheduler.wait_connected(PATIENCE) and self.worker.wait_connected(PATIENCE)
        tables = [GroupTable(BLOCK, kind.reach, kind.state, kind.reach if kind.local else 0) for kind in kinds]
        self.requests: Requests[Request] = Requests(self.scheduler, groups=tables)
        self.copies = Copies(self.worker, [0] * len(kinds), requests=self.requests)
        self.opened = 0

    @staticmethod
    def _memory(kind: Kind) -> npt.NDArray[np.uint16]:
        shape = (len(kind.layers), BLOCKS, 12) if kind.state else (len(kind.layers), 2, BLOCKS, BLOCK, 2, 8)
        return np.full(shape, POISON, dtype=np.uint16)

    def _paged(self, kind: Kind, kv: npt.NDArray[np.uint16]) -> PagedKV:
        if kind.state:
            planes = [Plane.strided(one.ctypes.data, one.strides[0], 0, 1, 0, 24, 1) for one in kv]
            return PagedKV(tuple(planes), 1, BLOCKS, 1, kv)
        planes = [
            Plane.strided(one.ctypes.data, one.strides[0], one.strides[1], 2, one.strides[2], 8, one.strides[3])
            for one in kv.reshape(-1, *kv.shape[2:])
        ]
        return PagedKV(tuple(planes), BLOCK, BLOCKS, 2, kv)

    def upload(self) -> None:
        """Bring `kv` to where the engine computes. An engine on a device overrides this and `download`."""

    def download(self) -> None: ...

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()

    # What the engine computes

    def value(self, number: int, ids: Sequence[int], token: int) -> npt.NDArray[np.uint16]:
        """The KV of this token in group `number`, or the state behind it."""
        kv = self.kv[number]
        shape = kv.shape[:1] + kv.shape[2:] if self.kinds[number].state else kv.shape[:2] + kv.shape[4:]
        seed = [number, token, *(int(one) for one in ids[: token + 1])]
        return np.random.default_rng(seed).integers(0, 1 << 16, shape, dtype=np.uint16)

    def at(self, number: int, table: Sequence[int], token: int) -> npt.NDArray[np.uint16]:
        """Where that lies, by the group's block table."""
        block, kv = table[token // BLOCK], self.kv[number]
        return kv[:, block] if self.kinds[number].state else kv[:, :, block, token % BLOCK]

    def tables(self, tokens: int) -> list[list[int]]:
        return [blocks[: -(-tokens // BLOCK)] for blocks in self.blocks]

    def open(self, salt: str = "") -> Request:
        self.opened += 1
        request = self.requests.open[str(self.opened)] = Request(str(self.opened), salt=salt)
        return request

    def compute(
        self,
        ids: Sequence[int],
        steps: Sequence[int],
        request: Request | None = None,
        have: int = 0,
        raced: bool = False,
    ) -> Request:
        """Compute a prompt in steps that end at these tokens, and store what is new. What is out of reach is overwritten."""
        request = request or self.open()
        if not have and not raced:
            assert self.requests.find(request, ids, wait=True) is None
        before = have
        for end in steps:
            request.blocks, *request.tables = self.tables(end)
            for number, kind in enumerate(self.kinds):
                table = (request.blocks, *request.tables)[number]
                for token in range(before, end):
                    if not kind.state:
                        self.at(number, table, token)[...] = self.value(number, ids, token)
                if kind.state:
                    self.at(number, table, end - 1)[...] = self.value(number, ids, end - 1)
            self.upload()
            plan = self.requests.store(request, ids[:end], end, before=before)
            if plan is not None:
                copy = self.copies.store(plan, plan.blocks, others=[part.blocks for part in plan.others])
                assert self.copies.wait([copy], PATIENCE) and (copy.ok or raced)
            for number, kind in enumerate(self.kinds):
                gone = kind.needed_from(end) // BLOCK
                for block in self.blocks[number][:gone]:
                    self.kv[number][(slice(None), block) if kind.state else (slice(None), slice(None), block)] = POISON
            before = end
        return request

    def load(self, ids: Sequence[int], have: int = 0, request: Request | None = None) -> int:
        """Look up, load into tables with null blocks where vLLM has them, and check each token; return the tokens of the hit."""
        request = request or self.open()
        for kv in self.kv:
            kv[...] = POISON
        self.upload()
        found = self.requests.find(request, ids, have, wait=True)
        if not isinstance(found, Hit):
            return 0
        end = request.found_tokens
        tables = self.tables(end)
        for table, kind in zip(tables, self.kinds, strict=True):
            gone = kind.needed_from(end) // BLOCK
            table[:gone] = [NULL] * gone
        plan = self.requests.load(request, have, end)
        for part, table in zip((plan, *plan.others), tables, strict=True):
            part.blocks = table
        copy = self.copies.load(plan, plan.blocks, others=[part.blocks for part in plan.others])
        assert self.copies.settle([copy], PATIENCE)
        self.download()
        for number, (kind, table) in enumerate(zip(self.kinds, tables, strict=True)):
            first = max(have, kind.needed_from(end))
            for token in range(first, end):
                assert (self.at(number, table, token) == self.value(number, ids, token)).all(), (number, token)
            null = self.kv[number][:, NULL] if kind.state else self.kv[number][:, :, NULL]
            assert (null == POISON).all(), "something was written to the null block"
        return end


@pytest.fixture
def engines() -> Iterator[Callable[..., HybridEngine]]:
    made: list[HybridEngine] = []

    def make(one: Server, **options: object) -> HybridEngine:
        made.append(HybridEngine(one.address, name=f"engine-{len(made)}", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def ids_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 30_000, count).tolist()


@pytest.mark.parametrize("mode", ["auto", "payload"])
@pytest.mark.parametrize("kinds", [MODEL, (SHORT,), (LONG, STATE), (FULL, SHORT), (FULL, LOCAL), (LOCAL,)], ids=str)
def test_what_one_engine_stores_of_all_kinds_another_loads(
    server: Servers, engines: Callable[..., HybridEngine], kinds: tuple[Kind, ...], mode: str
) -> None:
    one = server(chunk=CHUNK)
    writer, reader = engines(one, kinds=kinds, mode=mode), engines(one, kinds=kinds, mode=mode)
    ids = ids_of(1, 200)
    writer.compute(ids, [64, 96, 160, 192, 200])
    assert reader.load(ids) == 192
    assert reader.load(ids, have=64) == 192
    assert reader.load([*ids[:170], 1, 2]) == 160
    assert reader.load(ids[:192]) == 160, "the last token is always computed, and its window begins one token earlier"
    assert reader.load(ids_of(2, 200)) == 0
    assert eventually(lambda: one.status()["index"]["leases"] == 0)


def test_a_state_is_used_only_where_a_step_has_ended(server: Servers, engines: Callable[..., HybridEngine]) -> None:
    engine = engines(server(chunk=CHUNK))
    ids = ids_of(3, 200)
    request = engine.compute(ids, [64, 100, 180, 200])
    assert engine.load(ids) == 64, "the other boundaries were passed in the middle of steps"
    engine.compute(ids, [96, 128, 160, 192], have=64, request=engine.open())
    assert engine.load(ids) == 192
    assert request.stored == 6


def test_a_window_that_has_moved_on_is_not_stored_from_blocks_that_others_have(
    server: Servers, engines: Callable[..., HybridEngine]
) -> None:
    """The server comes late: the full group still has the prompt's first chunks, and the window's blocks have others."""
    engine = engines(server(chunk=CHUNK), kinds=(FULL, SHORT))
    ids, request = ids_of(4, 200), engine.open()
    request.cacheable = False
    engine.compute(ids, [64, 128], request=request, have=0)
    request.cacheable = True
    engine.compute(ids, [160, 192], request=request, have=128)
    assert engine.load(ids) == 192
    assert engine.load([*ids[:130], 7]) == 128, "what is in reach of the boundary is still there"
    assert engine.load([*ids[:110], 7]) == 0, "no window that ends before is"


def test_what_has_left_a_chunk_of_attention_is_not_stored(
    server: Servers, engines: Callable[..., HybridEngine]
) -> None:
    """As above. Nothing of the chunk that ended at the last step's end is there, as nothing of it is needed."""
    engine = engines(server(chunk=CHUNK), kinds=(FULL, LOCAL))
    ids, request = ids_of(8, 300), engine.open()
    request.cacheable = False
    engine.compute(ids, [64, 128], request=request, have=0)
    request.cacheable = True
    engine.compute(ids, [192, 256], request=request, have=128)
    assert engine.load(ids) == 256
    assert engine.load([*ids[:200], 7]) == 192
    assert engine.load([*ids[:170], 7]) == 0, "two chunks before the end are asked for, though one is needed"
    assert engine.load([*ids[:140], 7]) == 0


def test_chunks_that_do_not_end_where_blocks_end_are_refused_with_what_to_type() -> None:
    kv = np.zeros((1, 2, 4, 48, 2, 8), np.uint16)
    planes = [
        Plane.strided(one.ctypes.data, one.strides[0], one.strides[1], 2, one.strides[2], 8, one.strides[3])
        for one in kv.reshape(-1, *kv.shape[2:])
    ]
    kind = Kind((0,), 16)
    rank = RankGroup(
        kind.layout, shard_of_rank(kind.layout(1), 0, 1, 0, 1), PagedKV(tuple(planes), 48, 4, 2), kind.group
    )
    with pytest.raises(LayoutError, match="--chunk-size 48 or a multiple"):
        rank.shard_bytes(32)
    assert rank.shard_bytes(96) == 16 * 64, "an extent holds only what is in reach of its end"


def test_a_tier_brings_back_all_groups(
    server: Servers, engines: Callable[..., HybridEngine], folders: Callable[[str], Path]
) -> None:
    one = server(chunk=CHUNK, flags=("--l2", f"dir://{folders('/dev/shm')}/store"))
    engine = engines(one)
    ids = ids_of(5, 200)
    engine.compute(ids, [64, 96, 160, 192])
    eventually(lambda: one.status()["tiers"][0]["counters"]["written_shards"] >= 6 + 6 + 6 + 4)
    assert engine.scheduler.clear()
    assert engine.load(ids) == 192


def test_a_tier_that_lacks_what_an_end_needs_brings_back_an_earlier_one(
    server: Servers, engines: Callable[..., HybridEngine], folders: Callable[[str], Path]
) -> None:
    """States exist only where steps have ended, and a tier may have lost shards of some groups. What is in memory and in tiers is
    found as if all of it were in memory."""
    store = folders("/dev/shm") / "store"
    one = server(chunk=CHUNK, flags=("--l2", f"dir://{store}", "--worth", "always"))
    engine, ids = engines(one, kinds=(FULL, LONG, STATE)), ids_of(9, 200)
    engine.compute(ids, [64, 96, 160, 192])
    assert eventually(lambda: len(list(store.glob("*/*/*-0-1"))) == 6 + 6 + 4)
    request = engine.open()
    assert engine.load(ids, request=request) == 192 and request.chain is not None
    hashes = request.chain.hashes.hex()

    def load(prompt: Sequence[int]) -> int:
        assert engine.scheduler.clear()
        return engine.load(prompt)

    assert load([*ids[:150], 7]) == 96, "no step has ended after the fourth chunk"
    shards = {(path.name[:32], path.stat().st_size): path for path in store.glob("*/*/*-0-1")}
    state, window, full = sorted({size for _, size in shards})
    shards[hashes[160:192], window].unlink()  # of the sixth chunk
    assert load(ids) == 160
    for size in (state, full):
        shards[hashes[32:64], size].unlink(missing_ok=True)  # of the second one
    shards[hashes[64:96], state].unlink()  # of the third one
    assert load(ids) == 0, "the second chunk of full attention is needed for all that follows"


def test_ranks_that_share_the_shard_of_one_group_store_those_of_the_others(
    server: Servers, engines: Callable[..., HybridEngine]
) -> None:
    """With more ranks than KV heads several ranks have the same heads, which the first of them stores, and each has states of its
    own."""
    engine, ids = engines(server(chunk=CHUNK)), ids_of(7, 100)
    for stores in ([False, False, False, True], [True, True, True, False]):
        assert engine.load(ids) == 0
        engine.copies = Copies(engine.worker, [0] * 4, stores=stores, requests=engine.requests)
        engine.compute(ids, [96])
    assert engine.load(ids) == 96


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_pipeline_stage_without_the_first_group_loads_its_own(
    server: Servers, engines: Callable[..., HybridEngine], mode: str
) -> None:
    """The shards of both groups have equal sizes here, so those of the other group would arrive without an error."""
    one, kinds, ids = server(chunk=CHUNK), (FULL, Kind((1, 4), CHUNK)), ids_of(8, 100)
    engine = engines(one, kinds=kinds, mode=mode)
    engine.compute(ids, [96])
    window, paged = kinds[1], engine._paged(kinds[1], engine.kv[1])
    stage = WorkerSession(
        Endpoint(one.address, "engine-0", "worker", 1, PATIENCE, transfer_mode=mode),
        RankGroup(window.layout, shard_of_rank(window.layout(1), 0, 1, 0, 2), paged, window.group),
    )
    try:
        assert stage.wait_connected(PATIENCE)
        request = engine.open()
        assert isinstance(engine.requests.find(request, ids, wait=True), Hit)
        request.blocks, *request.tables = engine.tables(96)
        plan = engine.requests.load(request, 0, 96)
        engine.kv[1][...] = POISON
        side = WorkerSide(stage, [Registered(paged, 1)], [0], held=[1], fails_by_request=True)
        step = StepPlan(loads=[plan])
        side.start_loads(step)
        eventually(lambda: side.finished(step)[1] == {request.id})
        assert not side.take_failed_requests()
        for token in range(64, 96):
            assert (engine.at(1, engine.blocks[1], token) == engine.value(1, ids, token)).all(), token
    finally:
        stage.close()


def test_an_engine_with_another_window_gets_nothing(server: Servers, engines: Callable[..., HybridEngine]) -> None:
    one, ids = server(chunk=CHUNK), ids_of(6, 100)
    engines(one, kinds=(FULL, SHORT)).compute(ids, [96])
    assert engines(one, kinds=(FULL, Kind(SHORT.layers, 32))).load(ids) == 0
    assert engines(one, kinds=(FULL, Kind((1, 3), 16))).load(ids) == 0, "other layers"
    assert engines(one, kinds=(FULL, SHORT)).load(ids) == 96


# What goes first


def keys_of(seed: int, count: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(16) for _ in range(count)]


def fill(heart: Heart, space: int, keys: Sequence[bytes], now: float) -> None:
    grant = heart.reserve(now, 1, space, 0, b"", True, b"".join(keys))
    assert not grant.refused
    if grant.reservation:
        heart.commit(now, 1, grant.reservation, True)


def test_a_hit_that_ends_with_a_chunk_of_attention_needs_no_copy(
    server: Servers, engines: Callable[..., HybridEngine]
) -> None:
    engine, ids = engines(server(chunk=CHUNK), kinds=(LOCAL,)), ids_of(6, 200)
    engine.compute(ids, [64, 128, 192, 200])
    assert engine.load(ids) == 192
    assert engine.load(ids[:170]) == 160


def test_a_version_with_a_lease_for_each_group_gets_misses_and_not_the_bytes_of_another_group(
    server: Servers, engines: Callable[..., HybridEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older engine takes 0 for no lease. The answers of an older server are made here from those of this one."""
    one = server(chunk=CHUNK)
    engine, ids = engines(one, kinds=(FULL, SHORT), mode="payload"), ids_of(5, 200)
    engine.compute(ids, [96, 192, 200])
    connection, leases, released = engine.scheduler._connection, list[int](), list[int]()
    call, post = connection.call, connection.post

    def older(request: m.Message, expect: type[m.AnswerT]) -> tuple[m.AnswerT, list[bytes]]:
        answer, frames = call(request, expect)
        if isinstance(answer, m.Found):
            leases.extend(lease for lease, _ in answer.others)
            own = [(answer.lease + 1, extents) for _, extents in answer.others]
            answer = msgspec.structs.replace(answer, others=own)
        return answer, frames

    def posted(request: m.Message) -> None:
        released.extend(request.leases if isinstance(request, m.Release) else ())
        post(request)

    with monkeypatch.context() as patched:
        patched.setattr(connection, "call", older)
        patched.setattr(connection, "post", posted)
        assert engine.load(ids) == 0
    assert leases == [0] and len(released) == 2, "each of the older server's leases ends"
    assert engine.load(ids) == 192
    assert eventually(lambda: one.status()["index"]["leases"] == 0)


def test_windows_in_the_middle_of_prompts_go_before_those_at_ends_and_forks() -> None:
    """Prompts of 20 chunks, of which always two share the first 10. Windows of 2 chunks have room for few prompts with all their
    chunks; for many with those at the end and the fork only."""
    heart = Heart(4000 * SECTOR)
    heart.join(1, "engine")
    full, window = shares([(1, 0), (1, 2 * 128)])
    first = heart.open_space(1, b"f" * 16, 1, 0, SECTOR, share=full)
    second = heart.open_space(1, b"w" * 16, 1, 0, SECTOR, 2, share=window, main=first)
    prompts = []
    for turn in range(200):
        begin = keys_of(turn, 10)
        for half in (1, 2):
            keys = begin + keys_of(1000 * half + turn, 10)
            usable(heart, first, second, keys, float(turn))
            fill_chain(heart, first, keys, 0, 10, float(turn))
            fill_chain(heart, first, keys, 10, 20, float(turn))
            fill(heart, second, keys, float(turn))
            prompts.append(keys)
        heart.tick(float(turn))
    ends = [usable(heart, first, second, keys) for keys in prompts]
    forks = [usable(heart, first, second, keys[:10]) for keys in prompts]
    held = {space.number: len(space.table) for space in heart.spaces}
    assert held[second] < 0.25 * held[first]
    assert ends[-30:] == [20] * 30 and forks[-30:] == [10] * 30
    assert held[second] < 0.6 * 15 * 30, "there is no room for all 30 chunks of these 15 pairs"


def test_the_search_for_the_window_to_evict_is_short_however_far_windows_reach() -> None:
    """All chunks are in reach of the ends of their prompts. The server's loop serves nobody while it searches."""
    heart, calls = Heart(1500 * SECTOR), 0
    heart.join(1, "engine")
    first = heart.open_space(1, b"f" * 16, 1, 0, SECTOR, share=0.8)
    second = heart.open_space(1, b"w" * 16, 1, 0, SECTOR, 200, share=0.2, main=first)
    for turn in range(6):
        keys = keys_of(turn, 200)
        usable(heart, first, second, keys, float(turn))
        fill_chain(heart, first, keys, 0, 200, float(turn))
        if turn < 5:
            fill(heart, second, keys, float(turn))
    before = heart.events.counters["evicted"]

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "c_call"

    sys.setprofile(note)
    try:
        fill(heart, second, keys, 9.0)
    finally:
        sys.setprofile(None)
    evicted = heart.events.counters["evicted"] - before
    assert evicted > 50 and calls < 1000 * evicted


class CountingTable:
    """A table that counts what is looked for in it."""

    looked_for = steps = 0

    def __init__(self, shards: int) -> None:
        self._table = Table(shards)

    def match(self, hashes: bytes) -> bytes:
        self.looked_for, self.steps = self.looked_for + 1, self.steps + len(hashes) // 16
        return self._table.match(hashes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    def __len__(self) -> int:
        return len(self._table)


def test_a_lookup_looks_for_no_chunk_of_a_group_twice() -> None:
    """Two groups whose states never lie at the same place, beside a window that has everything: the server's loop must not spend
    the length of the window on each of these places."""
    heart = Heart(4000 * SECTOR, new_table=CountingTable)  # type: ignore[arg-type]
    heart.join(1, "engine")
    full = heart.open_space(1, b"f" * 16, 1, 0, SECTOR)
    window, *states = [
        heart.open_space(1, bytes([name]) * 16, 1, 0, SECTOR, reach) for name, reach in enumerate((60, 1, 1))
    ]
    keys = keys_of(1, 300)
    fill_chain(heart, full, keys, 0, 300, 0.0)
    for space, kept in zip((window, *states), (keys, keys[::2], keys[1::2]), strict=True):
        fill(heart, space, kept, 0.0)
    assert heart.lookup(0.0, 1, full, b"".join(keys), others=[states[0], window, states[1]]).chunks == 0
    assert max(space.table.looked_for for space in heart.spaces) <= 300 + 1  # type: ignore[attr-defined]


def split_space(heart: Heart, process: int, shards: int) -> int:
    """Open the space of one more split of a model."""
    name, more = f"split {shards}".encode().ljust(16), {"family": b"m" * 16}
    for shard in range(shards):
        space = heart.open_space(process, name, shards, shard, SECTOR, split=Split((), shards), **more)
    return space


def test_a_lookup_looks_into_few_splits_however_many_have_stored_the_prompt() -> None:
    """Of a model whose splits are all in use, those above the bound share nothing; an idle one makes place for a new one."""
    heart, keys, counts = Heart(1 << 28, new_table=CountingTable), keys_of(1, 100), range(1, 21)  # type: ignore[arg-type]
    for count in counts:
        heart.join(count, f"engine {count}")
        space = split_space(heart, count, count)
        if count > 1:
            for shard in range(count):
                grant = heart.reserve(0.0, count, space, shard, b"", True, b"".join(keys))
                heart.commit(0.0, count, grant.reservation, True)
    assert heart.events.counters["spaces_without_sisters"] == len(counts) - MAX_SISTERS - 1
    first, second, *_, last = heart.spaces
    assert len(first.sisters) == MAX_SISTERS and not last.sisters

    def looked_up(process: int, space: int) -> tuple[int, int]:
        before = steps()
        return heart.lookup(0.0, process, space, b"".join(keys), sisters=True).chunks, steps() - before

    def steps() -> int:
        return sum(one.table.steps for one in heart.spaces)  # type: ignore[attr-defined]

    chunks, taken = looked_up(1, first.number)
    assert chunks == 100 and taken <= (MAX_SISTERS + 1) * 101
    chunks, taken = looked_up(20, last.number)
    assert chunks == 100 and taken == 100
    heart.leave(2)
    heart.join(21, "engine 21")
    newest = split_space(heart, 21, 21)
    assert not second.sisters and len(first.sisters) == MAX_SISTERS
    assert looked_up(21, newest)[0] == 100
    with pytest.raises(Refusal, match="8 other splits"):
        heart.open_sister(newest, Split((), 22))


def test_a_window_forgets_the_index_of_a_model_that_is_closed() -> None:
    """The space of the group that has everything is closed before that of the window: it is another model's, too."""
    heart = Heart(100 * SECTOR)
    heart.join(1, "engine")
    heart.join(2, "other")
    first = heart.open_space(1, b"f" * 16, 1, 0, SECTOR)
    second = heart.open_space(1, b"w" * 16, 1, 0, SECTOR, 2, main=first)
    assert heart.open_space(2, b"w" * 16, 1, 0, SECTOR, 2) == second
    window = heart.space(second)
    assert window is not None and window.main is heart.space(first)
    heart.leave(1)
    heart.tick(0.0)
    assert heart.space(first) is None and window.main is None


def usable(heart: Heart, first: int, second: int, keys: Sequence[bytes], now: float = 999.0) -> int:
    hit = heart.lookup(now, 1, first, b"".join(keys), others=[second])
    heart.release(1, hit.lease)
    return hit.chunks


def fill_chain(heart: Heart, space: int, keys: Sequence[bytes], begin: int, end: int, now: float) -> None:
    grant = heart.reserve(now, 1, space, 0, keys[begin - 1] if begin else b"", not begin, b"".join(keys[begin:end]))
    assert not grant.refused
    if grant.reservation:
        heart.commit(now, 1, grant.reservation, True)


def test_a_model_with_groups_has_the_share_of_one_model() -> None:
    """Two models want more than there is, one of them with five groups: each keeps about half."""
    heart = Heart(16000 * SECTOR)
    heart.join(1, "engine")
    heart.join(2, "other")
    parts = shares([(1, 0), *[(1, 1024)] * 4])
    assert sum(parts) == pytest.approx(1.0) and parts[0] > parts[1]
    groups = [
        heart.open_space(1, bytes([number]) * 16, 1, 0, SECTOR, 4 * bool(number), share)
        for number, share in enumerate(parts)
    ]
    plain = heart.open_space(2, b"p" * 16, 1, 0, SECTOR)
    for turn in range(500):
        for space in groups:
            fill(heart, space, keys_of(turn * 10 + space, 40), float(turn))
        grant = heart.reserve(float(turn), 2, plain, 0, b"", True, b"".join(keys_of(5000 + turn, 40)))
        heart.commit(float(turn), 2, grant.reservation, True)
        heart.tick(float(turn))
    held = {space.number: len(space.table) for space in heart.spaces}
    assert 0.4 < held[plain] / sum(held.values()) < 0.6
    assert held[groups[0]] > 1.5 * held[groups[1]]


def test_stores_and_loads_of_groups_run_side_by_side(server: Servers, engines: Callable[..., HybridEngine]) -> None:
    """Two engines with the same prompts at the same time: each group's chunks are filled by whoever comes first."""
    one = server(chunk=CHUNK)
    both, prompts = [engines(one), engines(one)], [ids_of(20 + number, 200) for number in range(6)]

    def run(engine: HybridEngine) -> None:
        for ids in prompts:
            request = engine.open()
            request.chain = engine.requests.chain(request)
            if not engine.load(ids):
                engine.compute(ids, [64, 96, 128, 160, 192], request=request, raced=True)

    threads = [threading.Thread(target=run, args=(engine,)) for engine in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert [both[0].load(ids) for ids in prompts] == [192] * 6
