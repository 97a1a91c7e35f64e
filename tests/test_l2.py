"""A real server, real engines and a real store behind it: restarts, stalls, and what is told of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_process import Engine
from lmcache.config.server import ServerConfig
from lmcache.engine.identity import named
from lmcache.server.report import Report
from lmcache.server.tier_runner import CLOSE_SECONDS
from ports import free_port
from proxy import Proxy
from rounding import BFLOAT16, rounded
from servers import PATIENCE, Server, beside, eventually, server_parts
from stores import RedisServer, binary_of

TOKENS = list(range(160))
"""Ten chunks."""
PATIENT = ("--worth", "always", "--l2-patience-seconds", "600")
"""Flags of a server that waits for its tiers, however slow the machine is."""


@pytest.fixture
def valkey(folders: Callable[[str], Path]) -> Iterator[RedisServer]:
    store = RedisServer(binary_of("valkey"), folders("/tmp"))
    yield store
    store.end()


def tiers_of(server: Server) -> dict[str, dict[str, Any]]:
    return {tier["name"]: tier for tier in server.status()["tiers"]}


def written(server: Server, shards: int, name: str = "redis") -> None:
    """Until the tier has acknowledged so many shards."""
    eventually(lambda: tiers_of(server)[name]["counters"].get("kept_shards", 0) >= shards)


def sector(server: Server, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_restarted_server_finds_everything_in_its_tier(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer, shards: int
) -> None:
    flags = ("--l2", valkey.url(), *PATIENT)
    first = server(flags=flags)
    for shard in range(shards):
        assert engine(first, shard=shard, shards=shards).store(TOKENS) == len(TOKENS)
    written(first, 10 * shards)
    first.end()
    second = server(flags=flags)
    ranks = [engine(second, "again", shard=shard, shards=shards) for shard in range(shards)]
    for rank in ranks:
        assert rank.load(TOKENS) == len(TOKENS)
    stored = tiers_of(second)["redis"]["counters"]
    assert stored["loaded_shards"] == 10 * shards and "written_shards" not in stored, "it is not written back"


@pytest.mark.parametrize("scheme", ["disk", "dir", "redis"])
def test_kv_is_stored_in_fewer_bytes_and_comes_back_the_same(
    server: Callable[..., Server],
    engine: Callable[..., Any],
    folders: Callable[[str], Path],
    valkey: RedisServer,
    scheme: str,
) -> None:
    """A server that encodes and one that does not, before and after it, use one store."""
    store = valkey.url() if scheme == "redis" else f"{scheme}://{folders('/tmp')}/store"

    def served(codec: str) -> Server:
        return server(flags=("--l2", f"{store}?codec={codec}", *PATIENT))

    first = served("pack12")
    writer = engine(first, layers=4, dims=64)
    assert writer.store(TOKENS) == len(TOKENS)
    written(first, 10, scheme)
    said = tiers_of(first)[scheme]["codec"]
    assert said["used"] == said["option"] == "pack12" and said["ratio"] > 1.3
    assert 1.3 * said["stored_bytes"] < said["raw_bytes"]
    first.end()
    second, others = served("none"), list(range(1000, 1160))
    reader = engine(second, "second", layers=4, dims=64)
    assert reader.load(TOKENS) == len(TOKENS) and reader.store(others) == len(others)
    written(second, 10, scheme)
    said = tiers_of(second)[scheme]["codec"]
    assert said["used"] == "none" and said["ratio"] is None
    second.end()
    third = engine(served("auto"), "third", layers=4, dims=64)
    assert third.load(TOKENS) == len(TOKENS) and third.load(others) == len(others)


def test_rounded_kv_reaches_only_engines_that_accept_it(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    """From a tier of rounded KV through L1 into a second tier: the same prompt of an exact engine is exact everywhere."""
    store = f"dir://{folders('/tmp')}/store"
    second_tier = f"disk://{folders('/tmp')}/second?name=second"
    accepting = named("model").accepting("int8")

    def served(*urls: str) -> Server:
        return server(flags=(*(flag for url in urls for flag in ("--l2", url)), *PATIENT))

    def rounding(one: Any) -> Any:
        exact = one.kv_of
        one.kv_of = lambda ids: np.frombuffer(rounded(exact(ids).tobytes(), 64, BFLOAT16), np.uint16).reshape(
            exact(ids).shape
        )
        return one

    first = served(f"{store}?codec=int8")
    lossy, exact = engine(first, "lossy", layers=4, dims=64, model=accepting), engine(first, layers=4, dims=64)
    assert lossy.store(TOKENS) == len(TOKENS) and lossy.load(TOKENS) == len(TOKENS), "L1 holds it as it was computed"
    written(first, 10, "dir")
    said = tiers_of(first)["dir"]["codec"]
    assert said["used"] == "int8" and said["ratio"] > 1.85 and said["rounded_bytes"] == said["raw_bytes"] > 0
    first.line_with("Tier dir: KV of engines with lossy_kv=int8 is stored rounded by int8 from now on")
    assert {one["layout"]["lossy_kv"] for one in first.status()["engines"]} == {"int8", "none"}
    assert f'lmcache_tier_rounded_bytes_total{{tier="dir"}} {said["rounded_bytes"]}' in sector(first, "/metrics")[1]
    assert exact.hit_tokens(TOKENS) == 0
    first.end()

    second = served(store, second_tier)
    exact, reader = engine(second, layers=4, dims=64), engine(second, "again", layers=4, dims=64, model=accepting)
    assert rounding(reader).load(TOKENS) == len(TOKENS), "from the tier it comes rounded"
    assert exact.hit_tokens(TOKENS) == 0, "neither L1 nor the tier has it for this engine"
    assert exact.store(TOKENS) == len(TOKENS) and exact.load(TOKENS) == len(TOKENS)
    written(second, 10, "dir")
    assert tiers_of(second)["dir"]["codec"]["rounded_bytes"] == 0
    second.end()

    third = served(f"{store}?codec=int8")
    exact, reader = engine(third, layers=4, dims=64), engine(third, "again", layers=4, dims=64, model=accepting)
    assert exact.load(TOKENS) == len(TOKENS), "bit for bit, from a tier with codec=int8"
    assert rounding(reader).load(TOKENS) == len(TOKENS)


def test_kv_is_encoded_once_the_store_is_known_to_be_slow(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    """Ten chunks are 1.25 MiB, and the rate of the store counts from 4 MiB on."""
    proxy = Proxy(valkey.port)
    try:
        proxy.rate = 4e6
        cache = server(flags=("--l2", valkey.url("?timeout=3600", port=proxy.port), *PATIENT))
        one = engine(cache, layers=8, dims=128)
        prompts = [list(range(start, start + 160)) for start in range(1000, 8000, 1000)]
        for number, prompt in enumerate(prompts):
            assert one.store(prompt) == len(prompt)
            written(cache, 10 * (number + 1))
        told = tiers_of(cache)["redis"]["codec"]
        assert told["option"] == "auto" and told["used"] == "pack12" and "it stores 0.00" in told["why"]
        assert 0 < told["stored_bytes"] < told["raw_bytes"] / 1.3
        cache.line_with("Tier redis: KV in bfloat16 is stored with pack12 from now on: it stores 0.00")
        sector(cache, "/clear-cache", "POST")
        proxy.rate = None
        assert [one.load(prompt) for prompt in prompts] == [160] * 7
    finally:
        proxy.close()


@pytest.mark.parametrize("scheme", ["dir", "disk"])
def test_what_memory_answers_with_is_not_evicted_from_the_tier(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path], scheme: str
) -> None:
    """All prompts begin alike, and memory answers with that. Without it nothing behind it is found after a restart."""
    url = f"{scheme}://{folders('/tmp')}/store?max_gb={0.004 if scheme == 'dir' else 0.008}"
    flags = ("--l2", f"{url}&io=buffered" if scheme == "disk" else url, *PATIENT)
    first = server(flags=flags)
    one = engine(first, layers=4, dims=32)
    numbers = itertools.count(1)

    def tier(counter: str) -> int:
        return int(tiers_of(first)[scheme]["counters"].get(counter, 0))

    def next_prompt() -> list[int]:
        """Another one that is in memory and in the tier."""
        ids = [*TOKENS, *range(number := 1000 * next(numbers), number + 160)]
        one.store(ids)
        eventually(lambda: tier("written_shards") >= first.counters()["stored_chunks_total"])
        return ids

    def told() -> bool:
        assert one.hit_tokens(TOKENS) == len(TOKENS)
        return tier("kept_shards") >= before + 10

    while (now := tiers_of(first)[scheme])["stored_bytes"] < 0.85 * now["max_bytes"]:
        next_prompt()
    for _ in range(6):
        for _ in range(8):  # more than an eighth of the tier
            ids = next_prompt()
        before = tier("kept_shards")
        eventually(told)
    first.end()
    assert engine(server(flags=flags), "again", layers=4, dims=32).load(ids) == 320


def test_the_end_waits_for_what_is_to_be_written(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    first = server(flags=("--l2", f"{valkey.url()}?write=on-evict"))
    one = engine(first)
    one.store(TOKENS)
    assert tiers_of(first)["redis"]["kept_back_chunks"] == 10 and tiers_of(first)["redis"]["shards"] == 0
    first.signal(signal.SIGTERM)
    first.line_with("has stopped")
    second = server(flags=("--l2", valkey.url(), *PATIENT))
    assert engine(second, "other").load(TOKENS) == len(TOKENS)


@pytest.mark.parametrize(("drain", "signals"), [("600", 1), ("0.1", 1), ("600", 2)])
def test_the_end_waits_as_long_as_it_was_told(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer, drain: str, signals: int
) -> None:
    """Six spaces are six writes, of which some wait for the others, and the store answers only when the server has ended
    its waiting, or was seen to go on; a second signal does not wait."""
    proxy = Proxy(valkey.port)
    try:
        url = valkey.url("?write=on-evict&timeout=3600", port=proxy.port)
        cache = server(flags=("--l2", url, "--drain-seconds", drain))
        for number in range(6):
            one = engine(cache, f"engine{number}", model=f"model{number}")
            one.store(TOKENS)
        proxy.freeze()
        asked = proxy.questions.arrived
        cache.signal(signal.SIGTERM)
        eventually(lambda: proxy.questions.arrived > asked)
        if signals == 2:
            cache.signal(signal.SIGTERM)
        everything = drain == "600" and signals == 1
        if everything:
            assert one.hit_tokens(TOKENS) == len(TOKENS), "it serves until then"
        else:
            eventually(lambda: not one.scheduler.connected)
        proxy.thaw()
        cache.line_with("has stopped")
        kept = [name for name in valkey.raw.keys("{lmcache}/*") if b"." not in name.partition(b"/")[2]]
        assert (len(kept) == 6 * 10) == everything, len(kept)
        assert any("could not be written before the server ended" in line for line in cache.log) == (not everything)
    finally:
        proxy.close()


def test_many_tiny_chunks_are_stored_in_calls_that_end_in_time(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    """Two calls are under way while the store does not answer, of 512 shards each, though many more would be small enough."""
    proxy = Proxy(valkey.port)
    try:
        flags = ("--l2", valkey.url("?write=on-evict&timeout=3600", port=proxy.port), "--drain-seconds", "600")
        cache, tokens = server(flags=flags), list(range(1600 * 16))
        assert engine(cache, num_blocks=1600).store(tokens) == len(tokens)
        proxy.freeze()
        cache.signal(signal.SIGTERM)
        eventually(lambda: tiers_of(cache)["redis"]["queued_chunks"] == 1600 - 2 * 512)
        proxy.thaw()
        cache.line_with("has stopped")
        kept = [name for name in valkey.raw.keys("{lmcache}/*") if b"." not in name.partition(b"/")[2]]
        assert len(kept) == 1600
    finally:
        proxy.close()


def test_the_decision_to_load_and_both_its_numbers_are_told(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    cache = server(flags=("--l2", valkey.url(), "--log-level", "DEBUG", *PATIENT))
    one = engine(cache)
    one.store(TOKENS)
    written(cache, 10)
    sector(cache, "/clear-cache", "POST")
    assert one.hit_tokens(TOKENS) == len(TOKENS)
    cache.line_with("loading is expected to take 0.000 s, computing 0.000 s: loading")
    metrics = sector(cache, "/metrics")[1]
    for name in ("expected_seconds", "recompute_seconds", "loaded"):
        assert f"lmcache_last_fetch_{name} " in metrics


def test_a_user_finds_what_tiers_did_for_his_request(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    cache = server(flags=("--l2", valkey.url(), *PATIENT))
    one = engine(cache)
    one.store(TOKENS)
    written(cache, 10)
    sector(cache, "/clear-cache", "POST")
    for request, tokens in (("request-1", TOKENS), ("request-\n2", [7, *TOKENS])):
        hit = one.scheduler.lookup(one.chain(tokens), prefill_rate=1000.0, request_id=request)
        assert (hit.chunks if hit else 0) == (10 if tokens is TOKENS else 0)
    absent, loaded = json.loads(sector(cache, "/fetches")[1])["fetches"]
    assert (absent["request"], absent["outcome"], absent["decision"]) == ("request-?2", "absent", "")
    assert (loaded["request"], loaded["outcome"], loaded["from"]) == ("request-1", "arrived", {"redis": 10})
    assert (loaded["asked_chunks"], loaded["l1_chunks"], loaded["arrived_chunks"]) == (10, 0, 10)
    assert loaded["decision"] == "load" and loaded["recompute_seconds"] == 0.16 and loaded["waited_seconds"] > 0
    assert [one["request"] for one in cache.status()["fetches"]] == ["request-?2", "request-1"]
    command = [sys.executable, "-m", "lmcache.cli.main", "describe", "fetches"]
    url = f"http://127.0.0.1:{cache.http_port}"
    said = subprocess.run([*command, "--url", url], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    (line,) = [line for line in said.splitlines() if "request-1" in line]
    assert line.split()[6] == "-" and "0.16" in line and "arrived" in line, said


def test_two_servers_share_a_store(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    here, there = (server(flags=("--l2", valkey.url(), *PATIENT)) for _ in range(2))
    writer, reader = engine(here, "writer"), engine(there, "reader")
    writer.store(TOKENS)
    written(here, 10)
    assert reader.load(TOKENS) == len(TOKENS)


def test_a_stalled_tier_costs_a_full_hit_nothing(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    """Whatever ends here has not waited for the tier: it answers only after the test, and would be waited for an hour."""

    def asked() -> int:
        return int(valkey.raw.info("commandstats").get("cmdstat_exists", {"calls": 0})["calls"])

    proxy = Proxy(valkey.port)
    try:
        cache = server(flags=("--l2", valkey.url("?timeout=3600", port=proxy.port), "--l2-patience-seconds", "600"))
        one = engine(cache, deadline=3000.0)
        one.store(TOKENS)
        written(cache, 10)
        before = asked()
        for _ in range(3):
            assert one.hit_tokens(TOKENS) == len(TOKENS)
        one.lookup([6, *TOKENS])
        eventually(lambda: asked() >= before + 10)
        assert asked() == before + 10, "a full hit asks nobody"
        proxy.freeze()
        for _ in range(50):
            assert one.hit_tokens(TOKENS) == len(TOKENS)
        sent = proxy.questions.arrived
        assert beside(lambda: one.lookup([7, *TOKENS])).result(PATIENCE) is None
        eventually(lambda: proxy.questions.arrived > sent)  # the tier was asked
        # What the tier cannot answer is a miss; and while it hangs nobody waits for it again.
        eventually(lambda: one.lookup([8, *TOKENS]) is None)
        assert one.hit_tokens(TOKENS) == len(TOKENS)
    finally:
        proxy.close()


def decided(server: Server, one: Any, prompts: list[list[int]]) -> tuple[Any, dict[str, Any]]:
    """Hit and record of the first lookup that ends with a decision: on a busy machine the store's answer may come too late."""
    for number, prompt in enumerate(itertools.cycle(prompts)):
        name = f"request {number}"
        hit = one.scheduler.lookup(one.chain(prompt), prefill_rate=1000.0, request_id=name)
        record = next(record for record in server.status()["fetches"] if record["request"] == name)
        if record["decision"]:
            return hit, record
    raise AssertionError("there are no prompts")


def test_what_takes_longer_than_computing_is_loaded_only_on_request(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    """A real store behind a slow network: 40 KiB take 0.4 s, computing them 0.16 s."""
    proxy = Proxy(valkey.port)
    try:
        flags = ("--l2", valkey.url(port=proxy.port))
        prompts = [[seed, *TOKENS[1:]] for seed in range(1000, 1005)]
        told = dict[str, dict[str, Any]]()
        for worth in ("auto", "always"):
            cache = server(flags=(*flags, "--worth", worth, "--l2-patience-seconds", "600"))
            one = engine(cache, worth)
            proxy.rate = None
            for prompt in prompts:
                one.store(prompt)
            written(cache, 50)
            sector(cache, "/clear-cache", "POST")
            proxy.rate = 100e3
            one.lookup(prompts[0])  # now the server has seen how slow it is
            eventually(lambda: one.hit_tokens(prompts[0]) == len(TOKENS))  # noqa: B023
            hit, told[worth] = decided(cache, one, prompts[1:])
            assert (hit.chunks if hit else 0) == (10 if worth == "always" else 0)
        assert (told["auto"]["decision"], told["auto"]["outcome"]) == ("not worth it", "not worth it")
        assert told["auto"]["expected_seconds"] > told["auto"]["recompute_seconds"] == 0.16
        assert (told["always"]["decision"], told["always"]["outcome"]) == ("load", "arrived")
        assert told["always"]["waited_seconds"] > 0.16
    finally:
        proxy.close()


def test_the_end_does_not_wait_for_a_tier_that_hangs(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    proxy = Proxy(valkey.port)
    try:
        cache = server(flags=("--l2", valkey.url("?timeout=3", port=proxy.port), "--drain-seconds", "0.1"))
        one, other = engine(cache), engine(cache, "other")
        eventually(lambda: tiers_of(cache)["redis"]["state"] == "serving")
        proxy.freeze()
        one.store(TOKENS)
        other.lookup([7, *TOKENS])
        eventually(lambda: not tiers_of(cache)["redis"]["queued_chunks"])  # the write is under way
        assert cache.end() == 0
        assert not list(cache.arena_dir.glob("*.arena*")) and "Traceback" not in "".join(cache.log)
    finally:
        proxy.close()


def ended_without(server: Server, tier: str, calls: str) -> float:
    """The server ends by itself, cleanly but for these calls of a tier; how long it has waited for them."""
    line = server.line_with(f"Tier {tier} is abandoned: {calls} have not returned after ")
    server.line_with("has stopped")
    assert server.child.wait(PATIENCE) == 0
    assert not list(server.arena_dir.glob("*.arena*")) and "Traceback" not in "".join(server.log)
    return float(line.partition(" have not returned after ")[2].split()[0])


def bring_about(call: str, server: Server, engine: Engine) -> None:
    """Make the server call this method of its tier."""

    def clear() -> None:
        with contextlib.suppress(OSError):  # the server ends before it has answered
            sector(server, "/clear-cache?tiers=all", "POST")

    if call == "store":
        engine.store(TOKENS)
    elif call in ("contains", "load"):
        engine.lookup(TOKENS)
    elif call == "clear":
        threading.Thread(target=clear, daemon=True).start()


@pytest.mark.parametrize("call", ["contains", "load", "store", "clear", "close"])
def test_one_signal_ends_a_server_whose_tier_hangs(
    server: Callable[..., Server], engine: Callable[..., Engine], hanging: Path, call: str
) -> None:
    flags = ("--l2", f"hanging://{hanging}?calls={call}", "--drain-seconds", "0", "--l2-patience-seconds", "0.1")
    cache = server(flags=flags)
    bring_about(call, cache, engine(cache))
    if call != "close":
        cache.line_with(f"{call} hangs")
    cache.signal(signal.SIGTERM)
    ended_without(cache, "hanging", f"1 calls (1 of {call})")


def test_a_second_signal_does_not_wait_for_a_tier_that_hangs(
    server: Callable[..., Server], engine: Callable[..., Engine], hanging: Path
) -> None:
    cache = server(flags=("--l2", f"hanging://{hanging}?calls=store", "--drain-seconds", "3600"))
    bring_about("store", cache, engine(cache))
    cache.line_with("store hangs")
    cache.signal(signal.SIGTERM)
    cache.line_with("Writing 10 chunks to tiers before the server ends, for up to 3600 s")
    cache.signal(signal.SIGTERM)
    assert ended_without(cache, "hanging", "1 calls (1 of store)") < CLOSE_SECONDS


@pytest.mark.parametrize("signals", [1, 2])
def test_a_store_that_is_frozen_does_not_hold_up_the_end(
    server: Callable[..., Server], engine: Callable[..., Engine], valkey: RedisServer, signals: int
) -> None:
    drain = "0" if signals == 1 else "3600"
    cache = server(flags=("--l2", valkey.url("?timeout=3600"), "--drain-seconds", drain))
    one = engine(cache)
    valkey.child.send_signal(signal.SIGSTOP)
    one.store(TOKENS)
    eventually(lambda: not tiers_of(cache)["redis"]["queued_chunks"])  # the write is under way
    cache.signal(signal.SIGTERM)
    if signals == 2:
        cache.line_with("chunks to tiers before the server ends")
        cache.signal(signal.SIGTERM)
    waited = ended_without(cache, "redis", "1 calls (1 of store)")
    assert (waited < CLOSE_SECONDS) == (signals == 2)


def test_a_file_system_that_does_not_answer_does_not_hold_up_the_end(
    server: Callable[..., Server], engine: Callable[..., Engine], folders: Callable[[str], Path]
) -> None:
    """Each shard's file is a FIFO now: who opens it waits in the kernel, in threads of the tier's own."""
    store = folders("/tmp") / "tier"
    first = server(flags=("--l2", f"dir://{store}"))
    assert engine(first).store(TOKENS) == len(TOKENS)
    written(first, 10, "dir")
    first.end()
    for file in store.glob("*/??/*"):
        if file.is_file():
            file.unlink()
            os.mkfifo(file)
    second = server(flags=("--l2", f"dir://{store}", "--worth", "always", "--l2-patience-seconds", "3"))
    assert not engine(second, "again").lookup(TOKENS)
    second.line_with("Tier dir: load has not returned for ")
    second.signal(signal.SIGTERM)
    ended_without(second, "dir", "1 calls (1 of load)")


def test_a_server_ends_while_a_tier_hangs_in_its_start(folders: Callable[[str], Path], hanging: Path) -> None:
    flags = ("--l2", f"hanging://{hanging}?calls=open", "--l2-required")
    cache = Server(folders("/tmp"), folders("/dev/shm"), 64, 16, free_port(), flags)
    try:
        cache.line_with("open hangs")
        cache.signal(signal.SIGTERM)
        ended_without(cache, "hanging", "1 calls (1 of open)")
    finally:
        cache.end()


def test_a_required_tier_that_hangs_ends_the_start(folders: Callable[[str], Path], hanging: Path) -> None:
    flags = ("--l2", f"hanging://{hanging}?calls=open", "--l2-required")
    cache = Server(folders("/tmp"), folders("/dev/shm"), 64, 16, free_port(), flags)
    try:
        cache.line_with("not open after 15 s (--l2-required is set)")
        assert cache.child.wait(PATIENCE) == 2
        assert not list(cache.arena_dir.glob("*.arena*")) and "Traceback" not in "".join(cache.log)
    finally:
        cache.end()


@pytest.mark.parametrize("call", ["contains", "load", "store"])
def test_a_call_that_does_not_return_costs_its_tier_alone_and_is_told(
    server: Callable[..., Server],
    engine: Callable[..., Engine],
    hanging: Path,
    folders: Callable[[str], Path],
    call: str,
) -> None:
    """The other tier goes on to be written and read, lookups are answered, and the calls that return at last do no harm."""
    tiers = ("--l2", f"hanging://{hanging}?calls={call}", "--l2", f"dir://{folders('/tmp')}/tier")
    cache = server(flags=(*tiers, "--worth", "always", "--l2-patience-seconds", "0.1"))
    one = engine(cache)
    bring_about(call, cache, one)
    cache.line_with(f"{call} hangs")
    told = cache.line_with(f"Tier hanging: {call} has not returned for ")
    assert f"check whether hanging://{hanging}" in told
    assert tiers_of(cache)["hanging"]["state"] == "stalled" and tiers_of(cache)["dir"]["state"] == "serving"
    (degraded,) = cache.get("/healthcheck")["degraded"]
    assert degraded.startswith(f"hanging: {call} has not returned for ")
    other = [7, *TOKENS[1:]]
    assert one.store(other) == len(other)
    eventually(lambda: tiers_of(cache)["dir"]["counters"].get("kept_shards", 0) >= 10)
    sector(cache, "/clear-cache", "POST")
    if call != "store":  # a tier that is only slow to write is still asked, and says that it has everything
        eventually(lambda: one.load(other) == len(other))
    hanging.open("w").close()
    cache.line_with("Tier hanging: no call hangs any more")
    assert tiers_of(cache)["hanging"]["state"] == "serving" and cache.healthy()


def test_the_answer_to_a_clear_names_the_tier_that_takes_long(
    folders: Callable[[str], Path], hanging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(hanging.parent))
    monkeypatch.setattr("lmcache.server.report._CLEAR_TIERS_SECONDS", 0.1)
    with server_parts(folders, 8 << 20, l2=[f"hanging://{hanging}?calls=clear"]) as (service, _):
        told = Report(ServerConfig(), service.loop, service).clear("all")
        hanging.open("w").close()
    assert told["cleared_tiers"] == [] and "the server goes on with it" in str(told["failed_tiers"])


def test_loads_that_failed_do_not_spoil_the_end(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    """Each shard's file is a folder now: reading fails, and not for want of the file."""
    store = folders() / "tier"
    first = server(flags=("--l2", f"dir://{store}"))
    assert engine(first).store(TOKENS) == len(TOKENS)
    written(first, 10, "dir")
    assert first.end() == 0
    shards = [file for file in store.glob("*/??/*") if file.is_file()]
    assert len(shards) == 10
    for file in shards:
        file.unlink()
        file.mkdir()
    second = server(flags=("--l2", f"dir://{store}", *PATIENT))
    assert engine(second, "again").load(TOKENS) == 0
    assert tiers_of(second)["dir"]["counters"]["missed:tier failed"] >= 10
    assert second.end() == 0 and "Traceback" not in "".join(second.log)


def test_how_long_and_how_much_may_wait_is_what_was_told(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    """Two chunks of 4 KiB may wait to be written, and a lookup for 0.3 s, while that of a server that was told 600 s still
    does; the store does not answer at all."""
    proxy = Proxy(valkey.port)
    try:
        flags = ("--l2", valkey.url("?timeout=3600", port=proxy.port), "--l2-queue-gb", str(8192 / 2**30))
        patience = ("--worth", "always", "--l2-patience-seconds")
        cache, patient = (server(flags=(*flags, *patience, seconds)) for seconds in ("0.3", "600"))
        one, other = engine(cache), engine(patient)
        proxy.freeze()
        waiting = beside(lambda: other.lookup([7, *TOKENS]))
        eventually(lambda: "lmcache_fetches_open 1.0" in sector(patient, "/metrics")[1])
        begin = time.monotonic()
        assert one.lookup([7, *TOKENS]) is None
        eventually(lambda: cache.status()["fetches"])
        assert time.monotonic() - begin >= 0.3
        assert not waiting.done() and not patient.status()["fetches"]
        one.store(TOKENS)
        lost = 'lmcache_tier_lost_total{reason="queue full",tier="redis"} 8.0'
        eventually(lambda: lost in sector(cache, "/metrics")[1])
        assert "queue full: a higher --l2-queue-gb" in cache.line_with("Tier redis: not written: ")
        proxy.refuse = True  # so that the end need not wait for the calls under way
        proxy.cut()
    finally:
        proxy.close()


def test_a_store_that_comes_late_goes_and_comes_back(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    store = RedisServer(binary_of("valkey"), folders("/tmp"))
    store.end()
    cache = server(flags=("--l2", store.url()))
    assert any("does not serve yet" in line for line in cache.log)
    (told,) = cache.get("/healthcheck")["degraded"]
    assert told.startswith("redis: ") and str(store.port) in told
    one = engine(cache)
    assert one.store(TOKENS) == len(TOKENS) == one.hit_tokens(TOKENS)
    store.start()
    try:
        written(cache, 10)
        assert cache.get("/healthcheck") == {"status": "healthy"}
        metrics = sector(cache, "/metrics")[1]
        assert 'lmcache_tier_serving{tier="redis"} 1.0' in metrics and "lmcache_tier_failed_total{" in metrics
    finally:
        store.end()


def test_each_tier_that_cannot_be_used_is_one_line_and_the_server_serves(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    store, file = RedisServer(binary_of("valkey"), folders("/tmp"), password="right"), folders("/tmp") / "file"
    file.touch()
    tiers = {
        "locked": (store.url("?name=locked").replace("right", "wrong"), "WRONGPASS"),
        "gone": ("redis://127.0.0.1:1/0?name=gone", "127.0.0.1:1"),
        "file": (f"disk://{file}/tier?name=file", str(file)),
        "shared": (f"dir://{file}/tier?name=shared", str(file)),
    }
    try:
        cache = server(flags=tuple(word for url, _ in tiers.values() for word in ("--l2", url)))
        degraded = cache.get("/healthcheck")["degraded"]
        for name, (_, said) in tiers.items():
            (line,) = [line for line in cache.log if f"Tier {name} does not serve yet" in line]
            assert said in line and "wrong@" not in line
            assert any(one.startswith(f"{name}: ") and said in one for one in degraded), degraded
            assert tiers_of(cache)[name]["state"] != "serving" and said in tiers_of(cache)[name]["reason"]
        one = engine(cache)
        assert one.store(TOKENS) == len(TOKENS) == one.hit_tokens(TOKENS)
        assert "Traceback" not in "".join(cache.log)
    finally:
        store.end()


def test_required_tiers_and_wrong_urls_end_the_start_with_one_line(folders: Callable[[str], Path]) -> None:
    def start_fails(*flags: str) -> str:
        failed = subprocess.run(
            [sys.executable, "-m", "lmcache.cli.main", "server", "--l1-size-gb", "0.01", "--port", "0", "--http-port", "0",
             "--socket-dir", str(folders("/tmp")), "--arena-dir", str(folders("/dev/shm")), *flags],
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        return failed.stderr.splitlines()[-1]

    nowhere = "redis://127.0.0.1:1/0"
    assert "--l2-required is set" in start_fails("--l2", nowhere, "--l2-required")
    assert "unknown tier 'rediss2'" in start_fails("--l2", "rediss2://host")
    assert "unknown option 'max_bg'; did you mean max_gb?" in start_fails("--l2", "redis://h?max_bg=3")
    assert "${NOT_SET_ANYWHERE} is not set" in start_fails("--l2", "redis://:${NOT_SET_ANYWHERE}@h")
    assert "type 'tape' is not supported" in start_fails("--l2-adapter", '{"type": "tape"}')


def test_clearing_reaches_the_tiers_that_are_named(
    server: Callable[..., Server], engine: Callable[..., Any], valkey: RedisServer
) -> None:
    cache = server(flags=("--l2", f"{valkey.url()}?name=far", *PATIENT))
    one = engine(cache)
    one.store(TOKENS)
    written(cache, 10, "far")
    assert sector(cache, "/clear-cache", "POST")[0] == 200
    assert one.hit_tokens(TOKENS) == len(TOKENS), "L1 alone was emptied"
    status, answer = sector(cache, "/clear-cache?tiers=nowhere", "POST")
    assert status == 404 and "there is no such tier; known: all, far" in answer
    status, answer = sector(cache, "/clear-cache?tiers=far", "POST")
    assert status == 200 and json.loads(answer)["cleared_tiers"] == ["far"]
    cache.line_with("Tier far cleared")
    assert tiers_of(cache)["far"]["shards"] == 0 and one.hit_tokens(TOKENS) == 0


def test_all_tiers_however_they_were_spelled_are_described_and_emptied(
    server: Callable[..., Server], engine: Callable[..., Any], folders: Callable[[str], Path]
) -> None:
    def say(*words: str) -> str:
        command = [sys.executable, "-m", "lmcache.cli.main", *words, "--url", f"http://127.0.0.1:{cache.http_port}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout

    paths = [folders("/tmp") / "tier" for _ in range(3)]
    peers = [json.dumps({"type": "fs", "base_path": str(path), "max_capacity_gb": 1}) for path in paths[:2]]
    flags = ("--l2", f"dir://{paths[2]}", "--l2-adapter", peers[0], "--l2-adapter", peers[1])
    cache = server(flags=flags)
    assert list(tiers_of(cache)) == ["dir", "disk", "disk2"]
    one = engine(cache)
    one.store(TOKENS)
    for name in tiers_of(cache):
        written(cache, 10, name)
    rows = {
        line[0]: line for line in (re.split(r" {2,}", one.strip()) for one in say("describe", "tiers").splitlines())
    }
    for name, path in zip(("disk", "disk2", "dir"), paths, strict=True):
        assert str(path) in rows[name][1] and rows[name][2] == "serving"
        assert rows[name][rows["name"].index("shards")] == "10"
    assert "cleared tiers ['dir', 'disk', 'disk2']" in say("clear", "--tiers", "all")
    assert [tier["shards"] for tier in tiers_of(cache).values()] == [0, 0, 0] and one.hit_tokens(TOKENS) == 0


def test_tiers_are_shown_without_passwords(server: Callable[..., Server], folders: Callable[[str], Path]) -> None:
    store = RedisServer(binary_of("valkey"), folders("/tmp"), password="hunter2")
    try:
        cache = server(flags=("--l2", store.url()))
        assert any("can be read by every user" in line for line in cache.log)
        assert not any("hunter2" in line for line in cache.log)
        for path in ("/status", "/metrics", "/", "/healthcheck"):
            assert "hunter2" not in sector(cache, path)[1]
        assert tiers_of(cache)["redis"]["url"] == f"redis://:***@127.0.0.1:{store.port}/0"
        assert tiers_of(cache)["redis"]["state"] == "serving"
    finally:
        store.end()


def test_a_disk_that_admits_at_the_second_touch_gets_what_is_wanted_again(
    server: Callable[..., Server], engine: Callable[..., Any], tmp_path: Path
) -> None:
    cache = server(flags=("--l2", f"disk://{tmp_path}/a,{tmp_path}/b?max_gb=1&admit=second-touch", "--worth", "always"))
    one, ids, other = engine(cache), TOKENS, [7, *TOKENS[1:]]
    assert one.store(ids) == one.store(other) == 160
    assert cache.status()["tiers"][0]["counters"].get("kept_shards", 0) == 0
    assert one.load(ids) == 160
    eventually(lambda: cache.status()["tiers"][0]["counters"].get("kept_shards", 0) == 10)
    cache.clear()
    assert one.load(ids) == 160 and not one.lookup(other)
    one.close()
