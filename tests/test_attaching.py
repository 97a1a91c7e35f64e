"""Tiers of a running server are attached, removed and paused: over HTTP, by `lmcache tier` and by SIGHUP."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine_process import Engine
from lmcache.cli.main import main
from lmcache.errors import ConfigError
from lmcache.server.report import _check_reads_no_secrets
from servers import PATIENCE, Server, beside, eventually

TOKENS = list(range(160))
"""Ten chunks."""
TOKEN = "a-token-of-more-than-twenty"
PATIENT = ("--worth", "always", "--l2-patience-seconds", "600")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", PATIENCE)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


@pytest.fixture
def cache(server: Callable[..., Server], token: Path) -> Server:
    return server(flags=("--api-token-file", str(token), *PATIENT))


@pytest.fixture
def tier(cache: Server, token: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`lmcache tier ...`: the answer, or (with `fails`) the error."""

    def call(*words: str, fails: int = 0) -> Any:
        url = f"http://127.0.0.1:{cache.http_port}"
        code = main(["tier", *words, "--url", url, "--api-token-file", str(token), *(() if fails else ("--json",))])
        said = capsys.readouterr()
        assert code == fails, said
        return said.out + said.err if fails else json.loads(said.out)

    return call


def called(cache: Server, method: str, path: str, token: str = TOKEN, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"http://127.0.0.1:{cache.http_port}{path}"
    return httpx.request(method, url, headers=headers, timeout=PATIENCE, trust_env=False, **more)


def names(cache: Server) -> list[str]:
    return [one["name"] for one in cache.get("/tiers")["tiers"]]


def counted(cache: Server, counter: str, name: str = "dir") -> int:
    """The value of a counter of a tier in /metrics, of whatever reason."""
    text = called(cache, "GET", "/metrics").text
    return sum(
        int(float(one)) for one in re.findall(rf'^lmcache_tier_{counter}_total{{.*tier="{name}".*}} (\S+)', text, re.M)
    )


def test_a_tier_comes_and_goes_and_the_engine_notices_nothing(
    cache: Server, tier: Callable[..., Any], engine: Callable[..., Engine], folders: Callable[[str], Path]
) -> None:
    one, url = engine(cache), f"dir://{folders('/tmp')}/store"
    assert one.store(TOKENS) == len(TOKENS) and names(cache) == []
    assert tier("add", url)["name"] == "dir" and names(cache) == ["dir"]
    other = [7, *TOKENS[1:]]
    assert one.store(other) == len(other)
    eventually(lambda: counted(cache, "kept_shards") == 10)
    cache.clear()
    assert one.load(other) == len(other), "it comes back from the tier"
    why = cache.get("/requests?limit=1")["requests"][0]
    assert why["sources"].get("dir") == len(other)
    assert tier("remove", "dir") == {"status": "ok", "name": "dir", "state": "removed"}
    assert names(cache) == [] and cache.get("/tiers")["leaving"] == []
    cache.clear()
    assert one.hit_tokens(other) == 0, "lookups have forgotten what it has"
    assert counted(cache, "kept_shards") == 10, "the counters of a removed tier stay"
    assert tier("add", url)["name"] == "dir"
    assert one.load(other) == len(other), "its data has stayed in the store"
    assert counted(cache, "kept_shards") == 10 and counted(cache, "loaded_shards") == 20, "its counters go on"
    assert cache.healthy() and cache.counters()["loop_errors_total"] == 0


def test_the_order_of_tiers_is_chosen(cache: Server, tier: Callable[..., Any], folders: Callable[[str], Path]) -> None:
    folder = folders("/tmp")
    assert tier("add", f"dir://{folder}/a")["name"] == "dir"
    assert tier("add", f"dir://{folder}/b")["name"] == "dir2"
    assert tier("add", f"dir://{folder}/c?name=near", "--before", "dir")["name"] == "near"
    assert names(cache) == ["near", "dir", "dir2"]
    assert "known: near, dir, dir2" in tier("add", f"dir://{folder}/d", "--before", "nowhere", fails=1)
    assert "this tier is attached already" in tier("add", f"dir://{folder}/a", fails=1)
    assert "name=near is taken" in tier("add", f"dir://{folder}/e?name=near", fails=1)
    assert "there is no such tier; known: near, dir, dir2" in tier("remove", "far", fails=1)
    assert names(cache) == ["near", "dir", "dir2"]


def test_a_tier_that_cannot_be_opened_is_not_attached(
    cache: Server, tier: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    file = folders("/tmp") / "file"
    file.write_text("x")
    assert "cannot be opened" in tier("add", f"dir://{file}/store", fails=1)
    assert "unknown tier 'tape'" in tier("add", "tape://x", fails=1)
    assert "unknown option 'maxgb'" in tier("add", "dir:///tmp/x?maxgb=1", fails=1)
    eventually(lambda: cache.get("/tiers") == {"tiers": [], "leaving": []})
    assert cache.get("/healthcheck") == {"status": "healthy"}


def test_a_paused_tier_is_left_alone_and_loses_nothing(
    cache: Server, tier: Callable[..., Any], engine: Callable[..., Engine], folders: Callable[[str], Path]
) -> None:
    one, folder = engine(cache), folders("/tmp")
    tier("add", f"dir://{folder}/store")
    one.store(TOKENS)
    eventually(lambda: counted(cache, "kept_shards") == 10)
    assert tier("pause", "dir")["under_way"] == {}
    assert cache.get("/healthcheck")["degraded"] == ["dir: an operator has paused it (`lmcache tier resume`)"]
    other = [7, *TOKENS[1:]]
    one.store(other)
    (shown,) = cache.get("/tiers")["tiers"]
    assert shown["state"] == "paused" and shown["queued_chunks"] == 10, "what is queued waits"
    moved = Path(folder / "store").rename(
        folder / "elsewhere"
    )  # work on the store, of which the server notices nothing
    moved.rename(folder / "store")
    tier("resume", "dir")
    eventually(lambda: counted(cache, "kept_shards") == 20)
    assert cache.healthy() and counted(cache, "lost") == 0
    tier("pause", "dir")
    one.store([8, *TOKENS[1:]])
    tier("remove", "dir")
    assert counted(cache, "kept_shards") == 20 and counted(cache, "lost") == 10, "a paused tier is not written to"


def test_what_only_a_paused_tier_has_is_missing_for_that_reason(
    server: Callable[..., Server], engine: Callable[..., Engine], folders: Callable[[str], Path], token: Path
) -> None:
    """L1 is too small for both prompts."""
    cache = server(l1=8, flags=("--api-token-file", str(token), "--l2", f"dir://{folders('/tmp')}/store", *PATIENT))
    one = engine(cache, layers=8, dims=64)
    one.store(TOKENS)
    eventually(lambda: counted(cache, "kept_shards") == 10)
    number = 1000

    def evicted() -> bool:
        nonlocal number
        number += 1000
        one.store(list(range(number, number + 160)))
        return cache.counters()["evicted_chunks_total"] >= 10

    eventually(evicted)
    assert called(cache, "POST", "/tiers/dir/pause").status_code == 200
    assert one.hit_tokens(TOKENS) < len(TOKENS)
    assert cache.counters()['missed_tokens_total{reason="tier_paused"}'] > 0


def test_what_is_queued_is_written_before_a_tier_leaves_or_counted_as_lost(
    cache: Server, tier: Callable[..., Any], engine: Callable[..., Engine], folders: Callable[[str], Path]
) -> None:
    one, folder = engine(cache), folders("/tmp")
    tier("add", f"dir://{folder}/store?write=on-evict")
    one.store(TOKENS)
    (shown,) = cache.get("/tiers")["tiers"]
    assert shown["kept_back_chunks"] == 10
    tier("remove", "dir")
    assert counted(cache, "kept_shards") == 10 and counted(cache, "lost") == 0
    tier("add", f"dir://{folder}/other?write=on-evict")
    one.store([7, *TOKENS[1:]])
    tier("remove", "dir", "--drain", "0")
    text = called(cache, "GET", "/metrics").text
    assert counted(cache, "kept_shards") + counted(cache, "lost") == 20
    assert 'reason="tier removed"' in text or counted(cache, "lost") == 0
    assert one.hit_tokens(TOKENS) == len(TOKENS), "L1 has lost nothing"


@pytest.mark.parametrize("call", ["load", "store"])
def test_a_tier_that_hangs_is_left_behind_and_a_lookup_goes_on(
    hanging: Path, cache: Server, tier: Callable[..., Any], engine: Callable[..., Engine], call: str
) -> None:
    one = engine(cache)
    tier("add", f"hanging://{hanging}?calls={call}")
    if call == "store":
        one.store(TOKENS)
    waits = beside(lambda: one.load(TOKENS)) if call == "load" else None
    cache.line_with(f"{call} hangs")
    said = tier("remove", "hanging", "--drain", "0", fails=1)
    assert f"calls have not returned: 1 of {call}" in said
    if waits is not None:
        assert waits.result(PATIENCE) == 0, "the load is a miss"
        record = cache.get("/fetches")["fetches"][0]
        assert record["outcome"] == "failed" and record["left_out"] == {"hanging": "removed"}
    assert names(cache) == [] and [row["name"] for row in cache.get("/tiers")["leaving"]] == ["hanging"]
    other = [7, *TOKENS[1:]]
    assert one.store(other) == len(other) == one.hit_tokens(other), "the engine goes on"
    hanging.open("w").close()
    eventually(lambda: cache.get("/tiers")["leaving"] == [])
    assert cache.counters()["quarantined_bytes"] == 0 and cache.healthy()


def test_late_answers_of_a_tier_do_not_end_the_metrics_when_tiers_are_removed(
    hanging: Path,
    server: Callable[..., Server],
    engine: Callable[..., Engine],
    folders: Callable[[str], Path],
    token: Path,
) -> None:
    """Fetches know tiers by numbers that are no places in the list, and the counters of removed tiers stay."""
    flags = ("--l2", f"dir://{folders('/tmp')}/store", "--l2", f"hanging://{hanging}?calls=contains")
    cache = server(flags=("--api-token-file", str(token), *flags, "--worth", "always", "--l2-patience-seconds", "0.1"))
    assert engine(cache).load(TOKENS) == 0
    late = 'fetched_chunks_late_answers_total{tier="hanging"}'
    assert cache.counters()[late] == 1
    for name in ("dir", "hanging"):
        assert called(cache, "DELETE", f"/tiers/{name}?drain_seconds=0").status_code in (200, 202)
        assert cache.counters()[late] == 1 and cache.get("/status")["counters"][late] == 1
    hanging.open("w").close()


def test_the_earlier_metrics_count_on_when_a_tier_is_removed_and_comes_back(
    server: Callable[..., Server], engine: Callable[..., Engine], folders: Callable[[str], Path], token: Path
) -> None:
    cache = server(flags=("--api-token-file", str(token), "--metrics-names", "lmcache-0.5", *PATIENT))
    one, url = engine(cache), f"dir://{folders('/tmp')}/store"

    def told() -> list[float]:
        read = cache.metrics()
        hits = [read[f"lmcache_mp_lookup_hit_{level}_tokens_total"] for level in ("l1", "l2")]
        return [
            *hits,
            read["lmcache_mp_l1_read_chunks_total"],
            read["lmcache_mp_l2_prefetch_load_completed_chunks_total"],
        ]

    assert called(cache, "POST", "/tiers", json={"url": url}).status_code == 200
    one.store(TOKENS)
    eventually(lambda: counted(cache, "kept_shards") == 10)
    cache.clear()
    assert one.load(TOKENS) == len(TOKENS) and told() == [0, 160, 20, 10]
    assert called(cache, "DELETE", "/tiers/dir").status_code == 200
    assert told() == [0, 160, 20, 10]
    assert one.load(TOKENS) == len(TOKENS) and told() == [160, 160, 30, 10], "from L1"
    assert called(cache, "POST", "/tiers", json={"url": url}).status_code == 200
    assert one.load(TOKENS) == len(TOKENS) and told() == [320, 160, 40, 10]


def test_nobody_changes_tiers_without_the_token(
    server: Callable[..., Server], cache: Server, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"dir://{folders('/tmp')}/store"
    changes = ("POST", "/tiers"), ("DELETE", "/tiers/dir"), ("POST", "/tiers/dir/pause"), ("POST", "/tiers/dir/resume")
    for method, path in changes:
        refused = called(cache, method, path, token="", json={"url": url} if path == "/tiers" else None)
        assert refused.status_code == 403 and "from this host too" in refused.json()["reason"]
        wrong = called(cache, method, path, token="wrong", json={"url": url} if path == "/tiers" else None)
        assert wrong.status_code == 403 and "not the server's" in wrong.json()["reason"]
    plain = server()
    refused = called(plain, "POST", "/tiers", token="", json={"url": url})
    assert refused.status_code == 403 and "start the server with --api-token-file" in refused.json()["reason"]
    assert names(cache) == names(plain) == [], "and everybody here may read"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:${HOME}@127.0.0.1:1/0",
        "redis://:%24%7BHOME%7D@127.0.0.1:1/0",
        "redis://127.0.0.1:1/0?password_file=/etc/shadow",
        "redis://127.0.0.1:1/0?password%5Ffile=/etc/shadow",
        "disk:///tmp/x?key_file=/etc/shadow&max_gb=1",
        "redis-sentinel://127.0.0.1:1,[::1]:2/main/0?password_file=/etc/shadow",
        "redis-sentinel://127.0.0.1:1,[::1/main/0?password_file=/etc/shadow",
        "az://bucket/prefix?endpoint=http://127.0.0.1:1",
        "gs://bucket/prefix?%65ndpoint=http://127.0.0.1:1",
    ],
)
def test_a_url_that_came_over_http_reads_no_secrets_of_the_server(url: str) -> None:
    with pytest.raises(ConfigError, match="over HTTP the URL"):
        _check_reads_no_secrets(url)


@pytest.mark.parametrize("name", ["a/b", "", "..", "x%22,tier=%22y", "two%0Alines", "x" * 65])
def test_no_tier_gets_a_name_that_no_route_and_no_metric_can_show(
    cache: Server, folders: Callable[[str], Path], name: str
) -> None:
    """Such a tier could not be removed again."""
    refused = called(cache, "POST", "/tiers", json={"url": f"dir://{folders('/tmp')}/store?name={name}"})
    assert refused.status_code == 400 and "name: " in refused.json()["reason"] and names(cache) == []


def test_what_is_sent_is_checked(cache: Server) -> None:
    odd = b"[" * (60 << 10), b'{"url": "dir:///tmp/\\ud800"}', b'{"url": "dir:///tmp/two\\nlines"}'
    for content in (b"", b"[]", b'{"url": 5}', b'{"url": ""}', b'{"uri": "dir:///x"}', b"x" * (65 << 10), *odd):
        answer = called(cache, "POST", "/tiers", content=content)
        assert answer.status_code == 400 and answer.json()["reason"], content
    assert called(cache, "DELETE", "/tiers/dir?drain_seconds=nan").status_code == 400
    assert called(cache, "POST", "/tiers/dir/explode").status_code == 404
    assert cache.healthy()


def test_the_number_of_tiers_is_bounded(
    cache: Server, tier: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    folder = folders("/tmp")
    for number in range(16):
        assert called(cache, "POST", "/tiers", json={"url": f"dir://{folder}/{number}"}).status_code == 200
    refused = called(cache, "POST", "/tiers", json={"url": f"dir://{folder}/17"})
    assert refused.status_code == 400 and "there are 16 tiers" in refused.json()["reason"]


def test_hangup_attaches_and_removes_what_the_file_says(
    server: Callable[..., Server], engine: Callable[..., Engine], folders: Callable[[str], Path], token: Path
) -> None:
    folder, file = folders("/tmp"), token.with_name("lmcache.yaml")
    a, b, c = (f"dir://{folder}/{name}?name={name}" for name in "abc")

    def write(*urls: str) -> None:
        lines = [f"api-token-file: {token}", "worth: always", "l2:", *(f"  - {url}" for url in urls)]
        file.write_text("\n".join(lines if urls else lines[:-1]) + "\n")

    write(a, b)
    cache = server(flags=("--config", str(file)))
    one = engine(cache)
    one.store(TOKENS)
    eventually(lambda: counted(cache, "kept_shards", "b") == 10)
    assert called(cache, "POST", "/tiers", json={"url": f"dir://{folder}/d?name=d"}).status_code == 200
    write(c, b)
    cache.signal(signal.SIGHUP)
    cache.line_with("in effect now: l2")
    eventually(lambda: names(cache) == ["c", "b", "d"])
    eventually(lambda: cache.get("/tiers")["leaving"] == [])
    cache.clear()
    assert one.load(TOKENS) == len(TOKENS), "from b"
    eventually(lambda: counted(cache, "kept_shards", "c") == 10)  # the nearer tier has got it
    file.write_text("l2:\n  - 'tape://x'\n")
    cache.signal(signal.SIGHUP)
    cache.line_with("SIGHUP: tape://x: unknown tier 'tape'")
    eventually(lambda: names(cache) == ["d"])
    assert cache.healthy() and os.path.exists(folder / "a"), "what is stored stays"


def test_a_tier_that_could_not_be_attached_is_tried_again_by_the_next_hangup(
    server: Callable[..., Server], folders: Callable[[str], Path], token: Path
) -> None:
    """By the same file, once what was in the way is gone; one that was removed over HTTP stays away."""
    folder, file = folders("/tmp"), token.with_name("lmcache.yaml")
    urls = [f"dir://{folder}/{name}?name={name}&key_file={folder}/{name}.key" for name in "ab"]
    file.write_text(f"api-token-file: {token}\n")
    cache = server(flags=("--config", str(file)))
    file.write_text(f"api-token-file: {token}\nl2:\n" + "".join(f"  - {url}\n" for url in urls))
    (folder / "b.key").touch(0o600)
    (folder / "b.key").write_bytes(bytes(32))
    cache.signal(signal.SIGHUP)
    eventually(lambda: names(cache) == ["b"])
    eventually(lambda: any("SIGHUP" in line and "a.key" in line for line in cache.log))
    assert called(cache, "DELETE", "/tiers/b").status_code == 200
    (folder / "a.key").touch(0o600)
    (folder / "a.key").write_bytes(bytes(32))
    cache.signal(signal.SIGHUP)
    eventually(lambda: names(cache) == ["a"])
    cache.signal(signal.SIGHUP)
    eventually(lambda: sum("settings were read again" in line for line in cache.log) == 3)
    assert names(cache) == ["a"] and cache.healthy()


def test_a_tier_that_is_still_being_opened_can_be_removed(
    hanging: Path, server: Callable[..., Server], token: Path
) -> None:
    """By another SIGHUP, as after a slip in the file, and over HTTP."""
    file, given = token.with_name("lmcache.yaml"), f"api-token-file: {token}\n"
    file.write_text(given)
    cache = server(flags=("--config", str(file)))
    url = f"hanging://{hanging}?calls=open"
    file.write_text(f"{given}l2: {url}\n")
    cache.signal(signal.SIGHUP)
    cache.line_with("open hangs")
    file.write_text(given)
    cache.signal(signal.SIGHUP)
    eventually(lambda: [one["name"] for one in cache.get("/tiers")["leaving"]] == ["hanging"])
    waits = beside(lambda: called(cache, "POST", "/tiers", json={"url": f"{url}&name=slow"}))
    eventually(lambda: "is still being opened" in called(cache, "POST", "/tiers/slow/pause").text)
    removed = called(cache, "DELETE", "/tiers/slow")
    assert removed.status_code == 200 and "1 of open" in removed.json()["left_behind"]
    assert "removed while it was being opened" in waits.result(PATIENCE).json()["reason"]
    hanging.open("w").close()
    eventually(lambda: cache.get("/tiers") == {"tiers": [], "leaving": []})
    assert cache.healthy() and cache.counters()["loop_errors_total"] == 0
