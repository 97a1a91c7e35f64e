"""Rolling upgrades: servers and engines of an older version of this project beside those of this one, in processes of their own.

The older version is built from the project's history. `LMCACHE_TEST_OLDER` names a folder with another one, whose native part
is built.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from servers import READY, EngineProcess, Server, eventually

pytestmark = pytest.mark.xdist_group("upgrades")
PROJECT = Path(__file__).parents[1]
OLDER = "241707b217c74f3f853940ef4e21976fef3908ec"
"""The oldest version that every version in use must work with. A release moves it forward."""
CHUNK = 16
Servers = Callable[..., Server]
EngineProcesses = Callable[..., EngineProcess]
Older = Callable[[], Any]


@pytest.fixture(scope="session")
def older_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the older version's package, with its native part."""
    if given := os.environ.get("LMCACHE_TEST_OLDER"):
        return Path(given)
    folder = tmp_path_factory.mktemp("older")
    archive = folder / "older.tar"
    done = subprocess.run(
        ["git", "archive", "-o", str(archive), OLDER, "src", "setup.py", "pyproject.toml", "README.md"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"the project's history lacks {OLDER[:7]} here: {done.stderr.strip()}")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return folder / "src"


@pytest.fixture
def older(older_source: Path, monkeypatch: pytest.MonkeyPatch) -> Older:
    """`with older():` starts processes of the older version."""

    @contextmanager
    def processes() -> Iterator[None]:
        rest = os.environ.get("PYTHONPATH", "")
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(older_source), rest))))
            command = [sys.executable, "-c", "import lmcache; print(lmcache.__file__)"]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert found.startswith(str(older_source)), "another version would be tried"
            yield

    return processes


def prompts(count: int, chunks: int = 4) -> list[list[int]]:
    dice = random.Random(11)
    return [[dice.randrange(1 << 30) for _ in range(chunks * CHUNK)] for _ in range(count)]


def written(cache: Server, prompts: int) -> bool:
    """Whether the tier has all chunks of so many prompts."""
    (tier,) = cache.status()["tiers"]
    return bool(tier["shards"] == 4 * prompts)


@pytest.mark.parametrize("older_server", [True, False], ids=["older server", "older engine"])
def test_engines_of_both_versions_share_the_kv_of_a_server_of_either(
    server: Servers, engine_process: EngineProcesses, older: Older, older_server: bool
) -> None:
    if older_server:
        with older():
            cache = server(chunk=CHUNK)
    else:
        cache = server(chunk=CHUNK)
    new = engine_process(cache, "new")
    with older():
        old = engine_process(cache, "old")
    for writer, reader in ((old, new), (new, old)):
        for ids in prompts(3):
            ids = [*ids, *range(5)] if writer is old else [1, *ids]
            assert writer.ask("store", ids=ids) == len(ids) // CHUNK * CHUNK
            assert reader.ask("load", ids=ids) == len(ids) // CHUNK * CHUNK, "all of it, bit for bit"
    assert not any("Traceback" in line for one in (cache, new, old) for line in one.log)


@pytest.mark.parametrize("forth", [True, False], ids=["to the newer version", "back to the older one"])
def test_a_server_of_the_other_version_takes_over_what_the_tier_has(
    server: Servers, engine_process: EngineProcesses, folders: Callable[[str], Path], older: Older, forth: bool
) -> None:
    """Engines of both versions go on through the restart, and hit what they had stored before it."""
    flags = ("--l2", f"disk://{folders('/tmp')}?max_gb=1", "--worth", "always")

    def start(of_older: bool, port: int = 0) -> Server:
        if not of_older:
            return server(chunk=CHUNK, port=port, flags=flags)
        with older():
            return server(chunk=CHUNK, port=port, flags=flags)

    first = start(forth)
    new = engine_process(first, "new")
    with older():
        old = engine_process(first, "old")
    before = prompts(4)
    for writer, ids in zip((old, new, old, new), before, strict=True):
        assert writer.ask("store", ids=ids) == len(ids)
    eventually(lambda: written(first, len(before)))
    first.signal(signal.SIGTERM)
    assert first.child.wait(60) == 0
    second = start(not forth, first.port)
    for one in (new, old):
        for ids in before:
            eventually(lambda one=one, ids=ids: one.ask("hits", ids=ids) == len(ids))
            assert one.ask("load", ids=ids) == len(ids)
    assert not any("Traceback" in line for one in (first, second, new, old) for line in one.log)


def test_an_upgrade_under_load_costs_no_request_and_no_hit_that_the_tier_has(
    server: Servers, engine_process: EngineProcesses, folders: Callable[[str], Path], older: Older
) -> None:
    """An engine asks without a pause while its server is drained and replaced. Each request ends: with the right bytes, or as a
    miss while no server is there."""
    flags = ("--l2", f"disk://{folders('/tmp')}?max_gb=1", "--worth", "always")
    with older():
        first = server(chunk=CHUNK, flags=flags)
        one = engine_process(first, "one")
    before = prompts(4)
    for ids in before:
        assert one.ask("store", ids=ids) == len(ids)
    eventually(lambda: written(first, len(before)))
    answers: list[tuple[str, Any]] = []
    stage, failed = "before", threading.Event()

    def load() -> None:
        try:
            while stage != "over":
                for ids in before:
                    began, told = stage, one.ask("load", ids=ids)
                    answers.append((began if began == stage else "during", told))
                    if told <= 0:
                        time.sleep(
                            0.02
                        )  # an engine computes what it has missed, and leaves the cores to the new server
        except BaseException:
            failed.set()
            raise

    asking = threading.Thread(target=load)
    asking.start()
    try:
        eventually(lambda: len(answers) > 8 or failed.is_set())
        stage = "during"
        first.signal(signal.SIGTERM)
        assert first.child.wait(60) == 0
        second = server(chunk=CHUNK, port=first.port, flags=flags)
        assert READY in "".join(second.log)
        eventually(lambda: [told for _, told in answers[-4:]] == [len(ids) for ids in before] or failed.is_set())
        stage, seen = "after", len(answers)
        eventually(lambda: sum(began == "after" for began, _ in answers) >= 8 or failed.is_set())
    finally:
        stage = "over"
        asking.join(60)
    assert not failed.is_set() and not asking.is_alive(), "a request did not end"
    full = len(before[0])
    assert {told for began, told in answers if began != "during"} == {full}, (seen, answers)
    assert {told for _, told in answers} <= {full, 0, -1}, "wrong bytes, or a part of a prompt"
    assert not any("Traceback" in line for each in (first, second, one) for line in each.log)
