"""Extent headers: a file beside the arena that records which shard each extent holds, and which extents may still be written. A
later server reads it after a crash.

The file lies in /dev/shm if the arena is on a hugetlbfs, whose files cannot be written to. Engines do not get this file, so only
the user can change its contents. The file begins with a header of its own (4 KiB).
One record of fixed size follows for each sector of the arena; an extent's record is that of its first sector. The file is sparse:
only extents take memory, 4 KiB for an extent of 170 KiB or more. The server writes records and does not map them, because a write
to a full memory file system returns an error where an access to a mapping would kill the process. A record is valid when its
checksum is right and its generation and number of clears are those of the file, so clearing costs one write. Little-endian:

    file    magic 8, version u32, record bytes u32, generation 8, clears u64, arena id 16, arena bytes u64, epoch u64, crc32 u32
    record  magic 4, version u16, state u16, generation 8, clears u32, sector u32, stored bytes u64, shard u16, shards u16,
            space fingerprint 16, chunk key 16, parent key 16 (zeros before the first chunk), crc32 u32

After the records, each open reservation has entries of a fixed stride, which a clear does not remove. Extents are granted only
after their entry has been written, the page with its magic last; a process is not killed within a page that the kernel writes.
So an entry with a magic and a wrong checksum means that the file is damaged.

    entry   magic 4, sectors u32, generation 8, stored bytes u64 (of each extent), writer: pid u64, start u64, pid namespace u64,
            first sector of each extent u32, crc32 u32

The *epoch* counts the servers that have owned the arena. Each server begins a new epoch, in which earlier claims are not valid.
"""

from __future__ import annotations

import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lmcache.errors import ConfigError
from lmcache.memory.huge_pages import mount_of
from lmcache.memory.slabs import SECTOR_BYTES
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

SUFFIX = ".headers"
RECORD_BYTES = 96
VERSION = 2
COMMITTED = 1
_MAGIC, _RECORD_MAGIC, _ENTRY_MAGIC = b"lmcachHD", b"LMsl", b"LMop"
_PAGE_BYTES = 4096
_FIRST_RECORD = _PAGE_BYTES
_FILE = struct.Struct("<8sII8sQ16sQQ")
_RECORD = struct.Struct("<4sHH8sIIQHH16s16s16s")
_ENTRY = struct.Struct("<4sI8sQQQQ")
_ENTRY_BYTES = 17 << 12
_ENTRY_SECTORS = 16 << 10
_CRC = struct.Struct("<I")
_NOTHING = bytes(8)


def beside(arena: Path) -> Path:
    """Return the path of the header file that belongs to this arena."""
    if mount_of(arena.parent).is_hugetlbfs:
        # Without ".arena", since a server with its arena in /dev/shm removes the headers that have no arena there.
        return Path("/dev/shm", arena.stem + SUFFIX)
    return arena.with_name(arena.name + SUFFIX)


class Writer(NamedTuple):
    """A process that may write to extents. `start`: its start in clock ticks after the boot, 0 if unknown; it distinguishes
    processes that have had the same pid. `namespace`: the inode of the pid namespace of `pid`."""

    pid: int
    start: int
    namespace: int

    @classmethod
    def of(cls, pid: int | None = None) -> Writer:
        """Return the writer with this pid in our pid namespace. 0: it has no pid there. None: this process."""
        pid = os.getpid() if pid is None else pid
        return cls(pid, _start_of(pid), _namespace())


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _start_of(pid: int) -> int:
    """Return the start of the process in clock ticks after the boot; 0 if there is no such process, or if it is a zombie."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(fields[18])
    return 0


class Headers:
    """The header file of a running server, which is the `epoch`th server of the arena.

    Raises:
        ConfigError: the file cannot be created.
    """

    def __init__(self, path: Path, arena_id: bytes, arena_bytes: int, epoch: int = 1) -> None:
        self.path, self.epoch = path, epoch
        self.unwritten = 0
        """How many header writes failed. Their extents are usable, but a server that adopts the arena does not find them."""
        self._arena_id, self._arena_bytes = arena_id, arena_bytes
        self._generation = secrets.token_bytes(8)
        self._clears = 0
        self._void = False
        self._open: dict[int, list[tuple[int, bytes]]] = {}
        """Number of an open reservation -> (offset, bytes) of each of its entries."""
        self._free_entries: list[int] = []
        self._entries = _entries_at(arena_bytes)
        """Offset of the next new entry."""
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

    def opened(self, number: int, stored_bytes: int, sectors: Sequence[int], writer: Writer) -> None:
        """Record that these extents are about to be granted to the writer. If the entry cannot be written, all headers become
        void until the next clear, since a later server would not know that the extents may be written to."""
        entries = self._open[number] = []
        for at in range(0, len(sectors), _ENTRY_SECTORS):
            own = sectors[at : at + _ENTRY_SECTORS]
            entry = _ENTRY.pack(_ENTRY_MAGIC, len(own), self._generation, stored_bytes, *writer)
            entry += struct.pack(f"<{len(own)}I", *own)
            if self._free_entries:
                place = self._free_entries.pop()
            else:
                place, self._entries = self._entries, self._entries + _ENTRY_BYTES
            entries.append((place, entry + _CRC.pack(zlib.crc32(entry))))
        try:
            self._write_entries(entries)
        except OSError as error:
            self._report_unwritten(error)
            self.void()

    def ended(self, number: int) -> None:
        """Record that no process writes to the extents of this reservation any more."""
        for place, _ in self._open.pop(number):
            self._free_entries.append(place)
            os.pwrite(self._descriptor, _NOTHING, place)

    def cleared(self) -> None:
        """Invalidate all records with one write."""
        self._clears += 1
        if self._void:
            for entries in self._open.values():
                self._write_entries(entries)
        self._write_own()
        self._void = False

    def void(self) -> None:
        """Invalidate the file until the next clear, because some records may be wrong."""
        self._void = True
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            self._report_unwritten(error)

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _write_entries(self, entries: list[tuple[int, bytes]]) -> None:
        for place, entry in entries:
            if len(entry) > _PAGE_BYTES:
                os.pwrite(self._descriptor, entry[_PAGE_BYTES:], place + _PAGE_BYTES)
            os.pwrite(self._descriptor, entry[:_PAGE_BYTES], place)

    def _write_own(self) -> None:
        header = _FILE.pack(
            _MAGIC, VERSION, RECORD_BYTES, self._generation, self._clears, self._arena_id, self._arena_bytes, self.epoch
        )
        os.pwrite(self._descriptor, header + _CRC.pack(zlib.crc32(header)), 0)

    def _report_unwritten(self, error: OSError) -> None:
        if not self.unwritten:
            logger.warning("%s: cannot write extent headers, so later servers lose these extents: %s", self.path, error)
        self.unwritten += 1


def _entries_at(arena_bytes: int) -> int:
    """Return the offset of the first entry: after the records of all sectors, rounded up to 4 KiB."""
    return -(-(_FIRST_RECORD + arena_bytes // SECTOR_BYTES * RECORD_BYTES) // _FIRST_RECORD) * _FIRST_RECORD
