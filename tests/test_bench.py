"""`lmcache bench` against a real server, and the arithmetic of the benchmark report."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.groups import lru_hit_rate
from benchmarks.rows import Goal, Row, cells, replace_figures
from benchmarks.scenarios import SHAPES
from benchmarks.sides import Side
from benchmarks.tiers_served import Turns, last_written, ours_of

from lmcache.bench.samples import align, figure, quantile
from lmcache.cli.main import main
from ports import free_port


@pytest.fixture
def server_url(server: Callable[..., Any]) -> str:
    return f"http://127.0.0.1:{server(l1=256, chunk=256).http_port}"


def test_bench_measures_a_running_server(server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", server_url, "--rounds", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    measured = {(row["what"], row["unit"]) for row in report["rows"]}
    assert {("empty call", "ms"), ("store of 1 chunks", "ms"), ("retrieve of 8 chunks", "GB/s")} <= measured
    assert all(0 < row["low"] <= row["median"] <= row["high"] and row["samples"] >= 2 for row in report["rows"])
    assert report["memory_bytes"]["process"] < 150 << 20


def test_bench_prints_a_table_for_people(server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", server_url, "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "256-token chunks of 0.50 MiB" in printed
    assert "lookup of 32 chunks, hashes known" in printed


def test_bench_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, said in (
        (("--url", f"http://127.0.0.1:{free_port()}"), 1, "start `lmcache server`"),
        (("--url", "localhost"), 2, "--url localhost"),
        (("--threads", "0"), 2, "--threads 0"),
        (("--bogus",), 2, "--bogus: no such flag of `lmcache bench`"),
    ):
        assert main(["bench", *words]) == code
        assert said in capsys.readouterr().err


def test_quantiles_and_figures() -> None:
    samples = [float(number) for number in range(100, 0, -1)]
    assert quantile(samples, 0.0) == 1.0
    assert quantile(samples, 1.0) == 100.0
    assert figure(samples).p99 == 100.0
    assert figure(samples, more_is_better=True).p99 == 2.0
    with pytest.raises(ValueError, match="no samples"):
        figure([])


def test_a_table_lines_up() -> None:
    lines = align([["what", "ms"], ["longer than that", "1"]]).splitlines()
    assert len(lines[1]) == len(lines[2]) == len("longer than that") + 4


@pytest.mark.parametrize(
    ("ours", "limit", "met"),
    [([10.0], [20.0], "yes"), ([8.0], [9.0], "by ratio"), ([8.0], [20.0], "no")],
)
def test_a_goal_is_met_by_its_number_or_by_its_part_of_the_limit(
    ours: list[float], limit: list[float], met: str
) -> None:
    row = Row("store", "store", "GB/s", Goal(9, "more", 10.9))
    row.add("limit", limit)
    row.add("ours", ours)
    assert row.verdict() == met
    assert cells(row)[-1] == met


def test_ratios_compare_neighbours_in_time() -> None:
    """A machine that slows down for a round slows both sides: the ratio stays."""
    row = Row("call", "call", "ms", Goal(1, "less"))
    for slowness in (1.0, 1.0, 50.0):
        row.add("ours", [slowness])
        row.add("peer", [4 * slowness])
    assert row.ratio("peer") == 0.25
    assert cells(row)[8] == "4"


def test_what_is_loaded_behind_a_server_comes_from_its_tier(tmp_path: Path) -> None:
    """The first load finds an empty L1, and the last one a tier that was emptied."""
    folder = tmp_path / "tier"
    with contextlib.ExitStack() as stack:
        tier = ours_of(f"disk://{folder}?io=buffered&max_gb=1", last_written(folder))
        turns = Turns(Side("ours", sys.executable), tier, stack, SHAPES["small"], l1_gb=0.1)
        turns.store(4)
        assert turns.load(0.001)[0] > 0
        turns.wipe()
        with pytest.raises(RuntimeError, match="of 4 chunks that a tier had, 0 came"):
            turns.load(0.001)


def test_exact_lru() -> None:
    assert lru_hit_rate([0, 1, 0, 1], 2, 0) == 0.5
    assert lru_hit_rate([0, 1, 2, 0, 1, 2], 2, 0) == 0.0
    assert lru_hit_rate([0, 1, 0, 2, 0, 1], 2, 2) == 0.5


def test_figures_replace_those_of_the_last_run(tmp_path: Path) -> None:
    sector = tmp_path / "page.md"
    sector.write_text("before\n<!-- begin a -->\nold\n<!-- end a -->\nbetween\n<!-- begin b -->\n<!-- end b -->\n")
    replace_figures(sector, "a", "new")
    assert sector.read_text() == (
        "before\n<!-- begin a -->\nnew\n<!-- end a -->\nbetween\n<!-- begin b -->\n<!-- end b -->\n"
    )
    with pytest.raises(ValueError, match="begin c"):
        replace_figures(sector, "c", "new")
