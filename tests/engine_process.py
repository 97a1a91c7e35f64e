"""A small fake engine for tests: paged KV in NumPy whose every byte follows from the whole prompt before it.

Used in the test's own process, and as a process of its own that can be stopped and killed: then it reads one JSON command a
line from stdin and answers each with one JSON line on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.chunks import Layout, TokenChain, shard_of_rank
from lmcache.engine import Done, Hit, SchedulerSession, Store, WorkerSession
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape, RankGroup
from lmcache.engine.identity import Identity, named
from lmcache.engine.plans import LoadPlan
from lmcache.transfer.paged import PagedKV, Plane

POISON = 0xDEAD
PATIENCE = 60.0  # of tests, for what should come soon


def kv_of(ids: Sequence[int], layers: int, heads: int, dims: int) -> npt.NDArray[np.uint16]:
    """[layers, 2, tokens, heads, dims]: what the KV of this prompt is. Every element depends on all tokens up to its own. It is a
    bfloat16 between 2^-7 and 2, as in real KV."""
    with np.errstate(over="ignore"):
        mixed = (np.asarray(ids, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        prefix = np.cumsum(mixed * (np.arange(len(ids), dtype=np.uint64) * np.uint64(2) + np.uint64(1)))
        element = np.arange(layers * 2 * heads * dims, dtype=np.uint64).reshape(layers, 2, 1, heads, dims)
        x = prefix[None, None, :, None, None] + element * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
        bits = (x >> np.uint64(40)).astype(np.uint16)
        exponents = np.uint16(120) + ((bits >> np.uint16(7)) & np.uint16(7))
        return (bits & np.uint16(0x807F)) | (exponents << np.uint16(7))


class Engine:
    """Scheduler and one rank of an engine, or (`shards` > 1) the rank of one shard, with a scheduler where `scheduler` is.

    stages: where pipeline stages end.

    deadline: seconds; where it is not the deadline that is tested, so long that no busy machine makes a miss of a hit.
    """

    def __init__(
        self,
        address: str,
        instance: str = "engine",
        *,
        layers: int = 2,
        heads: int = 2,
        dims: int = 16,
        block_tokens: int = 16,
        num_blocks: int = 160,
        shard: int = 0,
        shards: int = 1,
        scheduler: bool = True,
        deadline: float = PATIENCE,
        mode: str = "auto",
        key_file: str | None = None,
        model: str | Identity = "model",
        stages: tuple[int, ...] = (),
        follows: bool = False,
    ) -> None:
        self.layers, self.heads, self.dims, self.block_tokens = layers, heads, dims, block_tokens
        self.blocks = np.random.default_rng(7).permutation(num_blocks).tolist()
        self.jobs = 0
        self.done: dict[str, Done] = {}
        key = Path(key_file) if key_file else None
        identity, whole = (
            named(model) if isinstance(model, str) else model,
            Layout("", "bfloat16", layers, heads, dims, 1),
        )

        pp_size = max(1, len(stages))
        tp_size = shards // pp_size
        stage, ends = shard // tp_size, stages or (layers,)
        held = (0, *ends)[stage], ends[stage]
        self.shard = shard_of_rank(whole, shard % tp_size, tp_size, *held, stage, pp_size)
        own = self.shard.end_head - self.shard.first_head
        self.kv = np.full((held[1] - held[0], 2, num_blocks, block_tokens, own, dims), POISON, dtype=np.uint16)

        def layout(chunk_tokens: int) -> Layout:
            return identity.layout(whole, chunk_tokens)

        def endpoint(role: str) -> Endpoint:
            return Endpoint(address, instance, role, shard, deadline, transfer_mode=mode, auth_key_file=key)

        group = RankGroup(layout, self.shard, self._describe(), stages=tuple(stages))
        shape = GroupShape(layout, shards, stages=tuple(stages))
        more = (
            {"follows": True} if follows else {}
        )  # an older version, which tests of upgrades start, lacks the argument
        self.scheduler = SchedulerSession(endpoint("scheduler"), shape, **more) if scheduler else None
        self.worker = WorkerSession(endpoint("worker"), group)

    def _describe(self) -> PagedKV:
        planes = []
        for plane in self.kv.reshape(-1, *self.kv.shape[2:]):
            block, token, head, dim = plane.strides
            planes.append(Plane.strided(plane.ctypes.data, block, token, plane.shape[2], head, plane.shape[3], dim))
        return PagedKV(tuple(planes), self.block_tokens, self.kv.shape[2], 2, self.kv)

    def connect(self, seconds: float = PATIENCE) -> Engine:
        assert self.worker.wait_connected(seconds), "the worker did not connect"
        assert self.scheduler is None or self.scheduler.wait_connected(seconds), "the scheduler did not connect"
        return self

    def set_deadline(self, seconds: float) -> None:
        """Of calls from now on."""
        set_deadline(seconds, self.worker, *([self.scheduler] if self.scheduler else []))

    def close(self) -> None:
        self.worker.close()
        if self.scheduler is not None:
            self.scheduler.close()

    # Paged KV

    def table(self, tokens: int) -> list[int]:
        """A block table for so many tokens, scattered over the paged KV."""
        return self.blocks[: -(-tokens // self.block_tokens)]

    def fill(self, ids: Sequence[int]) -> None:
        """What a prefill leaves in the blocks."""
        tokens = np.arange(len(ids))
        table = np.asarray(self.table(len(ids)))
        fresh = self.kv_of(ids)
        self.kv[:, :, table[tokens // self.block_tokens], tokens % self.block_tokens] = fresh

    def kv_of(self, ids: Sequence[int]) -> npt.NDArray[np.uint16]:
        """This rank's part of the prompt's KV."""
        layers = slice(self.shard.first_layer, self.shard.end_layer)
        heads = slice(self.shard.first_head, self.shard.end_head)
        return kv_of(ids, self.layers, self.heads, self.dims)[layers, :, :, heads]

    def poison(self) -> None:
        self.kv[...] = POISON

    def tokens(self, count: int) -> npt.NDArray[np.uint16]:
        """The first `count` tokens of the table: [layers, 2, tokens, heads, dims]."""
        at = np.arange(count)
        table = np.asarray(self.table(count))
        return self.kv[:, :, table[at // self.block_tokens], at % self.block_tokens]

    def right(self, ids: Sequence[int], start: int, end: int) -> bool:
        """Whether tokens [start, end) are this prompt's, bit for bit, and nothing outside of them was written."""
        have, want = self.tokens(len(ids)), self.kv_of(ids)
        outside = np.concatenate([have[:, :, :start], have[:, :, end:]], axis=2)
        return bool((have[:, :, start:end] == want[:, :, start:end]).all() and (outside == POISON).all())

    # Jobs

    def chain(self, ids: Sequence[int]) -> TokenChain:
        assert self.scheduler is not None
        chain = self.scheduler.new_chain()
        assert chain is not None, "no server was ever reached"
        chain.extend(ids)
        return chain

    def submit_store(self, ids: Sequence[int], first_chunk: int = 0, chain: TokenChain | None = None) -> str:
        """Fill the blocks with this prompt's KV and hand its full chunks to the worker."""
        chain = chain or self.chain(ids)
        self.fill(ids)
        self.jobs += 1
        hashes = chain.hashes[16 * first_chunk :]
        job = Store(chain.chunk_tokens, chain.parent(first_chunk), hashes, first_chunk, self.table(len(ids)))
        self.worker.store(f"s{self.jobs}", job)
        return f"s{self.jobs}"

    def submit_load(self, hit: Hit, chunk_tokens: int, start: int, end: int, ids: Sequence[int]) -> str:
        self.jobs += 1
        table = self.table(len(ids))
        plan = LoadPlan(f"l{self.jobs}", "", hit, chunk_tokens, start, end, table)
        self.worker.load(plan.job_id, plan.job([self.shard.index], [table], None, None))
        return f"l{self.jobs}"

    def wait(self, job: str, seconds: float = PATIENCE) -> Done:
        """The job's `Done`."""
        while job not in self.done and self.worker.wait_finished(seconds):
            self.done |= {done.job_id: done for done in self.worker.finished()}
        if job in self.done:
            return self.done.pop(job)
        raise AssertionError(f"job {job} did not end in {seconds} s")

    def store(self, ids: Sequence[int], first_chunk: int = 0, chain: TokenChain | None = None) -> int:
        """Tokens that were stored."""
        return int(self.wait(self.submit_store(ids, first_chunk, chain)).tokens)

    def lookup(self, ids: Sequence[int], skip_tokens: int = 0) -> Hit | None:
        assert self.scheduler is not None
        return self.scheduler.lookup(self.chain(ids), skip_tokens, any_split=True)

    def hit_tokens(self, ids: Sequence[int]) -> int:
        """Tokens that are there; leaves no lease behind."""
        assert self.scheduler is not None
        hit = self.lookup(ids)
        if hit is None:
            return 0
        self.scheduler.release(hit)
        return hit.chunks * self.chain([]).chunk_tokens

    def load(self, ids: Sequence[int], start: int = 0, end: int | None = None, hit: Hit | None = None) -> int:
        """Look up, load, compare, release. Tokens loaded; -1 when the load failed (and so nothing may be used).

        Raises AssertionError for wrong bytes.
        """
        assert self.scheduler is not None
        hit = hit or self.lookup(ids, start)
        if hit is None:
            return 0
        chunk_tokens = self.chain([]).chunk_tokens
        end = hit.chunks * chunk_tokens if end is None else end
        self.poison()
        done = self.wait(self.submit_load(hit, chunk_tokens, start, end, ids))
        self.scheduler.release(hit)
        if not done.ok:
            return -1
        assert self.right(ids, start, end), "WRONG BYTES"
        return end - start


def set_deadline(seconds: float, *sessions: SchedulerSession | WorkerSession) -> None:
    """Of these sessions' calls from now on. A short one comes after what must not fail on a busy machine; a very long one tells
    whether anything waits that should not."""
    for session in sessions:
        session._connection.endpoint = replace(session._connection.endpoint, deadline_seconds=seconds)


def pause_once(copier: Any, what: str, midway: Callable[[], None]) -> None:
    """The copier's next gather or scatter stops when half of it is done, until `midway` returns."""
    copy = getattr(copier, what)

    def paused(base: int, blocks: Any, runs: Any, **more: Any) -> None:
        setattr(copier, what, copy)
        half = len(runs) // 2
        copy(base, blocks, runs[:half], **more)
        midway()
        copy(base, blocks, runs[half:], **more)

    setattr(copier, what, paused)


def become(uid: int = -1, *gids: int) -> None:
    """Go on as another user, with these groups, the first of them the effective one. What is imported later is imported before,
    since that user may not read the interpreter's files."""
    if uid < 0:
        return
    import encodings.idna  # noqa: F401
    import os
    import stringprep  # noqa: F401

    import blake3  # noqa: F401
    import zmq  # noqa: F401

    import lmcache.engine.embedded
    import lmcache.engine.worker  # noqa: F401

    os.setgroups(gids)
    os.setgid(gids[0])
    os.setuid(uid)


def main() -> None:
    def say(answer: Any) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")  # at once: the log goes to the same pipe
        sys.stdout.flush()

    def midway() -> None:
        say({"midway": True})
        assert json.loads(sys.stdin.readline()) == {"go": True}

    config = json.loads(sys.argv[1])
    become(*config.pop("user", ()))
    engine = Engine(**config).connect()
    say("ready")
    held: list[Hit] = []
    while line := sys.stdin.readline():
        command = json.loads(line)
        ids = command.get("ids", [])
        match command["do"]:
            case "store":
                say(engine.store(ids))
            case "load":
                try:
                    say(engine.load(ids, **command.get("range", {})))
                except AssertionError as error:
                    say(str(error))
            case "hold":  # a lease that is never released
                hit = engine.lookup(ids)
                held += [hit] if hit else []
                say(hit.chunks if hit else 0)
            case "pause":  # the next copies stop midway
                pause_once(engine.worker._access.parts[0].copier, command["what"], midway)
                say("ok")
            case "fork":  # a child that keeps every descriptor open
                import os
                import time

                child = os.fork()
                if not child:
                    time.sleep(3600)
                say(child)
            case "hits":
                say(engine.hit_tokens(ids))
            case "close":
                engine.close()
                say("closed")


if __name__ == "__main__":
    main()
