"""Transfer of frames between memory and a segment file: in large pieces, by direct I/O where possible, with checksums.

Native code reads large frames and computes their checksums, so that Python and its lock cost only once a call. In writes, and
where checksums are keyed, other threads compute them meanwhile. This module knows nothing of the index.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

from lmcache.tiers import frame
from lmcache.tiers.disk.segments import frame_bytes, is_large, offset_of
from lmcache.tiers.filesystem import BLOCK_BYTES, Bounces, Filesystem, address_of, blocks, is_aligned
from lmcache.tiers.tier import Shard, ShardKey

PIECE_BYTES = 8 << 20
"""Size of one request to the device: of 2, 8 and 32 MiB, 8 was the fastest or as fast as any."""
BOUNCE_BYTES = 2 << 20
GROUP_BYTES = 64 << 20
GROUP_FRAMES = BOUNCE_BYTES // (2 * BLOCK_BYTES)
"""The most bytes and frames in one `write_large`: each frame takes two blocks of a bounce buffer for its tail and header."""
_CACHED_BYTES = 512 << 10
"""Size of a buffered read: of 0.25 to 8 MiB, the fastest or as fast as any, from the page cache and from the device."""
_INLINE_BYTES = 256 << 10
"""Checksums of smaller pieces are computed by the calling thread: waking another thread would take longer."""
_GAP_BYTES = 16 << 10
"""Packed frames that lie no farther apart are read by one request."""
UNREADABLE = "unreadable"
"""Outcome of a load: the device could not read this frame, though it could read others."""


class Found(NamedTuple):
    """A frame to read, at the place and with the bytes of payload that the index gives. into: a buffer of the shard's size, which
    is larger if the payload is encoded."""

    place: int
    key: ShardKey
    into: memoryview
    stored_bytes: int

    @property
    def payload(self) -> memoryview:
        """The part of the buffer that the payload is read into."""
        return self.into.cast("B")[: self.stored_bytes]


Decoded = Callable[[int, int], None] | None
"""As in `TierBase`."""


def groups_to_write(numbers: list[int], shards: Sequence[Shard]) -> Iterator[list[int]]:
    """Yield groups of these shards, all large or all packed, for one call of `write_large` or `write_packed` each."""
    group: list[int] = []
    size = 0
    for number in numbers:
        one = frame_bytes(shards[number].payload.nbytes)
        limit = GROUP_BYTES if is_large(shards[number].payload.nbytes) else BOUNCE_BYTES
        if group and (size + one > limit or len(group) == GROUP_FRAMES):
            yield group
            group, size = [], 0
        group.append(number)
        size += one
    if group:
        yield group


class FrameIO:
    """Reads and writes frames. With `direct`, all descriptors are opened for direct I/O."""

    def __init__(self, filesystem: Filesystem, secret: bytes, pool: Executor, direct: bool) -> None:
        self._filesystem, self._secret, self._pool, self._direct = filesystem, secret, pool, direct
        self._bounces = Bounces(BOUNCE_BYTES)

    def write_large(self, fd: int, offset: int, shards: Sequence[Shard]) -> None:
        """Write frames one after another from `offset` on. Raises OSError."""
        sums = [self._begin_sum(shard.payload) for shard in shards]
        total = sum(frame_bytes(shard.payload.nbytes) for shard in shards)
        writer = _Pieces(self._filesystem, fd, offset, min(PIECE_BYTES, max(BOUNCE_BYTES, blocks(total // 4))))
        bounce = self._bounces.take()
        try:
            ends = memoryview(bounce)
            for number, (shard, checksum) in enumerate(zip(shards, sums, strict=True)):
                end = ends[number * 2 * BLOCK_BYTES :][: 2 * BLOCK_BYTES]
                payload = shard.payload.cast("B")
                whole = payload.nbytes // BLOCK_BYTES * BLOCK_BYTES
                aligned = self._aligned(payload)
                if aligned is not payload:
                    aligned[:] = payload
                writer.add(aligned[:whole])
                tail = payload[whole:]
                end[:] = bytes(2 * BLOCK_BYTES)
                end[: tail.nbytes] = tail
                header_at = blocks(tail.nbytes)
                header = end[header_at:][: frame.HEADER_BYTES]
                writer.add(end[: header_at + BLOCK_BYTES], _fill(header, checksum, shard))
            writer.flush()
        finally:
            self._settle(sums)
            self._bounces.give(bounce)

    def read_large(self, fd: int, found: Sequence[Found], decoded: Decoded = None) -> list[str | OSError]:
        """Read frames of one file, in the order of their places. Return the outcome of each, which is an OSError where the device
        could not read it."""
        group = 1 if self._secret else len(found)  # a keyed checksum is computed while the next frame is read
        outcomes: list[str | OSError | Future[str]] = []
        headers: list[bytes] = []
        try:
            for first in range(0, len(found), group):
                some, heads = self._read_frames(fd, found[first : first + group])
                outcomes += some
                headers += heads
        finally:
            self._settle(outcomes)
        ended = [one.result() if isinstance(one, Future) else one for one in outcomes]
        return [
            one or frame.unfold(header, where.into, decoded)
            for one, header, where in zip(ended, headers, found, strict=True)
        ]

    def _read_frames(self, fd: int, found: Sequence[Found]) -> tuple[list[str | OSError | Future[str]], list[bytes]]:
        """Read by native code, and return outcomes and headers. It computes the checksum of a buffered piece while the piece is
        in the cache of the core that copied it; other calls or lanes keep the device busy meanwhile."""
        payloads = [one.payload for one in found]
        targets = [self._aligned(payload) for payload in payloads]
        asked = [
            (offset_of(one.place), one.stored_bytes, address_of(target))
            for one, target in zip(found, targets, strict=True)
        ]
        read = self._filesystem.read_frames(fd, asked, PIECE_BYTES if self._direct else _CACHED_BYTES)
        outcomes: list[str | OSError | Future[str]] = []
        for one, payload, target, (error, header, digest) in zip(found, payloads, targets, read, strict=True):
            if target is not payload:
                payload[:] = target
            if error > 0:
                outcomes.append(OSError(error, os.strerror(error)))
            elif error:
                outcomes.append(frame.TRUNCATED)
            elif self._secret:
                check = self._pool.submit(frame.check, header, payload, one.key, self._secret, one.into.nbytes)
                outcomes.append(check)
            else:
                outcomes.append(frame.check_digest(header, one.stored_bytes, digest, one.key, one.into.nbytes))
        return outcomes, [header for _, header, _ in read]

    def _aligned(self, memory: memoryview) -> memoryview:
        """Return memory of this size that direct I/O, if that is used, can access: `memory` itself if possible."""
        return memory if not self._direct or is_aligned(memory) else memoryview(mmap.mmap(-1, memory.nbytes))

    def write_packed(self, fd: int, offset: int, shards: Sequence[Shard]) -> None:
        """Write frames one after another from `offset` on, padded to the end of a block. Raises OSError."""
        bounce = self._bounces.take()
        try:
            memory, at = memoryview(bounce), 0
            for shard in shards:
                payload = shard.payload.cast("B")
                size = frame_bytes(payload.nbytes)
                header = frame.make_header(shard.key, shard.parent, payload, self._secret, shard.coding)
                used = frame.HEADER_BYTES + payload.nbytes
                memory[at : at + frame.HEADER_BYTES] = header
                memory[at + frame.HEADER_BYTES : at + used] = payload
                memory[at + used : at + size] = bytes(size - used)
                at += size
            memory[at : blocks(at)] = bytes(blocks(at) - at)
            self._filesystem.write(fd, [memory[: blocks(at)]], offset)
        finally:
            self._bounces.give(bounce)

    def read_packed(self, fd: int, found: Sequence[Found], decoded: Decoded = None) -> list[str]:
        """Read frames of one file, in the order of their places, neighbours by one request. Raises OSError."""
        outcomes: list[str] = []
        bounce = self._bounces.take()
        try:
            memory, first = memoryview(bounce), 0
            while first < len(found):
                begin, behind, end = _run(found, first)
                got = self._filesystem.read(fd, [memory[: end - begin]], begin)
                read = memory[: min(got, end - begin)]
                for one in found[first:behind]:
                    payload = one.payload
                    at = offset_of(one.place) - begin
                    header, stored = read[at:][: frame.HEADER_BYTES], read[at + frame.HEADER_BYTES :][: payload.nbytes]
                    if stored.nbytes < payload.nbytes:
                        outcomes.append(frame.TRUNCATED)
                        continue
                    outcome = frame.check(header, stored, one.key, self._secret, one.into.nbytes)
                    payload[:] = stored
                    outcomes.append(outcome or frame.unfold(header, one.into, decoded))
                first = behind
        finally:
            self._bounces.give(bounce)
        return outcomes

    def _begin_sum(self, payload: memoryview) -> Future[frame.Checksum] | frame.Checksum:
        checksum = frame.Checksum(self._secret)
        if payload.nbytes <= _INLINE_BYTES:
            checksum.update(payload)
            return checksum

        def whole() -> frame.Checksum:
            checksum.update(payload)
            return checksum

        return self._pool.submit(whole)

    @staticmethod
    def _settle(sums: Sequence[object]) -> None:
        """Wait until no thread reads the caller's memory any more."""
        for one in sums:
            if isinstance(one, Future):
                one.result()


class _Pieces:
    """Buffers that are adjacent in a file, written in pieces of about one size."""

    def __init__(self, filesystem: Filesystem, fd: int, offset: int, piece_bytes: int) -> None:
        self._filesystem, self._fd, self._offset, self._piece_bytes = filesystem, fd, offset, piece_bytes
        self._buffers: list[memoryview] = []
        self._fills: list[Callable[[], None]] = []
        self._waiting = 0

    def add(self, buffer: memoryview, fill: Callable[[], None] | None = None) -> None:
        """Add the next bytes. `fill` completes them right before they are written."""
        if fill is not None:
            self._fills.append(fill)
        while buffer.nbytes:
            part = buffer if fill is not None else buffer[: self._piece_bytes - self._waiting]
            self._buffers.append(part)
            self._waiting += part.nbytes
            buffer = buffer[part.nbytes :]
            if self._waiting >= self._piece_bytes:
                self.flush()

    def flush(self) -> None:
        for fill in self._fills:
            fill()
        if self._buffers:
            self._filesystem.write(self._fd, self._buffers, self._offset)
        self._offset += self._waiting
        self._buffers, self._fills, self._waiting = [], [], 0


def _fill(into: memoryview, checksum: Future[frame.Checksum] | frame.Checksum, shard: Shard) -> Callable[[], None]:
    def fill() -> None:
        done = checksum.result() if isinstance(checksum, Future) else checksum
        into[:] = done.header(shard.key, shard.parent, shard.coding)

    return fill


def _run(found: Sequence[Found], first: int) -> tuple[int, int, int]:
    """Return (first byte, number after the last frame, end byte) of frames to read by one request, in complete blocks."""
    begin = offset_of(found[first].place) // BLOCK_BYTES * BLOCK_BYTES
    behind, end = first, begin
    while behind < len(found):
        at = offset_of(found[behind].place)
        next_end = blocks(at + frame_bytes(found[behind].stored_bytes))
        if behind > first and (at - end > _GAP_BYTES or next_end - begin > BOUNCE_BYTES):
            break
        behind, end = behind + 1, max(end, next_end)
    return begin, behind, end
