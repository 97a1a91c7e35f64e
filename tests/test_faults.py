"""Death, frost and nonsense on either side: never wrong bytes, never more than the deadline, nothing left for good."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from engine_process import pause_once
from lmcache.engine import Load, Store, connection, hello
from lmcache.wire import messages as m
from lmcache.wire.frames import frame
from ports import free_port
from servers import PATIENCE, beside, eventually

PATIENT = 3000.0  # seconds; a call with such a deadline ends by what a test does, or not at all
L1_CHUNKS = 2048  # of 4096 bytes in 8 MiB


def prompt(seed: int, tokens: int) -> list[int]:
    return [seed * 1_000_003 % 100_000, *range(seed, seed + tokens - 1)]


def fill_l1(one, seed: int, prompts: int) -> list[list[int]]:
    """Store so many prompts of 512 chunks each; 4 of them fill L1."""
    fresh = [prompt(seed + n, 512 * 16) for n in range(prompts)]
    for ids in fresh:
        one.store(ids)
    return fresh


# Slots that may still be touched: decision 1


def test_a_writer_frozen_past_its_deadline_writes_into_nobodys_extents(server, engine, engine_process):
    cache = server(l1=8, flags=("--lease-seconds", "3"))
    writer, ids = engine_process(cache, "writer", num_blocks=64), prompt(1, 640)
    writer.ask("pause", what="gather")
    writer.say(do="store", ids=ids)
    assert writer.hear() == {"midway": True}
    writer.freeze()
    eventually(lambda: cache.counters()["quarantined_bytes"] == 40 * 4096)
    other = engine(cache, "other", num_blocks=520)
    kept = fill_l1(other, 100, 5)[-3:]
    assert other.lookup(ids) is None
    writer.thaw()
    writer.say(go=True)
    assert writer.hear() == 0, "too late: nothing was stored"
    for one in kept:
        assert other.load(one) == 512 * 16, "the late half was written over somebody's chunks"
    assert other.lookup(ids) is None
    counters = cache.counters()
    assert counters["quarantined_bytes"] == 0 and counters["reservations"] == 0
    assert counters["expired_chunks_total"] == 40
    assert writer.ask("store", ids=ids) == 640 and other.load(ids) == 640, "and it is welcome again"


def test_a_reader_frozen_past_its_deadline_still_reads_the_right_bytes(server, engine, engine_process):
    cache = server(l1=8, flags=("--lease-seconds", "3"))
    reader, ids = engine_process(cache, "reader", num_blocks=64), prompt(2, 640)
    reader.ask("store", ids=ids)
    reader.ask("pause", what="scatter")
    reader.say(do="load", ids=ids)
    assert reader.hear() == {"midway": True}
    reader.freeze()
    eventually(lambda: cache.counters()["quarantined_bytes"] == 40 * 4096)
    other = engine(cache, "other", num_blocks=520)
    kept = fill_l1(other, 200, 5)[-3:]
    cache.clear()
    kept += fill_l1(other, 300, 3)
    reader.thaw()
    reader.say(go=True)
    assert reader.hear() == 640, "the slots under a reader were given away"
    assert all(other.load(one) == 512 * 16 for one in kept[-3:])
    assert cache.counters()["quarantined_bytes"] == 0
    eventually(lambda: cache.counters()["leases"] == 0)


def test_the_extents_of_a_killed_writer_are_free_again(server, engine, engine_process):
    """A frozen one that never wakes up: when it is known dead, its quarantine ends."""
    cache = server(l1=8, flags=("--lease-seconds", "3"))
    writer = engine_process(cache, "writer", num_blocks=64)
    writer.ask("pause", what="gather")
    writer.say(do="store", ids=prompt(3, 640))
    writer.hear()
    writer.freeze()
    eventually(lambda: cache.counters()["quarantined_bytes"])
    writer.kill()
    eventually(lambda: cache.counters()["quarantined_bytes"] == 0)
    other = engine(cache, "other", num_blocks=520)
    kept = fill_l1(other, 400, 4)
    assert sum(other.hit_tokens(one) for one in kept) == L1_CHUNKS * 16


def test_quarantine_is_capped(server, raw):
    """An instance whose expired claims hold more than a quarter of L1 gets nothing new, until it gives something back."""
    cache = server(l1=8, flags=("--lease-seconds", "3"))
    client, other = raw(cache, "frozen"), raw(cache, "other")
    hashes = os.urandom(16 * 600)
    client.store(hashes)
    lease = client.ask(m.Lookup(client.space, hashes)).lease
    eventually(lambda: cache.counters()["quarantined_bytes"] == 600 * 4096)
    refused = client.reserve(os.urandom(160))
    assert (refused.refused, refused.reason) == (10, "quarantine")
    assert client.ask(m.Lookup(client.space, hashes)).chunks == 0
    assert other.hits(hashes) == 600 and other.store(os.urandom(160)) == 10
    client.ask(m.Release([lease]))
    assert client.store(os.urandom(160)) == 10


# The server dies, freezes, comes back


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_server_killed_under_load_costs_one_deadline(server, engine, unanswered, mode):
    """Of the scheduler, and one of the rank: each waits for one answer that does not come."""
    cache = server(l1=64)
    one, ids = engine(cache, deadline=3.0, mode=mode, num_blocks=520), prompt(4, 8000)
    one.store(ids)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            one.hit_tokens(ids)

    asking = beside(ask)
    jobs = [one.submit_store(prompt(5 + n, 8000)) for n in range(3)]
    cache.kill()
    for job in jobs:
        one.wait(job)
    eventually(lambda: not one.scheduler.connected and not one.worker.connected)
    stop.set()
    asking.result(PATIENCE)
    chain = one.chain(ids)
    for _ in range(10):
        assert one.scheduler.lookup(chain) is None
    assert one.store(ids[:160]) == 0
    assert len(unanswered) <= 2, "without a server, everything is a miss at once"
    again = server(l1=64, port=cache.port)
    eventually(lambda: one.scheduler.connected and one.worker.connected)
    assert one.lookup(ids) is None
    assert one.store(ids) == 8000 and one.load(ids) == 8000
    assert again.counters()["engine_processes"] == 2


def test_a_restart_between_two_calls_is_noticed_by_a_remote_engine(server, engine):
    """ZMQ reconnects by itself and says nothing: the engine must not go on with the number of a former server's lease."""
    cache = server()
    one, ids = engine(cache, mode="payload", deadline=2.0), prompt(6, 320)
    one.store(ids)
    hit = one.lookup(ids)
    cache.kill()
    server(port=cache.port)
    assert one.load(ids, hit=hit) == -1, "another server's lease"
    eventually(lambda: one.lookup(ids) is None and one.scheduler.connected and one.worker.connected)
    assert one.store(ids) == 320
    assert one.load(ids) == 320


def test_loads_of_an_arena_that_a_rank_lacks_cost_one_deadline_in_all(server, engine):
    one = engine(server(), deadline=1.0)
    wait_for, waits = one.worker._state.wait_for, []
    one.worker._state.wait_for = lambda what, seconds: (waits.append(seconds), wait_for(what, seconds))[1]
    for number in range(12):
        one.worker.load(f"load {number}", Load(b"?" * 16, 1, 0, bytes(4), 0, 16, [0]))
    left = 12
    while left:
        one.worker.wait_finished(PATIENCE)
        done = one.worker.finished()
        assert not any(job.ok for job in done)
        left -= len(done)
    assert waits.count(1.0) == 1


def test_a_late_release_for_a_former_server_ends_no_lease_of_the_next(server, engine):
    """Both servers have done the same: their leases differ all the same."""
    ids = prompt(7, 320)

    def leased(cache, name):
        one = engine(cache, name)
        assert one.store(ids) == 320
        return one, one.lookup(ids)

    _, old = leased(server(), "a")
    second, new = leased(server(), "b")
    assert old.lease != new.lease
    second.scheduler._connection.post(m.Release([old.lease]))
    assert second.load(ids, hit=new) == 320


def test_the_memory_of_a_server_that_is_gone_is_free_for_the_next_one(server, engine, monkeypatch):
    """Though the engine lives on; but for what a copy is still reading."""
    monkeypatch.setattr(connection, "GONE_SECONDS", 0.0)
    cache = server()
    one, ids = engine(cache), prompt(22, 1600)
    one.store(ids)
    hit = one.lookup(ids)
    reading, go = threading.Event(), threading.Event()
    pause_once(one.worker._access.parts[0].copier, "scatter", lambda: (reading.set(), go.wait(PATIENCE)))
    job = one.submit_load(hit, 16, 0, 1600, ids)
    assert reading.wait(PATIENCE)
    maps = Path("/proc/self/maps")
    cache.signal(signal.SIGTERM)
    eventually(lambda: "Connection refused" in one.worker._connection._logged)
    assert f"{cache.arena_dir}/" in maps.read_text()
    go.set()
    assert one.wait(job).ok
    eventually(lambda: f"{cache.arena_dir}/" not in maps.read_text())
    again = server(port=cache.port)
    one.connect()
    assert one.store(ids) == one.load(ids) == 1600 and again.healthy()


def test_loads_from_the_mapped_arena_outlive_the_server(server, engine, monkeypatch):
    monkeypatch.setattr(connection, "GONE_SECONDS", 3600.0)
    cache = server()
    one, ids = engine(cache), prompt(7, 1600)
    one.store(ids)
    hit = one.lookup(ids)
    cache.kill()
    eventually(lambda: not one.worker.connected)
    assert one.load(ids, hit=hit) == 1600


def test_a_new_server_is_used_at_once_though_the_rank_learns_of_it_later(server, engine):
    """The scheduler's first hits of the new server wait for the rank's connection, not for their deadline."""
    cache = server()
    one, ids = engine(cache, deadline=PATIENT), prompt(8, 320)
    cache.kill()
    gate, register = threading.Event(), one.worker._register
    one.worker._connection._on_welcome = lambda *all: (gate.wait(PATIENCE), register(*all))
    new = server(port=cache.port)
    helper = engine(new, "helper")
    helper.store(ids)
    eventually(lambda: one.scheduler.connected)
    hit = one.lookup(ids)
    assert hit is not None and hit.chunks == 20
    one.poison()
    job = one.submit_load(hit, 16, 0, 320, ids)
    eventually(lambda: job in one.worker._running.values())
    gate.set()
    assert one.wait(job).ok and one.right(ids, 0, 320)


def test_a_store_waits_for_a_server_that_is_there_and_not_ready(server, engine):
    """A rank that lets go of an old arena first has heard the new server's welcome; what is stored meanwhile is not lost."""
    cache = server()
    one, ids = engine(cache, deadline=PATIENT), prompt(19, 320)
    cache.kill()
    gate, welcomed, register = threading.Event(), threading.Event(), one.worker._register
    one.worker._connection._on_welcome = lambda *all: (welcomed.set(), gate.wait(PATIENCE), register(*all))
    server(port=cache.port)
    assert welcomed.wait(PATIENCE)
    eventually(lambda: one.scheduler.connected)
    job = one.submit_store(ids)
    eventually(lambda: one.worker._running.get("store") == job)
    assert one.worker.wait([job], PATIENCE) == set(), "the blocks are free, as long as nothing is read"
    second = one.submit_store(prompt(20, 320))
    assert not one.worker.finished(), "both wait"
    gate.set()
    assert one.wait(job).tokens == 0, "cancelled"
    assert one.wait(second).tokens == 320


def test_unmapping_the_old_arena_holds_up_no_engine(server, engine, monkeypatch):
    """A GPU's driver lets go of 100 GiB of pinned memory in seconds; the engine's thread asks this session meanwhile."""
    cache = server()
    one, unmapping, go, unmapped = engine(cache), threading.Event(), threading.Event(), threading.Event()
    close = one.worker._access.close
    slowly = lambda: (unmapping.set(), go.wait(PATIENCE), unmapped.set(), close())  # noqa: E731
    monkeypatch.setattr(one.worker._access, "close", slowly)
    cache.kill()
    server(port=cache.port)
    assert unmapping.wait(PATIENCE)
    assert one.worker.mapped_epoch == b""
    assert one.worker.wait(["no such job"], PATIENCE) == set()
    job = one.submit_store(prompt(13, 640))
    assert not unmapped.is_set()
    go.set()
    one.wait(job)
    eventually(lambda: one.worker.connected and one.scheduler.connected)
    ids = prompt(14, 640)
    assert one.store(ids) == 640
    assert one.load(ids) == 640


def test_an_arena_that_is_counted_on_stays_mapped_until_it_is_not(server, engine, monkeypatch):
    for module in ("connection", "worker"):
        monkeypatch.setattr(f"lmcache.engine.{module}.GONE_SECONDS", PATIENT)
    cache = server()
    one, ids = engine(cache), prompt(21, 640)
    one.store(ids)
    hit = one.lookup(ids)
    assert one.worker.count_on_arena() == hit.epoch
    cache.kill()
    server(port=cache.port)
    eventually(lambda: one.worker.mapped_epoch == b"")
    assert one.worker.count_on_arena() == b"" and one.load(ids, hit=hit) == 640
    one.worker.count_on_nothing()
    eventually(lambda: one.worker.mapped_epoch not in (b"", hit.epoch))


def test_an_arena_that_is_counted_on_does_not_stay_mapped_for_good(server, engine, monkeypatch):
    monkeypatch.setattr("lmcache.engine.worker.GONE_SECONDS", 0.1)
    cache = server()
    one = engine(cache)
    epoch = one.worker.count_on_arena()
    cache.kill()
    server(port=cache.port)
    eventually(lambda: one.worker.mapped_epoch not in (b"", epoch))


def test_a_connection_made_anew_keeps_the_arena_mapped(server, engine):
    one, ids = engine(server()), prompt(15, 640)
    assert one.store(ids) == 640
    access, carrier = one.worker._access, one.worker._connection._carrier
    carrier._socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: one.worker._connection._carrier not in (None, carrier))
    assert one.worker._access is access
    assert one.load(ids) == 640


def test_a_start_waits_for_a_server_that_listens_and_for_no_other(server, engine, impostor, monkeypatch):
    """A server that stands still takes connections, and may be there in a moment."""
    monkeypatch.setattr(connection, "START_SECONDS", 100 * PATIENCE)  # whoever waits in vain waits longer than the test
    cache = server()
    cache.freeze()
    one = engine(cache, connect=False)
    starting = [beside(session.wait_for_server) for session in (one.scheduler, one.worker)]
    eventually(lambda: one.scheduler._connection._logged)  # a first attempt has had no answer
    assert not any(start.done() for start in starting)
    cache.thaw()
    for start in starting:
        start.result(PATIENCE)
    assert one.scheduler.connected and one.worker.connected
    foreign = impostor(lambda sequence, request: [m.encode(sequence, m.Error("refused", "not for you"))])
    nowhere = SimpleNamespace(address=f"tcp://127.0.0.1:{free_port()}")
    for place in (nowhere, foreign):
        late = engine(place, connect=False)
        for session in (late.scheduler, late.worker):
            beside(session.wait_for_server).result(PATIENCE)
            assert not session.connected


def test_the_sessions_of_a_process_log_once_that_their_server_has_gone(server, engine, caplog):
    def lines(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    cache = server()
    one = engine(cache)
    for times in (1, 2):
        cache.kill()
        eventually(lambda: one.scheduler._connection._logged and one.worker._connection._logged)
        assert lines("Lost the LMCache server") == lines("Connection refused") == times
        cache = server(port=cache.port)
        one.connect()


def test_a_session_that_never_returns_silences_no_later_loss(server, engine, caplog):
    """The second server is too small for what the rank stores, and serves the scheduler."""
    cache = server()
    one = engine(cache, layers=32, heads=8, dims=128, num_blocks=4)

    def lost() -> int:
        return sum("Lost the LMCache server" in record.getMessage() for record in caplog.records)

    for times, size in ((1, 1.25), (2, 8)):
        cache.kill()
        eventually(lambda: one.scheduler._connection._logged and one.worker._connection._logged)
        assert lost() == times
        cache = server(l1=size, port=cache.port)
        assert one.scheduler.wait_connected(PATIENCE)
        eventually(lambda: one.worker.connected or "is of no use" in caplog.text)
    one.connect()


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_frozen_server_costs_one_deadline_not_one_a_call(server, engine, unanswered, mode):
    """Of the scheduler, and one of the rank; all of this ends before the server wakes up."""
    cache, deadline = server(), 3.0
    one, ids = engine(cache, deadline=deadline, mode=mode), prompt(9, 640)
    one.store(ids)
    cache.freeze()
    begin = time.monotonic()
    job = one.submit_store(prompt(10, 640))
    assert one.lookup(ids) is None
    assert time.monotonic() - begin >= deadline
    one.wait(job)
    chain = one.chain(ids)
    for _ in range(10):
        assert one.scheduler.lookup(chain) is None
    assert {type(request) for request in unanswered} == {m.Lookup, m.Reserve}
    assert len(unanswered) == 2, "it is known to be frozen"
    cache.thaw()
    eventually(lambda: one.scheduler.connected and one.worker.connected)
    assert one.load(ids) == 640, "what it held is still there"
    eventually(lambda: cache.counters()["leases"] == 0)  # that of the lookup whose answer came too late has ended too
    assert cache.counters()["reservations"] == 0


def engine_dropped(cache, reason):
    return cache.counters().get(f'engine_dropped_chunks_total{{reason="{reason}"}}')


def test_a_preemption_does_not_wait_for_a_silent_server(server, engine):
    """A store that waits for its slots reads no block yet, and will not when it has them."""
    cache = server()
    one, ids = engine(cache, deadline=PATIENT), prompt(12, 640)
    cache.freeze()
    job = one.submit_store(ids)
    eventually(lambda: one.worker._running.get("store") == job)
    assert one.worker.wait([job], PATIENCE) == set()
    cache.thaw()
    done = one.wait(job)
    assert (done.ok, done.tokens) == (False, 0)
    assert one.worker.counters["dropped_chunks:preempted"] == 40
    eventually(lambda: cache.counters()["reservations"] == 0)
    assert one.lookup(ids) is None
    eventually(lambda: engine_dropped(cache, "preempted") == 40)


def test_what_waits_and_is_cancelled_is_told_the_server(server, engine):
    cache = server()
    one, ids = engine(cache, deadline=PATIENT), prompt(12, 640)
    cache.freeze()
    first, second = one.submit_store(prompt(16, 320)), one.submit_store(ids)
    assert one.worker.wait([second], PATIENCE) == set()
    eventually(lambda: one.worker._running.get("store") == first)  # the storing thread is in a call, or will soon be
    beside(lambda: one.worker.drop(3, "computed from a failed load")).result(PATIENCE)
    cache.thaw()
    assert one.wait(first).tokens == 320 and one.wait(second).tokens == 0
    eventually(lambda: engine_dropped(cache, "preempted") == 40)
    one.worker.drop(4, "computed from a failed load")
    eventually(lambda: engine_dropped(cache, "computed from a failed load") == 7)


class Hangs:
    """A point in a device's stream that is not passed before `answer` is set."""

    def __init__(self):
        self.asked, self.answer = threading.Event(), threading.Event()

    def query(self):
        return False

    def synchronize(self):
        self.asked.set()
        assert self.answer.wait(2 * PATIENCE)


def hanging_store(one, ids):
    """The job, and the point for which it waits."""
    chain, point = one.chain(ids), Hangs()
    one.fill(ids)
    job = Store(chain.chunk_tokens, chain.root, chain.hashes, 0, one.table(len(ids)), after=point)
    one.worker.store("hangs", job)
    assert point.asked.wait(PATIENCE)
    return point


def test_what_is_dropped_while_the_storing_thread_hangs_takes_no_memory(server, engine):
    cache = server()
    one = engine(cache)
    point = hanging_store(one, prompt(18, 64))
    for _ in range(5000):
        one.worker.drop(1, "queue full")
        one.worker.drop(2, "weights changed")
    assert len(one.worker._unreported) == 2
    point.answer.set()
    assert one.wait("hangs").tokens == 64
    eventually(lambda: engine_dropped(cache, "queue full") == 5000)
    assert engine_dropped(cache, "weights changed") == 10000


@pytest.mark.parametrize("midway", [False, True])
def test_the_end_of_an_engine_does_not_wait_for_a_device_that_hangs(server, engine, monkeypatch, caplog, midway):
    """Before its copy, and in the middle of it: then the slots are still this process's."""
    monkeypatch.setattr("lmcache.engine.worker._LAST_COPY_SECONDS", 0.1)
    cache = server()
    one, ids = engine(cache, "closes"), prompt(19, 64)
    if midway:
        point = Hangs()
        pause_once(one.worker._access.parts[0].copier, "gather", point.synchronize)
        one.submit_store(ids)
        assert point.asked.wait(PATIENCE)
    else:
        point = hanging_store(one, ids)
    try:
        closing = threading.Thread(target=one.worker.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        assert "lmcache-store: a copy has not ended within 0.1 s and is left behind" in caplog.text
        assert cache.counters()["reservations"] == midway
    finally:
        point.answer.set()
    assert not one.wait("s1" if midway else "hangs").tokens


def test_an_interrupted_lookup_leaves_no_lease(server, engine, monkeypatch):
    """Ctrl-C in a notebook comes between the server's answer and the caller."""
    cache = server()
    one, ids = engine(cache), prompt(17, 640)
    assert one.store(ids) == 640
    carrier = one.scheduler._connection._carrier
    exchange = carrier.exchange

    def interrupted(*all):
        exchange(*all)
        raise KeyboardInterrupt

    monkeypatch.setattr(carrier, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.lookup(ids)
    eventually(lambda: one.scheduler.connected)
    eventually(lambda: cache.counters()["leases"] == 0)
    assert one.load(ids) == 640


def test_a_lookup_that_crosses_a_restart_leaves_no_lease(server, engine, monkeypatch):
    """The scheduler has read the old arena's name, the new server answers: the lease is that one's."""
    cache = server()
    one, ids = engine(cache), prompt(18, 640)
    assert one.store(ids) == 640
    one.scheduler.release(one.lookup(ids))
    connection, arena = one.scheduler._connection, one.scheduler._epoch
    call = connection.call

    def crossed(*all):
        one.scheduler._epoch = arena
        return call(*all)

    monkeypatch.setattr(connection, "call", crossed)
    one.scheduler._epoch = b"the old server's"
    assert one.lookup(ids) is None
    eventually(lambda: cache.counters()["leases"] == 0)


def test_no_extent_is_freed_under_a_copy_when_the_connection_is_lost(server, engine, engine_process):
    """The link breaks while a store is half done: the session says hello again only when that copy has ended."""
    cache = server(l1=8)
    one, ids = engine(cache, num_blocks=64), prompt(11, 640)
    midway, go = threading.Event(), threading.Event()
    pause_once(one.worker._access.parts[0].copier, "gather", lambda: (midway.set(), go.wait(PATIENCE)))
    job = one.submit_store(ids)
    assert midway.wait(PATIENCE)
    one.worker._connection._carrier._socket.shutdown(socket.SHUT_RDWR)  # as when the server hangs up
    eventually(lambda: not one.worker.connected)
    other = engine_process(cache, "other", num_blocks=520)
    kept = [prompt(500 + n, 512 * 16) for n in range(5)]
    for fresh in kept:
        other.ask("store", ids=fresh)
    assert not one.worker.connected, "it must not say hello yet"
    go.set()
    assert one.wait(job).tokens == 0
    eventually(lambda: one.worker.connected)
    for fresh in kept[-3:]:
        assert other.ask("load", ids=fresh) == 512 * 16
    assert one.lookup(ids) is None


# Somebody else on the port


class Nonsense:
    """A raw TCP listener that does `what` with every connection."""

    def __init__(self, what: Callable[[socket.socket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.open: list[socket.socket] = []
        self._what = what
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.open.append(sock)
                with contextlib.suppress(OSError):
                    self._what(sock)

    def close(self) -> None:
        self.listener.close()
        for sock in self.open:
            sock.close()


@pytest.mark.parametrize("what", ["says nothing", "hangs up", "junk", "http"])
def test_something_else_on_the_port_costs_nothing(engine, monkeypatch, what):
    """Nobody waits for an attempt to connect, however long it takes; and an end waits for the one at hand only."""
    acts = {
        "says nothing": lambda sock: None,
        "hangs up": lambda sock: sock.close(),
        "junk": lambda sock: sock.sendall(os.urandom(100_000)),
        "http": lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    }
    attempt, tried, go, ended = hello._through_port, threading.Event(), threading.Event(), threading.Event()

    def slow_attempt(endpoint, words):
        try:
            return attempt(endpoint, words)
        finally:
            tried.set()
            go.wait(PATIENCE)
            ended.set()

    monkeypatch.setattr(hello, "_through_port", slow_attempt)
    stranger = Nonsense(acts[what])
    one = engine(stranger, connect=False)
    assert tried.wait(PATIENCE) and eventually(lambda: stranger.open)
    assert not one.scheduler.connected and one.scheduler.new_chain() is None
    assert not ended.is_set()
    go.set()
    one.close()
    eventually(lambda: not any(half._connection._thread.is_alive() for half in (one.scheduler, one.worker)))
    stranger.close()


WELCOME = m.Welcome(m.PROTOCOL_VERSION, "test", b"s" * 16, 16, "", b"a" * 16, 1 << 20)


@pytest.mark.parametrize(
    "says",
    [
        [b""],
        [b"\xc1" * 50],
        [b"\x91" * 100_000],
        [msgspec.msgpack.encode([1, [2]])],
        [m.encode(1, m.Found(1 << 62, 1, b""))],
        [m.encode(9, WELCOME)],
        [m.encode(1, msgspec.structs.replace(WELCOME, version=7))],
        [m.encode(1, msgspec.structs.replace(WELCOME, chunk_tokens=-1))],
        [m.encode(1, msgspec.structs.replace(WELCOME, socket_path="/dev/null"))],
        [m.encode(1, msgspec.structs.replace(WELCOME, socket_path="/nowhere\0", cookie_path="\0.cookie"))],
        [m.encode(1, m.Error("version", "too old"))],
    ],
)
def test_a_fake_that_answers_nonsense_to_hello_is_not_a_server(engine, impostor, server, says):
    fake = impostor(lambda sequence, request: says)
    one = engine(fake, connect=False)
    eventually(lambda: fake.asked >= 3)
    assert not one.scheduler.connected and not one.worker.connected
    fake.close()
    cache = server(port=fake.port)
    one.connect()
    assert one.store(prompt(12, 160)) == 160, "a real one on the same port is found"
    assert cache.healthy()


def test_the_engine_names_both_versions(engine, impostor, caplog):
    future = msgspec.structs.replace(WELCOME, version=7, software="9.9")
    fake = impostor(lambda sequence, request: [m.encode(sequence, future)])
    engine(fake, connect=False)
    eventually(lambda: "protocol 1" in caplog.text)
    assert "the server 7 (lmcache 9.9)" in caplog.text and "upgrade the engine's lmcache package" in caplog.text


@pytest.mark.parametrize(
    "found",
    [
        None,
        b"",
        b"\x92\x01\x02",
        m.Ok(),
        m.Error("refused", "no"),
        m.Found(1 << 62, 1, b""),
        m.Found(-1, 1, b"\0" * 16),
        m.Found(4, 1, b"\0" * 15),
        m.Found(400, 1, b"\0" * 1600),
        m.Found(0, 1, b""),
        m.Welcome(1, "", b"", 16, "", b"", 1),
    ],
)
def test_nonsense_in_answer_to_a_lookup_is_a_miss(engine, impostor, found, monkeypatch):
    """At once; and no answer is one after the deadline."""
    monkeypatch.setenv("LMCACHE_INSECURE_NO_AUTH", "1")

    def answers(sequence: int, request: m.Message) -> list[bytes] | None:
        if isinstance(request, m.Hello):
            return [m.encode(sequence, WELCOME)]
        if isinstance(request, m.Register):
            return [m.encode(sequence, m.Registered(0))]
        if isinstance(request, m.Lookup):
            return None if found is None else [found if isinstance(found, bytes) else m.encode(sequence, found)]
        if isinstance(request, m.Reserve):
            return [m.encode(sequence, m.Reserved(1, b"\0" * 7, 0))]
        return [m.encode(sequence, m.Ok())]

    one = engine(impostor(answers), mode="payload", deadline=0.5 if found is None else PATIENT)
    ids = prompt(13, 64)
    assert one.lookup(ids) is None
    eventually(lambda: one.worker.connected)
    assert one.store(ids) == 0


def test_a_fake_behind_the_unix_socket_costs_at_most_the_deadline(engine, impostor, folders):
    """The welcome leads to a Unix socket whose owner says junk, or nothing."""
    folder = folders("/tmp")
    for n, say in enumerate([b"", b"\xff" * 64, frame(b"junk"), frame(m.encode(0, m.Error("refused", "no")))]):
        path = str(folder / f"{n}.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(8)
            welcome = msgspec.structs.replace(WELCOME, socket_path=path)
            fake = impostor(lambda sequence, request, welcome=welcome: [m.encode(sequence, welcome)])
            one = engine(fake, f"e{n}", connect=False)
            sock, _ = listener.accept()
            with sock:
                sock.sendall(say)
                assert not one.scheduler.connected
            one.close()


def test_an_arena_shorter_than_announced_is_not_touched(engine, impostor, folders):
    """Touching it would kill the engine; and the link must try again, for the next server may be a good one."""
    path = str(folders("/tmp") / "s")
    welcome = msgspec.structs.replace(WELCOME, socket_path=path, arena_bytes=1 << 40)
    greeted = threading.Semaphore(0)

    def greet(listener: socket.socket, memory: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.recv(4096)
                    socket.send_fds(sock, [frame(m.encode(0, welcome))], [memory])
                    greeted.release()
                    while sock.recv(4096):
                        sock.sendall(frame(m.encode(1, m.Registered(0))))

    with socket.socket(socket.AF_UNIX) as listener, open(folders("/dev/shm") / "short", "w+b") as memory:
        memory.truncate(4096)
        listener.bind(path)
        listener.listen(8)
        threads = [threading.Thread(target=greet, args=(listener, memory.fileno()), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        fake = impostor(lambda sequence, request: [m.encode(sequence, welcome)])
        one = engine(fake, connect=False, scheduler=False)
        for _ in range(3):
            assert greeted.acquire(timeout=PATIENCE), "the link gave up for good"
        assert not one.worker.connected
        one.close()
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE)
