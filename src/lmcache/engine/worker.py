"""The session of one rank of an engine: it copies between paged KV and extents, and never holds up the engine.

The arena is mapped with the first connection, and unmapped when another server takes over and no copy runs; so a load from the
mapped arena succeeds even if the server has died meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from lmcache.chunks.hashing import HASH_BYTES
from lmcache.engine.access import Access, ArenaAccess, Part, PayloadAccess
from lmcache.engine.connection import GONE_SECONDS, Connection
from lmcache.engine.copy_threads import STORING, Cancelled, CopyThreads, Outcome
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import RankGroup, refuse_unrounded
from lmcache.engine.hello import ask
from lmcache.engine.jobs import Load, Store
from lmcache.engine.runs import load_group, store_runs
from lmcache.engine.session import UNKNOWN
from lmcache.errors import ServerRefused, ServerUnavailable, Unroundable
from lmcache.memory.arena import Mapping
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.copier import make_copiers
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier

logger = init_logger(__name__)
_LAST_COPY_SECONDS = 30.0
"""How long a connection to a new server waits for copies in the old server's arena, and `close` for running copies."""


class WorkerSession(CopyThreads):
    """The session of one rank. No method raises.

    Args:
        endpoint: the server's address; `instance` is the scheduler's, `rank` this rank's number.
        groups: what this rank holds: one, or several of a model with several kinds of KV. While the first one's `layout_for`
            raises IdentityUnknown this rank does not connect.
        threads: copy threads of one job.
        runtime: clock and threads.
    """

    def __init__(self, endpoint: Endpoint, *groups: RankGroup, threads: int = 1, runtime: Runtime = RUNTIME) -> None:
        first = groups[0]
        super().__init__(first.layout_for, runtime, first.paged.device, first.shard.index)
        self._groups, self._copy_threads = groups, threads
        self._chunk_tokens, self._arena, self._epoch = 0, b"", b""
        self._spaces: list[int] = []
        self._access: Access | None = None
        self._left_behind: Access | None = None
        """The arena that stays mapped because a copy hung when the session was closed and may still touch it."""
        self._in_vain = b""
        """The epoch that a load has waited for in vain, so that the next load does not wait again."""
        self._counted_on = self._leaving = False
        """Whether a scheduler may plan loads that must not fail from the mapped arena; whether that is about to be unmapped."""
        self._load_ended = 0.0
        self._copying: set[str] = set()
        """Threads that may be touching the arena now."""
        self._connection = Connection(
            endpoint, self._register, self._before_hello, on_gone=self._let_go, runtime=runtime
        )
        self._start()

    @property
    def mapped_epoch(self) -> bytes:
        """The epoch whose arena this process has mapped, so that a load needs no server; b"" for none (payload frames), and while
        another server takes over."""
        with self._state:
            return self._stays()

    def count_on_arena(self) -> bytes:
        """Return the `mapped_epoch`. Until `count_on_nothing`, its arena stays mapped when another server takes over, for at most
        `GONE_SECONDS`: loads from it may have been planned that have not begun."""
        with self._state:
            self._counted_on |= bool(self._stays())
            return self._stays()

    def count_on_nothing(self) -> None:
        """Let the arena be unmapped when another server takes over."""
        with self._state:
            self._counted_on = False
            self._state.notify_all()

    def close(self) -> None:
        """Finish the running copies, end the queued jobs as failed, as well as all that come later, and unmap the arena.

        A copy that hangs (in a device that does not answer) is abandoned after 30 s. The arena then stays mapped, and the
        server counts the copy's extents as in use until this process has ended.
        """
        hanging = self._end_jobs(_LAST_COPY_SECONDS)
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

    # Jobs, in the threads that copy

    def _run_load(self, thread: str, load: Load) -> Outcome:
        with self._using(thread, load.epoch) as access:
            begin = self.runtime.now()
            parts = [one for one in enumerate((load, *load.others)) if one[1].start_token < one[1].end_token]
            for number, part in parts:
                load_group(access, number, self._groups[number], part, self._chunk_tokens)
            end = self.runtime.now()
            begin, self._load_ended = max(begin, self._load_ended), end
            return Outcome(max((part.end_token - part.start_token for _, part in parts), default=0), end - begin)

    def _fetch(self, request: m.Fetch) -> list[bytes]:
        """Return the payload frames of chunks that a load has leased."""
        return self._connection.call(request, m.Ok)[1]

    def _run_store(self, job_id: str, store: Store) -> Outcome:
        self._connection.wait_welcomed()
        if store.chunk_tokens != self._chunk_tokens:
            reason = "another chunk size" if self.identified else UNKNOWN
            self._count_drop(len(store.hashes) // HASH_BYTES, reason)
            return Outcome()
        begin = self.runtime.now()
        parts = [self._store_group(job_id, number, part) for number, part in enumerate((store, *store.others))]
        tokens, seconds = max(part[0] for part in parts), sum(part[1] for part in parts)
        return Outcome(tokens, seconds, self.runtime.now() - begin - seconds)

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
                with self._using(STORING) as access:
                    batch = self._store_batch(job_id, number, access, store, parent, store.first_chunk + at, hashes)
                tokens, seconds = tokens + batch[0], seconds + batch[1]
            except Cancelled:
                self._count_drop(total - at, "preempted")
                break
            except Unroundable as error:
                self._count_drop(total - at, "not finite")
                logger.debug("%d chunks of a store were dropped: %s", total - at, error)
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
        own, name = self._groups[number], m.request_name(store.request_id)
        request = m.Reserve(self._spaces[number], own.shard.index, parent, first_chunk == 0, hashes, name)
        granted, _ = self._connection.call(request, m.Reserved)
        if granted.refused:
            self.counters[f"dropped_chunks:{granted.reason}"] += granted.refused
        chunks = len(hashes) // HASH_BYTES
        runs, tokens = store_runs(own, store, first_chunk, chunks, granted.extents, self._chunk_tokens)
        if not len(runs):
            return 0, 0.0
        blocks = np.asarray(store.blocks, dtype=np.int32)
        begin, ok = self.runtime.now(), False
        try:
            with self._touching_blocks(job_id):
                frames = access.gather(number, blocks, runs)
            if frames:
                self._connection.call(m.Fill(granted.reservation, 0), m.Ok, frames)
            ok = True
        finally:
            seconds = self.runtime.now() - begin
            self._connection.call(m.Commit(granted.reservation, ok), m.Ok)
        return tokens, seconds

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
            if not self._state.wait_for(lambda: STORING not in self._copying, _LAST_COPY_SECONDS):
                raise ServerUnavailable("a copy into the arena does not end")

    def _may_unmap(self) -> bool:
        """Return whether no copy runs, and no load waits for the arena that is mapped now."""
        return not self._copying and not any(load.epoch == self._epoch for load in self._loads())

    def _register(self, carrier: Carrier, welcome: m.Welcome, descriptor: int) -> None:
        """Map the new arena once no copy runs in the old one, and register this rank's part of the layout."""
        try:
            size, spaces = welcome.chunk_tokens, []
            sizes = [one.shard_bytes(size) for one in self._groups]  # first: it names chunks that do not fit the groups
            refuse_unrounded([one.layout_for(size) for one in self._groups])
            for one, shard_bytes in zip(self._groups, sizes, strict=True):
                request = one.shape.registration(size, one.shard.index, shard_bytes)
                spaces.append(ask(carrier, request, m.Registered).space)
            with self._state:
                known = welcome.arena == self._arena and (descriptor < 0 or self._mapped())
                self._leaving = not known
                if self._leaving:
                    self._state.wait_for(lambda: not self._counted_on or self._closed, GONE_SECONDS)
                if not known and not self._state.wait_for(self._may_unmap, _LAST_COPY_SECONDS) and self._copying:
                    raise ServerUnavailable("a copy in the old arena does not end")
                access = self._access if known else self._taken_away()
            if not known:
                # Not under the lock, which the engine's thread takes: unpinning memory takes seconds.
                if access is not None:
                    access.close()
                access = self._new_access(welcome, descriptor, sizes)
            with self._state:
                self._spaces, self._chunk_tokens = spaces, size
                self._access, self._arena, self._epoch = access, welcome.arena, welcome.holds_for
                self._state.notify_all()
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _new_access(self, welcome: m.Welcome, descriptor: int, sizes: Sequence[int]) -> Access:
        """Map the arena, or prepare for payload frames without a descriptor. sizes: bytes of an extent of each group."""
        kept = [one.kept_tokens(welcome.chunk_tokens) for one in self._groups]
        planes = [(one.stored(welcome.chunk_tokens), tokens) for one, tokens in zip(self._groups, kept, strict=True)]
        copiers = make_copiers(planes, self._copy_threads, self.runtime)
        parts = list(map(Part, copiers, kept, [one.shard.index for one in self._groups], sizes))
        if descriptor < 0:
            return PayloadAccess(parts, self._fetch)
        return ArenaAccess(parts, Mapping(descriptor, welcome.arena_bytes, welcome.huge_pages), self.runtime)

    def _let_go(self) -> None:
        """Unmap the arena of a server that has ended, unless a copy or a load still needs it. Its memory is freed only then, and
        the next server may need it."""
        with self._state:
            access = self._taken_away() if self._mapped() and self._may_unmap() else None
        if access is not None:
            access.close()
            logger.info("Unmapped the memory of the LMCache server that has ended")

    def _stays(self) -> bytes:
        return self._epoch if self._mapped() and not self._leaving else b""

    def _mapped(self) -> bool:
        return self._access is not None and self._access.mapped

    def _taken_away(self) -> Access | None:
        """Detach the arena, for the caller to close without the lock. Called with it, while no copy runs; none begins later."""
        access, self._access, self._arena, self._epoch = self._access, None, b"", b""
        self._counted_on = self._leaving = False
        return access
