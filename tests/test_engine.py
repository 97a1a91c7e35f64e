"""An engine's sessions with a real server: what goes in comes out, bit for bit, and only that."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import replace

import numpy as np
import pytest

from engine_process import pause_once
from lmcache.engine import Load, connection
from lmcache.engine.connection import RENEWALS
from ports import free_port
from servers import PATIENCE, eventually, unresolved


def prompt(seed: int, tokens: int) -> list[int]:
    return [
        random.Random(seed).randrange(150_000) if at == 0 else (seed * 7919 + at * 31) % 150_000 for at in range(tokens)
    ]


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 70), (16, 1000), (256, 1300)])
@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_round_trip_keeps_every_bit(server, engine, chunk, tokens, mode):
    one = engine(server(chunk=chunk), mode=mode, num_blocks=90)
    ids, whole = prompt(1, tokens), tokens // chunk * chunk
    assert one.lookup(ids) is None
    assert one.store(ids) == whole
    assert one.load(ids) == whole
    assert one.store(ids) == 0, "what is there is not copied again"


def test_the_log_lines_that_users_look_for(server, engine):
    """And the seconds in them are those of the finished copy, by a clock that only this test moves."""
    now = [1000.0]
    cache, ids = server(), prompt(13, 320)
    one = engine(cache)
    one.worker.runtime = replace(one.worker.runtime, now=lambda: now[0])
    cache.line_with(f"Registered KV cache for GPU ID {os.getpid()} with 2 layers (worker rank 0, pid {os.getpid()})")
    for what, said in (("gather", "Stored"), ("scatter", "Retrieved")):
        pause_once(one.worker._access.parts[0].copier, what, lambda: now.append(now.pop() + 7.25))
        assert (one.store(ids) if what == "gather" else one.load(ids)) == 320
        cache.line_with(f"{said} 320 tokens in 7.250 seconds")


@pytest.mark.parametrize("name", ["localhost", "LocalHost", "one.localhost."])
def test_loopback_needs_no_resolver(server, engine, monkeypatch, name):
    """As in a root without /etc/hosts."""
    cache = server()
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    cache.address = cache.address.replace("127.0.0.1", name)
    for mode in ("auto", "payload"):
        engine(cache, mode, mode=mode)


def test_an_l1_smaller_than_a_chunk_is_said_on_both_sides_and_not_tried_all_the_time(
    server, engine, monkeypatch, caplog
):
    monkeypatch.setattr(connection, "_USELESS_BACKOFF_SECONDS", (0.0, 0.0, 3600.0))
    cache = server(l1=1.5, chunk=8192)
    one = engine(cache, connect=False)
    remedy = "L1 has 1.5 MiB, and one chunk of this model takes 2.0 MiB: start the server with --l1-size-gb"
    eventually(lambda: f"LMCache server at {cache.address} is of no use to this engine ({remedy}" in caplog.text)
    assert "No LMCache server" not in caplog.text
    eventually(lambda: cache.counters()['refused_engines_total{reason="small L1"}'] == 3)
    one.close()
    assert cache.counters()['refused_engines_total{reason="small L1"}'] == 3
    who = f"worker rank 0, pid {os.getpid()}, from this host"
    cache.said_once(f"Refused an engine: {who}: {remedy}")
    assert "Engine process connected: worker" not in "".join(cache.log)
    (told,) = cache.get("/healthcheck")["refused_engines"]
    assert told.startswith(f"{who}: {remedy}") and cache.status()["refused_engines"][0]["reason"] == "small L1"


@pytest.mark.parametrize("block_tokens", [16, 128])
def test_token_ranges_inside_blocks_and_chunks(server, engine, block_tokens):
    """Hits that end inside a block, loads that start behind what the engine has already."""
    one = engine(server(chunk=16), block_tokens=block_tokens, num_blocks=80)
    ids = prompt(2, 300)
    one.store(ids)
    for start, end in [(0, 31), (0, 5), (17, 33), (100, 288), (287, 288), (16, 16 * 18)]:
        assert one.load(ids, start, end) == end - start
    assert one.load(ids[:31]) == 16
    assert one.load(ids[:15]) == 0
    longer = ids[:200] + prompt(3, 100)  # a shared prefix of 12 chunks and a half
    assert one.load(longer) == 192


def test_layouts_never_mix(server, engine):
    """Several layouts in one server, with the same tokens: each gets its own bytes back, or nothing."""
    cache, ids = server(chunk=16, l1=128), prompt(4, 400)
    shapes = [(2, 2, 16, "a"), (2, 2, 16, "b"), (1, 4, 16, "a"), (3, 1, 40, "a")]
    engines = [
        engine(cache, f"e{n}", layers=layers, heads=heads, dims=dims, model=model)
        for n, (layers, heads, dims, model) in enumerate(shapes)
    ]
    for one in engines:
        assert one.lookup(ids) is None
        assert one.store(ids) == 400
    for one in engines:
        assert one.load(ids) == 400
    assert len(cache.status()["index"]["spaces"]) == len(shapes)


def test_salts_and_adapters_see_only_their_own(server, engine):
    one, ids = engine(server()), prompt(5, 64)
    chain = one.scheduler.new_chain(cache_salt="tenant")
    chain.extend(ids)
    one.store(ids, chain=chain)
    assert one.lookup(ids) is None
    other = one.scheduler.new_chain(cache_salt="tenant", lora_name="adapter")
    other.extend(ids)
    assert one.scheduler.lookup(other) is None
    hit = one.scheduler.lookup(chain)
    assert hit is not None and hit.chunks == 4


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_chunk_is_there_once_both_ranks_have_stored_it(server, engine, mode):
    cache, ids = server(), prompt(6, 320)
    first = engine(cache, shards=2, shard=0, mode=mode)
    second = engine(cache, shards=2, shard=1, scheduler=False, mode=mode)
    chain = first.chain(ids)
    first.store(ids)
    assert first.lookup(ids) is None, "half a chunk is no chunk"
    half = first.chain(ids[:160])
    second.store(ids[:160], chain=half)
    assert first.hit_tokens(ids) == 160
    second.store(ids, first_chunk=10, chain=chain)
    hit = first.lookup(ids)
    assert hit is not None and hit.chunks == 20
    for rank in (first, second):
        rank.poison()
        assert rank.wait(rank.submit_load(hit, 16, 0, 320, ids)).ok
        assert rank.right(ids, 0, 320)
    first.scheduler.release(hit)


def test_two_engine_processes_share(server, engine, engine_process):
    cache, ids = server(), prompt(7, 500)
    other = engine_process(cache)
    assert other.ask("store", ids=ids) == 496
    one = engine(cache)
    assert one.load(ids) == 496
    more = ids[:496] + prompt(8, 100)
    one.store(more)
    assert other.ask("load", ids=more) == 592
    assert cache.status()["counters"]["engine_processes"] == 4


def test_an_engine_may_start_before_its_server(server, engine, folders):
    port = free_port()

    class Later:
        address = f"tcp://127.0.0.1:{port}"

    one = engine(Later, connect=False)
    assert one.scheduler.new_chain() is None
    assert not one.scheduler.connected
    server(port=port)
    one.connect()
    ids = prompt(9, 100)
    assert one.store(ids) == 96
    assert one.load(ids) == 96


def test_a_load_that_makes_no_sense_is_refused_and_touches_nothing(server, engine):
    """Another epoch might still come, so that load takes a deadline; the others end at once."""
    one, ids = engine(server(), deadline=5.0), prompt(10, 160)
    one.store(ids)
    hit = one.lookup(ids)
    assert hit is not None
    one.poison()
    table, good = one.table(160), hit.shard_extents(0)
    beyond = np.full(10, (1 << 32) - 2, dtype="<u4").tobytes()
    for name, load in {
        "slots beyond the arena": Load(hit.epoch, hit.lease, 0, beyond, 0, 160, table),
        "fewer slots than tokens": Load(hit.epoch, hit.lease, 0, good[:8], 0, 160, table),
        "no slots": Load(hit.epoch, hit.lease, 0, b"", 0, 160, table),
        "a torn slot": Load(hit.epoch, hit.lease, 0, good[:-1], 0, 160, table),
        "a block that is not": Load(hit.epoch, hit.lease, 0, good, 0, 160, [*table[:-1], 10_000]),
        "a block table too short": Load(hit.epoch, hit.lease, 0, good, 0, 160, table[:-1]),
        "another epoch": Load(bytes(16), hit.lease, 0, good, 0, 160, table),
    }.items():
        one.set_deadline(0.5 if name == "another epoch" else PATIENCE)  # which is waited for
        one.worker.load(name, load)
        done = one.wait(name)
        assert not done.ok and done.tokens == 0, name
        assert one.right(ids, 0, 0), name


def test_jobs_that_wait_can_be_cancelled(server, engine):
    """Preemption: what has not begun never touches the blocks; what has begun is waited for."""
    one = engine(server(l1=128))
    ids = prompt(11, 2000)
    jobs = [one.submit_store(ids[: 400 * n]) for n in range(1, 6)]
    assert one.worker.wait(jobs, PATIENCE) == set()
    one.poison()  # nobody reads these blocks any more
    ended = {}
    while len(ended) < len(jobs):
        assert one.worker.wait_finished(PATIENCE)
        ended |= {done.job_id: done for done in one.worker.finished()}
    kept = one.hit_tokens(ids)
    assert kept == 0 or one.load(ids) == kept


def test_what_is_skipped_is_not_leased(server, engine):
    cache = server()
    one, ids = engine(cache), prompt(12, 160)
    one.store(ids)
    hit = one.lookup(ids, skip_tokens=100)
    assert (hit.chunks, hit.first_chunk, len(hit.extents)) == (10, 6, 16)
    assert one.lookup(ids, skip_tokens=160) is None
    one.scheduler.release(hit)
    eventually(lambda: cache.counters()["leases"] == 0)


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_hit_is_held_for_longer_than_a_claim_lasts(server, engine, mode):
    """A long decode: the session renews what it holds, as often as the server's own number makes necessary."""
    cache = server(flags=("--lease-seconds", "1"))
    one, ids = engine(cache, mode=mode), prompt(14, 160)
    one.store(ids)
    hit = one.lookup(ids)
    assert hit is not None and one.scheduler.claim_seconds == 1.0
    eventually(lambda: cache.counters()["renewed_leases_total"] > 2 * RENEWALS)
    one.poison()
    # On a busy machine a renewal may come late; the lease is expired until it does, and payload frames are refused.
    eventually(lambda: one.wait(one.submit_load(hit, 16, 0, 160, ids)).ok)
    assert one.right(ids, 0, 160)
    eventually(lambda: cache.counters()["quarantined_bytes"] == 0)
    one.scheduler.release(hit)
    eventually(lambda: cache.counters()["leases"] == 0)


def test_leases_that_expired_while_an_engine_stood_still_are_its_own_again(server, engine_process):
    cache = server(flags=("--lease-seconds", "1"))
    one, ids = engine_process(cache), prompt(15, 160)
    one.ask("store", ids=ids)
    one.ask("hold", ids=ids)
    one.freeze()
    held = eventually(lambda: cache.counters()["quarantined_bytes"])
    assert held == cache.status()["arena"]["used_bytes"]
    one.thaw()
    eventually(lambda: cache.counters()["quarantined_bytes"] == 0)
    assert cache.counters()["leases"] == 1
