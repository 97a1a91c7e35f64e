"""The threads of a rank that run its jobs: their queues, what is cancelled, and the counts of what was dropped.

One thread loads and one stores. With a GPU a second thread loads too: it launches its copy while the copy before it runs.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

from lmcache.chunks.hashing import HASH_BYTES
from lmcache.engine.jobs import Done, Event, Load, Store
from lmcache.engine.session import LayoutFor, Session
from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger
from lmcache.runtime import Runtime
from lmcache.transfer.gpu.driver import beside_captures
from lmcache.wire import messages as m

logger = init_logger(__name__)
_STEP_END_SECONDS = 0.002
"""A store waits this long after a forward, while the engine samples, fetches the token and reports it. A store that begins
at once slows down the token's copy and the threads that report it: by 0.6 ms of 51 on an H200."""
_MAX_QUEUED_STORES = 1024
STORING = "store"
"""The thread that stores."""
Kind = Literal["load", "store"]


class Cancelled(LMCacheError):
    """The engine has taken away the blocks of a store that had not been copied yet."""


class Outcome(NamedTuple):
    """What a job has copied. seconds, put_seconds: as in `Done`."""

    tokens: int = 0
    seconds: float = 0.0
    put_seconds: float = 0.0


class CopyThreads(Session):
    """A session that runs jobs in threads: `load` and `store` only enqueue jobs, `finished` returns the results. No public method
    raises. A subclass copies, and calls `_start` when it is ready for that.

    device: on which the paged KV is. shard: the number of the rank's shard, for reports.
    """

    def __init__(self, layout_for: LayoutFor, runtime: Runtime, device: str, shard: int) -> None:
        super().__init__(layout_for, runtime)
        self._device, self._shard_index = device, shard
        self.counters: Counter[str] = Counter()
        """Counts of failed jobs and dropped chunks; a reason follows a colon."""
        lock = threading.Lock()
        self._state = runtime.condition(lock)
        self._ready = {"load": runtime.condition(lock), "store": runtime.condition(lock)}
        """One condition for each kind of job: waking the other threads too would cost a small job more than its copy."""
        self._ended = runtime.condition(lock)
        """Notified when a job has ended, and not at its steps, for the same reason."""
        self._queues: dict[Kind, deque[tuple[str, Load | Store]]] = {"load": deque(), "store": deque()}
        self._running: dict[str, str] = {}
        """Thread -> id of the job whose copy may be touching memory now."""
        self._touching: dict[str, str] = {}
        """Thread -> id of the job that reads or writes paged KV at this moment."""
        self._loading: dict[str, Load] = {}
        """Thread -> the load that it runs."""
        self._cancelled: set[str] = set()
        self._done: deque[Done] = deque()
        self._unreported: Counter[str] = Counter()
        """Dropped chunks by reason, for the storing thread to report to the server: the engine's thread must wait neither for an
        answer nor for a thread that waits for one."""
        self._counting = threading.Lock()
        """Guards `_unreported`."""
        self._closed = False
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        works: list[tuple[Kind, str]] = [("load", "load"), ("store", STORING)]
        if self._device != "cpu":
            works.append(("load", "load-2"))
        self._threads = [
            self.runtime.start(partial(self._run, kind, thread), f"lmcache-{thread}") for kind, thread in works
        ]

    def _run_load(self, thread: str, load: Load) -> Outcome:
        """Run a load. The seconds are those of its copy, without its wait for the copy before it.

        Raises:
            LMCacheError: the load failed, and the engine must not use the blocks.
        """
        raise NotImplementedError

    def _run_store(self, job_id: str, store: Store) -> Outcome:
        """Run a store. The tokens are those of the group that stored most; `put_seconds` is as in `Done`.

        Raises:
            LMCacheError: the store failed.
        """
        raise NotImplementedError

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

    def _enqueue(self, kind: Kind, job_id: str, job: Load | Store) -> None:
        with self._state:
            self._queues[kind].append((job_id, job))
            if self._closed:
                self._end_queued()
            self._ready[kind].notify()

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

    def _loads(self) -> list[Load]:
        """Return the loads that are queued or running. The caller holds the lock."""
        return [job for _, job in self._queues["load"] if isinstance(job, Load)] + list(self._loading.values())

    @contextmanager
    def _touching_blocks(self, job_id: str) -> Iterator[None]:
        """Mark the time in which the storing thread reads the paged KV of this job.

        Raises:
            Cancelled: the engine has taken the blocks away.
        """
        with self._state:
            if job_id in self._cancelled:
                raise Cancelled("the blocks were taken away")
            self._touching[STORING] = job_id
        try:
            yield
        finally:
            with self._state:
                self._touching.pop(STORING, None)
                self._state.notify_all()

    def _end_jobs(self, seconds: float) -> list[str]:
        """End the queued jobs as failed, as well as all that come later, and wait for those that run. Return the names of the
        threads that have not ended in this time."""
        with self._state:
            self._closed = True
            self._end_queued()
            for ready in self._ready.values():
                ready.notify_all()
        until = self.runtime.now() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - self.runtime.now()))
        return [thread.name for thread in self._threads if thread.is_alive()]

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

    # The threads

    def _busy(self) -> bool:
        return bool(self._running or any(self._queues.values()))

    def _run(self, kind: Kind, thread: str) -> None:
        with beside_captures(self._device):
            while (taken := self._take(kind, thread)) is not None:
                self._carry_out(kind, thread, *taken)

    def _take(self, kind: Kind, thread: str) -> tuple[str, Load | Store, bool] | None:
        """Wait for a job of this kind. Return its id, the job, and whether it is cancelled; None once this object is closed."""
        queue, unreported = self._queues[kind], self._unreported if kind == "store" else {}
        while True:
            if unreported:
                self._report_drops()
            with self._state:
                self._ready[kind].wait_for(lambda: queue or unreported or self._closed)
                if self._closed:
                    return None
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
                return job_id, job, cancelled

    def _carry_out(self, kind: Kind, thread: str, job_id: str, job: Load | Store, cancelled: bool) -> None:
        copied, failed = Outcome(), True
        try:
            if not cancelled:
                if job.after is not None:
                    self._wait_for_step(job.after, leave_end=isinstance(job, Store))
                copied = self._run_load(thread, job) if isinstance(job, Load) else self._run_store(job_id, job)
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
            ok = copied.tokens > 0 or (isinstance(job, Load) and not (cancelled or failed))
            self._done.append(Done(job_id, kind, ok, *copied))
            self._state.notify_all()
            self._ended.notify_all()
        if copied.tokens:
            name = m.request_name(job.request_id)
            self._connection.post(m.Copied(kind, copied.tokens, copied.seconds, self._shard_index, request=name))
        elif isinstance(job, Load) and not ok:
            tokens, name = job.end_token - job.start_token, m.request_name(job.request_id)
            self._connection.post(m.Copied(kind, tokens, 0.0, self._shard_index, ok=False, request=name))

    def _wait_for_step(self, point: Event, leave_end: bool) -> None:
        """Wait until the device has passed `point`. leave_end: if it had not yet, wait for the rest of the engine's step too."""
        passed = point.query()
        point.synchronize()
        if leave_end and not passed:
            self.runtime.sleep(_STEP_END_SECONDS)
