"""Digests of large files are remembered on disk, by what cannot stay the same when a file changes."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3

from lmcache.engine import digests as module
from lmcache.engine.digests import DigestMemory, Stamp, digest_file, stamp_of
from lmcache.errors import LayoutError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(100_000))
    return path


def test_a_digest_is_of_every_byte(file: Path) -> None:
    assert digest_file(file, stamp_of(file.stat())) == blake3(file.read_bytes()).hexdigest()


def test_another_file_than_the_stamps_is_refused(file: Path) -> None:
    stamp = stamp_of(file.stat())
    file.write_bytes(b"other")
    with pytest.raises(LayoutError, match="has changed"):
        digest_file(file, stamp)


def test_a_memory_finds_what_was_added_and_forgets_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REMEMBERED", 3)
    memory = DigestMemory(tmp_path / "cache")
    stamps = [Stamp(1, number, 2, 3, 4) for number in range(5)]
    for stamp in stamps:
        memory.add({stamp: f"{stamp.inode:064x}"})
    assert DigestMemory(tmp_path / "cache").find(stamps) == {one: f"{one.inode:064x}" for one in stamps[2:]}
    kept = tmp_path / "cache" / "digests"
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_bytes(kept.read_bytes().replace(b"2", b"3", 1))
    assert memory.find(stamps) == {}, "damaged: hashed again"
    memory.add({stamps[0]: "0" * 64})
    kept.chmod(0o666)
    assert memory.find(stamps) == {}, "others may have written to it"


def test_a_turn_ends_though_a_process_was_forked_in_it(tmp_path: Path) -> None:
    memory = DigestMemory(tmp_path / "cache")
    with memory.turn(1):
        pid = os.fork()
        if not pid:
            signal.pause()
    try:
        assert subprocess.run(["flock", "--nonblock", tmp_path / "cache" / "lock-1", "true"]).returncode == 0
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
