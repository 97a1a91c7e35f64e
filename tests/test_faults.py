"""Death, frost and nonsense on either side: never wrong bytes, never more than the deadline, nothing left for good."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from engine_process import pause_once
from lmcache.engine import Load
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier
from lmcache.wire.frames import frame
from ports import free_port
from servers import PATIENCE, eventually

FOR_EVER = 10 * PATIENCE
"""Seconds of a deadline that must not be waited for: the test has been called off before."""
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


def test_a_writer_frozen_past_its_deadline_writes_into_nobodys_slots(server, engine, engine_process):
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
    eventually(lambda: cache.counters()["leases"] == 0)
    assert cache.counters()["quarantined_bytes"] == 0


def test_the_slots_of_a_killed_writer_are_free_again(server, engine, engine_process):
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
def test_a_server_killed_under_load_costs_one_deadline(server, engine, mode):
    cache = server(l1=64)
    one, ids = engine(cache, mode=mode, num_blocks=520), prompt(4, 8000)
    one.store(ids)
    one.set_deadline(1.0)
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            one.hit_tokens(ids)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    jobs = [one.submit_store(prompt(5 + n, 8000)) for n in range(3)]
    cache.kill()
    for job in jobs:
        one.wait(job)
    eventually(lambda: not one.scheduler.connected and not one.worker.connected)
    stop.set()
    asking.join(PATIENCE)
    assert not asking.is_alive(), "a lookup still waits for a server that is gone"
    one.set_deadline(FOR_EVER)
    chain = one.chain(ids)
    for _ in range(100):
        assert one.scheduler.lookup(chain) is None
    assert one.store(ids[:160]) == 0, "without a server, everything is a miss at once"
    one.set_deadline(PATIENCE)
    again = server(l1=64, port=cache.port)
    eventually(lambda: one.scheduler.connected and one.worker.connected)
    assert one.lookup(ids) is None
    assert one.store(ids) == 8000 and one.load(ids) == 8000
    assert again.counters()["engine_processes"] == 2


def test_a_restart_between_two_calls_is_noticed_by_a_remote_engine(server, engine):
    """ZMQ reconnects by itself and says nothing: the engine must not go on with the number of a former server's lease."""
    cache = server()
    one, ids = engine(cache, mode="payload"), prompt(6, 320)
    one.store(ids)
    hit = one.lookup(ids)
    cache.kill()
    server(port=cache.port)
    assert one.load(ids, hit=hit) == -1, "another server's lease"
    eventually(lambda: one.lookup(ids) is None and one.scheduler.connected and one.worker.connected)
    assert one.store(ids) == 320
    assert one.load(ids) == 320


def test_loads_of_an_arena_that_a_rank_lacks_cost_one_deadline_in_all(server, engine):
    one = engine(server())
    for number in range(12):
        one.set_deadline(FOR_EVER if number else 0.5)
        one.worker.load(f"load {number}", Load(b"?" * 16, 1, 0, bytes(4), 0, 16, [0]))
        assert not one.wait(f"load {number}").ok


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
    second.scheduler._link.post(m.Release([old.lease]))
    assert second.load(ids, hit=new) == 320


def test_loads_from_the_mapped_arena_outlive_the_server(server, engine):
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
    one, ids = engine(cache, deadline=FOR_EVER), prompt(8, 320)
    cache.kill()
    gate, register = threading.Event(), one.worker._register
    one.worker._link._on_welcome = lambda *all: (gate.wait(PATIENCE), register(*all))
    new = server(port=cache.port)
    helper = engine(new, "helper")
    helper.store(ids)
    eventually(lambda: one.scheduler.connected)
    hit = one.lookup(ids)
    assert hit is not None and hit.chunks == 20
    one.poison()
    job = one.submit_load(hit, 16, 0, 320, ids)
    eventually(lambda: one.worker._running.get("load") == job)
    gate.set()
    assert one.wait(job).ok and one.right(ids, 0, 320)


def test_a_store_waits_for_a_server_that_is_there_and_not_ready(server, engine):
    """A rank that lets go of an old arena first has heard the new server's welcome; what is stored meanwhile is not lost."""
    cache = server()
    one, ids = engine(cache), prompt(19, 320)
    cache.kill()
    gate, welcomed, register = threading.Event(), threading.Event(), one.worker._register
    one.worker._link._on_welcome = lambda *all: (welcomed.set(), gate.wait(PATIENCE), register(*all))
    server(port=cache.port)
    assert welcomed.wait(PATIENCE)
    eventually(lambda: one.scheduler.connected)
    job = one.submit_store(ids)
    eventually(lambda: one.worker._running.get("store") == job)
    assert one.worker.wait([job], 0.0) == set(), "the blocks are free, as long as nothing is read"
    second = one.submit_store(prompt(20, 320))
    assert one.worker._running.get("store") == job, "it waits, though it is cancelled"
    gate.set()
    assert one.wait(job).tokens == 0, "cancelled"
    assert one.wait(second).tokens == 320


def test_unmapping_the_old_arena_holds_up_no_engine(server, engine, monkeypatch):
    """A GPU's driver lets go of 100 GiB of pinned memory in seconds; the engine's thread asks this session meanwhile."""
    cache = server()
    one, unmapping, go, in_time = engine(cache), threading.Event(), threading.Event(), []
    close = one.worker._access.close
    monkeypatch.setattr(
        one.worker._access, "close", lambda: (unmapping.set(), in_time.append(go.wait(PATIENCE)), close())
    )
    cache.kill()
    server(port=cache.port)
    assert unmapping.wait(PATIENCE)
    assert one.worker.mapped_arena == b""
    assert one.worker.wait(["no such job"], 0.0) == set()
    job = one.submit_store(prompt(13, 640))
    go.set()
    one.wait(job)
    eventually(lambda: one.worker.connected and one.scheduler.connected)
    assert in_time == [True], "what asked the session meanwhile has waited for the unmapping"
    ids = prompt(14, 640)
    assert one.store(ids) == 640
    assert one.load(ids) == 640


def test_a_connection_made_anew_keeps_the_arena_mapped(server, engine):
    one, ids = engine(server()), prompt(15, 640)
    assert one.store(ids) == 640
    access, carrier = one.worker._access, one.worker._link._carrier
    carrier._socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: one.worker._link._carrier not in (None, carrier))
    assert one.worker._access is access
    assert one.load(ids) == 640


@pytest.mark.parametrize("mode", ["auto", "payload"])
def test_a_frozen_server_costs_one_deadline_not_one_a_call(server, engine, mode):
    cache = server()
    one, ids = engine(cache, mode=mode), prompt(9, 640)
    one.store(ids)
    one.set_deadline(0.5)
    cache.freeze()
    job = one.submit_store(prompt(10, 640))
    assert one.lookup(ids) is None
    one.wait(job)
    one.set_deadline(FOR_EVER)  # of which nothing is waited for: the server is known to be frozen
    chain = one.chain(ids)
    for _ in range(100):
        assert one.scheduler.lookup(chain) is None
    assert one.store(ids[:160]) == 0
    one.set_deadline(PATIENCE)
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
    one, ids = engine(cache, deadline=FOR_EVER), prompt(12, 640)
    cache.freeze()
    job = one.submit_store(ids)
    eventually(lambda: one.worker._running.get("store") == job)
    assert one.worker.wait([job], 0.0) == set()
    cache.thaw()
    done = one.wait(job)
    assert (done.ok, done.tokens) == (False, 0)
    assert one.worker.counters["dropped_chunks:preempted"] == 40
    eventually(lambda: cache.counters()["reservations"] == 0)
    assert one.lookup(ids) is None
    eventually(lambda: engine_dropped(cache, "preempted") == 40)


def test_what_waits_and_is_cancelled_is_told_the_server(server, engine):
    cache = server()
    one, ids = engine(cache, deadline=FOR_EVER), prompt(12, 640)
    cache.freeze()
    first, second = one.submit_store(prompt(16, 320)), one.submit_store(ids)
    eventually(lambda: one.worker._running.get("store") == first)
    assert one.worker.wait([second], 0.0) == set()
    one.worker.drop(3, "computed from a failed load")  # returns, though the storing thread is in a call
    cache.thaw()
    assert one.wait(first).tokens == 320 and one.wait(second).tokens == 0
    eventually(lambda: engine_dropped(cache, "preempted") == 40)
    one.worker.drop(4, "computed from a failed load")
    eventually(lambda: engine_dropped(cache, "computed from a failed load") == 7)


def test_an_interrupted_lookup_leaves_no_lease(server, engine, monkeypatch):
    """Ctrl-C in a notebook comes between the server's answer and the caller."""
    cache = server()
    one, ids = engine(cache), prompt(17, 640)
    assert one.store(ids) == 640
    carrier = one.scheduler._link._carrier
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
    link, arena = one.scheduler._link, one.scheduler._arena
    call = link.call

    def crossed(*all):
        one.scheduler._arena = arena
        return call(*all)

    monkeypatch.setattr(link, "call", crossed)
    one.scheduler._arena = b"the old server's"
    assert one.lookup(ids) is None
    eventually(lambda: cache.counters()["leases"] == 0)


def test_no_slot_is_freed_under_a_copy_when_the_connection_is_lost(server, engine, engine_process):
    """The link breaks while a store is half done: the session says hello again only when that copy has ended."""
    cache = server(l1=8)
    one, ids = engine(cache, num_blocks=64), prompt(11, 640)
    midway, go = threading.Event(), threading.Event()
    pause_once(one.worker._access.copier, "gather", lambda: (midway.set(), go.wait(PATIENCE)))
    job = one.submit_store(ids)
    assert midway.wait(PATIENCE)
    one.worker._link._carrier._socket.shutdown(socket.SHUT_RDWR)  # as when the server hangs up
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
    """The engine's thread does not wait for an attempt to connect; only its end does, for those that are at hand."""
    trying, go, in_time, exchange = threading.Event(), threading.Event(), [], ZmqCarrier.exchange

    def held(*all):
        try:
            return exchange(*all)
        finally:
            trying.set()
            in_time.append(go.wait(PATIENCE))

    monkeypatch.setattr(ZmqCarrier, "exchange", held)
    acts = {
        "says nothing": lambda sock: None,
        "hangs up": lambda sock: sock.close(),
        "junk": lambda sock: sock.sendall(os.urandom(100_000)),
        "http": lambda sock: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    }
    stranger = Nonsense(acts[what])
    one = engine(stranger, connect=False)
    eventually(lambda: stranger.open)
    assert trying.wait(PATIENCE)
    assert not one.scheduler.connected and one.scheduler.new_chain() is None
    go.set()
    one.close()
    eventually(lambda: not one.scheduler._link._thread.is_alive() and not one.worker._link._thread.is_alive())
    assert all(in_time)
    stranger.close()


WELCOME = m.Welcome(m.PROTOCOL_VERSION, "test", b"s" * 16, 16, "", b"a" * 16, 1 << 20)


class Impostor:
    """A ZMQ server that speaks our protocol up to a point: `answers` maps a request's type to what it says."""

    def __init__(self, answers: Callable[[int, m.Message], list[bytes] | None], port: int = 0) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.port = port or free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.socket.bind(self.address)
        self.answers, self.asked, self.stop = answers, 0, threading.Event()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while not self.stop.is_set():
            if self.socket.poll(20):
                identity, head, *_ = self.socket.recv_multipart()
                self.asked += 1
                frames = self.answers(*m.decode_request(head))
                if frames is not None:
                    self.socket.send_multipart([identity, *frames])

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.socket.close()
        self.context.term()


@pytest.fixture
def impostor() -> Iterator[Callable[..., Impostor]]:
    made: list[Impostor] = []

    def make(answers: Callable[[int, m.Message], list[bytes] | None]) -> Impostor:
        made.append(Impostor(answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


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
def test_nonsense_in_answer_to_a_lookup_is_a_miss(engine, impostor, found):
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

    deadline = 0.5 if found is None else FOR_EVER  # silence lasts as long as the impostor, and only a deadline ends it
    one, ids = engine(impostor(answers), mode="payload", deadline=deadline), prompt(13, 64)
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
