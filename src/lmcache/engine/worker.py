"""The session of one rank of an engine: its threads copy between paged KV and extents, and never hold up the engine.

One thread loads and one stores. With a GPU a second thread loads too: it launches its copy while the copy before it runs. The
arena is mapped with the first connection, and unmapped when another server takes over and no copy runs; so a load from the mapped
arena succeeds even if the server has died meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from lmcache.chunks import Group, Shard
from lmcache.chunks.hashing import HASH_BYTES
from lmcache.engine.access import ArenaAccess
from lmcache.engine.connection import Connection, Endpoint, ask
from lmcache.engine.groups import RankGroup
from lmcache.engine.identified import UNKNOWN, LayoutFor, is_identified
from lmcache.engine.jobs import Done, Event, Load, Store
from lmcache.engine.runtime import RUNTIME, Runtime
from lmcache.errors import LayoutError, LMCacheError, ServerRefused, ServerUnavailable
from lmcache.memory.arena import Mapping
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.observability.log import init_logger
from lmcache.transfer.bounds import Runs
from lmcache.transfer.copier import Copier, make_copier
from lmcache.transfer.gpu.driver import beside_captures
from lmcache.transfer.paged import PagedKV
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier

logger = init_logger(__name__)
_BATCH_SECONDS = 0.01
"""A store reserves, fills and commits extents in steps of about this length; a preemption waits for at most one step."""
_STEP_END_SECONDS = 0.002
"""A store waits this long after a forward, while the engine samples, fetches the token and reports it. A store that begins
at once slows down the token's copy and the threads that report it: by 0.6 ms of 51 on an H200."""
_PAYLOAD_BYTES = 64 << 20
_MAX_QUEUED_STORES = 1024
_STORING = "store"
_LAST_COPY_SECONDS = 30.0
"""How long a connection to a new server waits for copies in the old server's arena, and `close` for running copies."""


class _Cancelled(LMCacheError):
    """The engine has taken away the blocks of a store that had not been copied yet."""


class WorkerSession:
    """The session of one rank. `load` and `store` only enqueue jobs, `finished` returns the results. No method raises.

    Args:
        endpoint: the server's address; `instance` is the scheduler's, `rank` this rank's number.
        layout_for: the model's layout for a chunk size in tokens. While it raises IdentityUnknown this rank does not connect.
        shard: the part of every chunk that this rank holds.
        paged: this rank's paged KV.
        threads: copy threads of one job.
        stages: the layer at which each pipeline stage ends, if the model is split by layers; the same as the scheduler's.
        others: the further groups of a model with several kinds of KV; `layout_for`, `shard`, `paged`, `group`, `share`,
            `state_tokens` and `block_tokens` are those of the first one.
        runtime: clock and threads.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        layout_for: LayoutFor,
        shard: Shard,
        paged: PagedKV,
        threads: int = 1,
        stages: Sequence[int] = (),
        runtime: Runtime = RUNTIME,
        group: Group | None = None,
        share: float = 1.0,
        others: Sequence[RankGroup] = (),
        state_tokens: int = 0,
        block_tokens: int = 0,
    ) -> None:
        self.runtime = runtime
        self.counters: Counter[str] = Counter()
        """Counts of failed jobs and dropped chunks; a reason follows a colon."""
        self._layout_for, self._shard, self._paged, self._threads = layout_for, shard, paged, threads
        self._groups = (RankGroup(layout_for, shard, paged, group, share, state_tokens, block_tokens), *others)
        self._stages = list(stages)
        self._chunk_tokens, self._arena, self._epoch = 0, b"", b""
        self._spaces: list[int] = []
        self._shard_bytes: list[int] = []
        """Of each group."""
        self._access: ArenaAccess | None = None
        self._left_behind: ArenaAccess | None = None
        """The arena that stays mapped because a copy hung when the session was closed and may still touch it."""
        lock = threading.Lock()
        self._state = threading.Condition(lock)
        self._ready = {"load": threading.Condition(lock), "store": threading.Condition(lock)}
        """One condition for each kind of job: waking the other threads too would cost a small job more than its copy."""
        self._queues: dict[str, deque[tuple[str, Load | Store]]] = {"load": deque(), "store": deque()}
        self._running: dict[str, str] = {}
        """Thread -> id of the job whose copy may be touching memory now."""
        self._touching: dict[str, str] = {}
        """Thread -> id of the job that reads or writes paged KV at this moment."""
        self._cancelled: set[str] = set()
        self._done: deque[Done] = deque()
        self._unreported: Counter[str] = Counter()
        """Dropped chunks by reason, for the storing thread to report to the server: the engine's thread must wait neither for an
        answer nor for a thread that waits for one."""
        self._counting = threading.Lock()
        """Guards `_unreported`."""
        self._closed = False
        self._loading: dict[str, Load] = {}
        """Thread -> the load that it runs."""
        self._in_vain = b""
        """The epoch that a load has waited for in vain, so that the next load does not wait again."""
        self._load_ended = 0.0
        self._copying: set[str] = set()
        """Threads that may be touching the arena now."""
        self._connection = Connection(
            endpoint, self._register, self._before_hello, on_gone=self._let_go, runtime=runtime
        )
        works: list[tuple[Literal["load", "store"], str]] = [("load", "load"), ("store", _STORING)]
        if paged.device != "cpu":
            works.append(("load", "load-2"))
        self._threads_running = [
            runtime.start(partial(self._run, kind, thread), f"lmcache-{thread}") for kind, thread in works
        ]

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def identified(self) -> bool:
        """Whether the weights are identified. Until then this rank connects to no server, and waits for none."""
        return is_identified(self._layout_for)

    @property
    def mapped_epoch(self) -> bytes:
        """The epoch whose arena this process has mapped, so that a load needs no server; b"" for none (payload frames)."""
        with self._state:
            return self._epoch if self._mapped() else b""

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait for the first connection."""
        return self._connection.wait_connected(timeout_seconds)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """At engine start: wait for the first connection, unless no server listens or none can serve this engine. The wait for a
        server that listens and has not answered ends `seconds` (None: ten) after this session was made."""
        if self.identified:
            self._connection.wait_for_server(seconds)

    def load(self, job_id: str, load: Load) -> None:
        """Enqueue a job that fills paged KV from extents. The scheduler's lease must hold until `finished` returns the job."""
        self._enqueue("load", job_id, load)

    def store(self, job_id: str, store: Store) -> None:
        """Enqueue a job that copies chunks into extents. The blocks must stay unchanged until `finished` returns the job."""
        if len(self._queues["store"]) >= _MAX_QUEUED_STORES:
            self.drop(len(store.hashes) // HASH_BYTES, "queue full")
            self._done.append(Done(job_id, "store", False, 0, 0.0))
            return
        self._enqueue("store", job_id, store)

    def drop(self, chunks: int, reason: str) -> None:
        """Count chunks that are not stored, here and at the server, without waiting."""
        self._count_drop(chunks, reason)
        with self._state:
            self._ready["store"].notify()

    def finished(self) -> list[Done]:
        """Return the jobs that ended since the last call, without waiting."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def wait_finished(self, timeout_seconds: float) -> bool:
        """Wait until a job has ended, or no job is queued or running. Return whether `finished` will return a job."""
        with self._state:
            self._state.wait_for(lambda: self._done or not self._busy(), timeout_seconds)
        return bool(self._done)

    def wait(self, job_ids: Iterable[str], timeout_seconds: float | None = None) -> set[str]:
        """Cancel what these jobs have not copied yet, and wait until none of them touches paged KV, now or later.

        A job that waits for the server's answer does not touch paged KV. Return the jobs that still copy after the timeout.
        """
        wanted = set(job_ids)
        with self._state:
            self._cancelled |= {job for queue in self._queues.values() for job, _ in queue if job in wanted}
            self._cancelled |= wanted & set(self._running.values())
            self._state.wait_for(lambda: not wanted & set(self._touching.values()), timeout_seconds)
            return wanted & set(self._touching.values())

    def close(self) -> None:
        """Finish the running copies, drop the queued jobs, and unmap the arena.

        A copy that hangs (in a device that does not answer) is abandoned after 30 s. The arena then stays mapped, and the
        server counts the copy's extents as in use until this process has ended.
        """
        with self._state:
            self._closed = True
            for ready in self._ready.values():
                ready.notify_all()
        until = self.runtime.now() + _LAST_COPY_SECONDS
        for thread in self._threads_running:
            thread.join(max(0.0, until - self.runtime.now()))
        hanging = [thread.name for thread in self._threads_running if thread.is_alive()]
        self._connection.close(goodbye=not hanging)
        with self._state:
            access = self._taken_away()
        if hanging:
            self._left_behind = access
            logger.error(
                "%s: a copy has not ended within %g s and is left behind; check whether the engine's device answers",
                ", ".join(hanging),
                _LAST_COPY_SECONDS,
            )
        elif access is not None:
            access.close()

    # The threads that copy

    def _enqueue(self, kind: Literal["load", "store"], job_id: str, job: Load | Store) -> None:
        with self._state:
            self._queues[kind].append((job_id, job))
            self._ready[kind].notify()

    def _count_drop(self, chunks: int, reason: str) -> None:
        self.counters[f"dropped_chunks:{reason}"] += chunks
        with self._counting:
            self._unreported[reason] += chunks

    def _report_drops(self) -> None:
        with self._counting:
            unreported = dict(self._unreported)
            self._unreported.clear()
        for reason, chunks in unreported.items():
            self._connection.post(m.Dropped(chunks, reason))

    def _busy(self) -> bool:
        return bool(self._running or any(self._queues.values()))

    def _run(self, kind: Literal["load", "store"], thread: str) -> None:
        with beside_captures(self._paged.device):
            self._work(kind, thread)

    def _work(self, kind: Literal["load", "store"], thread: str) -> None:
        queue, unreported = self._queues[kind], self._unreported if kind == "store" else {}
        while True:
            if unreported:
                self._report_drops()
            with self._state:
                self._ready[kind].wait_for(lambda: queue or unreported or self._closed)
                if self._closed:
                    return
                if not queue:
                    continue
                job_id, job = queue.popleft()
                cancelled = job_id in self._cancelled
                if cancelled and isinstance(job, Store):
                    self._count_drop(len(job.hashes) // HASH_BYTES, "preempted")
                if not cancelled:
                    self._running[thread] = job_id
                    if isinstance(job, Load):
                        self._touching[thread] = job_id
                        self._loading[thread] = job
            tokens, seconds, put_seconds, failed = 0, 0.0, 0.0, True
            try:
                if not cancelled:
                    if job.after is not None:
                        self._wait_for_step(job.after, leave_end=isinstance(job, Store))
                    if isinstance(job, Load):
                        tokens, seconds = self._load(thread, job)
                    else:
                        tokens, seconds, put_seconds = self._store(job_id, job)
                failed = False
            except LMCacheError as error:
                logger.debug("A %s failed: %s", kind, error)
            except Exception:  # the edge of the thread: a bug must fail this job only and not end the thread
                logger.exception("A %s failed", kind)
            if isinstance(job, Load) and job.progress is not None:
                job.progress.end()
            with self._state:
                if failed:
                    self.counters[f"failed_{kind}s"] += 1
                self._running.pop(thread, None)
                self._touching.pop(thread, None)
                self._loading.pop(thread, None)
                self._cancelled.discard(job_id)
                self._done.append(Done(job_id, kind, tokens > 0, tokens, seconds, put_seconds))
                self._state.notify_all()
            if tokens:
                self._connection.post(m.Copied(kind, tokens, seconds, self._shard.index))
            elif isinstance(job, Load):
                self._connection.post(m.Copied(kind, job.end_token - job.start_token, 0.0, self._shard.index, ok=False))

    def _wait_for_step(self, point: Event, leave_end: bool) -> None:
        """Wait until the device has passed `point`. leave_end: if it had not yet, wait for the rest of the engine's step too."""
        passed = point.query()
        point.synchronize()
        if leave_end and not passed:
            self.runtime.sleep(_STEP_END_SECONDS)

    def _load(self, thread: str, load: Load) -> tuple[int, float]:
        """Run a load. Return the tokens loaded and the seconds of its copy, without its wait for the copy before it.

        Raises:
            LMCacheError: the load failed, and the engine must not use the blocks.
        """
        with self._using(thread, load.epoch) as access:
            begin, mapping = self.runtime.now(), access.mapping
            for number, part in enumerate((load, *load.others)):
                runs, blocks = self._load_runs(number, part), np.asarray(part.blocks, dtype=np.int32)
                copier = access.copiers[number]
                if mapping is not None:
                    copier.scatter(
                        mapping.address, blocks, runs, arena_bytes=mapping.size_bytes, progress=part.progress
                    )
                else:
                    self._fetch(number, copier, part, blocks, runs)
            end = self.runtime.now()
            begin, self._load_ended = max(begin, self._load_ended), end
            return load.end_token - load.start_token, end - begin

    def _load_runs(self, number: int, load: Load) -> Runs:
        sectors = np.frombuffer(load.extents, dtype="<u4").astype(np.int64)
        chunks = np.arange(load.first_chunk, load.first_chunk + len(sectors))
        held = self._groups[number].first_token(chunks, self._chunk_tokens)
        first = np.maximum(held, load.start_token)
        count = np.minimum((chunks + 1) * self._chunk_tokens, load.end_token) - first
        runs = np.stack([sectors * SECTOR_BYTES, first, count, first - held], axis=1)
        if len(sectors) == 0 or first[0] != load.start_token or int(count.sum()) != load.end_token - load.start_token:
            raise LayoutError(f"{len(sectors)} extents do not cover tokens {load.start_token}..{load.end_token}")
        return self._groups[number].in_table(runs[count > 0])

    def _fetch(self, number: int, copier: Copier, load: Load, blocks: npt.NDArray[np.int32], runs: Runs) -> None:
        """Load by payload frames, in messages of at most 64 MiB of chunks."""
        shard_bytes, shard = self._shard_bytes[number], self._groups[number].shard.index
        step = max(1, _PAYLOAD_BYTES // shard_bytes)
        for at in range(0, len(runs), step):
            part = runs[at : at + step].copy()
            request = m.Fetch(load.lease, shard, load.lease_chunk + at, len(part))
            _, frames = self._connection.call(request, m.Ok)
            if len(frames) != len(part) or any(len(one) != shard_bytes for one in frames):
                raise LayoutError(f"{len(frames)} payload frames for {len(part)} chunks")
            part[:, 0] = 0
            for run, one in zip(part, frames, strict=True):
                copier.scatter(np.frombuffer(one, dtype=np.uint8).ctypes.data, blocks, run[None])

    def _store(self, job_id: str, store: Store) -> tuple[int, float, float]:
        """Run a store. Return the tokens stored in the group that stored most, the seconds of the copies, and those of reserving
        and committing extents."""
        self._connection.wait_welcomed()
        if store.chunk_tokens != self._chunk_tokens:
            reason = "another chunk size" if self.identified else UNKNOWN
            self._count_drop(len(store.hashes) // HASH_BYTES, reason)
            return 0, 0.0, 0.0
        begin = self.runtime.now()
        parts = [self._store_group(job_id, number, part) for number, part in enumerate((store, *store.others))]
        tokens, seconds = max(part[0] for part in parts), sum(part[1] for part in parts)
        return tokens, seconds, self.runtime.now() - begin - seconds

    def _store_group(self, job_id: str, number: int, store: Store) -> tuple[int, float]:
        """Store the chunks of one group. Return the tokens stored, and the seconds of the copies."""
        total, tokens, seconds, parent = len(store.hashes) // HASH_BYTES, 0, 0.0, store.parent
        step = min(max(1, self._batch_bytes() // self._shard_bytes[number]), m.MAX_RESERVED_CHUNKS)
        for at in range(0, total, step):
            if job_id in self._cancelled:
                self._count_drop(total - at, "preempted")
                break
            hashes = store.hashes[at * HASH_BYTES : (at + step) * HASH_BYTES]
            try:
                with self._using(_STORING) as access:
                    batch = self._store_batch(job_id, number, access, store, parent, store.first_chunk + at, hashes)
                tokens, seconds = tokens + batch[0], seconds + batch[1]
            except _Cancelled:
                self._count_drop(total - at, "preempted")
                break
            except (ServerUnavailable, ServerRefused) as error:
                reason = "no server" if isinstance(error, ServerUnavailable) else "refused"
                self.counters[f"dropped_chunks:{reason}"] += total - at
                logger.debug("%d chunks of a store were dropped: %s", total - at, error)
                break
            parent = hashes[-HASH_BYTES:]
        return tokens, seconds

    def _store_batch(
        self,
        job_id: str,
        number: int,
        access: ArenaAccess,
        store: Store,
        parent: bytes,
        first_chunk: int,
        hashes: bytes,
    ) -> tuple[int, float]:
        own, shard_bytes, size = self._groups[number], self._shard_bytes[number], self._chunk_tokens
        copier, mapping, kept = access.copiers[number], access.mapping, own.kept_tokens(size)
        request = m.Reserve(self._spaces[number], own.shard.index, parent, first_chunk == 0, hashes, store.request_id)
        granted, _ = self._connection.call(request, m.Reserved)
        if granted.refused:
            self.counters[f"dropped_chunks:{granted.reason}"] += granted.refused
        sectors = np.frombuffer(granted.extents, dtype="<u4")
        wanted = np.flatnonzero(sectors != NO_EXTENT)
        if len(sectors) != len(hashes) // HASH_BYTES:
            raise LayoutError(f"{len(sectors)} extents for {len(hashes) // HASH_BYTES} chunks")
        if not len(wanted):
            return 0, 0.0
        first = own.first_token(first_chunk + wanted, size)
        count = np.minimum(first + kept, store.end_token or first[-1] + kept) - first
        runs = own.in_table(
            np.stack([sectors[wanted].astype(np.int64) * SECTOR_BYTES, first, count, 0 * first], axis=1)
        )
        blocks = np.asarray(store.blocks, dtype=np.int32)
        begin, ok = self.runtime.now(), False
        try:
            if mapping is not None and int(runs[:, 0].max()) + shard_bytes > mapping.size_bytes:
                raise LayoutError(f"the server gave an extent beyond the arena's {mapping.size_bytes} bytes")
            if mapping is not None and count[-1] < kept and not copier.zeroes_the_rest:
                # Tiers store the complete extent, so the rest behind an unfull chunk must not hold bytes of a former chunk.
                ctypes.memset(mapping.address + int(runs[-1, 0]), 0, shard_bytes)
            buffer = self._gather(job_id, copier, mapping, blocks, runs, shard_bytes, kept)
            if buffer is not None:
                self._connection.call(m.Fill(granted.reservation, 0), m.Ok, [row.data for row in buffer])
            ok = True
        finally:
            seconds = self.runtime.now() - begin
            self._connection.call(m.Commit(granted.reservation, ok), m.Ok)
        return int(count.sum()), seconds

    def _gather(
        self,
        job_id: str,
        copier: Copier,
        mapping: Mapping | None,
        blocks: npt.NDArray[np.int32],
        runs: Runs,
        shard_bytes: int,
        kept_tokens: int,
    ) -> npt.NDArray[np.uint8] | None:
        """Copy into the extents; without a mapping, into a returned buffer uint8 [chunk][byte of the shard].

        Raises:
            _Cancelled: the engine took the blocks away meanwhile.
        """
        with self._state:
            if job_id in self._cancelled:
                raise _Cancelled("the blocks were taken away")
            self._touching[_STORING] = job_id
        try:
            if mapping is not None:
                copier.gather(mapping.address, blocks, runs, arena_bytes=mapping.size_bytes)
                return None
            # Behind an unfull chunk an uninitialized buffer would send this process's memory to the server.
            full = bool((runs[:, 2] == kept_tokens).all())
            buffer = (np.empty if full else np.zeros)((len(runs), shard_bytes), dtype=np.uint8)
            runs[:, 0] = np.arange(len(runs)) * shard_bytes
            copier.gather(buffer.ctypes.data, blocks, runs)
            return buffer
        finally:
            with self._state:
                self._touching.pop(_STORING, None)
                self._state.notify_all()

    def _batch_bytes(self) -> int:
        access = self._access
        if access is None or access.mapping is None:
            return _PAYLOAD_BYTES
        return int(access.copiers[0].bytes_per_second * _BATCH_SECONDS)

    @contextmanager
    def _using(self, thread: str, epoch: bytes | None = None) -> Iterator[ArenaAccess]:
        """Give access to this epoch's arena (None: the current one), which stays mapped meanwhile.

        Raises:
            ServerUnavailable: this rank is not, or no longer, connected to that epoch's server.
        """
        with self._state:
            if (  # the scheduler may have found a new server before this rank
                epoch is not None
                and epoch not in (self._epoch, self._in_vain)
                and self.identified
                and not self._state.wait_for(lambda: epoch == self._epoch, self._connection.endpoint.deadline_seconds)
            ):
                self._in_vain = epoch
            if epoch not in (None, self._epoch) or self._access is None:
                raise ServerUnavailable("this rank is not connected to the server that gave the hit")
            access = self._access
            self._copying.add(thread)
        try:
            yield access
        finally:
            with self._state:
                self._copying.discard(thread)
                self._state.notify_all()

    # The connection's thread

    def _before_hello(self) -> None:
        """Wait until this session fills no extent any more, as a hello states. Without a connection no new store can begin.

        Raises:
            IdentityUnknown, ServerUnavailable: there is no layout to register yet; a copy into the arena does not end.
        """
        self._layout_for(1)
        with self._state:
            if not self._state.wait_for(lambda: _STORING not in self._copying, _LAST_COPY_SECONDS):
                raise ServerUnavailable("a copy into the arena does not end")

    def _may_unmap(self) -> bool:
        """Return whether no copy runs, and no load waits for the arena that is mapped now."""
        loads = [job for _, job in self._queues["load"] if isinstance(job, Load)]
        loads += self._loading.values()
        return not self._copying and not any(load.epoch == self._epoch for load in loads)

    def _register(self, carrier: Carrier, welcome: m.Welcome, descriptor: int) -> None:
        """Map the new arena once no copy runs in the old one, and register this rank's part of the layout."""
        try:
            size = welcome.chunk_tokens
            shard_bytes = [one.shard_bytes(size) for one in self._groups]
            spaces = []
            for one, own_bytes in zip(self._groups, shard_bytes, strict=True):
                shard = one.shard.count, one.shard.index, own_bytes
                request = m.Register(one.layout_for(size), *shard, self._stages, one.group, one.share)
                spaces.append(ask(carrier, request, m.Registered).space)
            with self._state:
                known = welcome.arena == self._arena and (descriptor < 0 or self._mapped())
                if not known and not self._state.wait_for(self._may_unmap, _LAST_COPY_SECONDS) and self._copying:
                    raise ServerUnavailable("a copy in the old arena does not end")
                access = self._access if known else self._taken_away()
            if not known:
                # Not under the lock, which the engine's thread takes: unpinning memory takes seconds.
                if access is not None:
                    access.close()
                copiers = [make_copier(one.paged, one.kept_tokens(size), self._threads) for one in self._groups]
                access = ArenaAccess(copiers, welcome, descriptor, self.runtime)
            with self._state:
                self._spaces, self._chunk_tokens, self._shard_bytes = spaces, size, shard_bytes
                self._access, self._arena, self._epoch = access, welcome.arena, welcome.holds_for
                self._state.notify_all()
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _let_go(self) -> None:
        """Unmap the arena of a server that has ended, unless a copy or a load still needs it. Its memory is freed only then, and
        the next server may need it."""
        with self._state:
            access = self._taken_away() if self._mapped() and self._may_unmap() else None
        if access is not None:
            access.close()
            logger.info("Unmapped the memory of the LMCache server that has ended")

    def _mapped(self) -> bool:
        return self._access is not None and self._access.mapping is not None

    def _taken_away(self) -> ArenaAccess | None:
        """Detach the arena, for the caller to close without the lock. Called with it, while no copy runs; none begins later."""
        access, self._access, self._arena, self._epoch = self._access, None, b"", b""
        return access
