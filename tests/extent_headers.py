"""Reads the extent headers of a server that is no more, as a server that adopts its arena will have to."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lmcache.memory.headers import (
    _CRC,
    _ENTRY,
    _ENTRY_BYTES,
    _ENTRY_MAGIC,
    _FILE,
    _FIRST_RECORD,
    _MAGIC,
    _NOTHING,
    _RECORD,
    _RECORD_MAGIC,
    COMMITTED,
    RECORD_BYTES,
    VERSION,
    Writer,
    _entries_at,
    _namespace,
    _start_of,
)
from lmcache.memory.slabs import SECTOR_BYTES

_READ_BYTES = RECORD_BYTES << 15


class DamagedHeaders(Exception):
    """The file is not a header file, has another version, or its own header is damaged: no record of it may be used."""


class ExtentHeader(NamedTuple):
    """One committed shard: `stored_bytes` from sector `sector` on are shard `shard` of `shards` of the chunk `key`."""

    sector: int
    stored_bytes: int
    shard: int
    shards: int
    fingerprint: bytes
    key: bytes
    parent: bytes


class OpenReservation(NamedTuple):
    """Extents of `stored_bytes` from each of `sectors` on, that `writer` was filling."""

    stored_bytes: int
    sectors: tuple[int, ...]
    writer: Writer


class Left(NamedTuple):
    """What the file of a server that is no more says. The extents of `open` may be among those in `extents`; they are not to be
    used while their writer may write."""

    epoch: int
    extents: list[ExtentHeader]
    """Committed, by sector."""
    open: list[OpenReservation]


def read_headers(path: Path) -> Left:
    """What a server that is no more has left.

    Raises:
        DamagedHeaders: no record of the file may be used. OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        own = os.pread(descriptor, _FILE.size + _CRC.size, 0)
        if len(own) < _FILE.size + _CRC.size or _CRC.pack(zlib.crc32(own[: _FILE.size])) != own[_FILE.size :]:
            raise DamagedHeaders(f"{path} is damaged: delete it, the arena beside it is of no use")
        magic, version, record_bytes, generation, clears, _, arena_bytes, epoch = _FILE.unpack_from(own)
        if (magic, version, record_bytes) != (_MAGIC, VERSION, RECORD_BYTES):
            raise DamagedHeaders(f"{path} has version {version}, this lmcache reads {VERSION}: delete it")
        behind = _entries_at(arena_bytes)
        found = [
            header
            for offset, record in _records(descriptor, behind)
            if (header := _complete(record, generation, clears)) is not None
            and header.sector * RECORD_BYTES + _FIRST_RECORD == offset
            and header.sector * SECTOR_BYTES + header.stored_bytes <= arena_bytes
        ]
        entries = [
            _read_entry(path, entry, generation)
            for _, entry in _blocks(descriptor, behind, _ENTRY_BYTES, _ENTRY_BYTES)
            if not entry.startswith(_NOTHING[:4])
        ]
    finally:
        os.close(descriptor)
    return Left(epoch, found, entries)


def may_write(writer: Writer) -> bool:
    """Whether it may still be there. False only where it is certain that it has ended."""
    if not writer.start or writer.namespace != _namespace():
        return True
    return _start_of(writer.pid) == writer.start


def _read_entry(path: Path, entry: bytes, generation: bytes) -> OpenReservation:
    magic, count, of, stored_bytes, *writer = _ENTRY.unpack_from(entry.ljust(_ENTRY.size, b"\0"))
    end = _ENTRY.size + 4 * count
    if (magic, of) != (_ENTRY_MAGIC, generation) or _CRC.pack(zlib.crc32(entry[:end])) != entry[end : end + _CRC.size]:
        raise DamagedHeaders(
            f"{path} is damaged: it is unknown which processes may still write to the arena beside it; delete both files"
        )
    return OpenReservation(stored_bytes, struct.unpack_from(f"<{count}I", entry, _ENTRY.size), Writer(*writer))


def _complete(record: bytes, generation: bytes, clears: int) -> ExtentHeader | None:
    if _CRC.pack(zlib.crc32(record[: _RECORD.size])) != record[_RECORD.size : _RECORD.size + _CRC.size]:
        return None
    _, version, state, of, when, sector, stored_bytes, shard, shards, *names = _RECORD.unpack_from(record)
    if (version, state, of, when) != (VERSION, COMMITTED, generation, clears & 0xFFFFFFFF):
        return None
    return ExtentHeader(sector, stored_bytes, shard, shards, *names)


def _records(descriptor: int, behind: int) -> Iterator[tuple[int, bytes]]:
    """What could be a record, with its offset."""
    for at, block in _blocks(descriptor, _FIRST_RECORD, RECORD_BYTES, _READ_BYTES, behind):
        place = block.find(_RECORD_MAGIC)
        while place >= 0:
            if place % RECORD_BYTES == 0:
                yield at + place, block[place : place + RECORD_BYTES]
            place = block.find(_RECORD_MAGIC, place + 1)


def _blocks(descriptor: int, first: int, unit: int, size: int, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Blocks of `size` bytes, and their offsets, a multiple of `unit` behind `first`; holes of the file are passed over."""
    at, size_bytes = first, os.fstat(descriptor).st_size
    end = size_bytes if end is None else min(end, size_bytes)
    while at < end:
        try:
            at = max(at, os.lseek(descriptor, at, os.SEEK_DATA))
        except OSError:  # only a hole remains
            return
        at -= (at - first) % unit
        yield at, os.pread(descriptor, size, at)
        at += size
