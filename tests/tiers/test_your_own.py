"""The code of docs/tiers/your-own.md as it stands there: installed, against the published suite, and behind a real server."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache.testing.conformance import ConformanceSuite
from servers import PATIENCE, Server, eventually

pytestmark = pytest.mark.xdist_group("your own")  # long tests, which begin early as a group
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tiers" / "your-own.md").read_text()
TOKENS = list(range(160))
"""Ten chunks."""


def file_of(name: str) -> str:
    """The block of code under the line that names it."""
    found = re.search(rf"^`{re.escape(name)}`:\n\n((?:    .*\n|\n)+)", PAGE, re.MULTILINE)
    assert found, name
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE).rstrip("\n") + "\n"


@pytest.fixture
def installed(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of all that are started, as `pip install .` would leave it. In memory: no test is about the disk."""
    place = folders("/dev/shm")
    pyproject = file_of("pyproject.toml")
    entry = re.search(r'^\[project\.entry-points\."lmcache\.tiers"\]\n(\w+) = "([\w:]+)"$', pyproject, re.MULTILINE)
    assert entry and f'py-modules = ["{entry[2].partition(":")[0]}"]' in pyproject
    folder = place / "site"
    told = folder / "lmcache_sqlite-1.0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache-sqlite\nVersion: 1.0\n")
    ram = re.search(r'`(ram) = "(lmcache_ram:RamTier)"`', PAGE)
    assert ram
    (told / "entry_points.txt").write_text(f"[lmcache.tiers]\n{entry[1]} = {entry[2]}\n{ram[1]} = {ram[2]}\n")
    for name in ("lmcache_sqlite.py", "lmcache_ram.py"):
        (folder / name).write_text(file_of(name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    return place


def run_the_tests_of_the_page(installed: Path, name: str, *options: str) -> str:
    """What pytest says of them."""
    (installed / name).write_text(file_of(name))
    (installed / "pytest.ini").touch()  # nothing of whoever runs this
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "places", name, *options],
        cwd=installed, env=environment, capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["test_lmcache_sqlite.py", "test_lmcache_ram.py"])
def test_the_tiers_of_the_page_pass_the_tests_of_the_page(installed: Path, name: str) -> None:
    count = sum(test.startswith("test_") for test in dir(ConformanceSuite))
    said = run_the_tests_of_the_page(installed, name)
    assert f"\n{count} passed in " in said, said
    assert f"All {count} must pass" in PAGE


@pytest.mark.parametrize("name", ["test_lmcache_sqlite.py", "test_lmcache_ram.py"])
def test_the_classes_of_the_page_define_only_what_the_suite_calls(name: str) -> None:
    (defined,) = [one for one in ast.parse(file_of(name)).body if isinstance(one, ast.ClassDef)]
    methods = {one.name for one in defined.body if isinstance(one, ast.FunctionDef)}
    assert methods <= vars(ConformanceSuite).keys()


@pytest.mark.parametrize(
    ("line", "instead", "test", "shown"),
    [
        (
            "USE if outcome == OK else REMOVE",
            "USE",
            "test_damage_is_a_miss_with_its_name_and_goes",
            "[True] == [False]",
        ),
        ("if not self._make_room(db, pages):", "if False:", "test_the_cap_is_hard", "<= 25165824"),
    ],
)
def test_the_tests_of_the_page_find_what_is_broken(
    installed: Path, line: str, instead: str, test: str, shown: str
) -> None:
    whole = file_of("lmcache_sqlite.py")
    assert whole.count(line) == 1
    (installed / "site" / "lmcache_sqlite.py").write_text(whole.replace(line, instead))
    said = run_the_tests_of_the_page(installed, "test_lmcache_sqlite.py", "-k", test)
    assert f"FAILED test_lmcache_sqlite.py::TestSqlite::{test}" in said and shown in said, said


def test_a_server_finds_again_what_it_and_another_one_stored(
    installed: Path, server: Callable[..., Server], engine: Callable[..., Any]
) -> None:
    command = re.search(r"^    lmcache server --l1-size-gb \d+ --l2 '(\S+)'$", PAGE, re.MULTILINE)
    assert command and command[1].count("/var/lib/lmcache/") == 1
    url = command[1].replace("/var/lib/lmcache", str(installed))
    first = server(flags=("--l2", url))
    assert engine(first).store(TOKENS) == len(TOKENS)

    def tier(one: Server) -> Any:
        (found,) = one.status()["tiers"]
        return found

    eventually(lambda: tier(first)["counters"].get("written_shards") == 10)
    assert (tier(first)["name"], tier(first)["url"], tier(first)["shards"]) == ("sqlite", url, 10)
    first.clear()
    assert engine(first, "after L1 was lost").load(TOKENS) == len(TOKENS)
    beside = server(flags=("--l2", url))
    assert engine(beside, "of a server beside it").load(TOKENS) == len(TOKENS)
    first.end()
    again = server(flags=("--l2", url))
    assert engine(again, "after a restart").load(TOKENS) == len(TOKENS)
    for one in (beside, again):
        counters = tier(one)["counters"]
        assert counters.pop("loaded_bytes") and counters == {"loaded_shards": 10}, "and nothing was written back"
        assert one.healthy()


def test_a_server_drives_the_asynchronous_tier_of_the_page(
    installed: Path, server: Callable[..., Server], engine: Callable[..., Any]
) -> None:
    cache = server(flags=("--l2", "ram:///kv?max_gb=1", "--worth", "always", "--l2-patience-seconds", "600"))
    assert engine(cache).store(TOKENS) == len(TOKENS)

    def counters() -> Any:
        (tier,) = cache.status()["tiers"]
        return tier["counters"]

    eventually(lambda: counters().get("written_shards") == 10)
    cache.clear()
    assert engine(cache, "after L1 was lost").load(TOKENS) == len(TOKENS)
    assert counters()["loaded_shards"] == 10 and cache.healthy()
    assert cache.end() == 0 and "Traceback" not in "".join(cache.log)


def test_a_server_says_what_is_wrong_with_its_url(installed: Path) -> None:
    for url, said in (
        ("sqlite://host/kv.db", "sqlite://host/kv.db: write an absolute path behind three slashes"),
        ("sqlite:///kv.db?max_bg=1", "unknown option 'max_bg'; did you mean max_gb?"),
        ("sqlite:///kv.db?timeout=0", "timeout: must be a number from 0.1 to 600"),
        (f"sqlite://{installed}/no/kv.db", "No such file or directory"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "lmcache.cli.main", "server", "--l1-size-gb", "0.01", "--l2-required", "--l2", url],
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
