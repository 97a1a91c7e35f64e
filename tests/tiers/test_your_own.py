"""The code of docs/tiers/your-own.md as it stands there: installed, against the published suite, and behind a real server."""

from __future__ import annotations

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
SECTOR = (Path(__file__).resolve().parents[2] / "docs" / "tiers" / "your-own.md").read_text()
TOKENS = list(range(160))
"""Ten chunks."""


def file_of(name: str) -> str:
    """The block of code under the line that names it."""
    found = re.search(rf"^`{re.escape(name)}`:\n\n((?:    .*\n|\n)+)", SECTOR, re.MULTILINE)
    assert found, name
    return re.sub(r"^    ", "", found[1].split("\n    pytest ")[0], flags=re.MULTILINE).rstrip("\n") + "\n"


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
    (told / "entry_points.txt").write_text(f"[lmcache.tiers]\n{entry[1]} = {entry[2]}\n")
    (folder / "lmcache_sqlite.py").write_text(file_of("lmcache_sqlite.py"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    return place


def run_the_tests_of_the_sector(installed: Path, *options: str) -> str:
    """What pytest says of them."""
    command = re.search(r"^    pytest (\S+)$", SECTOR, re.MULTILINE)
    assert command
    (installed / command[1]).write_text(file_of(command[1]))
    (installed / "pytest.ini").touch()  # nothing of whoever runs this
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", "places", command[1], *options],
        cwd=installed, capture_output=True, text=True, timeout=4 * PATIENCE,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_tier_of_the_sector_passes_the_tests_of_the_sector(installed: Path) -> None:
    count = sum(name.startswith("test_") for name in dir(ConformanceSuite))
    said = run_the_tests_of_the_sector(installed)
    assert f"\n{count} passed in " in said, said
    assert f"All {count} must pass" in SECTOR


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
def test_the_tests_of_the_sector_find_what_is_broken(
    installed: Path, line: str, instead: str, test: str, shown: str
) -> None:
    whole = file_of("lmcache_sqlite.py")
    assert whole.count(line) == 1
    (installed / "site" / "lmcache_sqlite.py").write_text(whole.replace(line, instead))
    said = run_the_tests_of_the_sector(installed, "-k", test)
    assert f"FAILED test_lmcache_sqlite.py::TestSqlite::{test}" in said and shown in said, said


def test_a_server_finds_again_what_it_and_another_one_stored(
    installed: Path, server: Callable[..., Server], engine: Callable[..., Any]
) -> None:
    command = re.search(r"^    lmcache server --l1-size-gb \d+ --l2 '(\S+)'$", SECTOR, re.MULTILINE)
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
