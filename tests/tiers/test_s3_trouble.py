"""A real server before an S3 that answers SlowDown or AccessDenied for a while: what goes on, what is told, what comes back."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import obstore
import pytest

from http_proxy import HTTPProxy
from lmcache.tiers import OK, TierError
from prompts import tokens
from servers import PATIENCE, Server, eventually
from stores import ACCESS, SECRET, Seaweed, load, shards_of, tier_of

pytestmark = [pytest.mark.xdist_group("s3"), pytest.mark.usefixtures("credentials")]
TOKENS = 160
"""Of a prompt: ten chunks, and so ten objects."""
SLOW_DOWN, DENIED, EXPIRED = (
    (503, "SlowDown", "slow down"),
    (403, "AccessDenied", "denied"),
    (400, "ExpiredToken", "denied"),
)


def answered(answer: tuple[int, str, str]) -> pytest.MarkDecorator:
    """Each test of a server is of one answer: what all answers to all requests are called is tested on the tier alone."""
    return pytest.mark.parametrize(("status", "code", "reason"), [answer])


@pytest.fixture
def through(seaweed: Seaweed) -> Iterator[HTTPProxy]:
    with closing(HTTPProxy(seaweed.port)) as one:
        yield one


@pytest.fixture
def start(
    server: Callable[..., Server], seaweed: Seaweed, through: HTTPProxy, request: pytest.FixtureRequest
) -> Callable[[], Server]:
    """A server whose S3 tier, of the test's own prefix, is behind the proxy; what is there is loaded, however long it takes."""
    url = seaweed.url(prefix_of(request), port=through.port)
    return lambda: server(flags=("--l2", url, "--worth", "always", "--l2-patience-seconds", "600"))


def prefix_of(request: pytest.FixtureRequest) -> str:
    return "trouble/" + re.sub(r"\W+", "-", request.node.name)


def prompts(count: int, seed: int) -> list[list[int]]:
    return [tokens(TOKENS, seed + number) for number in range(count)]


def tier(cache: Server) -> dict[str, Any]:
    (one,) = cache.status()["tiers"]
    return dict(one)


def counter(cache: Server, name: str) -> int:
    return int(tier(cache)["counters"].get(name, 0))


def keep(cache: Server, engine: Any, wanted: list[list[int]]) -> None:
    """Store them, until S3 has acknowledged all."""
    before = counter(cache, "kept_shards")
    for ids in wanted:
        assert engine.store(ids) == TOKENS
    eventually(lambda: counter(cache, "kept_shards") == before + 10 * len(wanted))


def said(cache: Server) -> str:
    """All that people can see of the server."""
    url = f"http://127.0.0.1:{cache.http_port}"
    pages = [
        urllib.request.urlopen(url + path, timeout=PATIENCE).read().decode()
        for path in ("/", "/status", "/healthcheck", "/metrics")
    ]
    command = [sys.executable, "-m", "lmcache.cli.main", "describe", "tiers", "--url", url]
    table = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    return "\n".join([*cache.log, *pages, table])


def ends_well(cache: Server, engine: Any) -> None:
    engine.close()
    assert cache.end() == 0
    log = "".join(cache.log)
    assert "Traceback" not in log and ACCESS not in log and SECRET not in log


@answered(SLOW_DOWN)
def test_while_stores_fail_hits_go_on_and_what_waits_is_stored_later(
    start: Callable[[], Server], engine: Callable[..., Any], through: HTTPProxy, status: int, code: str, reason: str
) -> None:
    cache = start()
    one = engine(cache)
    old, (new,) = prompts(6, 100), prompts(1, 200)
    keep(cache, one, old)
    cache.clear()
    began = time.monotonic()
    through.fail("PUT", status, code)
    assert one.store(new) == TOKENS
    absent = iter(range(10**6))
    # Questions that S3 answers meanwhile are no sign that it takes what is stored.
    eventually(lambda: not one.hit_tokens([next(absent), *new]) and counter(cache, "opened_breaker"))
    assert one.load(new) == TOKENS, "it is in L1"
    line = cache.line_with("Tier s3: ")
    assert "WARNING" in line and "S3 bucket kvbucket" in line and f"{status} {code}" in line
    eventually(lambda: counter(cache, "opened_breaker") >= 2)  # a store was tried once more, and failed
    for ids in old[:3]:
        assert one.load(ids) == TOKENS, "loads work, and so they go on"
    assert tier(cache)["state"] == "stores fail" and f"{status} {code}" in tier(cache)["reason"]
    (degraded,) = cache.get("/healthcheck")["degraded"]
    assert degraded.startswith("s3: S3 bucket") and f"{status} {code}" in degraded
    everything = said(cache)
    assert 'lmcache_tier_serving{tier="s3"} 0.0' in everything and "stores fail" in everything
    failed = (
        f'lmcache_tier_failed_total{{reason="{reason}",tier="s3"}}'  # one more store may fail between two questions
    )
    eventually(lambda: f"{failed} {counter(cache, 'failed:' + reason)}.0" in said(cache))
    assert ACCESS not in everything and SECRET not in everything
    lines = sum("Tier s3: S3 bucket" in line for line in cache.log)
    assert lines <= 1 + (time.monotonic() - began) / 10, "once in ten seconds"
    through.heal()
    eventually(lambda: counter(cache, "kept_shards") == 10 * len(old) + 10)
    cache.line_with("Tier s3 serves again")
    assert cache.healthy() and tier(cache)["state"] == "serving"
    cache.clear()
    for ids in (new, *old):
        assert one.load(ids) == TOKENS
    ends_well(cache, one)


@answered(EXPIRED)
def test_while_loads_fail_lookups_are_misses_and_nothing_is_removed(
    start: Callable[[], Server],
    engine: Callable[..., Any],
    through: HTTPProxy,
    seaweed: Seaweed,
    request: pytest.FixtureRequest,
    status: int,
    code: str,
    reason: str,
) -> None:
    def objects() -> set[str]:
        return {str(listed["path"]) for listed in obstore.list(seaweed.store(), prefix_of(request) + "/").collect()}

    cache = start()
    one = engine(cache)
    old, (new,) = prompts(6, 300), prompts(1, 400)
    keep(cache, one, old)
    before = objects()
    assert len(before) == 10 * len(old)
    cache.clear()
    through.fail("GET", status, code)
    for ids in old:
        assert one.lookup(ids) is None
    assert not one.scheduler.misses, "each was answered"
    ended = cache.status()["fetches"]
    assert ended[-1]["outcome"] == "failed" and ended[-1]["from"] == {"s3": 10}, "the oldest comes last"
    assert all(fetch["outcome"] in ("failed", "absent") for fetch in ended), "nobody's patience ended"
    assert any(fetch["left_out"] == {"s3": "not serving"} for fetch in ended), "after three that failed nobody waits"
    assert counter(cache, "opened_breaker") and counter(cache, f"failed:{reason}") >= 3
    keep(cache, one, [new])
    assert tier(cache)["state"] in ("loads fail", "serving") and one.load(new) == TOKENS
    assert before < objects() and not through.forwarded["DELETE"], "nothing is removed"
    through.heal()
    cache.clear()
    for ids in (*old, new):
        eventually(lambda: one.load(ids) == TOKENS)  # noqa: B023
    assert cache.healthy() and tier(cache)["state"] == "serving"
    ends_well(cache, one)


@answered(DENIED)
def test_a_server_that_starts_before_an_s3_in_trouble_has_it_later(
    start: Callable[[], Server], engine: Callable[..., Any], through: HTTPProxy, status: int, code: str, reason: str
) -> None:
    through.fail("HEAD GET PUT DELETE LIST", status, code)
    cache = start()
    (line,) = [line for line in cache.log if "Tier s3 does not serve yet" in line]
    assert f"{status} {code}" in line
    one = engine(cache)
    (ids,) = prompts(1, 500)
    assert one.store(ids) == TOKENS == one.load(ids)
    assert one.lookup([7, *ids]) is None and not through.forwarded
    through.heal()
    cache.line_with("Tier s3 serves again")
    eventually(lambda: counter(cache, "kept_shards") == 10)
    assert cache.healthy()
    cache.clear()
    assert one.load(ids) == TOKENS
    ends_well(cache, one)


def test_one_slow_down_is_tried_again_and_a_denial_is_not(seaweed: Seaweed, through: HTTPProxy) -> None:
    one, shards = tier_of(seaweed.url("trouble/once", port=through.port)), shards_of(1, 1000)
    through.fail("HEAD PUT GET", 503, "SlowDown", times=1)
    assert one.store(shards) == [OK] and load(one, shards) == [OK]
    assert through.failed == {"HEAD": 1, "PUT": 1, "GET": 1}
    through.fail("GET", 503, "SlowDown", times=2)
    with pytest.raises(TierError, match="GET was answered with 503 SlowDown"):
        load(one, shards)
    through.fail("GET", 403, "AccessDenied", times=1)
    with pytest.raises(TierError, match=r"GET was denied .403 AccessDenied."):
        load(one, shards)
    assert through.failed["GET"] == 4 and load(one, shards) == [OK]
    one.close()


@pytest.mark.parametrize(("status", "code", "reason"), [SLOW_DOWN, DENIED, EXPIRED])
def test_every_request_that_is_refused_has_its_reason(
    seaweed: Seaweed, through: HTTPProxy, status: int, code: str, reason: str
) -> None:
    one, shards = tier_of(seaweed.url(f"trouble/{code}", port=through.port)), shards_of(2, 1000)
    assert one.store(shards[:1]) == [OK]
    keys = [shard.key for shard in shards]
    calls: dict[str, Callable[[], Any]] = {
        "PUT": lambda: one.store(shards[1:]),
        "GET": lambda: load(one, shards[:1]),
        "HEAD": lambda: one.contains(keys[:1]),
        "DELETE": lambda: one.remove(keys[:1]),
        "LIST": one.clear,
    }
    for verb, call in calls.items():
        through.fail(verb, status, code)
        with pytest.raises(TierError, match=f"{verb} was .*{status}") as caught:
            call()
        assert caught.value.reason == reason, verb
        through.heal()
    assert one.contains(keys) == [True, False]
    one.close()
