"""The log: both formats, what a fault that repeats may write, and what no line contains."""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmcache.config.server import LOG_FORMATS
from lmcache.observability import log
from lmcache.observability.log import MOST_LINES, WINDOW_SECONDS, JsonLines, Repeats, TextLines, init_logger, redacted
from lmcache.wire import messages as m
from ports import free_port
from servers import EngineProcess, Raw, Server, eventually

CANARY = 914_073_625
"""A token id that appears in no other number."""
KEY = "C4naryKey"


def record(
    text: str, *values: object, at: float = 0.0, level: int = logging.WARNING, line: int = 1, **more: Any
) -> Any:
    made = logging.makeLogRecord(
        {"msg": text, "args": values, "levelno": level, "levelname": logging.getLevelName(level)}
    )
    made.__dict__ |= {
        "created": at,
        "msecs": at % 1 * 1000,
        "pathname": "/x/file.py",
        "filename": "file.py",
        "lineno": line,
    }
    made.__dict__ |= {"name": "lmcache.x", **more}
    return made


def test_lines_for_people() -> None:
    line = TextLines().format(record("stored %d", 3, at=1_796_000_000.25, level=logging.INFO, request="cmpl-1"))
    assert line == "[2026-11-30 00:53:20.250Z] LMCache INFO: stored 3 [cmpl-1] (file.py:1)"
    assert TextLines().format(record("cmpl-1 has come", request="cmpl-1")).count("cmpl-1") == 1
    assert "[" not in TextLines().format(record("no request"))[3:]


def test_lines_for_programs() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        line = JsonLines().format(record('a "b"\nc é', at=1_796_000_000.5, request="r", exc_info=sys.exc_info()))
    assert "\n" not in line and line.isascii(), "whatever the encoding of stderr is"
    found = json.loads(line)
    assert found.pop("exception").endswith("ValueError: two\nlines")
    assert found == {
        "time": "2026-11-30T00:53:20.500Z",
        "level": "WARNING",
        "message": 'a "b"\nc é',
        "source": "file.py:1",
        "logger": "lmcache.x",
        "request": "r",
    }
    assert set(json.loads(JsonLines().format(record("x")))) == {"time", "level", "message", "source", "logger"}


def test_a_fault_that_repeats_is_logged_a_few_times() -> None:
    repeats = Repeats()

    def shown(at: float, count: int, line: int = 1, level: int = logging.ERROR) -> list[Any]:
        records = [record("x %d", number, at=at, line=line, level=level) for number in range(count)]
        return [TextLines().format(one) for one in records if repeats.filter(one)]

    assert len(shown(100.0, 500)) == MOST_LINES
    assert len(shown(101.0, 3, line=2)) == 3, "another place"
    assert len(shown(102.0, 500, line=3, level=logging.INFO)) == 500, "these are no faults"
    assert shown(100.0 + WINDOW_SECONDS - 0.1, 1) == []
    first, second = shown(100.0 + WINDOW_SECONDS, 2)
    assert f"({500 + 1 - MOST_LINES} more such lines were left out)" in first and "left out" not in second
    assert len(shown(50.0, 1)) == 1, "the clock was set back"
    assert len(repeats._places) == 2


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"redis://user:{KEY}@host:6379/0 does not answer", "redis://user:***@host:6379/0 does not answer"),
        (f"s3://b?secret_key={KEY} and more words", "s3://b?secret_key=*** and more words"),
        (f"http://h/?a=1&token={KEY}&b=2", "http://h/?a=1&token=***&b=2"),
        ("tcp://10.0.0.1:5555 is not of user me@host", "tcp://10.0.0.1:5555 is not of user me@host"),
        ("disk:///x?auth_key_file=/etc/key", "disk:///x?auth_key_file=/etc/key"),
    ],
)
def test_passwords_of_urls_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert TextLines().format(record("%s", text)).partition("WARNING: ")[2].startswith(shown)
    try:
        raise OSError(text)
    except OSError:
        line = JsonLines().format(record("failed", exc_info=sys.exc_info()))
    assert KEY not in line and shown in json.loads(line)["exception"]


@pytest.fixture
def fresh() -> Iterator[logging.Logger]:
    """The `lmcache` tree, whose handlers come back."""
    root = logging.getLogger("lmcache")
    kept = root.handlers
    yield root
    root.handlers = kept


@pytest.mark.parametrize(
    "name, kind", [("json", JsonLines), ("JSON", JsonLines), ("text", TextLines), ("xml", TextLines)]
)
def test_an_engine_takes_the_format_from_its_environment(
    fresh: logging.Logger, monkeypatch: pytest.MonkeyPatch, name: str, kind: type
) -> None:
    monkeypatch.setenv("LMCACHE_LOG_FORMAT", name)
    fresh.handlers = [others := logging.NullHandler()]
    log.set_format("json")
    assert others.formatter is None
    fresh.handlers = []
    init_logger("x")
    (handler,) = fresh.handlers
    assert type(handler.formatter) is kind and any(isinstance(one, Repeats) for one in handler.filters)
    log.set_format("json")
    assert type(handler.formatter) is JsonLines


@pytest.mark.parametrize("name", LOG_FORMATS)
def test_no_line_of_a_server_or_an_engine_has_a_token_or_a_key(
    server: Callable[..., Server],
    engine_process: Callable[..., EngineProcess],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Both log all they can; a tier does not answer, a load fails, and the server is asked with a token."""
    monkeypatch.setenv("LMCACHE_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("LMCACHE_LOG_FORMAT", name)
    url = f"redis://:{KEY}@127.0.0.1:{free_port()}/0"
    cache = server(flags=("--l2", url, "--api-token", KEY, "--log-level", "DEBUG"))
    engine = engine_process(cache, "engine")
    ids = [CANARY + number for number in range(64)]
    assert engine.ask("store", ids=ids) == 64
    assert engine.ask("load", ids=ids) == 64
    engine.ask("load", ids=[*ids[:40], *range(60)])
    raw = Raw(cache, "raw")
    raw.ask(m.Copied("load", 16, 0.1, 0, ok=False, request="cmpl-7"))
    raw.ask(m.Copied("store", 16, 0.1, 0, request="cmpl-8"))
    raw.close()
    cache.get("/status")
    cache.signal(signal.SIGHUP)
    eventually(lambda: any("SIGHUP" in line for line in cache.log))
    engine.end()
    cache.end()
    lines = [*cache.log, *engine.log]
    text = "".join(lines)
    assert "redis" in text and "connected" in text and "DEBUG" in text
    assert str(CANARY)[:7] not in text and KEY not in text
    if name == "text":
        assert re.search(
            r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z\] LMCache INFO: Stored 16 tokens .* \[cmpl-8\]", text, re.M
        )
        return
    found = [json.loads(line) for line in cache.log]
    assert {one.get("request") for one in found} >= {None, "cmpl-7", "cmpl-8"}
    (failed,) = (one for one in found if one.get("request") == "cmpl-7")
    assert failed["level"] == "WARNING" and "could not load" in failed["message"]
