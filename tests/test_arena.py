"""The arena: its size is a cap, its pages are there before they are handed out, and no crash leaves it behind."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import struct
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from lmcache.cache import L1, Refusal
from lmcache.chunks import Layout
from lmcache.engine import connection
from lmcache.errors import ConfigError
from lmcache.memory import arena as arenas
from lmcache.memory.arena import Arena, ArenaFull, Mapping, reclaim_stale
from lmcache.memory.slabs import NO_EXTENT, SECTOR_BYTES
from lmcache.server.loop import Loop
from lmcache.server.service import Service
from lmcache.server.sessions import Peer
from lmcache.wire import messages as m
from servers import PATIENCE, eventually

STEP = arenas._STEP_BYTES


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.arena"))


@pytest.fixture
def memory(folders):
    return folders("/dev/shm")


def test_the_size_is_a_cap_and_its_memory_comes_in_the_background(server):
    cache = server(l1=48)
    (path,) = cache.arena_dir.glob("*.arena")
    assert path.stat().st_mode & 0o777 == 0o600
    eventually(lambda: cache.status()["arena"]["backed_bytes"] == 48 << 20)
    assert path.stat().st_size == path.stat().st_blocks * 512 == 48 << 20


def test_a_clean_stop_leaves_nothing(server, engine):
    cache = server(l1=48)
    one = engine(cache)
    one.store(list(range(640)))
    assert cache.end() == 0
    assert files(cache.arena_dir) == [] and files(cache.socket_dir) == []


def test_a_killed_servers_arena_is_reclaimed_while_an_engine_maps_it(server, engine, monkeypatch):
    """Its lock must not live on in what the engine mapped; and what the engine mapped must not go from under it."""
    monkeypatch.setattr(connection, "GONE_SECONDS", 3600.0)  # however long the second server takes to start
    first, ids = server(l1=48), list(range(1600))
    one = engine(first)
    one.store(ids)
    hit = one.lookup(ids)
    (stale,) = first.arena_dir.glob("*.arena")
    first.kill()
    eventually(lambda: not one.worker.connected)
    second = server(l1=48)
    assert not stale.exists()
    assert [name.rpartition(".")[2] for name in files(second.socket_dir)] == ["cookie", "sock"], "of the new one only"
    assert one.load(ids, hit=hit) == 1600, "pages stay until the last one has let go"
    assert held_bytes(second.arena_dir) <= 48 << 20


def test_a_live_servers_arena_is_left_alone(server, engine):
    first, second = server(l1=48), server(l1=48)
    one, two, ids = engine(first, "one"), engine(second, "two"), list(range(320))
    one.store(ids)
    assert two.lookup(ids) is None
    two.store(ids)
    first.freeze()  # even one that does not answer
    third = server(l1=48)
    first.thaw()
    assert len(list(first.arena_dir.glob("*.arena"))) == len(list(first.socket_dir.glob("*.sock"))) == 3
    assert one.load(ids) == two.load(ids) == 320
    assert first.healthy() and second.healthy() and third.healthy()


def test_a_starting_servers_file_is_not_taken_for_a_dead_ones(memory):
    arena = Arena(memory, 1 << 20)
    young = memory / f"lmcache-{os.getuid()}-{'0' * 32}.arena"
    young.touch(0o600)
    assert reclaim_stale(memory) == 0 and young.exists() and arena.path.exists()
    os.utime(young, (1, 1))
    reclaim_stale(memory)
    assert not young.exists() and arena.path.exists()
    arena.close()
    assert files(memory) == []


def test_only_what_is_handed_out_is_backed(memory):
    """Slots at the arena's end must not cost the pages of all that lies below."""
    arena = Arena(memory, 8 * STEP + 4096 + 4095)  # no full page more
    assert arena.size_bytes == 8 * STEP + 4096
    assert held_bytes(memory) == 0
    arena.back([7 * STEP + 8192], 4096)
    assert arena.backed_bytes == held_bytes(memory) == STEP
    arena.back([STEP - 4096, 8 * STEP], 4096)
    assert arena.backed_bytes == held_bytes(memory) == 2 * STEP + 4096
    arena.back([STEP - 4096], 8192)  # a slot over an edge
    assert arena.backed_bytes == held_bytes(memory) == 3 * STEP + 4096
    arena.start_prefault()
    eventually(lambda: arena.backed_bytes == arena.size_bytes)
    assert held_bytes(memory) == arena.size_bytes
    arena.close()


def test_touching_stands_aside_where_others_need_the_cores(monkeypatch):
    """After a step that took longer than it worked; and at normal priority, for whoever waits for it waits no longer then."""

    class Stop:
        pauses: ClassVar[list[float]] = []
        is_set = staticmethod(lambda: False)
        wait = pauses.append

    wall, cpu = iter([0, 0.002, 1, 1.005, 2, 3]), iter([0, 0.0018, 1, 1.003, 2, 2.1])
    monkeypatch.setattr(arenas, "time", SimpleNamespace(perf_counter=wall.__next__, thread_time=cpu.__next__))
    steps = list(arenas._patient_steps(2 * STEP + 4096, Stop))
    assert steps == [(0, STEP), (STEP, STEP), (2 * STEP, 4096)]
    assert Stop.pauses == [pytest.approx(20 * 0.002), 0.25]


def test_no_thread_of_a_server_has_less_priority(server):
    """It could be kept from the cores while it holds the interpreter, and the server with it."""
    cache = server(l1=256)
    found = set()
    for thread in Path(f"/proc/{cache.pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it may have touched everything, and be gone
            found.add(os.getpriority(os.PRIO_PROCESS, int(thread.name)))
    assert found == {os.getpriority(os.PRIO_PROCESS, 0)}


def test_a_file_shorter_than_announced_is_not_mapped(memory):
    """Touching what lies beyond a file's end kills a process."""
    path = memory / "short"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file:
        for size in (8192, 1 << 62, 0, -1):
            with pytest.raises(ValueError, match="announced"):
                Mapping(file.fileno(), size)
        mapping = Mapping(file.fileno(), 4096)
    stop = threading.Event()
    arenas.populate_all(mapping, stop)
    assert bytes(mapping.view(0, 16)) == bytes(16)
    mapping.close()


def test_views_that_others_hold_are_no_trouble_at_the_end(memory):
    path = memory / "arena"
    path.write_bytes(bytes(8192))
    with open(path, "r+b") as file:
        forgotten, held = Mapping(file.fileno(), 4096), Mapping(file.fileno(), 4096)
    gc.disable()
    try:
        cycle = [forgotten.view(0, 16)]
        cycle.append(cycle)
        view = held.view(0, 16)
        del cycle
        for mapping in (forgotten, held):
            mapping.close()
    finally:
        gc.enable()
    assert forgotten._map.closed and not held._map.closed and bytes(view) == bytes(16)


def test_a_folder_that_cannot_be_used_is_named(memory):
    with pytest.raises(ConfigError, match="--arena-dir"):
        Arena(memory / "nowhere", 1 << 20)


@pytest.fixture
def tiny(memory):
    """A tmpfs of 24 MiB."""
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(memory)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr!r}")
    yield memory
    subprocess.run(["umount", "-l", str(memory)], check=True)


def test_a_full_tmpfs_is_a_clear_error(tiny):
    arena = Arena(tiny, 40 << 20)
    with pytest.raises(ArenaFull, match=r"is full: it holds only 2[0-4] MiB.*smaller --l1-size-gb"):
        arena.back(range(0, 40 << 20, STEP), 4096)
    backed = arena.backed_bytes
    assert 20 << 20 <= backed <= 24 << 20
    arena.start_prefault()
    arena._thread.join(PATIENCE)
    assert not arena._thread.is_alive() and arena.backed_bytes == backed
    arena.mapping.view(0, backed)[:] = b"x" * backed
    arena.close()
    assert files(tiny) == []


def test_a_full_tmpfs_makes_a_smaller_cache(tiny):
    arena, loop, answers = Arena(tiny, 40 << 20), Loop(), []
    service = Service(loop, L1(arena), 16, None)
    peer = Peer("test")

    def ask(request):
        service.handle(peer, request, [], lambda answer, _: answers.append(answer))
        return answers[-1]

    ask(m.Hello(m.PROTOCOL_VERSION, "", "i", "worker", 0, 1))
    space = ask(m.Register(Layout("big", "bfloat16", 1, 1, 64, 16, kind="mla"), 1, 0, 1 << 20)).space
    prompts = [b"".join(bytes([prompt, n]) * 8 for n in range(30)) for prompt in range(3)]
    for prompt in prompts:
        granted = ask(m.Reserve(space, 0, b"", True, prompt))
        sectors = [sector for (sector,) in struct.iter_unpack("<I", granted.extents) if sector != NO_EXTENT]
        assert 16 <= len(sectors) == 30 - granted.refused, "as many as there is memory for, whatever was there before"
        assert all(arena.has_sectors(sector * SECTOR_BYTES, 1 << 20) for sector in sectors)
        assert ask(m.Commit(granted.reservation, True)).count == len(sectors)
        found = ask(m.Lookup(space, prompt))
        assert found.chunks == len(sectors)
        ask(m.Release([found.lease]))
    arena.close()
    loop.close()


def test_a_server_says_at_once_when_the_folder_has_no_room(server, tiny):
    with pytest.raises(AssertionError, match=r"ended with 2 (.|\n)*--l1-size-gb"):
        server(l1=64, arena=tiny)
    assert files(tiny) == []


def test_a_file_system_that_fails_gives_no_memory_and_leaves_no_reservation(tmp_path, monkeypatch):
    l1 = L1(Arena(tmp_path, 4 << 20))
    l1.join(1, "engine")
    space = l1.open_space(1, b"f" * 16, 1, 0, 4096)

    def fail(descriptor: int, first: int, length: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(Refusal):
        l1.reserve(0.0, 1, space, 0, b"", True, bytes(16))
    assert l1.open_reservations == 0 and l1.quarantined_bytes == 0
    l1.arena.close()
