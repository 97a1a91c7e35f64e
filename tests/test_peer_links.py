"""Links between servers that are cut, frozen or slow, with real servers and a proxy between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prompts import tokens
from proxy import Proxy
from servers import eventually, key_file
from test_peers import IDS, PATIENT, Engines, Servers, connected, nothing_lent, tier_of, with_key
from test_peers import proxies as proxies


def test_a_link_that_is_cut_at_any_byte_is_a_miss_or_right_and_comes_back(
    server: Servers, engine: Engines, folders: Callable[[str], Path], proxies: Callable[[int], Proxy]
) -> None:
    """In the answer to the question, in the header of the first pull, in its payload, and in the last one."""
    key = key_file(folders("/tmp"))
    here, between, there = with_key(server, key, proxies)
    writer, reader = (engine(one, "e", key_file=str(key)) for one in (here, there))
    misses = 0
    for number, at in enumerate((0, 60, 300, 3000, 80_000, 160_000)):
        ids = tokens(640, 20 + number)
        assert writer.store(ids) == 640
        between.answers.after(at, between.cut)
        found = reader.load(ids)  # compares every byte
        assert found >= 0
        misses += found < 640
        assert eventually(lambda ids=ids: reader.load(ids) == 640), "the link is made again"
    assert misses > 2
    assert tier_of(there)["counters"].get("missed:lost", 0) + tier_of(there)["counters"].get("failed:unreachable", 0)
    nothing_lent(here)
    nothing_lent(there)


@pytest.mark.parametrize("end", ["released", "cut"])
def test_kv_that_arrives_after_a_freeze_of_the_link_reaches_no_memory_that_was_used_again(
    server: Servers, engine: Engines, folders: Callable[[str], Path], proxies: Callable[[int], Proxy], end: str
) -> None:
    key = key_file(folders("/tmp"))
    flags = "--auth-key-file", str(key)
    here = server(flags=flags)
    between = proxies(here.port)
    url = f"peer://127.0.0.1:{between.port}?name=peers&timeout=60"
    more = ("--lease-seconds", "1", "--l2-patience-seconds", "0.5")
    there = server(l1=1.5, flags=(*flags, "--l2", url, *more, *PATIENT))
    connected(there, between.port)
    engine(here, "writer", key_file=str(key)).store(IDS)
    reader = engine(there, "reader", key_file=str(key))
    between.answers.after(80_000, between.answers.hold)
    assert reader.hit_tokens(IDS) < 640, "it waits for half a second"
    eventually(lambda: tier_of(there)["counters"].get("missed:too late"))  # the memory is claimed no longer
    eventually(lambda: there.counters()["quarantined_bytes"] == 0)  # since what arrives later is copied no more
    prompts = [tokens(1600, 40 + number) for number in range(6)]
    for ids in prompts:
        assert reader.store(ids) > 0  # more than all of the memory
    if end == "released":
        between.answers.release()
    else:
        between.cut()
        between.answers.release()
    other = tokens(320, 9)
    engine(here, "writer 2", key_file=str(key)).store(other)
    assert eventually(lambda: reader.load(other) == 320), "what was on its way has arrived before it"
    found = [reader.load(ids) for ids in prompts]
    assert min(found) >= 0 and sum(found) > 3 * 1600, "most of the memory is theirs, and every byte is right"
    assert eventually(lambda: reader.load(IDS) == 640)
    nothing_lent(here)


def test_a_slow_link_is_left_where_computing_is_faster(
    server: Servers, engine: Engines, folders: Callable[[str], Path], proxies: Callable[[int], Proxy]
) -> None:
    key = key_file(folders("/tmp"))
    flags = "--auth-key-file", str(key)
    here = server(flags=flags)
    between = proxies(here.port)
    there = server(flags=(*flags, "--l2", f"peer://127.0.0.1:{between.port}?name=peers&timeout=60"))
    connected(there, between.port)
    writer, reader = (engine(one, "e", key_file=str(key)) for one in (here, there))
    for number in range(3):
        writer.store(tokens(640, 60 + number))
    assert reader.scheduler is not None

    def look(number: int, tokens_per_second: float) -> Any:
        """The record of a lookup of an engine that computes so fast."""
        name, ids = f"r{number} {tokens_per_second}", tokens(640, 60 + number)
        assert reader.scheduler is not None
        hit = reader.scheduler.lookup(reader.chain(ids), prefill_rate=tokens_per_second, request_id=name)
        if hit is not None:
            reader.scheduler.release(hit)
        return eventually(lambda: [one for one in there.get("/fetches")["fetches"] if one["request"] == name])[0]

    between.rate = 400e3  # 160 KiB take 0.4 s
    eventually(lambda: reader.hit_tokens(tokens(640, 60)) == 640)  # so the pace is known
    left = look(1, 1e5)
    assert left["outcome"] == "not worth it" and left["expected_seconds"] > left["recompute_seconds"]
    worth = look(2, 10.0)
    assert worth["outcome"] == "arrived" and worth["expected_seconds"] < worth["recompute_seconds"]
    assert reader.load(tokens(640, 62)) == 640
