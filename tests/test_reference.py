"""The generated reference has all that the code has, and what the code has is explained: nothing is listed a second time."""

from __future__ import annotations

import ast
import dataclasses
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import MagicMock

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tools import check_site, reference

from engine_process import Engine
from lmcache.cache.losses import LOSSES, TIER_FAILED
from lmcache.cache.reasons import REASONS
from lmcache.config.engine import MEANING, OTHERS, ROWS, EngineConfig
from lmcache.config.server import OPTIONS
from lmcache.integration.vllm.settings import SETTINGS
from lmcache.server.http_guards import CHANGES, READS
from lmcache.server.metrics import HELP, LABELS
from lmcache.server.refused import EXPLAINED, Reason
from lmcache.server.tier_report import TierReport
from lmcache.tiers import Usage, filesystem, frame
from lmcache.tiers.redis import remedies
from pages import DOCS, ROOT
from servers import Server

SOURCES = sorted(reference.SOURCE.rglob("*.py"))
EXPLAINED_WORDS = {word for table in LOSSES.values() for word in table}
SAYERS = {
    "TierError": 0, "_count_drop": 1, "drop": 1, "_lose": 0, "count": 1, "_end": 2, "end": 1, "_drop_reservations": 1,
    "_end_reservation": 2, "_end_fills": 2,
}  # fmt: skip
"""Function or method -> the place of the argument that is a reason."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def test_every_flag_variable_and_setting_is_there(pages: dict[str, str]) -> None:
    for option in OPTIONS:
        assert re.search(rf"^### `{option.flag}[ `]", pages["reference/flags.md"], re.MULTILINE) and option.help
        assert f"`{option.env}`" in pages["reference/flags.md"]
    text = pages["reference/settings.md"]
    assert [row.name for row in ROWS if f"| `{row.name}` |" not in text] == []
    assert [name for name in SETTINGS if f"| `lmcache.mp.{name}` |" not in text or not SETTINGS[name].meaning] == []
    assert set(MEANING) == {field.name for field in dataclasses.fields(EngineConfig)}


def test_every_variable_that_the_code_reads_is_there(pages: dict[str, str]) -> None:
    text = pages["reference/settings.md"] + pages["reference/flags.md"]
    read = {name for path in SOURCES for name in re.findall(r"\"(LMCACHE_[A-Z0-9_]+)\"", path.read_text())}
    read -= {"LMCACHE_", "LMCACHE_SERVER_"}
    assert len(read) >= 5
    known = {f"LMCACHE_{name}" for name in OTHERS} | {row.variable for row in ROWS}
    assert [name for name in sorted(read) if name not in known and f"`{name}`" not in text] == []


def test_every_command_and_route_is_there(pages: dict[str, str]) -> None:
    for name, summary, parser in reference.verbs():
        assert summary and parser.description and f"## `lmcache {name}`" in pages["reference/commands.md"]
        missing = [one.dest for one in parser._actions if not one.help]
        assert missing == [], f"lmcache {name} has arguments without a help text"
    routes = list(reference.http_routes())
    assert len(routes) >= 13
    for path, methods, caller, text in routes:
        assert text, f"{path}: its method needs a docstring, which is its documentation"
        assert caller in ("", READS, CHANGES) and (caller == CHANGES) == (methods != ["GET"])
        assert f"| `{methods[0]} {path}` |" in pages["reference/http.md"]
    guarded = {path for path, _, caller, _ in routes if caller}
    assert guarded >= {"/status", "/requests", "/config", "/history", "/fetches", "/cache/clear"}


def test_every_metric_and_reason_is_there(pages: dict[str, str]) -> None:
    assert [name for name in HELP if f"| `lmcache_{name}` |" not in pages["reference/metrics.md"]] == []
    assert set(LABELS) <= set(HELP) and set(EXPLAINED) == set(get_args(Reason))
    labelled = {name for name, labels in LABELS.items() if "reason" in labels}
    assert labelled == {*LOSSES, "missed_tokens_total", "refused_engines_total"}
    for name in (*REASONS, *EXPLAINED, *EXPLAINED_WORDS):
        assert f"| `{name}` |" in pages["reference/reasons.md"]


def test_the_labels_of_a_real_server_are_those_of_the_table(
    server: Callable[..., Server], engine: Callable[..., Engine], tmp_path: Path
) -> None:
    cache = server(flags=("--l2", f"disk://{tmp_path / 'tier'}?max_gb=0.1"))
    with urllib.request.urlopen(f"http://127.0.0.1:{cache.http_port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    seen = {
        (one.name if one.type == "histogram" else sample.name).removeprefix("lmcache_"): tuple(
            sorted(sample.labels.keys() - {"le"})
        )
        for one in families
        for sample in one.samples
    }
    own = {name: labels for name, labels in seen.items() if name in HELP}
    assert len(own) > 50
    assert {name: labels for name, labels in own.items() if labels != tuple(sorted(LABELS.get(name, ())))} == {}
    assert [name for name in seen if name not in HELP and not name.startswith("process_")] == []


def test_answers_that_come_late_are_counted_for_their_tier() -> None:
    runner = MagicMock(counters=Counter(), queue=MagicMock(counters=Counter(), queued_bytes=0))
    runner.name, runner.state.return_value, runner.usage.return_value = "far", ("serving", ""), Usage(0, 0, None)
    runner.number, runner.coder = 7, None  # six others have come and gone
    pace = SimpleNamespace(bytes_per_second=None, ask_seconds=None)
    counters = Counter({"late_answers:far": 3, "too_many": 2, "fetches": 7, "fetches:late": 4})
    fetches = MagicMock(counters=counters, open=0, last=None, paces={7: pace})
    report = TierReport(lambda: 0.0, [runner], [], fetches, {7: "far"}, 16)
    report.joined(runner)
    found = report.counters()
    assert found['fetched_chunks_late_answers_total{tier="far"}'] == 3 and found["fetched_chunks_too_many_total"] == 2
    names = {re.sub(r"\{.*", "", name): tuple(re.findall(r'(\w+)="', name)) for name in found}
    assert names == {name: LABELS.get(name, ()) for name in names} and set(names) <= set(HELP)


def said() -> Iterator[tuple[Path, int, str]]:
    """(file, line, reason) of each reason that is written as a literal where it is counted."""
    for path in SOURCES:
        if path.parent.name in ("cli", "bench", "sizing"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).rpartition(".")[2]
                place = SAYERS.get(name)
                found = node.args[place : place + 1] if place is not None else []
                if name in SAYERS or name in ("emit", "_emit"):
                    found += [one.value for one in node.keywords if one.arg == "reason"]
                for one in found:
                    for part in [one.body, one.orelse] if isinstance(one, ast.IfExp) else [one]:
                        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value:
                            yield path, node.lineno, part.value


def test_every_reason_that_is_counted_is_explained() -> None:
    found = list(said())
    words = {word for _, _, word in found}
    assert words >= {"too late", "owner died", "queue full", "preempted", "unreachable", "patience", "timeout"}, (
        "it finds them"
    )
    assert [f"{path.name}:{line}: {word}" for path, line, word in found if word not in EXPLAINED_WORDS] == []


def test_the_tables_of_reasons_are_explained() -> None:
    assert {reason for reason, _ in filesystem._REASONS.values()} <= set(TIER_FAILED)
    assert {*(reason for reason, _ in remedies._ERRORS.values()), *(reason for _, reason, _ in remedies._TEXTS)} <= set(
        TIER_FAILED
    )
    assert set(frame.DAMAGE) <= set(LOSSES["tier_missed_total"])


def test_every_message_of_an_exception_is_there(pages: dict[str, str]) -> None:
    text = pages["reference/messages.md"]
    assert text.count("\n| ") > 300
    assert "<code>--arena-dir …: is not a directory: pass one, such as /dev/shm</code>" in text
    assert all("|" not in line.split("<code>")[1].split("</code>")[0] for line in text.splitlines() if "<code>" in line)


def test_every_page_is_in_the_navigation() -> None:
    config = re.sub(r"!!python\S*", "", (ROOT / "mkdocs.yml").read_text())

    def leaves(part: object) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from leaves(one)

    shown = set(leaves(yaml.safe_load(config)["nav"]))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= shown


def test_what_a_page_fetches_from_elsewhere_is_found() -> None:
    bad = (
        '<script src="https://a.example/x.js"></script><link rel="stylesheet" href="//b.example/y.css">'
        '<img src="http://c.example/z.png"><p style="background:url(https://d.example/w)"></p><pre class="mermaid"></pre>'
    )
    assert len(check_site.fetched_from_elsewhere("a.html", bad)) == 5
    assert check_site.fetched_from_elsewhere(
        "a.css", '@import "https://a.example/x.css"; b{background:url(//c.example/d)}'
    )
    good = '<a href="https://a.example">a</a><img src="x.png"><link rel="canonical" href="https://a.example/b">'
    assert check_site.fetched_from_elsewhere("a.html", good) == []
