"""Slot headers: what a server that was killed had committed can be told exactly, and nothing else."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from extent_headers import DamagedHeaders, ExtentHeader, OpenReservation, may_write, read_headers
from lmcache.cache.l1 import first_number
from lmcache.chunks import Layout
from lmcache.engine.proofs import prove
from lmcache.errors import ConfigError
from lmcache.memory.arena import Arena, reclaim_stale
from lmcache.memory.headers import RECORD_BYTES, Headers, Writer
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier, ZmqCarrier
from servers import PATIENCE, Raw, Server

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
    assert read_headers(headers.path).extents == written
    headers.freed([2, 8000, 5])
    again = commit(headers, [8000], first_key=77)
    assert read_headers(headers.path).extents == [written[0], written[2], again[0], written[4]]
    headers.cleared()
    assert read_headers(headers.path).extents == []
    assert read_headers(headers.path).extents == [] and commit(headers, [4]) == read_headers(headers.path).extents


def test_it_is_private_and_sparse_and_gone_at_the_end(tmp_path: Path) -> None:
    headers = Headers(tmp_path / "big.headers", b"a" * 16, 1 << 40)
    written = commit(headers, [1 << 20, 200 << 20])
    status = os.stat(headers.path)
    assert status.st_mode & 0o777 == 0o600 and status.st_blocks * 512 <= 64 << 10
    begin = time.thread_time()
    assert read_headers(headers.path).extents == written
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
    assert read_headers(headers.path).extents == [written[number] for number in range(200) if number not in hurt]


def test_records_of_another_place_or_generation_do_not_count(headers: Headers, tmp_path: Path) -> None:
    commit(headers, [3])
    data = bytearray(headers.path.read_bytes())
    record = data[4096 + 3 * RECORD_BYTES :].ljust(RECORD_BYTES, b"\0")
    headers.path.write_bytes(data.ljust(4096 + 9 * RECORD_BYTES, b"\0") + record)
    assert [header.sector for header in read_headers(headers.path).extents] == [3]
    other = Headers(tmp_path / "two.headers", b"a" * 16, ARENA_BYTES)
    commit(other, [5])
    mixed = bytearray(other.path.read_bytes())
    mixed[4096 + 3 * RECORD_BYTES : 4096 + 4 * RECORD_BYTES] = record
    other.path.write_bytes(mixed)
    assert [header.sector for header in read_headers(other.path).extents] == [5]


def test_a_file_that_is_not_ours_is_not_used(headers: Headers, tmp_path: Path) -> None:
    data = bytearray(headers.path.read_bytes())
    data[10] ^= 1
    for content in (b"", b"x" * 5000, bytes(data)):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(DamagedHeaders):
            read_headers(tmp_path / "other")


ME = Writer.of()


def test_open_reservations_are_told_until_they_end(headers: Headers) -> None:
    """Through clears, and through a time when the file was void; those that are open then count again."""
    many = OpenReservation(4096, tuple(range(16384)), ME)
    few = OpenReservation(5000, (16000, 3), ME._replace(pid=1))
    headers.opened(7, 4096, many.sectors, ME)
    headers.opened(8, 5000, few.sectors, few.writer)
    assert read_headers(headers.path).open == [many, few]
    headers.ended(7)
    headers.cleared()
    assert read_headers(headers.path).open == [few]
    for number in (9, 10):
        headers.opened(number, 4096, [number], ME)
    headers.void()
    headers.opened(11, 4096, [11], ME)
    headers.ended(10)
    with pytest.raises(DamagedHeaders):
        read_headers(headers.path)
    headers.cleared()
    assert {one.sectors for one in read_headers(headers.path).open} == {(16000, 3), (9,), (11,)}
    assert headers.path.stat().st_blocks * 512 <= 1 << 20


def test_a_damaged_entry_makes_the_file_useless(headers: Headers) -> None:
    """Its extents may still be written to, and nobody knows which they are."""
    headers.opened(1, 4096, [5, 9], ME)
    data = bytearray(headers.path.read_bytes())
    data[data.rindex((9).to_bytes(4, "little"))] ^= 1
    headers.path.write_bytes(data)
    with pytest.raises(DamagedHeaders, match="which processes may still write"):
        read_headers(headers.path)


def test_without_room_for_an_entry_nothing_counts(headers: Headers, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(headers, [3])
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        headers.opened(1, 4096, [5], ME)
    with pytest.raises(DamagedHeaders):
        read_headers(headers.path)


def test_a_writer_is_known_by_more_than_its_pid() -> None:
    child = subprocess.Popen(["sleep", "600"])
    writer = Writer.of(child.pid)
    assert may_write(ME) and may_write(writer)
    assert not may_write(writer._replace(start=writer.start + 1)), "another process has its pid now"
    assert may_write(writer._replace(start=writer.start + 1, namespace=1)), "who knows what that pid means there"
    assert may_write(Writer.of(0)), "who knows"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not may_write(writer), "it has ended, though its parent has not asked"
    child.wait()
    assert not may_write(writer) and Writer.of(child.pid).start == 0


def test_no_two_epochs_of_an_arena_have_a_number_in_common() -> None:
    """Nor do they get beyond what a message can hold."""
    for arena_id in (bytes(16), b"\xff" * 16, os.urandom(16)):
        numbers = sorted(first_number(arena_id, epoch) for epoch in range(1, 1000))
        assert min(b - a for a, b in itertools.pairwise(numbers)) >= 1 << 36
        assert numbers[0] > 0 and numbers[-1] + (1 << 36) <= 1 << 63


def test_a_server_killed_during_a_fill_leaves_word_of_who_writes(server, engine_process) -> None:
    killed: Server = server(l1=8)
    process, ids = engine_process(killed, num_blocks=64), list(range(640))
    process.ask("store", ids=ids)
    process.ask("pause", what="gather")
    process.say(do="store", ids=[9, *ids])
    assert process.hear() == {"midway": True}
    killed.clear()
    killed.kill()
    (path,) = killed.arena_dir.glob("*.headers")
    left = read_headers(path)
    (fill,) = left.open
    assert (left.epoch, left.extents, len(fill.sectors), fill.stored_bytes) == (1, [], 40, 4096)
    assert fill.writer == Writer.of(process.pid) and may_write(fill.writer)
    process.kill()
    assert not may_write(fill.writer), "nobody writes there any more"


def test_a_session_that_writes_into_the_arena_itself_from_now_on_is_the_writer(server) -> None:
    """The server has written for it before, and has kept its number."""
    killed: Server = server(l1=8)
    hello = m.Hello(m.PROTOCOL_VERSION, "test", "one", "worker", 0, os.getpid(), session=bytes(16))
    door = ZmqCarrier(killed.address)
    welcome = door.exchange(hello, PATIENCE)[0]
    proof = prove(door, welcome, hello, False)
    assert isinstance(door.exchange(msgspec.structs.replace(hello, payload=True, proof=proof), PATIENCE)[0], m.Welcome)
    mapped = UnixCarrier(welcome.socket_path, hello, PATIENCE)
    layout = Layout("r", "bfloat16", 1, 1, 64, 16, kind="mla")
    space = mapped.exchange(m.Register(layout, 1, 0, 2048), PATIENCE)[0].space
    assert mapped.exchange(m.Reserve(space, 0, b"", True, bytes(16)), PATIENCE)[0].reservation
    assert len(killed.status()["engines"]) == 1
    killed.kill()
    (path,) = killed.arena_dir.glob("*.headers")
    assert [fill.writer for fill in read_headers(path).open] == [Writer.of()]
    os.close(mapped.descriptor)
    mapped.close()
    door.close()


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
    found = read_headers(path).extents
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
    assert len(read_headers(path).extents) == 1
    one.clear()
    assert read_headers(path).extents == []
    client.close()
    assert one.end() == 0
    assert list(one.arena_dir.iterdir()) == []
