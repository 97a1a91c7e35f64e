"""Reading and changing what a disk tier has written, behind its back."""

from __future__ import annotations

import os
from pathlib import Path

from lmcache.tiers import ShardKey
from lmcache.tiers.disk.segments import is_large, offset_of
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import blocks
from lmcache.tiers.frame import HEADER_BYTES


def where(tier: DiskTier, key: ShardKey) -> tuple[Path, int, int, int]:
    """(file, offset of the header, offset of the payload, bytes of the payload) of a shard that is there."""
    row = tier._index.find(key.packed)
    assert row
    place, size = tier._index.place(row), tier._index.payload(row)
    at = offset_of(place)
    header, payload = (at + blocks(size), at) if is_large(size) else (at, at + HEADER_BYTES)
    return tier._segments[place].path, header, payload, size


def stored_frame(tier: DiskTier, key: ShardKey) -> bytes:
    path, header, payload, size = where(tier, key)
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, HEADER_BYTES, header) + os.pread(fd, size, payload)
    finally:
        os.close(fd)


def replace_frame(tier: DiskTier, key: ShardKey, stored: bytes) -> None:
    """What is missing at the end becomes zeros, as where a file was cut and grew again."""
    path, header, payload, size = where(tier, key)
    stored = stored[: HEADER_BYTES + size].ljust(HEADER_BYTES + size, b"\0")
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, stored[:HEADER_BYTES], header)
        os.pwrite(fd, stored[HEADER_BYTES:], payload)
    finally:
        os.close(fd)


def filesystem_bytes(folder: Path) -> int:
    """Blocks of all files of a folder and of its folders, as du says."""
    total = 0
    for path in [folder, *folder.rglob("*")]:
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            pass  # gone meanwhile
    return total
