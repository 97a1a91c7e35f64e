"""`disk:///var/lib/lmcache?max_gb=200`: a directory on a local disk, which one server uses alone.

Segments hold the frames (`segments`, `frame_io`, `reads`), a journal records their places (`journal`), and an index of the
journal is in memory (`shard_index`). The order of writes makes a crash safe at any point: a frame is written before the journal
records it and acknowledged after that; an eviction is in the journal before its blocks are freed. Space is counted before it is
used.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from lmcache.config.options import GIB, word
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers import frame
from lmcache.tiers.disk.folder import can_be_direct, part_of_free, take_folder
from lmcache.tiers.disk.journal import PUT, REMOVE, STEP_BYTES, USE, Journal, places
from lmcache.tiers.disk.reads import LANES, Hit, Reader
from lmcache.tiers.disk.segments import (
    Run,
    Segments,
    cost_of,
    cost_of_reuse,
    frame_bytes,
    is_large,
    offset_of,
)
from lmcache.tiers.disk.shard_index import MAX_PAYLOAD_BYTES, RECORD, ShardIndex, tag_of
from lmcache.tiers.disk.stripes import StripedTier
from lmcache.tiers.filesystem import BLOCK_BYTES, FULL, Filesystem, blocks, named_errors, tier_error
from lmcache.tiers.frame_io import UNREADABLE, Found, FrameIO, groups_to_write
from lmcache.tiers.threads import started_pool
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

NO_ROOM, TOO_LARGE = "full", "too large"
"""Outcomes of a store: no space could be freed; the shard would not fit into an empty tier."""
_FIXED_BYTES = 4 * BLOCK_BYTES
"""Bytes of the directory and the lock file."""
_SEGMENT_BYTES = (1 << 20, 1 << 30)
"""Bounds of a segment's size, which is otherwise 1/64 of the cap."""
_SUMS = 4
"""Threads that compute checksums."""
_ENTRY_RECORDS = 1024
"""The most removals or uses in one entry of the journal, which must fit into the space that is allocated ahead."""
_KEPT_RANGES, _NEARLY_FULL = 256, 7 / 8
"""A nearly full tier keeps so many ranges for its next stores. Each reservation looks at all of them."""
_PAUSE_SECONDS = 2.0
"""How long no more shards are dropped after the file system was full although older shards had been dropped."""
log = init_logger(__name__)


class DiskTier(Tier):
    """Stores shards on a local disk, for one process at a time (which a lock enforces) and any number of its threads."""

    scheme = "disk"
    codecs = True

    def __init__(
        self,
        path: Path,
        max_bytes: int | None,
        io: str = "auto",
        secret: bytes = b"",
        filesystem: Filesystem | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        """max_bytes: the cap, None for 90 % of the file system's free space. io: auto, direct or buffered."""
        self._path, self._asked_bytes, self._mode, self._secret = path, max_bytes, io, secret
        self._where = f"disk://{path}"
        self._filesystem = filesystem or Filesystem()
        self._runtime, self._now = runtime, runtime.now
        self._life = threading.Lock()
        self._lock = threading.Lock()
        """Protects the index, the journal and the accounting of segments. Nothing that may wait for the device runs under it,
        except writes of the journal, which go through the page cache."""
        self._punching = threading.Lock()
        self._idle = runtime.condition(self._lock)
        self._calls = 0
        self._opened = self._alone = False
        self._closing = ExitStack()
        self._index = ShardIndex()
        self._max_bytes = max_bytes or 0
        self._compact_above = 0
        self._full_until = 0.0

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        folders = url.folders("/var/lib/lmcache")
        most, io = url.take_max_bytes(), url.take("io", word("auto", "direct", "buffered"), "auto")
        secret = url.take_frame_key()
        share = most // len(folders) if most else None
        parts = [(path, cls(path, share, io, secret, runtime=url.runtime)) for path in folders]
        return StripedTier(parts, url.runtime) if len(parts) > 1 else parts[0][1]

    # ---- the protocol

    def open(self) -> None:
        with self._life:
            if self._opened:
                return
            try:
                with named_errors(self._where):
                    self._mount()
            except TierError:
                self._closing.close()
                raise
            self._opened = True

    def known(self, keys: Sequence[ShardKey]) -> list[bool]:
        return [bool(self._index.find(key.packed)) for key in keys]

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return self.known(keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        with self._call():
            outcomes = [ABSENT] * len(keys)
            hits: list[Hit] = []
            with self._lock:
                for number, (key, buffer) in enumerate(zip(keys, into, strict=True)):
                    row = self._index.find(key.packed)
                    if not row:
                        continue
                    place = self._index.place(row)
                    stored = self._index.payload(row)
                    segment = self._segments[place]
                    hits.append(Hit(number, Found(place, key, buffer, stored), segment, segment.reuses))
                    if stored > buffer.nbytes:  # fewer bytes may be encoded, as their header then says
                        outcomes[number] = frame.OTHER_SIZE
            readable = [hit for hit in hits if outcomes[hit.number] != frame.OTHER_SIZE]
            failed: list[OSError] = []
            for number, outcome in self._reader.read(readable, self.decoded):
                if isinstance(outcome, OSError):
                    failed.append(outcome)
                    outcome = UNREADABLE
                outcomes[number] = outcome
            if failed and len(failed) == len(hits):
                raise tier_error(self._where, failed[0]) from failed[0]  # all reads failed, so the device is in trouble
            self._after_load(hits, outcomes)
            return outcomes

    def store(self, shards: Sequence[Shard]) -> list[str]:
        with self._call():
            outcomes = [KEPT] * len(shards)
            wanted: dict[bool, list[int]] = {True: [], False: []}
            seen: set[ShardKey] = set()
            again: list[int] = []
            with self._lock:
                kept: list[int] = []
                for number, shard in enumerate(shards):
                    size = shard.payload.nbytes
                    row = self._index.find(shard.key.packed)
                    if shard.key in seen:
                        again.append(number)
                    elif row and shard.is_kept(self._index.payload(row)):
                        kept.append(row)
                    elif size > MAX_PAYLOAD_BYTES or cost_of([size]) > self._largest_bytes():
                        outcomes[number] = TOO_LARGE
                    else:
                        seen.add(shard.key)
                        wanted[is_large(size)].append(number)
                self._use(kept)
            for numbers in wanted.values():
                for group in groups_to_write(numbers, shards):
                    said = self._store_group([shards[number] for number in group])
                    for number, outcome in zip(group, said, strict=True):
                        outcomes[number] = outcome
            if self._segments.freed_bytes and not self._keeps_freed():
                with named_errors(self._where):
                    self._give_back()
        if again:
            for number, outcome in zip(again, self.store([shards[number] for number in again]), strict=True):
                outcomes[number] = outcome
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        with self._call(), named_errors(self._where):
            with self._lock:
                self._drop({row for row in (self._index.find(key.packed) for key in keys) if row})
            self._give_back()

    def clear(self) -> None:
        with self._call(alone=True), named_errors(self._where):
            with self._lock:
                self._journal.restart(ShardIndex().records(), self._segments.next_number)
                self._index = ShardIndex()
                self._compact_above = 0
                self._segments.drop_all()
            self._give_back()

    def usage(self) -> Usage:
        """Return the usage. `stored_bytes`: the blocks of all frames and the most that the index may take during a rewrite."""
        return Usage(self._used() if self._opened else 0, len(self._index), self._max_bytes or None)

    def close(self) -> None:
        with self._life:
            with self._lock:
                if not self._opened:
                    return
                self._opened = False
                while self._calls:
                    self._idle.wait()
            try:
                self._compact()
            except OSError as error:
                log.warning("%s: could not rewrite the index at its end: %s", self._where, error.strerror)
            self._index = ShardIndex()
            self._closing.close()

    # ---- opening and calls

    def _mount(self) -> None:
        self._closing.callback(os.close, take_folder(self._filesystem, self._path, self._where))
        sums = started_pool(self._runtime, _SUMS, "lmcache-disk-sum")
        self._closing.callback(sums.shutdown)
        readers = started_pool(self._runtime, LANES, "lmcache-disk-read")
        self._closing.callback(readers.shutdown)
        direct = can_be_direct(self._filesystem, self._path, self._where, self._mode)
        self._io = FrameIO(self._filesystem, self._secret, sums, direct)
        self._max_bytes = self._asked_bytes or part_of_free(self._path)
        low, high = _SEGMENT_BYTES
        size = blocks(min(high, max(low, self._max_bytes // 64)))
        self._segments = Segments(self._filesystem, self._path, size, os.O_RDWR | (os.O_DIRECT if direct else 0))
        self._closing.callback(self._segments.close)
        self._reader = Reader(self._segments, self._io, readers)
        self._journal = Journal(self._filesystem, self._path)
        self._closing.callback(self._journal.close)
        records, next_segment = self._journal.open()
        self._segments.mount(records, next_segment)
        self._index = ShardIndex(records)
        self._compact_above = 0
        self._compact_when_due()
        while self._used() > self._max_bytes and self._evict(self._used() - self._max_bytes):
            self._give_back()  # max_gb is lower than at the last start
        log.info(
            "%s: %d shards, %.2f of %.2f GiB, %s I/O",
            self._where,
            len(self._index),
            self._used() / GIB,
            self._max_bytes / GIB,
            "direct" if direct else "buffered",
        )

    @contextmanager
    def _call(self, alone: bool = False) -> Iterator[None]:
        """Keep the tier open during one call; with `alone`, no other call may run beside it. Raises TierError when closed."""
        with self._lock:
            while self._alone or (alone and self._calls and self._opened):
                self._idle.wait()
            if not self._opened:
                raise TierError("closed", f"{self._where}: it is not open")
            self._calls += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._alone = False
                self._idle.notify_all()

    # ---- space

    def _used(self) -> int:
        return self._segments.bytes + self._index_bytes(len(self._index)) + _FIXED_BYTES

    def _largest_bytes(self) -> int:
        """Return the bytes available for one shard in an empty tier."""
        return self._max_bytes - _FIXED_BYTES - self._index_bytes(1)

    def _index_bytes(self, shards: int) -> int:
        """Return the most bytes of the journal with so many shards, including the new one that is written beside it."""
        snapshot = shards * RECORD.itemsize + BLOCK_BYTES
        return snapshot + max(self._journal_limit(shards), self._compact_above) + 3 * STEP_BYTES

    def _journal_limit(self, shards: int) -> int:
        snapshot = shards * RECORD.itemsize + BLOCK_BYTES
        return snapshot + snapshot // 2 + self._slack()

    def _slack(self) -> int:
        return max(STEP_BYTES, min(1 << 20, self._max_bytes // 64))

    def _compact_when_due(self) -> None:
        if self._journal.end <= max(self._compact_above, self._journal_limit(len(self._index))):
            return
        try:
            self._compact()
        except OSError as error:
            self._compact_above = self._journal.end + self._slack()
            log.warning("%s: could not rewrite the index, will try again: %s", self._where, error.strerror)

    def _compact(self) -> None:
        self._journal.restart(self._index.records(), self._segments.next_number)
        self._compact_above = 0

    def _evict(self, wanted_bytes: int) -> bool:
        """Drop shards in the order of eviction until so much can be given back; False when there is nothing to drop."""
        rows: list[int] = []
        freed = 0
        for row in itertools.islice(self._index.order, _ENTRY_RECORDS):
            if freed >= wanted_bytes:
                break
            rows.append(row)
            freed += frame_bytes(self._index.payload(row))
        self._drop(rows)
        return bool(rows)

    def _drop(self, rows: Iterable[int]) -> None:
        """Record removals in the journal, then free the places. `_give_back` returns their blocks to the file system."""
        for some in _parts(list(rows)):
            self._journal.append((REMOVE, places([self._index.place(row) for row in some])))
            if (dropped := self.dropped) is not None:
                dropped([ShardKey.unpack(self._index.key(row)) for row in some])
            for row in some:
                self._segments.free(self._index.place(row), self._index.payload(row))
                self._index.remove(row)
            self._compact_when_due()

    def _use(self, rows: Iterable[int]) -> None:
        """Mark shards as used now. A journal that cannot be written does not fail the call: a restart forgets the use."""
        for some in _parts(list(rows)):
            self._index.order.touched(some)
            try:
                self._journal.append((USE, places([self._index.place(row) for row in some])))
            except OSError as error:
                log.debug("%s: could not record the order of use: %s", self._where, error.strerror)
            self._compact_when_due()

    def _give_back(self) -> None:
        """Return the blocks of dropped shards to the file system. Must not be called with the lock held. Raises OSError."""
        with self._punching:
            with self._lock:
                pending = self._segments.take_pending()
            for number, freed in enumerate(pending):
                segment = freed.segment
                with self._lock:
                    spent = self._segments.claim_spent(segment)
                try:
                    if spent:
                        self._segments.delete(segment)
                        with self._lock:
                            self._segments.forget(segment)
                    elif not segment.gone:
                        self._segments.punch(freed)
                        with self._lock:
                            self._segments.settle(freed)
                except OSError:
                    with self._lock:
                        self._segments.put_back(pending[number:])
                    raise

    # ---- storing

    def _store_group(self, shards: list[Shard]) -> list[str]:
        payloads = [shard.payload.nbytes for shard in shards]
        for first in (True, False):
            with named_errors(self._where):
                runs = self._reserve(payloads)
            if not runs:
                break
            found = [place for run in runs for place in run.places]
            try:
                self._write(runs, shards)
                with self._lock:
                    return self._commit(shards, found)
            except OSError as error:
                full = error.errno in FULL
                with named_errors(self._where):
                    self._undo(found, payloads, make_room=full and first)
                if not full:
                    raise tier_error(self._where, error) from error
        else:
            self._full_until = self._now() + _PAUSE_SECONDS
            return [NO_ROOM] * len(shards)
        if len(shards) == 1 or self._now() < self._full_until:
            return [NO_ROOM] * len(shards)
        half = len(shards) // 2
        return self._store_group(shards[:half]) + self._store_group(shards[half:])

    def _write(self, runs: list[Run], shards: list[Shard]) -> None:
        """Write shards to the places that were reserved for them. Raises OSError."""
        write = self._io.write_large if is_large(shards[0].payload.nbytes) else self._io.write_packed
        first = 0
        for segment, some in runs:
            handle = self._segments.open_handle(segment, create=True)
            write(handle.fd, offset_of(some[0]), shards[first : first + len(some)])
            first += len(some)

    def _reserve(self, payloads: list[int]) -> list[Run]:
        """Count and take space for the payloads, evicting for it; return [] where that fails. Raises OSError."""
        while True:
            with self._lock:
                if self._now() < self._full_until:
                    return []
                runs, over = self._take_space(payloads)
                if runs:
                    return runs
                more = over - self._segments.freed_bytes
                if more > 0 and not self._evict(max(more, self._slack() // 4)) and not self._segments.freed_bytes:
                    return []
                runs, _ = self._take_space(payloads)
                if runs:
                    return runs
            self._give_back()

    def _keeps_freed(self) -> bool:
        """Return whether freed blocks stay allocated, because the next stores will need as many."""
        return self._segments.pending_ranges <= _KEPT_RANGES and self._used() > _NEARLY_FULL * self._max_bytes

    def _take_space(self, payloads: list[int]) -> tuple[list[Run], int]:
        """Take freed space, else new space below the cap. Where there is neither, return [] and how many bytes are missing."""
        count = len(self._index)
        index = self._index_bytes(count + len(payloads)) - self._index_bytes(count)
        room = self._max_bytes - self._used() - index
        runs = self._segments.reserve_freed(payloads) if room >= cost_of_reuse(len(payloads)) else []
        cost = cost_of(payloads)
        if not runs and room >= cost:
            runs = [self._segments.reserve(payloads)]
        return runs, cost - room

    def _commit(self, shards: list[Shard], found: list[int]) -> list[str]:
        """Record written shards in the journal and index them. Raises OSError, after which nothing has changed."""
        outcomes: list[str] = []
        spare: list[tuple[bytes, int, int]] = []
        puts: list[tuple[bytes, int, int]] = []
        for shard, place in zip(shards, found, strict=True):
            key, size = shard.key.packed, shard.payload.nbytes
            row = self._index.find(key)
            kept = bool(row) and shard.is_kept(self._index.payload(row))  # another call has stored it meanwhile
            outcomes.append(KEPT if kept else OK)
            (spare if kept else puts).append((key, size, place))
        if puts:
            records = np.zeros(len(puts), RECORD)
            for number, (key, size, place) in enumerate(puts):
                records[number] = (key, 0, size, place, tag_of(key))
            self._journal.append((PUT, records.tobytes()))
        for key, size, place in puts:
            row = self._index.in_the_way(key)
            if row:  # the journal's reader, too, lets a later put replace an earlier one with the same tag
                self._segments.free(self._index.place(row), self._index.payload(row))
                self._index.remove(row)
            self._index.insert(key, size, place)
        for _, size, place in spare:
            self._segments.free(place, size)
        self._compact_when_due()
        return outcomes

    def _undo(self, found: list[int], payloads: list[int], make_room: bool) -> None:
        """Free the places of a failed write. `make_room`: evict too, as the file system was full before max_gb was reached."""
        with self._lock:
            for place, size in zip(found, payloads, strict=True):
                self._segments.free(place, size)
            if make_room:
                self._evict(cost_of(payloads))
        self._give_back()

    # ---- loading

    def _after_load(self, hits: list[Hit], outcomes: list[str]) -> None:
        """Mark loaded shards as used and drop damaged ones. One that was dropped during the read is absent, not damaged. So is
        one that may have been dropped and stored again, at the same place."""
        used, damaged = [], []
        with self._lock:
            for hit in hits:
                row = self._index.find(hit.found.key.packed)
                there = bool(row) and self._index.place(row) == hit.found.place
                if outcomes[hit.number] == OK:
                    used += [row] if there else []
                elif there and hit.segment.reuses == hit.reuses:
                    damaged.append(row)
                else:
                    outcomes[hit.number] = ABSENT
            self._use(used)
        if damaged:
            try:
                with self._lock:
                    self._drop(set(damaged))
                self._give_back()
            except OSError as error:
                log.warning("%s: damaged shards could not be removed, and stay misses: %s", self._where, error.strerror)


def _parts(rows: list[int]) -> Iterator[list[int]]:
    for at in range(0, len(rows), _ENTRY_RECORDS):
        yield rows[at : at + _ENTRY_RECORDS]
