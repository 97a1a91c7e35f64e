"""Digests of large files are remembered on disk, by what cannot stay the same when a file changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from blake3 import blake3

from lmcache.errors import LayoutError
from lmcache.integration import digests as module
from lmcache.integration import identity
from lmcache.integration.digests import DigestMemory, Stamp, digest_file, stamp_of


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


def test_large_weights_are_hashed_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_REMEMBERED_BYTES", 1000)
    hashed: list[Path] = []

    def counted(path: Path, stamp: Stamp) -> str:
        hashed.append(path)
        return digest_file(path, stamp)

    monkeypatch.setattr(identity, "digest_file", counted)
    first = identity.path_identity(str(file))
    identity._files_digest.cache_clear()  # as in the next process
    assert identity.path_identity(str(file)) == first and hashed == [file]
    content = bytearray(file.read_bytes())
    content[50_000] ^= 1
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity.path_identity(str(file)) != first and hashed == [file, file], (
        "the time of change tells, as nobody sets it"
    )
