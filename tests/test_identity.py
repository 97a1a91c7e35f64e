"""An engine is served nothing while it is not known which weights it serves. Large ones are hashed in the background, once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_process import PATIENCE, Engine
from hashing import Turns
from lmcache.engine import StorePlan, digests, identity
from lmcache.engine.digests import digest_file
from lmcache.engine.identity import Identity, path_identity
from lmcache.errors import IdentityUnknown, LayoutError
from lmcache.integration.vllm.identity import Adapters
from lmcache.integration.vllm.paged import Registered
from lmcache.integration.vllm.plan import StepPlan
from lmcache.integration.vllm.worker import WorkerSide
from servers import Server, eventually

UNKNOWN = "identity not known yet"
TOKENS = list(range(100))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    return folder


def found(path: Path) -> Identity:
    """The identity as another process would find it: nothing of what this one has found out is used."""
    identity._finding.cache_clear()
    one = path_identity(str(path))
    assert one is not None
    return one


def known(one: Identity) -> bool:
    try:
        return bool(one.name)
    except IdentityUnknown:
        return False


def test_a_rank_that_still_hashes_holds_up_no_step(
    server: Callable[..., Server], engine: Callable[..., Engine], turns: Turns, weights: Path
) -> None:
    """The scheduler's process may know the weights first, and plans loads and stores then for ranks that do not."""
    cache = server()
    other = engine(cache, "other")
    other.store(TOKENS)
    hit = other.lookup(TOKENS)
    assert hit is not None
    rank = engine(cache, "rank", connect=False, scheduler=False, model=found(weights), deadline=1000.0)
    half = WorkerSide(rank.worker, [Registered(rank.worker._groups[0].paged, 1)], [0])
    half.wait_connected(StepPlan(stores=[StorePlan("job", "request", 16, bytes(16), bytes(16), 0, [0])]))
    assert not half._waited, "it waits for the server at the first step after that"
    assert not rank.wait(rank.submit_load(hit, 16, 0, 96, TOKENS)).ok
    assert rank.worker.counters == {"failed_loads": 1}
    turns.give()
    rank.worker.wait_connected(PATIENCE)
    assert rank.wait(rank.submit_load(hit, 16, 0, 96, TOKENS)).ok and rank.right(TOKENS, 0, 96)


def test_nothing_is_served_or_stored_until_the_weights_are_hashed(
    server: Callable[..., Server],
    engine: Callable[..., Engine],
    turns: Turns,
    weights: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache, one = server(), found(weights)
    first = engine(cache, "first", connect=False, model=one)
    scheduler, worker = first.scheduler, first.worker
    assert scheduler is not None
    assert not scheduler.identified and scheduler.new_chain() is None and scheduler.misses == {UNKNOWN: 1}
    scheduler.forgone(40)
    (thread,) = (one for one in threading.enumerate() if one.name == "lmcache-identity")
    eventually(lambda: os.getpriority(os.PRIO_PROCESS, thread.native_id or 0) == 10)
    other = engine(cache, "other")
    assert not first.wait(first.submit_store(TOKENS, chain=other.chain(TOKENS))).ok
    assert worker.counters == {f"dropped_chunks:{UNKNOWN}": 6}
    assert not worker.connected and not scheduler.connected
    assert {peer["instance"] for peer in cache.status()["engines"]} == {"other"}, "it has said hello to nobody"
    turns.give()
    first.connect()
    assert first.store(TOKENS) == 96 and first.load(TOKENS) == 96
    eventually(lambda: cache.counters().get(f'engine_dropped_chunks_total{{reason="{UNKNOWN}"}}') == 2)
    again = found(weights)
    assert known(again) and again.name == one.name, "remembered: no need to wait"
    second = engine(cache, "second", model=again)
    assert second.load(TOKENS) == 96, "the same weights in another engine"
    hashed = [line for line in caplog.messages if line.startswith("Hash")]
    assert len(hashed) == 2 and str(weights) in hashed[1] and "GB" in hashed[1]


def test_weights_that_change_while_they_are_hashed_are_not_served(
    turns: Turns, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for change in (weights / "config.json").write_text, (weights / "new.py").write_text:
        one = found(weights)
        assert not known(one) and not one.failure
        change("changed")
    turns.give()
    eventually(lambda: one.failure)
    assert (
        not known(one)
        and "set lmcache.mp.model_id" in one.failure
        and "start the engine in a new process" in one.failure
    )
    eventually(lambda: [line for line in caplog.messages if one.failure in line and "serves nothing" in line])


def test_weights_that_vanish_are_not_served(turns: Turns, weights: Path) -> None:
    one = found(weights)
    (weights / "model.safetensors").unlink()
    turns.give()
    eventually(lambda: one.failure)
    assert "model.safetensors" in one.failure and not known(one)


def test_a_process_that_hangs_in_its_turn_is_not_waited_for_without_end(
    turns: Turns, weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(digests, "_PATIENCE_SECONDS", 0.0)
    one = found(weights)
    eventually(lambda: known(one))
    assert turns.held, "another still has it"
    (warning,) = (line for line in caplog.messages if "locked" in line)
    assert "is waited for no longer" in warning and "end it" in warning


def lora(number: int, path: Path) -> Any:
    return SimpleNamespace(lora_name="x", lora_path=str(path), lora_int_id=number)


def test_a_large_adapter_is_cached_as_soon_as_it_is_hashed(
    turns: Turns, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters, other = Adapters(), Adapters()
    assert adapters.identity(lora(1, weights)) is None and other.identity(lora(1, weights)) is None
    (line,) = (line for line in caplog.messages if line.startswith("Hashing"))
    assert line.endswith(": requests with this adapter are not cached until it is done")
    turns.give()
    name, content = eventually(lambda: adapters.identity(lora(1, weights)))
    assert name == "x" and content.startswith("files:") and content == found(weights).name
    (weights / "config.json").write_text("changed")
    for one in adapters, other:
        assert one.identity(lora(1, weights)) is None, "not what it was at its first sight"
    (weights / "model.safetensors").unlink()
    assert adapters.identity(lora(2, weights)) is None
    assert f"Requests with the adapter '{weights}' are not cached: no weight files" in caplog.text


def test_of_many_adapters_each_is_read_at_its_first_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later requests wait for no hashing in the scheduler's thread."""
    requests = [lora(number, tmp_path / str(number)) for number in range(70)]
    for request in requests:
        Path(request.lora_path).mkdir()
        Path(request.lora_path, "adapter_model.safetensors").write_text(f"weights {request.lora_int_id}")
    adapters = Adapters()
    first = [adapters.identity(request) for request in requests]
    assert len(set(first)) == 70 and None not in first
    read: list[Path] = []
    listed = identity._listed
    monkeypatch.setattr(identity, "digest_file", lambda path, stamp: (read.append(path), digest_file(path, stamp))[1])
    monkeypatch.setattr(identity, "_listed", lambda path: (read.append(path), listed(path))[1])
    assert [adapters.identity(request) for request in requests] == first and read == []


def test_large_weights_are_hashed_once(turns: Turns, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns.give()
    hashed: list[str] = []
    monkeypatch.setattr(
        identity, "digest_file", lambda path, stamp: (hashed.append(path.name), digest_file(path, stamp))[1]
    )
    one = found(weights)
    eventually(lambda: known(one))
    assert found(weights).name == one.name and hashed == ["config.json", "model.safetensors"]
    file = weights / "model.safetensors"
    content, times = bytearray(file.read_bytes()), file.stat()
    content[50_000] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    two = found(weights)
    eventually(lambda: known(two))
    assert two.name != one.name and hashed[2:] == ["model.safetensors"], "the time of change tells, as nobody sets it"


_LOOK = """
import sys
from lmcache.engine.identity import path_identity
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(path_identity(line.strip()).name, flush=True)
    except Exception as error:
        print(error, flush=True)
"""


@pytest.mark.parametrize(
    "change", ["written", "renamed", "folder renamed", "folder above renamed", "link", "link behind a link"]
)
def test_weights_that_are_newer_than_the_engine_are_not_served(tmp_path: Path, change: str) -> None:
    """It may have read those that were there before."""
    one, two, connection, behind = (tmp_path / name for name in ("one", "two", "link", "behind"))
    for folder in (one, two):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        (folder / "model" / "model.safetensors").write_text(f"weights {folder.name}")
    connection.symlink_to("behind")
    behind.symlink_to(one)
    with subprocess.Popen(
        [sys.executable, "-c", _LOOK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def ask() -> str:
            print(connection / "model", file=process.stdin, flush=True)
            return process.stdout.readline()

        assert ask().startswith("files:"), "written before the process began"
        for folder in (tmp_path, one):
            (folder / "beside").write_text("comes and goes")
            (folder / "beside").unlink()
        assert ask().startswith("files:")
        if change == "written":
            (one / "model" / "model.safetensors").write_text("other weights")
        elif change == "link":
            connection.unlink()
            connection.symlink_to(two)
        elif change == "link behind a link":
            behind.unlink()
            behind.symlink_to(two)
        else:
            below = {"renamed": "model/model.safetensors", "folder renamed": "model"}.get(change, "")
            (one / below).rename(tmp_path / "old")
            (two / below).rename(one / below)
        answer = ask()
        assert (
            "has changed since the engine may have read it" in answer and "start the engine in a new process" in answer
        )
        process.stdin.close()
    assert path_identity(str(connection / "model")) is not None, "as the next engine finds it"


_HASHING = """
import os
import sys
from lmcache.engine import digests, identity
identity._AT_ONCE_BYTES = 1000
found = identity.path_identity(sys.argv[1])
print(found.failure or "hashing", flush=True)
pid = os.fork()
other = identity.path_identity(sys.argv[1])
if not pid:
    print("anew" if other != found else "never", flush=True)
else:
    os.waitpid(pid, 0)
    print("the same" if other == found else "twice", flush=True)
"""


def test_an_engine_forks_and_ends_while_its_weights_are_hashed(turns: Turns, weights: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _HASHING, weights], capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0 and process.stdout.split("\n")[:3] == ["hashing", "anew", "the same"], process.stderr


def test_a_failure_is_told_with_what_to_do() -> None:
    def fail() -> str:
        raise OSError("no such disk")

    with pytest.raises(LayoutError, match="no such disk; try another"):
        identity.Finding("weights", "try another", fail, 0)
