"""Slot headers: what a server that was killed had committed can be told exactly, and nothing else."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.memory.arena import Arena, reclaim_stale
from lmcache.memory.headers import RECORD_BYTES, DamagedHeaders, ExtentHeader, Headers, read_headers
from servers import Raw, Server

ARENA_BYTES = 64 << 20
FINGERPRINT = b"f" * 16


@pytest.fixture
def headers(tmp_path: Path) -> Headers:
    return Headers(tmp_path / "one.headers", b"a" * 16, ARENA_BYTES)


def commit(headers: Headers, sectors: list[int], first_key: int = 0) -> list[ExtentHeader]:
    keys = [key.to_bytes(16, "big") for key in range(first_key, first_key + len(sectors))]
    parents = [bytes(16), *keys[:-1]]
    headers.committed(FINGERPRINT, 2, 1, 5000, sectors, b"".join(keys), b"".join(parents))
    return [
        ExtentHeader(sector, 5000, 1, 2, FINGERPRINT, key, parent)
        for sector, key, parent in zip(sectors, keys, parents, strict=True)
    ]


def test_what_is_committed_and_not_freed_is_read(headers: Headers) -> None:
    written = commit(headers, [0, 2, 4, 8000, 16382])
    assert read_headers(headers.path) == written
    headers.freed([2, 8000, 5])
    again = commit(headers, [8000], first_key=77)
    assert read_headers(headers.path) == [written[0], written[2], again[0], written[4]]
    headers.cleared()
    assert read_headers(headers.path) == []
    assert read_headers(headers.path) == [] and commit(headers, [4]) == read_headers(headers.path)


def test_it_is_private_and_sparse_and_gone_at_the_end(tmp_path: Path) -> None:
    headers = Headers(tmp_path / "big.headers", b"a" * 16, 1 << 40)
    written = commit(headers, [1 << 20, 200 << 20])
    status = os.stat(headers.path)
    assert status.st_mode & 0o777 == 0o600 and status.st_blocks * 512 <= 64 << 10
    begin = time.thread_time()
    assert read_headers(headers.path) == written
    assert time.thread_time() - begin < 5.0, "a terabyte of zeros would take minutes"
    headers.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError):
        Headers(tmp_path / "no such folder" / "x", b"a" * 16, ARENA_BYTES)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_record_is_passed_over(headers: Headers, seed: int) -> None:
    dice = random.Random(seed)
    written = commit(headers, list(range(0, 400, 2)))
    data = bytearray(headers.path.read_bytes())
    hurt = dice.sample(range(200), 40)
    for number in hurt:
        data[4096 + 2 * number * RECORD_BYTES + dice.randrange(88)] ^= 1 << dice.randrange(8)
    headers.path.write_bytes(data)
    assert read_headers(headers.path) == [written[number] for number in range(200) if number not in hurt]


def test_records_of_another_place_or_generation_do_not_count(headers: Headers, tmp_path: Path) -> None:
    commit(headers, [3])
    data = bytearray(headers.path.read_bytes())
    record = data[4096 + 3 * RECORD_BYTES :].ljust(RECORD_BYTES, b"\0")
    headers.path.write_bytes(data.ljust(4096 + 9 * RECORD_BYTES, b"\0") + record)
    assert [header.sector for header in read_headers(headers.path)] == [3]
    other = Headers(tmp_path / "two.headers", b"a" * 16, ARENA_BYTES)
    commit(other, [5])
    mixed = bytearray(other.path.read_bytes())
    mixed[4096 + 3 * RECORD_BYTES : 4096 + 4 * RECORD_BYTES] = record
    other.path.write_bytes(mixed)
    assert [header.sector for header in read_headers(other.path)] == [5]


def test_a_file_that_is_not_ours_is_not_used(headers: Headers, tmp_path: Path) -> None:
    data = bytearray(headers.path.read_bytes())
    data[10] ^= 1
    for content in (b"", b"x" * 5000, bytes(data)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DamagedHeaders):
            read_headers(tmp_path / "other")


def test_stale_headers_go_with_their_arena(tmp_path: Path) -> None:
    live = Arena(tmp_path, 1 << 20)
    assert len(list(tmp_path.iterdir())) == 2
    dead = tmp_path / f"lmcache-{os.getuid()}-{'0' * 32}.arena"
    dead.write_bytes(bytes(4096))
    for stale in (dead.name, f"lmcache-{os.getuid()}-{'1' * 32}.arena"):
        (tmp_path / f"{stale}.headers").write_bytes(b"")
    reclaim_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([live.path, live.headers.path])
    live.close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_server_leaves_exactly_what_was_committed(server, raw) -> None:
    """Half of what was stored has been evicted, and a store is under way: then kill -9."""
    killed: Server = server(l1=1.5, chunk=16)
    client: Raw = raw(killed, shard_bytes=12288)  # 128 slots
    dice = random.Random(1)
    keys = [dice.randbytes(16) for _ in range(200)]
    for at in range(0, 200, 10):
        assert client.store(b"".join(keys[at : at + 10])) == 10
    unfinished = client.reserve(dice.randbytes(32))
    assert unfinished.reservation
    there = {key for key in keys if client.hits(key)}
    assert 120 <= len(there) <= 128
    killed.kill()
    (path,) = killed.arena_dir.glob("*.headers")
    found = read_headers(path)
    assert {header.key for header in found} == there and len(found) == len(there)
    parents = {key: keys[at - 1] if at % 10 else bytes(16) for at, key in enumerate(keys)}
    for header in found:
        assert (header.parent, header.shard, header.shards) == (parents[header.key], 0, 1)
        assert header.stored_bytes == 12288 and header.sector % 3 == 0
    server(l1=1.5, chunk=16)
    assert not path.exists() and len(list(killed.arena_dir.iterdir())) == 2


def test_clearing_and_a_clean_stop_leave_nothing(server, raw) -> None:
    one: Server = server(l1=1.5, chunk=16)
    client: Raw = raw(one)
    client.store(bytes(16))
    (path,) = one.arena_dir.glob("*.headers")
    assert len(read_headers(path)) == 1
    one.clear()
    assert read_headers(path) == []
    client.close()
    assert one.end() == 0
    assert list(one.arena_dir.iterdir()) == []
