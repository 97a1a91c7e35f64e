"""The *segments* of a disk tier: the files that hold its frames.

A segment is written from start to end. Where its frames have been removed, later ones are written, or holes are punched into it,
and when it holds no frame it is deleted. All sizes are counted in *blocks* of 4096 bytes, the unit of direct I/O.

A frame with a payload of 64 KiB or more is *large*: its payload begins at a block, and its header follows in a block of its
own, so that direct I/O needs no copy. Smaller frames are *packed* one after another: header, payload, padding to 64 bytes; each
store call begins a new block, and a block is freed together with its last frame. Large and packed frames have separate files.

The *place* of a frame says where it lies: number of the segment << 32 | offset in the file / 64. A frame is freed in two steps,
since the file system may be slow: `free` makes its blocks *pending*, and later `punch` or `delete` returns them to the file
system. Before that, `reserve_freed` may give them to other frames. A full tier does so with nearly all of them: a file system
takes longer to free blocks and to allocate others (with `discard` the device does, too) than to write to those that it has.
Whoever still reads a frame that was freed finds another shard's header or a wrong checksum.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmcache.tiers.disk.shard_index import UNIT_BYTES, Records
from lmcache.tiers.filesystem import BLOCK_BYTES, Filesystem, blocks
from lmcache.tiers.frame import HEADER_BYTES

LARGE_BYTES = 64 << 10
_NAME = re.compile(r"([0-9a-f]{8})\.(large|packed)")
_FILE_COST, _FRAME_COST = 2 * BLOCK_BYTES, 16
"""What a file system may need in addition for each file and each frame: an extent of ext4 takes 12 bytes of a block."""
_OPEN_FILES = 128


class BlockRange(NamedTuple):
    """A range of complete blocks of one segment. offset, size: in bytes. A size of 0 only asks whether to delete the segment."""

    segment: Segment
    offset: int
    size: int


class Run(NamedTuple):
    """Places of frames that are written one after another into one segment."""

    segment: Segment
    places: list[int]


class Handle:
    """A file descriptor that is closed when the last reference to the handle is gone."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Segment:
    """One file of `size` bytes. tail: the offset of the next frame. used: bytes of blocks in use or pending. frames: how many.

    made: the file exists. gone: the file has been deleted, or is being deleted. reuses: how often frames got blocks of others.
    """

    def __init__(self, path: Path, number: int, packed: bool, size: int) -> None:
        self.path, self.number, self.packed, self.size = path, number, packed, size
        self.tail = self.used = self.frames = self.reuses = 0
        self.sharers = bytearray()
        """The number of frames in each block of a packed file."""
        self.handle: Handle | None = None
        self.made = self.gone = False

    @property
    def cost(self) -> int:
        """Return the bytes on the device that the file takes at most."""
        return self.used + _FILE_COST + self.frames * _FRAME_COST


def is_large(payload_bytes: int) -> bool:
    """Return whether a frame with this payload is large; otherwise it is packed."""
    return payload_bytes >= LARGE_BYTES


def frame_bytes(payload_bytes: int) -> int:
    """Return the bytes that a frame takes in its file, from its offset on."""
    if is_large(payload_bytes):
        return blocks(payload_bytes) + BLOCK_BYTES
    return -(-(HEADER_BYTES + payload_bytes) // UNIT_BYTES) * UNIT_BYTES


def cost_of(payloads: Iterable[int]) -> int:
    """Return the most bytes that frames of these payload sizes, all large or all packed, add to `Segments.bytes`."""
    sizes = [frame_bytes(one) for one in payloads]
    return blocks(sum(sizes)) + _FRAME_COST * len(sizes) + _FILE_COST


def cost_of_reuse(frames: int) -> int:
    """Return the bytes that so many frames add to `Segments.bytes` in blocks that others have left."""
    return _FRAME_COST * frames


def offset_of(place: int) -> int:
    """Return the offset of a frame in its file, in bytes."""
    return (place & 0xFFFFFFFF) * UNIT_BYTES


class Segments:
    """All segments of one tier. Call with the tier's lock held, except the methods that do I/O: `open_handle`, `punch`, `delete`.

    bytes: bytes on the device, including those that are reserved or pending. freed_bytes: those that are pending, or are just
    being returned to the file system.
    """

    def __init__(self, filesystem: Filesystem, folder: Path, segment_bytes: int, flags: int) -> None:
        self._filesystem, self._folder, self._flags = filesystem, folder, flags
        self._segment_bytes = segment_bytes
        self._all: dict[int, Segment] = {}
        self._tails: dict[bool, Segment] = {}
        self._opened: list[Segment] = []
        self._pending: list[BlockRange] = []
        self.freed_bytes = 0
        self.next_number = 1
        self.bytes = 0

    def __getitem__(self, place: int) -> Segment:
        """Return the segment that holds the frame at `place`."""
        return self._all[place >> 32]

    def mount(self, records: Records, next_number: int) -> None:
        """Adopt the segments that an earlier start has left. Raises OSError.

        Blocks and files that no record names are returned to the file system. A load finds out that a record's file is missing.
        """
        self.next_number = next_number
        files = {int(path.name[:8], 16): path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)}
        ordered = records[np.argsort(records["place"])]
        numbers, firsts = np.unique(ordered["place"] >> np.uint64(32), return_index=True)
        for number, mine in zip(numbers.tolist(), np.split(ordered, firsts[1:]), strict=False):
            packed = not is_large(int(mine["payload"][0]))
            path = files.pop(number, self._path(number, packed))
            segment = Segment(path, number, packed, self._segment_bytes)
            self._all[number] = segment
            self._take_over(segment, mine)
            self.bytes += segment.cost
        for number, path in files.items():
            self._filesystem.unlink(path)
            self.next_number = max(self.next_number, number + 1)

    def reserve(self, payloads: list[int]) -> Run:
        """Reserve new blocks, at the end of a segment, for frames with these payloads, all large or all packed."""
        packed = not is_large(payloads[0])
        sizes = [frame_bytes(one) for one in payloads]
        size = blocks(sum(sizes))
        segment = self._tails.get(packed)
        if segment is None or segment.tail + size > segment.size:
            if segment is not None:
                self._pending.append(BlockRange(segment, 0, 0))  # deletes the file in case it is empty by now
            number, self.next_number = self.next_number, self.next_number + 1
            segment = Segment(self._path(number, packed), number, packed, max(size, self._segment_bytes))
            self._tails[packed] = self._all[number] = segment
            self.bytes += segment.cost
        at = segment.tail
        segment.tail += size
        segment.used += size
        self.bytes += size
        if packed:
            segment.sharers += bytes(segment.tail // BLOCK_BYTES - len(segment.sharers))
        return self._occupy(segment, at, sizes)

    def reserve_freed(self, payloads: list[int]) -> list[Run]:
        """Reserve pending blocks for frames with these payloads, all large or all packed; return [] where they do not all fit."""
        packed = not is_large(payloads[0])
        sizes = [frame_bytes(one) for one in payloads]
        if sum(sizes) > self.freed_bytes:
            return []
        self._pending = _merged(self._pending)
        fitted: list[tuple[int, int, int]] = []
        """The number of a pending range, and the first of the frames that fit there, and the one behind them."""
        placed = 0
        for number, freed in enumerate(self._pending):
            if freed.segment.packed != packed or freed.segment.gone:
                continue
            first, left = placed, freed.size
            while placed < len(sizes) and sizes[placed] <= left:
                left -= sizes[placed]
                placed += 1
            if placed > first:
                fitted.append((number, first, placed))
            if placed == len(sizes):
                break
        else:
            return []
        runs = []
        for number, first, behind in reversed(fitted):
            freed, some = self._pending[number], sizes[first:behind]
            taken = blocks(sum(some))
            self._pending[number : number + 1] = _behind(freed, taken)
            self.freed_bytes -= taken
            freed.segment.reuses += 1
            runs.append(self._occupy(freed.segment, freed.offset, some))
        return runs[::-1]

    def _occupy(self, segment: Segment, at: int, sizes: list[int]) -> Run:
        """Account for frames of these sizes, one after another, in blocks that are counted as used. Return their places."""
        segment.frames += len(sizes)
        self.bytes += len(sizes) * _FRAME_COST
        found = []
        for one in sizes:
            found.append(segment.number << 32 | at // UNIT_BYTES)
            if segment.packed:
                for block in range(at // BLOCK_BYTES, -(-(at + one) // BLOCK_BYTES)):
                    segment.sharers[block] += 1
            at += one
        return Run(segment, found)

    def free(self, place: int, payload_bytes: int) -> None:
        """Free a frame. The blocks that no other frame uses become pending."""
        segment, at = self[place], offset_of(place)
        size = frame_bytes(payload_bytes)
        segment.frames -= 1
        self.bytes -= _FRAME_COST
        if not segment.packed:
            self._pending.append(BlockRange(segment, at, size))
            self.freed_bytes += size
            return
        for block in range(at // BLOCK_BYTES, -(-(at + size) // BLOCK_BYTES)):
            segment.sharers[block] -= 1
            if not segment.sharers[block]:
                self._pending.append(BlockRange(segment, block * BLOCK_BYTES, BLOCK_BYTES))
                self.freed_bytes += BLOCK_BYTES

    @property
    def pending_ranges(self) -> int:
        """Return how many ranges are pending."""
        return len(self._pending)

    def take_pending(self) -> list[BlockRange]:
        """Return all pending ranges, adjacent ones as one, and forget them. The caller returns them to the file system.

        For each range it calls either `punch` and `settle` or, if `claim_spent` says so, `delete` and `forget`. `put_back` is for
        those that it could not return.
        """
        pending, self._pending = _merged(self._pending), []
        return pending

    def put_back(self, ranges: list[BlockRange]) -> None:
        """Make ranges pending again, because the first of them could not be returned to the file system."""
        ranges[0].segment.gone = False
        self._pending += ranges

    def settle(self, freed: BlockRange) -> None:
        """Account for a range that has been returned to the file system."""
        freed.segment.used -= freed.size
        self.bytes -= freed.size
        self.freed_bytes -= freed.size

    def claim_spent(self, segment: Segment) -> bool:
        """Return whether the segment holds no frame and is not about to get one. It gets none from then on, and the caller must
        `delete` and `forget` it."""
        if segment.gone or segment.frames or segment in self._tails.values():
            return False
        segment.gone = True
        return True

    def forget(self, segment: Segment) -> None:
        """Account for a segment that has been deleted."""
        del self._all[segment.number]
        self.bytes -= segment.cost
        self.freed_bytes -= segment.used

    def drop_all(self) -> None:
        """Free all frames. The blocks of all segments become pending."""
        self._tails.clear()
        self._pending = [BlockRange(segment, 0, 0) for segment in self._all.values()]
        for segment in self._all.values():
            self.bytes -= segment.frames * _FRAME_COST
            segment.frames = 0
        self.freed_bytes = sum(segment.used for segment in self._all.values())

    def open_handle(self, segment: Segment, create: bool = False) -> Handle:
        """Return an open handle of the segment's file. With `create`, create the file if it does not exist. Raises OSError."""
        handle = segment.handle
        if handle is None or (create and not segment.made):
            handle = Handle(self._filesystem.open(segment.path, self._flags | (os.O_CREAT if create else 0)))
            if create and not segment.made:
                self._filesystem.truncate(handle.fd, segment.size)
                segment.made = True
            segment.handle = handle
            self._opened.append(segment)
            if len(self._opened) > _OPEN_FILES:
                self._opened.pop(0).handle = None
        return handle

    def punch(self, freed: BlockRange) -> None:
        """Return the blocks of a range to the file system, unless the file is gone. Raises OSError."""
        if freed.size and freed.segment.made and not freed.segment.gone:
            handle = self.open_handle(freed.segment)
            self._filesystem.punch(handle.fd, freed.offset, freed.size)

    def delete(self, segment: Segment) -> None:
        """Delete the file. Raises OSError."""
        segment.handle = None
        self._filesystem.unlink(segment.path)

    def close(self) -> None:
        """Close all files."""
        for segment in self._all.values():
            segment.handle = None
        self._opened.clear()

    def _path(self, number: int, packed: bool) -> Path:
        return self._folder / f"{number:08x}.{'packed' if packed else 'large'}"

    def _take_over(self, segment: Segment, records: Records) -> None:
        """Set up a segment from the `records` of its file, which are in the order of their places."""
        segment.frames = len(records)
        begins = (records["place"] & np.uint64(0xFFFFFFFF)).astype(np.int64) * UNIT_BYTES
        payloads = records["payload"].astype(np.int64)
        if segment.packed:
            ends = begins + -(-(HEADER_BYTES + payloads) // UNIT_BYTES) * UNIT_BYTES
        else:
            ends = begins + -(-payloads // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        first, behind = begins // BLOCK_BYTES, -(-ends // BLOCK_BYTES)
        steps = np.zeros(int(behind[-1]) + 1, np.int64)
        np.add.at(steps, first, 1)
        np.add.at(steps, behind, -1)
        sharers = np.cumsum(steps)[:-1]
        segment.tail = segment.size  # each start begins new files
        segment.used = int(np.count_nonzero(sharers)) * BLOCK_BYTES
        if segment.packed:
            segment.sharers = bytearray(sharers.astype(np.uint8).tobytes())
        try:
            status = segment.path.stat()
        except FileNotFoundError:
            return  # loads will report its shards as damaged
        segment.made, segment.size = True, status.st_size
        if status.st_blocks * 512 > segment.used:
            fd = self.open_handle(segment).fd
            edges = np.flatnonzero(np.diff(np.concatenate(([1], sharers > 0, [1]))))
            for hole, end in edges.reshape(-1, 2).tolist():
                self._filesystem.punch(fd, hole * BLOCK_BYTES, (end - hole) * BLOCK_BYTES)
            beyond = len(sharers) * BLOCK_BYTES
            if status.st_size > beyond:
                self._filesystem.punch(fd, beyond, blocks(status.st_size) - beyond)


def _merged(ranges: Iterable[BlockRange]) -> list[BlockRange]:
    """Return the ranges in the order of their places, adjacent ones as one."""
    merged: list[BlockRange] = []
    for one in sorted(ranges, key=lambda one: (one.segment.number, one.offset)):
        last = merged[-1] if merged else None
        if last and last.segment is one.segment and last.offset + last.size == one.offset:
            merged[-1] = last._replace(size=last.size + one.size)
        else:
            merged.append(one)
    return merged


def _behind(freed: BlockRange, taken: int) -> list[BlockRange]:
    """Return what is left of a range without its first bytes, if anything."""
    left = freed._replace(offset=freed.offset + taken, size=freed.size - taken)
    return [left] if left.size else []
