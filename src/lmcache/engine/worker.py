"""The session of one rank of an engine: its threads copy between paged KV and extents, and never hold up the engine.

One thread loads and one stores. With a GPU a second thread loads too: it launches its copy while the copy before it runs. The
arena is mapped with the first connection, and unmapped when another server takes over and no copy runs; so a load from the mapped
arena succeeds even if the server has died meanwhile.
"""

from __future__ import annotations

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
from lmcache.engine.access import Access, ArenaAccess, Leased, Part, PayloadAccess
from lmcache.engine.connection import Connection
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import RankGroup
from lmcache.engine.hello import ask
from lmcache.engine.jobs import Done, Event, Load, Store
from lmcache.engine.session import UNKNOWN, LayoutFor, Session
from lmcache.errors import LayoutError, LMCacheError, ServerRefused, ServerUnavailable
from lmcache.memory.arena import Mapping
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.bounds import Runs
from lmcache.transfer.copier import make_copiers
from lmcache.transfer.gpu.driver import beside_captures
from lmcache.transfer.paged import PagedKV
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier

logger = init_logger(__name__)
_STEP_END_SECONDS = 0.002
"""A store waits this long after a forward, while the engine samples, fetches the token and reports it. A store that begins
at once slows down the token's copy and the threads that report it: by 0.6 ms of 51 on an H200."""
_MAX_QUEUED_STORES = 1024
_STORING = "store"
_LAST_COPY_SECONDS = 30.0
"""How long a connection to a new server waits for copies in the old server's arena, and `close` for running copies."""


class _Cancelled(LMCacheError):
    """The engine has taken away the blocks of a store that had not been copied yet."""


class WorkerSession(Session):
    """The session of one rank. `load` and `store` only enqueue jobs, `finished` returns the results. No method raises.

    Args:
        endpoint: the server's address; `instance` is the scheduler's, `rank` this rank's number.
        layout_for: the model's layout for a chunk size in tokens. While it raises IdentityUnknown this rank does not connect.
        shard: the part of every chunk that this rank holds.
        paged: this rank's paged KV.
        threads: copy threads of one job.
        stages: the layer at which each pipeline stage ends, if the model is split by layers; the same as the scheduler's.
        others: the further groups of a model with several kinds of KV; `layout_for`, `shard`, `paged`, `group`, `share`,
            `state_tokens`, `block_tokens` and `local_tokens` are those of the first one.
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
        local_tokens: int = 0,
    ) -> None:
        super().__init__(layout_for, runtime)
        self.counters: Counter[str] = Counter()
        """Counts of failed jobs and dropped chunks; a reason follows a colon."""
        self._shard, self._paged, self._threads = shard, paged, threads
        own = RankGroup(layout_for, shard, paged, group, share, state_tokens, block_tokens, tuple(stages), local_tokens)
        self._groups = (own, *others)
        self._chunk_tokens, self._arena, self._epoch = 0, b"", b""
        self._spaces: list[int] = []
        self._access: Access | None = None
        self._left_behind: Access | None = None
        """The arena that stays mapped because a copy hung when the session was closed and may still touch it."""
        lock = threading.Lock()
        self._state = runtime.condition(lock)
        self._ready = {"load": runtime.condition(lock), "store": runtime.condition(lock)}
        """One condition for each kind of job: waking the other threads too would cost a small job more than its copy."""
        self._ended = runtime.condition(lock)
        """Notified when a job has ended, and not at its steps, for the same reason."""
        self._queues: dict[Literal["load", "store"], deque[tuple[str, Load | Store]]] = {
            "load": deque(),
            "store": deque(),
        }
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
    def mapped_epoch(self) -> bytes:
        """The epoch whose arena this process has mapped, so that a load needs no server; b"" for none (payload frames)."""
        with self._state:
            return self._epoch if self._mapped() else b""

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
            self._ended.wait_for(lambda: self._done or not self._busy(), timeout_seconds)
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
        """Finish the running copies, end the queued jobs as failed, as well as all that come later, and unmap the arena.

        A copy that hangs (in a device that does not answer) is abandoned after 30 s. The arena then stays mapped, and the
        server counts the copy's extents as in use until this process has ended.
        """
        with self._state:
            self._closed = True
            self._end_queued()
            for ready in self._ready.values():
                ready.notify_all()
        until = self.runtime.now() + _LAST_COPY_SECONDS
        for thread in self._threads_running:
            thread.join(max(0.0, until - self.runtime.now()))
        hanging = [thread.name for thread in self._threads_running if thread.is_alive()]
        self._report_drops()
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
            if self._closed:
                self._end_queued()
            self._ready[kind].notify()

    def _end_queued(self) -> None:
        """End the jobs that have not begun, which no thread will take, as failed. The caller holds the lock."""
        for kind, queue in self._queues.items():
            for job_id, job in queue:
                if isinstance(job, Store):
                    self._count_drop(len(job.hashes) // HASH_BYTES, "closed")
                elif job.progress is not None:
                    job.progress.end()
                self._done.append(Done(job_id, kind, False, 0, 0.0))
            queue.clear()
        self._state.notify_all()
        self._ended.notify_all()

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
                # A rank whose layers all attend within chunks may need nothing of a hit.
                ok = tokens > 0 or (isinstance(job, Load) and not (cancelled or failed))
                self._done.append(Done(job_id, kind, ok, tokens, seconds, put_seconds))
                self._state.notify_all()
                self._ended.notify_all()
            if tokens:
                self._connection.post(m.Copied(kind, tokens, seconds, self._shard.index))
            elif isinstance(job, Load) and not ok:
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
            begin = self.runtime.now()
            parts = [one for one in enumerate((load, *load.others)) if one[1].start_token < one[1].end_token]
            for number, part in parts:
                self._load_group(access, number, part)
            end = self.runtime.now()
            begin, self._load_ended = max(begin, self._load_ended), end
            return max((part.end_token - part.start_token for _, part in parts), default=0), end - begin

    def _load_group(self, access: Access, number: int, load: Load) -> None:
        """Load one group: what other splits have stored first, since the own part reports the layers that have arrived.

        Raises:
            LMCacheError: the extents do not cover the load's tokens, or could not be copied.
        """
        own, group, blocks = access.parts[number], self._groups[number], np.asarray(load.blocks, dtype=np.int32)
        sectors = np.frombuffer(load.extents, dtype="<u4")
        runs = self._load_runs(group, load, load.first_chunk, len(sectors))
        foreign = [self._load_runs(group, load, one.first_chunk, one.chunks) for one in load.foreign]
        _check_covered(load, np.concatenate([runs, *foreign]) if foreign else runs)
        for one, others in zip(load.foreign, foreign, strict=True):
            shards = np.frombuffer(one.extents, dtype="<u4").reshape(-1, one.split.count)
            for source in access.sources(number, group, one.split, self._chunk_tokens):
                leased = Leased(load.lease, one.part, one.lease_chunk)
                access.load(source, leased, blocks, _placed(group, others, shards[:, source.shards]))
        if len(runs):
            leased = Leased(load.lease, number, load.lease_chunk)
            access.load(own.source, leased, blocks, _placed(group, runs, sectors[:, None]), load.progress)
        elif load.progress is not None:
            load.progress.arrived(len(group.paged.planes))

    def _load_runs(self, group: RankGroup, load: Load, first_chunk: int, count: int) -> Runs:
        """Return the runs of these chunks of a load, with a chunk's number among them in place of its extent."""
        chunks = np.arange(first_chunk, first_chunk + count)
        held = group.first_token(chunks, self._chunk_tokens)
        first = np.maximum(held, load.start_token)
        runs = np.empty((count, 4), dtype=np.int64)
        runs[:, 0], runs[:, 1], runs[:, 3] = chunks - first_chunk, first, first - held
        runs[:, 2] = np.minimum((chunks + 1) * self._chunk_tokens, load.end_token) - first
        filled: Runs = runs[runs[:, 2] != 0]
        return filled

    def _fetch(self, request: m.Fetch) -> list[bytes]:
        """Return the payload frames of chunks that a load has leased."""
        return self._connection.call(request, m.Ok)[1]

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
        access = self._access
        step = 1 if access is None else max(1, access.batch_bytes // access.parts[number].shard_bytes)
        step = min(step, m.MAX_RESERVED_CHUNKS)
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
        self, job_id: str, number: int, access: Access, store: Store, parent: bytes, first_chunk: int, hashes: bytes
    ) -> tuple[int, float]:
        own, size, name = self._groups[number], self._chunk_tokens, m.request_name(store.request_id)
        kept = own.kept_tokens(size)
        request = m.Reserve(self._spaces[number], own.shard.index, parent, first_chunk == 0, hashes, name)
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
        runs = np.zeros((len(wanted), 4), dtype=np.int64)
        runs[:, 0], runs[:, 1], runs[:, 2] = sectors[wanted].astype(np.int64) * SECTOR_BYTES, first, count
        blocks = np.asarray(store.blocks, dtype=np.int32)
        begin, ok = self.runtime.now(), False
        try:
            frames = self._gather(job_id, number, access, blocks, own.in_table(runs))
            if frames:
                self._connection.call(m.Fill(granted.reservation, 0), m.Ok, frames)
            ok = True
        finally:
            seconds = self.runtime.now() - begin
            self._connection.call(m.Commit(granted.reservation, ok), m.Ok)
        return int(count.sum()), seconds

    def _gather(
        self, job_id: str, number: int, access: Access, blocks: npt.NDArray[np.int32], runs: Runs
    ) -> Sequence[memoryview]:
        """As `Access.gather`.

        Raises:
            _Cancelled: the engine took the blocks away meanwhile.
        """
        with self._state:
            if job_id in self._cancelled:
                raise _Cancelled("the blocks were taken away")
            self._touching[_STORING] = job_id
        try:
            return access.gather(number, blocks, runs)
        finally:
            with self._state:
                self._touching.pop(_STORING, None)
                self._state.notify_all()

    @contextmanager
    def _using(self, thread: str, epoch: bytes | None = None) -> Iterator[Access]:
        """Give the access to this epoch's extents (None: the current ones), which is not closed meanwhile.

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
            size, spaces = welcome.chunk_tokens, []
            sizes = [one.shard_bytes(size) for one in self._groups]
            for one, shard_bytes in zip(self._groups, sizes, strict=True):
                shard = one.shard.count, one.shard.index, shard_bytes
                request = m.Register(one.layout_for(size), *shard, list(one.stages), one.group, one.share)
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
                kept = [one.kept_tokens(size) for one in self._groups]
                planes = [(one.paged, tokens) for one, tokens in zip(self._groups, kept, strict=True)]
                copiers = make_copiers(planes, self._threads, self.runtime)
                indices = [one.shard.index for one in self._groups]
                parts = list(map(Part, copiers, kept, indices, sizes))
                if descriptor < 0:
                    access = PayloadAccess(parts, self._fetch)
                else:
                    access = ArenaAccess(parts, Mapping(descriptor, welcome.arena_bytes), self.runtime)
            with self._state:
                self._spaces, self._chunk_tokens = spaces, size
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
        return self._access is not None and self._access.mapped

    def _taken_away(self) -> Access | None:
        """Detach the arena, for the caller to close without the lock. Called with it, while no copy runs; none begins later."""
        access, self._access, self._arena, self._epoch = self._access, None, b"", b""
        return access


def _check_covered(load: Load, runs: Runs) -> None:
    """Raise LayoutError unless the runs cover the load's tokens one after the other."""
    ends = runs[:, 1] + runs[:, 2]
    if not len(runs) or [*runs[:, 1], load.end_token] != [load.start_token, *ends]:
        raise LayoutError(f"{len(runs)} extents do not cover tokens {load.start_token}..{load.end_token}")


def _placed(group: RankGroup, runs: Runs, sectors: npt.NDArray[np.uint32]) -> Runs:
    """Return the runs of a load with the extents at these sectors [chunks, shards], a row for each shard."""
    placed = np.repeat(runs, sectors.shape[1], axis=0)
    placed[:, 0] = sectors[runs[:, 0]].astype(np.int64).ravel() * SECTOR_BYTES
    return group.in_table(placed)
