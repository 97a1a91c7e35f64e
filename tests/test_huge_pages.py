"""Huge pages: the arena and its engines' mappings get them where its file system gives them, and the server says what it got."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.memory import headers
from lmcache.memory.arena import Arena, ArenaFull
from lmcache.memory.huge_pages import HUGE_BYTES, mapped_bytes, mount_of, why_none
from servers import PATIENCE, eventually

POOL = Path("/proc/sys/vm/nr_hugepages")
THP = Path("/sys/kernel/mm/transparent_hugepage")
HERE = Path("/dev/shm")


@pytest.fixture
def mounted(folders: Callable[[str], Path]) -> Iterator[Callable[..., Path]]:
    """Mount file systems: mounted("tmpfs", "huge=advise"). Skips where this user cannot."""
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    points: list[Path] = []

    def mount(kind: str, options: str) -> Path:
        point = folders("/tmp")
        done = subprocess.run(["mount", "-t", kind, "-o", options, "none", str(point)], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr!r}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], check=True)


@pytest.fixture
def thp(mounted: Callable[..., Path]) -> Callable[[str], Path]:
    """Mount a tmpfs of 64 MiB with these options. Skips where the kernel's own setting overrules those of mounts."""
    setting = (THP / "shmem_enabled").read_text() if (THP / "shmem_enabled").exists() else ""
    if not setting or "[deny]" in setting or "[force]" in setting:
        pytest.skip(f"mounts do not decide about huge pages here: {setting!r}")
    return lambda options: mounted("tmpfs", f"size=64m{options}")


@pytest.fixture
def pool() -> Iterator[int]:
    """Set 32 MiB of huge pages aside. Skips where the kernel does not give them."""
    if os.getuid() != 0 or not POOL.exists():
        pytest.skip("only root can set huge pages aside")
    with Path("/tmp/lmcache-tests-huge-pages").open("w") as lock:  # other runs of the tests on this machine do the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _set_aside()


def _set_aside() -> Iterator[int]:
    before = int(POOL.read_text())
    try:
        POOL.write_text(str(before + 16))
        if int(POOL.read_text()) < before + 16:
            pytest.skip("the kernel has no 16 huge pages left")
        yield 32 << 20
    finally:
        POOL.write_text(str(before))


def held_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*.arena"))


def prefault(arena: Arena) -> None:
    arena.start_prefault()
    assert arena._thread is not None
    arena._thread.join(PATIENCE)
    assert not arena._thread.is_alive()


@pytest.mark.parametrize("options", [",huge=advise", ",huge=always", ",huge=within_size"])
def test_an_arena_has_the_huge_pages_that_its_mount_gives(thp: Callable[[str], Path], options: str) -> None:
    folder = thp(options)
    arena = Arena(folder, 8 * HUGE_BYTES + 4096)
    try:
        assert arena.mapping.address % HUGE_BYTES == 0
        arena.back([3 * HUGE_BYTES + 8192], 4096)
        assert mapped_bytes(arena.mapping.address, arena.size_bytes) == HUGE_BYTES, (
            "also what is needed before its turn"
        )
        assert arena.backed_bytes == held_bytes(folder) == HUGE_BYTES
        prefault(arena)
        assert arena.huge_bytes == 8 * HUGE_BYTES and arena.pages == "The arena uses huge pages of 2 MiB"
        assert arena.backed_bytes == held_bytes(folder) == arena.size_bytes
    finally:
        arena.close()


def test_an_arena_says_why_it_has_none(thp: Callable[[str], Path]) -> None:
    for folder, huge, why in [
        (thp(""), "auto", r", since {0} is mounted without huge=advise: `mount -o remount,huge=advise {0}` as root"),
        (thp(",huge=always"), "never", ", as --huge-pages never asks"),
    ]:
        arena = Arena(folder, 4 * HUGE_BYTES, huge=huge)
        try:
            prefault(arena)
            assert arena.huge_bytes == mapped_bytes(arena.mapping.address, arena.size_bytes) == 0
            assert re.match(r"The arena uses pages of \d+ KiB" + why.format(folder), arena.pages)
        finally:
            arena.close()


def test_a_remount_as_the_log_proposes_it_gives_them(thp: Callable[[str], Path]) -> None:
    folder = thp("")
    (command,) = re.findall(r"`(.*)`", why_none(folder))
    subprocess.run(command.split(), check=True)
    assert why_none(folder) == ""


def test_what_a_full_file_system_gives_in_part_goes_back(mounted: Callable[..., Path]) -> None:
    """The extent headers lie in the same file system, and need room after that."""
    folder = mounted("tmpfs", "size=5m")
    arena = Arena(folder, 16 << 20)
    try:
        with pytest.raises(ArenaFull):
            arena.back(range(0, 16 << 20, HUGE_BYTES), 4096)
        assert arena.backed_bytes == held_bytes(folder) == 2 * HUGE_BYTES
    finally:
        arena.close()


@pytest.mark.parametrize("policy", ["always", "never"])
def test_engines_map_the_arena_as_the_server_does(
    thp: Callable[[str], Path], server: Callable[..., Any], engine: Callable[..., Any], policy: str
) -> None:
    cache = server(l1=32, arena=thp(",huge=always"), flags=("--huge-pages", policy))
    cache.line_with("The arena uses ")
    huge = 32 << 20 if policy == "always" else 0
    assert cache.status()["arena"]["huge_bytes"] == huge
    one, ids = engine(cache), list(range(640))
    one.store(ids)
    assert one.load(ids) == 640
    mapping = one.worker._access._mapping
    assert mapping.address % HUGE_BYTES == 0
    one.worker._access._populating.join(PATIENCE)
    assert mapped_bytes(mapping.address, mapping.size_bytes) == huge
    smaps = Path("/proc/self/smaps").read_text()
    flags = re.search(rf"^{mapping.address:x}-.*?^VmFlags:([^\n]*)", smaps, re.DOTALL | re.MULTILINE)
    assert flags and (" hg" if huge else " nh") in flags[1], "what the engine touches first is like the rest"


def test_always_refuses_to_start_before_anything_is_created(
    thp: Callable[[str], Path], server: Callable[..., Any]
) -> None:
    folder = thp("")
    with pytest.raises(
        AssertionError, match=rf"ended with 2 (.|\n)*--huge-pages always: {folder} is mounted without huge=adv"
    ):
        server(l1=8, arena=folder, flags=("--huge-pages", "always"))
    assert list(folder.iterdir()) == []


def test_an_arena_on_a_hugetlbfs(
    pool: int, mounted: Callable[..., Path], server: Callable[..., Any], engine: Callable[..., Any]
) -> None:
    folder = mounted("hugetlbfs", "pagesize=2M")
    assert mount_of(folder).is_hugetlbfs
    with pytest.raises(AssertionError, match=r"--huge-pages never: \S+ is a hugetlbfs"):
        server(l1=8, arena=folder, flags=("--huge-pages", "never"))
    with pytest.raises(AssertionError, match=r"--l1-size-gb 1\.0: (.|\n)*`sysctl vm.nr_hugepages=\d+` as root"):
        server(l1=1024, arena=folder)
    first = server(l1=17, arena=folder, flags=("--huge-pages", "always"))  # not a multiple of the page size
    first.line_with("The arena uses huge pages of 2 MiB")
    assert first.status()["arena"]["huge_bytes"] == first.status()["arena"]["backed_bytes"] == 16 << 20
    one, ids = engine(first), list(range(640))
    one.store(ids)
    assert one.load(ids) == 640
    (arena,) = folder.iterdir()
    beside = headers.beside(arena)
    assert beside.exists() and arena.stat().st_size == 16 << 20
    first.kill()
    eventually(lambda: not one.worker.connected)
    one.close()
    second = server(l1=32, arena=folder)
    assert not arena.exists() and not beside.exists()
    assert second.end() == 0 and list(folder.iterdir()) == []
