"""Large frames read by native code: the same checksums and outcomes as by Python, one by one or together."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import xxhash
from disk_files import replace_frame, stored_frame, where
from filesystems import FaultyFilesystem

from lmcache.compiled import native
from lmcache.testing.conformance import corrupted, payload_of, shard_key
from lmcache.tiers import ABSENT, OK, Shard, ShardKey, frame
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import BLOCK_BYTES, Filesystem, address_of, blocks

MIB = 1 << 20
SIZES = (65_536, 65_537, 69_631, 69_632, 200_000, 524_288, MIB, 3 * MIB + 1000)


@pytest.fixture
def memory() -> Iterator[memoryview]:
    """Aligned, as the arena's slots are."""
    with mmap.mmap(-1, 32 * MIB) as mapped:
        view = memoryview(mapped)
        yield view
        view.release()


def layout(sizes: Sequence[int]) -> list[int]:
    """Where frames of these payloads begin in a file, and where the last one ends."""
    at = [0]
    for size in sizes:
        at.append(at[-1] + blocks(size) + BLOCK_BYTES)
    return at


def write(path: Path, sizes: Sequence[int]) -> list[bytes]:
    """Frames as a segment has them; their payloads."""
    payloads = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    with path.open("wb") as file:
        for number, (at, payload) in enumerate(zip(layout(sizes), payloads, strict=False)):
            file.seek(at)
            file.write(payload)
            file.seek(at + blocks(len(payload)))
            file.write(frame.make_header(shard_key(number), bytes(16), payload).ljust(BLOCK_BYTES, b"\0"))
    return payloads


def read(
    path: Path, sizes: Sequence[int], memory: memoryview, piece: int, flags: int = 0
) -> list[tuple[int, bytes, bytes]]:
    starts, address = layout(sizes), address_of(memory)
    asked = [(starts[number], size, address + starts[number]) for number, size in enumerate(sizes)]
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return Filesystem().read_frames(fd, asked, piece)
    finally:
        os.close(fd)


@pytest.mark.parametrize("piece", [BLOCK_BYTES, 64 << 10, 512 << 10, 8 * MIB])
def test_the_library_says_the_same(tmp_path: Path, memory: memoryview, piece: int) -> None:
    dice = random.Random(piece)
    sizes = [*SIZES, *(dice.randrange(BLOCK_BYTES, 300_000) for _ in range(40))]
    payloads = write(tmp_path / "frames", sizes)
    for at, payload, (error, header, digest) in zip(
        layout(sizes), payloads, read(tmp_path / "frames", sizes, memory, piece), strict=False
    ):
        assert error == 0
        assert memory[at : at + len(payload)] == payload
        assert digest == xxhash.xxh3_128_digest(payload + header[:112]) == header[112:]


def test_a_short_file_costs_what_lies_behind_its_end(tmp_path: Path, memory: memoryview) -> None:
    sizes = [100_000] * 8
    write(tmp_path / "frames", sizes)
    os.truncate(tmp_path / "frames", layout(sizes)[5] - 100)  # in the fifth one's last block, behind its header
    told = read(tmp_path / "frames", sizes, memory, 8 * MIB)
    assert [error for error, _, _ in told] == [0] * 4 + [-1] * 4
    assert all(digest == header[112:] for _, header, digest in told[:4])


def test_an_error_is_told_by_its_number(tmp_path: Path, memory: memoryview) -> None:
    write(tmp_path / "frames", SIZES)
    told = read(tmp_path / "frames", SIZES, memory, MIB, os.O_PATH)
    assert [error for error, _, _ in told] == [errno.EBADF] * len(SIZES)


def test_what_makes_no_sense_is_refused() -> None:
    assert native.read_frames(0, b"", BLOCK_BYTES) == b""
    one = (0).to_bytes(8, "little") + (4095).to_bytes(8, "little") + bytes(8)
    for frames, piece in ((one[:-1], BLOCK_BYTES), (one, BLOCK_BYTES), (b"", 0), (b"", 5000)):
        with pytest.raises(ValueError, match="read_frames"):
            native.read_frames(0, frames, piece)


@pytest.mark.parametrize("io", ["buffered", "auto"])
def test_damage_has_the_same_names(tmp_path: Path, memory: memoryview, io: str) -> None:
    outcomes = [
        list(damaged_loads(tmp_path / str(number), memory, io, filesystem))
        for number, filesystem in enumerate((Filesystem(), FaultyFilesystem()))  # the latter reads by Python
    ]
    assert outcomes[0] == outcomes[1]
    seen = {one for some in outcomes[0] for one in some}
    assert {OK, frame.CHECKSUM, frame.OTHER_SHARD, frame.TRUNCATED} <= seen


def damaged_loads(folder: Path, memory: memoryview, io: str, filesystem: Filesystem) -> Iterator[list[str]]:
    """What loads of a few shards say, of which one is damaged."""
    dice = random.Random(1)
    tier = DiskTier(folder, 64 * MIB, io, filesystem=filesystem)
    tier.open()
    try:
        for turn in range(60):
            keys = [shard_key(4 * turn + number) for number in range(4)]
            sizes = [dice.choice((65_536, 70_000, 131_072)) for _ in keys]
            store(tier, keys, sizes)
            bad, other = dice.sample(keys, 2)
            if turn == 59:
                path, header, _, _ = where(tier, keys[3])
                os.truncate(path, header)
            else:
                replace_frame(tier, bad, corrupted(stored_frame(tier, bad), stored_frame(tier, other), dice))
            into = [memory[number * MIB :][:size] for number, size in enumerate(sizes)]
            said = tier.load(keys, into)
            for key, buffer, outcome in zip(keys, into, said, strict=True):
                assert outcome != OK or buffer == payload_of(key, buffer.nbytes)
                assert outcome == OK or tier.load([key], [memory[:65_536]]) == [ABSENT]
            yield said
    finally:
        tier.close()


def store(tier: DiskTier, keys: Sequence[ShardKey], sizes: Sequence[int]) -> None:
    shards = [Shard(key, bytes(16), memoryview(payload_of(key, size))) for key, size in zip(keys, sizes, strict=True)]
    assert tier.store(shards) == [OK] * len(keys)


@pytest.mark.parametrize("io", ["buffered", "auto"])
@pytest.mark.parametrize("secret", [b"", bytes(32)], ids=["plain", "keyed"])
def test_memory_need_not_be_aligned(tmp_path: Path, memory: memoryview, io: str, secret: bytes) -> None:
    tier = DiskTier(tmp_path / "tier", 64 * MIB, io, secret)
    tier.open()
    try:
        keys = [shard_key(number) for number in range(4)]
        store(tier, keys, [200_000] * 4)
        into = [memory[number * MIB + number :][:200_000] for number in range(4)]
        assert tier.load(keys, into) == [OK] * 4
        assert into == [payload_of(key, 200_000) for key in keys]
        replace_frame(
            tier, keys[1], corrupted(stored_frame(tier, keys[1]), stored_frame(tier, keys[2]), random.Random(1))
        )
        assert [outcome == OK for outcome in tier.load(keys, into)] == [True, False, True, True]
    finally:
        tier.close()
