"""Tiers in a process that may start no more threads."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lmcache.server.loop import Loop
from lmcache.testing.conformance import payload_of, shard_key, shard_of
from lmcache.tiers import OK, Tier, TierError, frame
from lmcache.tiers.blocking import BlockingAdapter
from lmcache.tiers.directory.tier import DirectoryTier
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.object_store.client import Client
from lmcache.tiers.object_store.s3 import S3Tier
from lmcache.tiers.object_store.service import Place
from lmcache.tiers.operation import Load
from servers import PATIENCE

SIZE = 5 << 20
TIERS = [DiskTier, DirectoryTier]


def none_left(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("kind", TIERS)
def test_a_tier_that_is_open_starts_no_thread_in_the_middle_of_a_call(
    kind: Callable[[Path, int], Tier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call would fail, and return the memory on which its first threads still work."""
    tier, keys = kind(tmp_path / "tier", 64 << 20), [shard_key(number) for number in range(3)]
    tier.open()
    into = [bytearray(SIZE) for _ in keys]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert tier.store([shard_of(key, SIZE) for key in keys]) == [OK] * 3
        assert tier.load(keys, [memoryview(one) for one in into]) == [OK] * 3
    assert into == [payload_of(key, SIZE) for key in keys]
    tier.close()


@pytest.mark.parametrize("kind", TIERS)
def test_a_tier_that_gets_too_few_threads_is_not_open_and_leaves_none(
    kind: Callable[[Path, int], Tier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, start, started = kind(tmp_path / "tier", 64 << 20), threading.Thread.start, []

    def start_two(thread: threading.Thread) -> None:
        (start if len(started) < 2 else none_left)(thread)
        started.append(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(TierError, match="cannot be started: can't start new thread; raise the limit"):
            tier.open()
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)
    tier.open()
    assert tier.store([shard_of(shard_key(1), SIZE)]) == [OK]
    tier.close()


def test_an_operation_that_no_thread_can_be_started_for_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names memory, and nobody would end it."""
    loop, ended = Loop(), threading.Event()
    adapter = BlockingAdapter(DiskTier(tmp_path / "tier", 64 << 20), "few", loop.executor, loop.now)
    operation = Load(loop.now(), lambda result, error: None, [shard_key(1)], [memoryview(bytearray(SIZE))])
    kept = weakref.ref(operation)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            adapter.submit(operation)
    del operation
    adapter.submit(Load(loop.now(), lambda result, error: ended.set(), [], []))  # a thread passes the refused one over
    assert ended.wait(PATIENCE)
    gc.collect()
    assert kept() is None
    loop.close()


class SlowObjects(Client):
    """An object store that has nothing, and whose GETs do as the test says."""

    def __init__(self, get: Callable[[memoryview], None]) -> None:
        super().__init__(Place("bucket"), S3Tier.service, None)
        self._get = get

    def read_all(self, path: str) -> None:
        return None

    def read(self, path: str, start: int, memories: Sequence[memoryview], arrived: object = None) -> None:
        self._get(memories[-1])


@pytest.mark.parametrize("kind", [*TIERS, S3Tier])
def test_a_load_with_an_error_that_nobody_foresaw_ends_after_all_of_its_threads(
    kind: Callable[..., Tier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is given to somebody else then."""
    begun, returned, too_late = threading.Event(), threading.Event(), []
    keys, memories = [shard_key(number) for number in range(3)], [bytearray(SIZE) for _ in range(3)]

    def end(into: memoryview) -> None:
        if into.obj is memories[0]:
            assert begun.wait(PATIENCE)
            raise MemoryError
        begun.set()
        too_late.append(returned.wait(0.5))

    def unfold(header: bytes, into: memoryview, decoded: object = None) -> str:
        end(into)
        return OK

    tier = S3Tier(SlowObjects(end)) if kind is S3Tier else kind(tmp_path / "tier", 64 << 20)
    tier.open()
    if kind is not S3Tier:
        assert tier.store([shard_of(key, SIZE) for key in keys]) == [OK] * 3
    with monkeypatch.context() as patch:
        patch.setattr(frame, "unfold", unfold)
        with pytest.raises(MemoryError):
            tier.load(keys, [memoryview(one) for one in memories])
        returned.set()
        tier.close()
    assert too_late and not any(too_late)


class Panic(BaseException):
    """What libraries in Rust raise for a bug of theirs is no Exception."""


def test_a_library_that_panics_fails_its_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation without an end would keep its memory, and the tier from being asked anything new."""
    loop, ended = Loop(), queue.SimpleQueue[Exception | None]()
    tier = DiskTier(tmp_path / "tier", 64 << 20)

    def load(keys: object, into: object) -> list[str]:
        raise Panic("out of range")

    monkeypatch.setattr(tier, "load", load)
    adapter = BlockingAdapter(tier, "disk", loop.executor, loop.now)
    adapter.submit(Load(0.0, lambda result, error: ended.put(error), [shard_key(1)], [memoryview(bytearray(10))]))
    error = ended.get(timeout=PATIENCE)
    assert isinstance(error, RuntimeError) and str(error) == "Panic: out of range"
    loop.close()
