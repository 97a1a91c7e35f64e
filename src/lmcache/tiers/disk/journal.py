"""The index file of a disk tier: a journal of puts, removals and uses, one entry an append, replayed at the next start.

    file   64 bytes: "LMCindex", u16 version 1, u16 zero, u32 64, u64 number of the next segment, 32 zero,
           u64 xxh3-64 of the 56 bytes before
    entry  32 bytes: "LMCe", u8 kind, 3 zero, u32 records, u32 zero, u64 entry's number (1, 2, ...),
           u64 xxh3-64 of these 24 bytes and the body, which follows
    body   kind 1 (put): 64 bytes a record, `shard_index.RECORD`; 2 (remove) and 3 (use): u64 places

Reading ends at the first entry that is incomplete or out of sequence, where a crash cut the file. The journal does not replace
the checks of frames, which are made at each load. A new file is written beside the old one and renamed over it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lmcache.tiers.disk.shard_index import RECORD, Records
from lmcache.tiers.filesystem import FULL, Filesystem
from lmcache.tiers.tier import TierError

PUT, REMOVE, USE = 1, 2, 3
_SIZES = {PUT: RECORD.itemsize, REMOVE: 8, USE: 8}
_VERSION = 1
_FILE = struct.Struct("<8sHHIQ32x")
_ENTRY = struct.Struct("<4sB3xIIQ")
_SUM = struct.Struct("<Q")
FILE_BYTES = _FILE.size + _SUM.size
ENTRY_BYTES = _ENTRY.size + _SUM.size
STEP_BYTES = 16 << 10
"""Space is allocated ahead in such steps, so that evictions can still be recorded when the file system is full."""
_RECORDS_AN_ENTRY = 1 << 16


class Journal:
    """One open index file. Its methods are called with the tier's lock held."""

    def __init__(self, filesystem: Filesystem, folder: Path) -> None:
        self._filesystem, self._folder = filesystem, folder
        self._path, self._next_path = folder / "index", folder / "index.new"
        self._fd = -1
        self._number = self._allocated = 0
        self.end = 0
        """Bytes written so far."""

    def open(self) -> tuple[Records, int]:
        """Return the shards, least recently used first, and the number of the next segment.

        Raises:
            TierError: the file has another version, a damaged head, or is not an index at all.
            OSError: the file cannot be read or created.
        """
        self._filesystem.unlink(self._next_path)
        self._fd = self._filesystem.open(self._path, os.O_RDWR | os.O_CREAT)
        content = self._content()
        if not content:
            nothing = np.empty(0, RECORD)
            self.restart(nothing, 1)
            return nothing, 1
        next_segment = _read_head(content, self._path)
        records, last, self.end, self._number = _replay(content)
        self._allocated = self.end
        return records, max(next_segment, last + 1)

    def append(self, *entries: tuple[int, bytes]) -> None:
        """Append one entry for each (kind, body): all of them or, after an OSError, none."""
        made = b"".join(_entry(kind, body, self._number + at) for at, (kind, body) in enumerate(entries))
        if self.end + len(made) + STEP_BYTES > self._allocated:
            wanted = self.end + len(made) + 2 * STEP_BYTES
            try:
                self._filesystem.allocate(self._fd, self._allocated, wanted - self._allocated)
                self._allocated = wanted
            except OSError as error:
                if error.errno not in FULL:
                    raise
        self._filesystem.write(self._fd, [made], self.end)
        self.end += len(made)
        self._number += len(entries)

    def restart(self, records: Records, next_segment: int) -> None:
        """Replace the file by one with only these records. After an OSError the old file stays in use."""
        head = _FILE.pack(b"LMCindex", _VERSION, 0, FILE_BYTES, next_segment)
        parts: list[bytes | memoryview] = [head + _SUM.pack(xxhash.xxh3_64_intdigest(head))]
        number = 1
        for at in range(0, len(records), _RECORDS_AN_ENTRY):
            parts.append(_entry(PUT, records[at : at + _RECORDS_AN_ENTRY].tobytes(), number))
            number += 1
        fd = self._filesystem.open(self._next_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            self._filesystem.write(fd, parts, 0)
            self._filesystem.sync(fd)
            self._filesystem.rename(self._next_path, self._path)
        except OSError:
            os.close(fd)
            try:
                self._filesystem.unlink(self._next_path)
            except OSError:
                pass  # the next start or the next try removes it
            raise
        self.close()
        self._fd, self._number = fd, number
        self.end = self._allocated = sum(len(one) for one in parts)

    def sync(self) -> None:
        self._filesystem.sync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _content(self) -> memoryview:
        content = memoryview(bytearray(os.fstat(self._fd).st_size))
        return content[: self._filesystem.read(self._fd, [content], 0)]


def places(of: Sequence[int]) -> bytes:
    """Return the body of a `REMOVE` or `USE` entry."""
    return struct.pack(f"<{len(of)}Q", *of)


def _entry(kind: int, body: bytes, number: int) -> bytes:
    head = _ENTRY.pack(b"LMCe", kind, len(body) // _SIZES[kind], 0, number)
    checksum = xxhash.xxh3_64(head)
    checksum.update(body)
    return head + _SUM.pack(checksum.intdigest()) + body


def _read_head(content: memoryview, path: Path) -> int:
    head = bytes(content[: _FILE.size])
    if len(content) < FILE_BYTES or not head.startswith(b"LMCindex"):
        raise TierError("denied", f"{path} is not the index of a disk tier; give the tier a directory of its own")
    _, version, _, _, next_segment = _FILE.unpack(head)
    if version != _VERSION:
        raise TierError(
            "version",
            f"{path} has version {version}, this LMCache reads {_VERSION}; empty the directory or use another",
        )
    if _SUM.unpack_from(content, _FILE.size)[0] != xxhash.xxh3_64_intdigest(head):
        raise TierError("damaged", f"the head of {path} is damaged; empty the directory to start anew")
    return int(next_segment)


def _entries(content: memoryview) -> Iterator[tuple[int, int, memoryview, int]]:
    """Yield (kind, records, body, end) of each complete entry."""
    at, number = FILE_BYTES, 1
    while at + ENTRY_BYTES <= len(content):
        magic, kind, count, _, found = _ENTRY.unpack_from(content, at)
        body_at = at + ENTRY_BYTES
        end = body_at + count * _SIZES.get(kind, 0)
        if magic != b"LMCe" or kind not in _SIZES or found != number or end > len(content):
            return
        body = content[body_at:end]
        checksum = xxhash.xxh3_64(content[at : at + _ENTRY.size])
        checksum.update(body)
        if checksum.intdigest() != _SUM.unpack_from(content, at + _ENTRY.size)[0]:
            return
        yield kind, count, body, end
        at, number = end, number + 1


def _replay(content: memoryview) -> tuple[Records, int, int, int]:
    """Return the remaining shards, oldest use first; the highest segment; the end of the last entry; and the next number.

    A shard remains if after its put neither its place was removed, nor another shard put there, nor one with the same tag put
    anywhere, which has replaced it.
    """
    bodies: dict[int, list[memoryview]] = {PUT: [], REMOVE: [], USE: []}
    counts: dict[int, list[int]] = {PUT: [], REMOVE: [], USE: []}
    firsts: dict[int, list[int]] = {PUT: [], REMOVE: [], USE: []}
    clock, end, number = 0, FILE_BYTES, 1
    for kind, count, body, end in _entries(content):  # noqa: B007
        bodies[kind].append(body)
        counts[kind].append(count)
        firsts[kind].append(clock)
        clock += count
        number += 1
    put = np.frombuffer(b"".join(bodies[PUT]), RECORD)
    removed = np.frombuffer(b"".join(bodies[REMOVE]), "<u8")
    used = np.frombuffer(b"".join(bodies[USE]), "<u8")
    last_segment = int(put["place"].max() >> np.uint64(32)) if len(put) else 0
    last_use = _times(firsts[PUT], counts[PUT])
    there = _is_last(put["tag"]) & _is_last(put["place"])
    there &= _last_times(removed, _times(firsts[REMOVE], counts[REMOVE]), put["place"]) < last_use
    records, last_use = put[there], last_use[there]
    np.maximum(last_use, _last_times(used, _times(firsts[USE], counts[USE]), records["place"]), out=last_use)
    records = records[np.argsort(last_use)]
    return records, last_segment, end, number


def _times(firsts: list[int], counts: list[int]) -> npt.NDArray[Any]:
    """Return the clock value of each record of the entries that began at `firsts`."""
    sizes = np.asarray(counts, np.int64)
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    times: npt.NDArray[Any] = np.repeat(np.asarray(firsts, np.int64), sizes) + within
    return times


def _is_last(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return for each element whether no equal one follows."""
    last = np.zeros(len(values), bool)
    last[len(values) - 1 - np.unique(values[::-1], return_index=True)[1]] = True
    return last


def _last_times(places: npt.NDArray[Any], times: npt.NDArray[Any], asked: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the last of the `times` (which ascend) at which each place that is asked for was among `places`; -1 if never."""
    if not len(places):
        return np.full(len(asked), -1, np.int64)
    known, last = np.unique(places[::-1], return_index=True)
    at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
    found: npt.NDArray[Any] = np.where(known[at] == asked, times[::-1][last[at]], -1)
    return found
