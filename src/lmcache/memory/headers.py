"""Extent headers: a file beside the arena that records which extents hold which committed shards, for use after a crash.

Engines do not get this file, so its contents are as trustworthy as the user is. The file begins with a header of its own (4 KiB).
One record of fixed size follows for each sector of the arena; an extent's record is that of its first sector. The file is sparse:
only extents take memory, 4 KiB for an extent of 170 KiB or more. The server writes records and does not map them, because a write
to a full memory file system returns an error where an access to a mapping would kill the process. A record is valid when its
checksum is right and its generation and number of clears are those of the file, so clearing costs one write. Little-endian:

    file    magic 8, version u32, record bytes u32, generation 8, clears u64, arena id 16, arena bytes u64, crc32 u32
    record  magic 4, version u16, state u16, generation 8, clears u32, first sector u32, stored bytes u64, shard u16, shards u16,
            space fingerprint 16, chunk hash 16, parent hash 16 (zeros before the first chunk), crc32 u32
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

SUFFIX = ".headers"
RECORD_BYTES = 96
VERSION = 1
COMMITTED = 1
_MAGIC, _RECORD_MAGIC = b"lmcachHD", b"LMsl"
_FIRST_RECORD = 4096
_SECTOR_BYTES = 4096
_READ_BYTES = RECORD_BYTES << 15
_FILE = struct.Struct("<8sII8sQ16sQ")
_RECORD = struct.Struct("<4sHH8sIIQHH16s16s16s")
_CRC = struct.Struct("<I")
_NOTHING = bytes(8)


def beside(arena: Path) -> Path:
    """Return the path of the header file that belongs to this arena."""
    return arena.with_name(arena.name + SUFFIX)


class DamagedHeaders(LMCacheError):
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


class Headers:
    """The header file of a running server.

    Raises:
        ConfigError: the file cannot be created.
    """

    def __init__(self, path: Path, arena_id: bytes, arena_bytes: int) -> None:
        self.path = path
        self.unwritten = 0
        """Header writes that failed. Such extents are usable now, but a server that adopts the arena does not find them."""
        self._arena_id, self._arena_bytes = arena_id, arena_bytes
        self._generation = secrets.token_bytes(8)
        self._clears = 0
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: cannot create the extent headers there: {error.strerror}") from error
        try:
            self._write_own()
        except OSError as error:
            self.close()
            raise ConfigError(f"{path}: cannot write the extent headers: {error.strerror}") from error

    def committed(
        self,
        fingerprint: bytes,
        shards: int,
        shard: int,
        stored_bytes: int,
        sectors: Iterable[int],
        keys: bytes,
        parents: bytes,
    ) -> None:
        """Record that the extents at `sectors` hold committed shards. `keys` and `parents` have 16 bytes for each extent."""
        for number, sector in enumerate(sectors):
            key, parent = keys[16 * number : 16 * number + 16], parents[16 * number : 16 * number + 16]
            record = _RECORD.pack(
                _RECORD_MAGIC, VERSION, COMMITTED, self._generation, self._clears, sector, stored_bytes, shard, shards,
                fingerprint, key, parent,
            )  # fmt: skip
            try:
                os.pwrite(
                    self._descriptor, record + _CRC.pack(zlib.crc32(record)), _FIRST_RECORD + sector * RECORD_BYTES
                )
            except OSError as error:
                self._report_unwritten(error)

    def freed(self, sectors: Iterable[int]) -> None:
        """Erase the records of these extents."""
        for sector in sectors:
            try:
                os.pwrite(self._descriptor, _NOTHING, _FIRST_RECORD + sector * RECORD_BYTES)
            except OSError as error:  # the record was never written, or the file is gone: there is nothing to erase
                self._report_unwritten(error)

    def cleared(self) -> None:
        """Invalidate all records with one write."""
        self._clears += 1
        self._write_own()

    def void(self) -> None:
        """Invalidate the file until the next `cleared`, because some records may be wrong."""
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            self._report_unwritten(error)

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write_own(self) -> None:
        header = _FILE.pack(
            _MAGIC, VERSION, RECORD_BYTES, self._generation, self._clears, self._arena_id, self._arena_bytes
        )
        os.pwrite(self._descriptor, header + _CRC.pack(zlib.crc32(header)), 0)

    def _report_unwritten(self, error: OSError) -> None:
        if not self.unwritten:
            logger.warning("%s: cannot write extent headers, so later servers lose these extents: %s", self.path, error)
        self.unwritten += 1


def read_headers(path: Path) -> list[ExtentHeader]:
    """Return the committed extents of a server that has ended, ordered by sector.

    Raises:
        DamagedHeaders: no record of the file may be used. OSError: the file cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        own = os.pread(descriptor, _FILE.size + _CRC.size, 0)
        if len(own) < _FILE.size + _CRC.size or _CRC.pack(zlib.crc32(own[: _FILE.size])) != own[_FILE.size :]:
            raise DamagedHeaders(f"{path} is damaged: delete it; the arena beside it cannot be adopted")
        magic, version, record_bytes, generation, clears, _, arena_bytes = _FILE.unpack_from(own)
        if (magic, version, record_bytes) != (_MAGIC, VERSION, RECORD_BYTES):
            raise DamagedHeaders(f"{path} has version {version}, this lmcache reads version {VERSION}: delete it")
        found = [
            header
            for offset, record in _records(descriptor)
            if (header := _complete(record, generation, clears)) is not None
            and header.sector * RECORD_BYTES + _FIRST_RECORD == offset
            and header.sector * _SECTOR_BYTES + header.stored_bytes <= arena_bytes
        ]
    finally:
        os.close(descriptor)
    return found


def _complete(record: bytes, generation: bytes, clears: int) -> ExtentHeader | None:
    if _CRC.pack(zlib.crc32(record[: _RECORD.size])) != record[_RECORD.size : _RECORD.size + _CRC.size]:
        return None
    _, version, state, of, when, sector, stored_bytes, shard, shards, *names = _RECORD.unpack_from(record)
    if (version, state, of, when) != (VERSION, COMMITTED, generation, clears & 0xFFFFFFFF):
        return None
    return ExtentHeader(sector, stored_bytes, shard, shards, *names)


def _records(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of each possible record. Holes of the sparse file are skipped."""
    end, at = os.fstat(descriptor).st_size, _FIRST_RECORD
    while at < end:
        try:
            at = max(at, os.lseek(descriptor, at, os.SEEK_DATA))
        except OSError:  # only a hole is left
            return
        at -= (at - _FIRST_RECORD) % RECORD_BYTES
        block = os.pread(descriptor, _READ_BYTES, at)
        place = block.find(_RECORD_MAGIC)
        while place >= 0:
            if place % RECORD_BYTES == 0:
                yield at + place, block[place : place + RECORD_BYTES]
            place = block.find(_RECORD_MAGIC, place + 1)
        at += _READ_BYTES
