"""Engines that cannot map the arena: payload frames, and who may speak over the network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from lmcache.cache import L1
from lmcache.chunks import Layout
from lmcache.engine.endpoint import given_address, server_address
from lmcache.engine.hello import probe
from lmcache.engine.proofs import prove
from lmcache.engine.settings import ServerSettings
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.memory.arena import Arena
from lmcache.server import sessions, strangers, zmq_endpoint
from lmcache.server.handshakes import _host_behind
from lmcache.server.loop import Loop
from lmcache.server.refused import MAX_PEERS as MAX_REFUSED
from lmcache.server.refused import Refused
from lmcache.server.service import Service
from lmcache.server.sessions import Peer
from lmcache.wire import auth
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier
from lmcache.wire.knock import _receive as receive
from lmcache.wire.knock import knock
from ports import free_port
from servers import PATIENCE, EngineProcess, beside, eventually, key_file, server_parts, unresolved


def payload_hello(proof: bytes = b"", session: bytes = b"x") -> m.Hello:
    return m.Hello(m.PROTOCOL_VERSION, "test", "remote", "worker", 0, 1, payload=True, proof=proof, session=session)


def test_an_address_is_whole_or_refused_by_name() -> None:
    assert given_address("tcp://h:5") == given_address("h:5") == "tcp://h:5"
    assert given_address(":5") == "tcp://localhost:5"
    assert given_address("tcp://[::1]:5") == "tcp://[::1]:5" == server_address("::1", 5)
    for text in ("tcp://127.0.0.1", "localhost", "", "h:", "h:p"):
        with pytest.raises(ValueError, match=f"address '{text}': give tcp://host:port"):
            given_address(text)
    for text, why in (("udp://h:5", "only tcp://"), ("h:0", "port 0"), ("h:65536", "port 65536")):
        with pytest.raises(ValueError, match=why):
            given_address(text)


def test_a_server_that_listens_on_ipv6(server, engine):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    cache, ids = server(flags=("--host", "::1")), list(range(640))
    cache.address = given_address(f"[::1]:{cache.port}")
    one, far = engine(cache), engine(cache, "far", mode="payload")
    assert one.store(ids) == 640
    assert far.load(ids) == 640
    probe(cache.address, PATIENCE)


def test_a_server_on_one_of_a_names_addresses_is_found_there(server, engine):
    """127.0.0.1 is the other one of localhost, and nobody listens there."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    cache, ids = server(flags=("--host", "::1")), list(range(640))
    cache.address = f"tcp://localhost:{cache.port}"
    one, far = engine(cache), engine(cache, "far", mode="payload")
    assert one.store(ids) == far.load(ids) == 640
    probe(cache.address, PATIENCE)


def test_payload_engines_and_mapped_ones_share(server, engine):
    cache, ids = server(), list(range(1000))
    near, far = engine(cache, "near"), engine(cache, "far", mode="payload")
    near.store(ids[:512])
    assert far.load(ids[:512], 100, 333) == 233
    far.store(ids)
    assert near.load(ids) == 992
    endpoints = {one["instance"]: one["payload_frames"] for one in cache.status()["engines"]}
    assert endpoints == {"near": False, "far": True}
    far.close()
    eventually(lambda: cache.counters()["engine_processes"] == 2)


def test_a_payload_load_may_begin_inside_a_lease(server, engine):
    one, ids = engine(server(), mode="payload"), list(range(640))
    one.store(ids)
    hit = one.lookup(ids, skip_tokens=100)
    assert hit is not None and hit.first_chunk == 6
    assert one.load(ids, 200, 600, hit=hit) == 400


def proven(carrier: ZmqCarrier) -> m.Hello:
    """What an engine of the server's user says next."""
    welcome = carrier.exchange(m.Hello(m.PROTOCOL_VERSION, "", "", "", 0, 0), PATIENCE)[0]
    return payload_hello(prove(carrier, welcome, payload_hello(), False))


def test_a_payload_engine_needs_the_cookie(server, engine, caplog):
    cache = server()
    (cookie,) = cache.socket_dir.glob("*.cookie")
    assert cookie.stat().st_mode & 0o777 == 0o600
    carrier = ZmqCarrier(cache.address)
    for proof in (b"", b"guess" * 10, auth.proof(cookie.read_bytes(), "engine", b"s" * 16, b"", b"", "")):
        answer, _ = carrier.exchange(payload_hello(proof), PATIENCE)
        assert isinstance(answer, m.Error) and answer.code == "refused" and "--auth-key-file" in answer.text
    for request in (m.Lookup(0, bytes(16)), m.Clear(), m.Reserve(0, 0, b"", True, bytes(16)), m.Fetch(1, 0, 0, 1)):
        answer, frames = carrier.exchange(request, PATIENCE)
        assert isinstance(answer, m.Error) and answer.code == "hello" and not frames
    assert isinstance(carrier.exchange(proven(carrier), PATIENCE)[0], m.Welcome)
    carrier.close()
    cookie.chmod(0o644)  # no longer a secret: the engine does not trust it
    one = engine(cache, "late", mode="payload", connect=False)
    eventually(lambda: "has mode 644 and 32 bytes: start the server anew, or give both the same key" in caplog.text)
    assert not one.scheduler.connected
    line = cache.line_with("this server's cookie file has been changed")
    assert f"scheduler rank 0, pid {os.getpid()}, from 127.0.0.1" in line or "worker rank 0" in line


def test_payload_requests_that_do_not_fit_are_refused(server, engine):
    """Wrong sizes, slots of others, a commit while the bytes are on their way, and more than a message may hold."""
    carrier = ZmqCarrier(server().address)

    def ask(request: m.Message, frames=()):
        return carrier.exchange(request, PATIENCE, frames)

    ask(proven(carrier))
    space = ask(m.Register(Layout("r", "bfloat16", 1, 1, 64, 16, kind="mla"), 1, 0, 2048))[0].space
    granted = ask(m.Reserve(space, 0, b"", True, os.urandom(64)))[0]
    fill = granted.reservation
    bad = [
        (m.Fill(fill, 0), [b"x" * 2047]),
        (m.Fill(fill, 0), [b"x" * 2048] * 5),
        (m.Fill(fill, 4), [b"x" * 2048]),
        (m.Fill(fill, -1), [b"x" * 2048]),
        (m.Fill(fill + 1, 0), [b"x" * 2048]),
        (m.Fetch(fill, 0, 0, 1), []),
    ]
    for request, frames in bad:
        assert ask(request, frames)[0].code == "refused", request
    assert isinstance(ask(m.Fill(fill, 1), [b"a" * 2048, b"b" * 2048])[0], m.Ok)
    assert ask(m.Commit(fill, False))[0] == m.Ok(0)
    carrier.close()


def test_a_session_back_while_its_bytes_are_copied_gets_a_new_number(folders):
    """An I/O thread still writes for the former connection: its slots must not be given away by the new hello."""

    class Later:
        def submit(self, run):
            self.run = run
            return Future()

    workers, loop, arena = Later(), Loop(), Arena(folders("/dev/shm"), 8 << 20)
    service, answers = Service(loop, L1(arena), 16, workers), []

    def ask(peer, request, frames=()):
        service.handle(peer, request, list(frames), lambda answer, payload: answers.append(answer))
        return answers[-1]

    first, second = Peer("ZMQ"), Peer("ZMQ")
    ask(first, payload_hello())
    space = ask(first, m.Register(Layout("r", "bfloat16", 1, 1, 64, 16, kind="mla"), 1, 0, 2048)).space
    fill = ask(first, m.Reserve(space, 0, b"", True, os.urandom(32))).reservation
    ask(first, m.Fill(fill, 0), [b"x" * 2048] * 2)
    assert first.busy == 1
    ask(second, payload_hello())
    assert first.process != second.process and service.l1.open_reservations == 1
    assert ask(first, m.Commit(fill, True)).code == "refused", "the bytes are still on their way"
    service.sessions.gone(first)
    assert service.l1.open_reservations == 1, "not before the copy has ended"
    workers.run()
    while loop._calls:
        loop._calls.popleft()()
    assert service.l1.open_reservations == 0 and len(service.sessions.peers) == 1
    arena.close()
    loop.close()


def test_a_request_that_fails_keeps_no_later_one_waiting(folders, monkeypatch):
    """ZMQ has given its signal for both of them, and this loop has no ticks in which the server would look again."""
    loop, arena, folder = Loop(), Arena(folders("/dev/shm"), 8 << 20), folders("/tmp")
    door = zmq_endpoint.ZmqEndpoint(loop, Service(loop, L1(arena), 16, None), "127.0.0.1", 0, folder, None, False)
    serve, hello, served = door._serve, m.Hello(m.PROTOCOL_VERSION, "test", "remote", "worker", 0, 1), []
    with zmq.Context() as context, context.socket(zmq.DEALER) as engine:
        engine.setsockopt(zmq.LINGER, 0)
        engine.connect(f"tcp://127.0.0.1:{door.port}")

        def fail_first(*message):
            served.append(message)
            if len(served) == 1:
                engine.send(m.encode(2, hello))
                assert door._socket.poll(PATIENCE * 1000)
                raise RuntimeError("this one fails")
            serve(*message)

        monkeypatch.setattr(door, "_serve", fail_first)
        engine.send(m.encode(1, hello))
        loop.run_until(lambda: len(served) == 2, PATIENCE)
        assert engine.poll(PATIENCE * 1000) and m.decode_answer(engine.recv())[0] == 2
        assert loop.errors == 1 and not door._receiving
    door.close()
    arena.close()
    loop.close()


class Deaf:
    """A payload engine with one stored chunk of 1 MiB and a lease on it, that sends requests and reads answers when told to."""

    def __init__(self, port: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, 1),
            (zmq.RCVBUF, 4096),
            (zmq.RCVTIMEO, int(PATIENCE * 1000)),
        ):
            self.socket.setsockopt(option, value)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.sequence = 0
        self.ask(payload_hello(session=os.urandom(16)))
        space = self.ask(m.Register(Layout("r", "bfloat16", 1, 1, 1 << 15, 16, kind="mla"), 1, 0, 1 << 20)).space
        granted = self.ask(m.Reserve(space, 0, b"", True, hashes := os.urandom(16)))
        self.ask(m.Fill(granted.reservation, 0), [bytes(1 << 20)])
        self.ask(m.Commit(granted.reservation, True))
        self.lease = self.ask(m.Lookup(space, hashes)).lease

    def send(self, request: m.Message, frames=()) -> None:
        self.sequence += 1
        self.socket.send_multipart([m.encode(self.sequence, request), *frames])

    def read(self) -> m.Message:
        return m.decode_answer(self.socket.recv_multipart()[0])[1]

    def ask(self, request: m.Message, frames=()):
        self.send(request, frames)
        return self.read()

    def fetch(self, times: int) -> None:
        for _ in range(times):
            self.send(m.Fetch(self.lease, 0, 0, 1))

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def deaf():
    made = []

    def make(port: int) -> Deaf:
        made.append(Deaf(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def copying(service: Service) -> bool:
    return any(peer.busy for peer in service.loop.ask(lambda: list(service.sessions.peers), PATIENCE))


def test_an_engine_that_does_not_read_is_forgotten_and_its_lost_answers_are_counted(folders, deaf):
    with server_parts(folders, 8 << 20) as (service, port):
        client = deaf(port)
        assert service.l1.open_leases == 1
        client.fetch(32)  # more than the sockets' own buffers hold
        eventually(lambda: service.sessions.held_bytes > 4 << 20 and not copying(service))
        for _ in range(2 * zmq_endpoint.MAX_UNREAD_ANSWERS):
            client.send(m.Ping())
        eventually(lambda: service.counters["unsent_answers"])
        eventually(lambda: not service.sessions.peers and service.l1.open_leases == 0)


def test_answers_to_an_engine_that_has_hung_up_are_counted(folders, deaf, monkeypatch):
    """It may come back as the same session, so it is not forgotten at once."""
    with server_parts(folders, 8 << 20) as (service, port):
        client, turns = deaf(port), threading.Semaphore(0)
        submit = service._payload._workers.submit
        monkeypatch.setattr(service._payload._workers, "submit", lambda run: submit(lambda: (turns.acquire(), run())))
        client.fetch(100)
        try:
            eventually(lambda: service.sessions.held_bytes >= 100 << 20)
            client.socket.close()
            eventually(lambda: not connections(port))
            # ZMQ's own thread knows now; when it tells the socket is not to be seen from here.
            eventually(lambda: turns.release() or service.counters["unsent_answers"])
            assert len(service.sessions.peers) == 1
        finally:
            turns.release(100)
        eventually(lambda: service.sessions.held_bytes == 0)


def connections(port: int) -> list[str]:
    """The kernel's lines of connections that the owner of this port has not closed."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return [one for one in lines if one.split()[1].endswith(f":{port:04X}") and one.split()[3] in ("01", "08")]


def test_unread_payload_is_bounded_and_served_again_once_it_is_read(folders, deaf, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_HELD_BYTES_OF_PEER", 8 << 20)
    with server_parts(folders, 8 << 20) as (service, port):
        client, other = deaf(port), deaf(port)
        client.fetch(100)
        eventually(lambda: service.counters["refused_requests"] and not copying(service))
        assert service.sessions.held_bytes <= 9 << 20
        other.fetch(1)
        assert other.read() == m.Ok(1), "others are served meanwhile"
        answers = [client.read() for _ in range(100)]
        refused = [one for one in answers if isinstance(one, m.Error)]
        assert len(refused) == service.counters["refused_requests"] and "read the answers" in refused[0].text
        eventually(lambda: service.sessions.held_bytes == 0)
        client.fetch(1)
        assert client.read() == m.Ok(1)


def test_what_waits_for_a_connection_that_takes_nothing_is_freed(folders, deaf, monkeypatch):
    monkeypatch.setattr(zmq_endpoint, "SILENCE_SECONDS", 1.0)  # the time that the kernel gives the connection
    with server_parts(folders, 8 << 20) as (service, port):
        monkeypatch.setattr(zmq_endpoint, "SILENCE_SECONDS", PATIENCE)
        client, hold, held = deaf(port), service.sessions.hold, []
        monkeypatch.setattr(
            service.sessions, "hold", lambda *all: (hold(*all), held.append(service.sessions.held_bytes))
        )
        client.fetch(32)
        eventually(lambda: max(held, default=0) > 4 << 20 and service.sessions.held_bytes == 0)
        monkeypatch.setattr(zmq_endpoint, "SILENCE_SECONDS", 0.0)
        eventually(lambda: not service.sessions.peers)


def stranger(port: int) -> socket.socket:
    """A connection to a ZMQ socket that has got as far as messages, and can send what ZMQ's own sockets would not."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.settimeout(PATIENCE)
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32))
    ready = b"\5READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
    connection.sendall(bytes([4, len(ready)]) + ready)
    assert connection.recv(1 << 16)
    return connection


def hung_up_on(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True  # else the time is up, which raises


def test_a_message_without_end_is_cut_off_unless_it_is_an_engines(folders, deaf):
    with server_parts(folders, 8 << 20) as (service, port):
        engine, other = deaf(port), stranger(port)  # the engine has sent 1 MiB already
        try:
            other.sendall(b"\3" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20))  # and there is more of this message
        except ConnectionError:
            pass
        assert hung_up_on(other)
        assert service.sessions.refused.counts["no hello"] == 1 and "more than 65536 bytes" in str(
            service.sessions.refused.status()
        )
        engine.fetch(1)
        assert engine.read() == m.Ok(1)
        other.close()


def test_connections_that_are_not_let_in_are_closed_in_time(folders, deaf, monkeypatch):
    monkeypatch.setattr(strangers, "HELLO_SECONDS", 100 * PATIENCE)
    with server_parts(folders, 8 << 20) as (service, port):
        engine, visitor = deaf(port), ZmqCarrier(f"tcp://127.0.0.1:{port}")
        silent, dumb = stranger(port), socket.create_connection(("127.0.0.1", port), PATIENCE)
        visitor.exchange(m.Hello(m.PROTOCOL_VERSION, "", "", "", 0, 0), PATIENCE)  # asks only the way
        monkeypatch.setattr(strangers, "HELLO_SECONDS", 0.0)
        assert hung_up_on(silent) and hung_up_on(dumb)
        eventually(lambda: service.sessions.refused.counts["no hello"] == 3)
        engine.fetch(1)
        assert engine.read() == m.Ok(1) and len(connections(port)) == 1
        for one in (silent, dumb, visitor):
            one.close()


def test_there_are_never_many_connections_that_are_not_let_in(folders, monkeypatch):
    monkeypatch.setattr(strangers, "MAX_STRANGERS", 2)
    monkeypatch.setattr(strangers, "HELLO_SECONDS", 100 * PATIENCE)
    with server_parts(folders, 8 << 20) as (service, port):
        opened = [stranger(port) for _ in range(5)]
        assert all(hung_up_on(one) for one in opened[:3])
        assert service.sessions.refused.counts["too many"] == 3 and len(connections(port)) == 2
        for one in opened:
            one.close()
        eventually(lambda: not connections(port))


def test_with_a_key_file_only_who_has_it_is_heard(server, engine, tmp_path, caplog):
    right, wrong = key_file(tmp_path), key_file(tmp_path, "wrong")
    cache, ids = server(flags=("--auth-key-file", str(right))), list(range(320))
    for mode in ("auto", "payload"):
        one = engine(cache, mode, key_file=str(right), mode=mode, model=mode)
        assert one.store(ids) == 320 and one.load(ids) == 320
    intruders = [engine(cache, f"i{n}", key_file=key, connect=False) for n, key in enumerate([str(wrong), None])]
    eventually(lambda: f"is {wrong} a copy of the server's --auth-key-file?" in caplog.text)
    eventually(
        lambda: (
            "is of no use to this engine (it has a key file, and this engine has none: set LMCACHE_AUTH_KEY_FILE"
            in caplog.text
        )
    )
    eventually(lambda: refused(cache, "wrong key") and refused(cache, "no key"))
    for why in ("its key is another one", "it has no key file"):
        cache.said_once(f"{why}: set LMCACHE_AUTH_KEY_FILE for the engine to a copy of the server's {right}")
    assert not any(one.scheduler.connected for one in intruders)
    carrier = ZmqCarrier(cache.address, wrong)
    with pytest.raises(ServerUnavailable):
        carrier.exchange(payload_hello(), 1.0)
    carrier.close()
    with zmq.Context() as context, context.socket(zmq.DEALER) as door:  # the server's public key alone is not enough
        door.curve_serverkey = zmq.curve_public(right.read_bytes())
        door.curve_publickey, door.curve_secretkey = zmq.curve_keypair()
        assert handshake(door, cache.address) == zmq.Event.HANDSHAKE_FAILED_AUTH
    with zmq.Context() as context, context.socket(zmq.DEALER) as door:
        auth.protect_engine(door, right)
        assert handshake(door, cache.address) == zmq.Event.HANDSHAKE_SUCCEEDED
    assert cache.counters()["engine_processes"] == 4


@pytest.mark.parametrize("seconds_before_hello", [0.0, 0.2])
def test_an_engine_with_a_wrong_key_says_so_once(server, engine, tmp_path, caplog, monkeypatch, seconds_before_hello):
    """The handshake may fail before the hello is handed to ZMQ, or after it."""
    post, connection = ZmqCarrier.post, "lmcache.engine.connection"
    monkeypatch.setattr(
        ZmqCarrier, "post", lambda self, *message: (time.sleep(seconds_before_hello), post(self, *message))[1]
    )
    wrong = key_file(tmp_path, "wrong")
    cache = server(flags=("--auth-key-file", str(key_file(tmp_path))))
    engine(cache, key_file=str(wrong), connect=False, scheduler=False)
    eventually(lambda: refused(cache, "wrong key") >= 1 and [one for one in caplog.records if one.name == connection])
    seconds_before_hello = 0.2 - seconds_before_hello
    eventually(lambda: refused(cache, "wrong key") >= 4)
    (line,) = {one.getMessage() for one in caplog.records if one.name == connection}
    assert "is of no use to this engine" in line and f"is {wrong} a copy of the server's --auth-key-file?" in line
    assert sum(one.name == connection for one in caplog.records) == 1


def refused(cache, reason: str) -> float:
    return cache.counters()[f'refused_engines_total{{reason="{reason}"}}']


@pytest.mark.parametrize("case", ["no folder", "another user's"])
def test_both_sides_say_why_an_engine_gets_nothing_from_a_default_server(server, engine, caplog, case):
    cache = server()
    hidden, path = cache.socket_dir.with_name(f"{cache.socket_dir.name}-hidden"), cache.socket_path()
    if case == "no folder":
        cache.socket_dir.rename(hidden)  # as in a container without it
        reason = f"user {os.getuid()} cannot see its socket '{path}' (No such file or directory)"
    elif os.getuid() == 0:
        for one in cache.socket_dir.iterdir():
            os.chown(one, 65534, 65534)
        reason = f"its socket {path} is user 65534's, and this engine is user 0's"
    else:
        pytest.skip("only root can give files away")
    try:
        engine(cache, connect=False)
        eventually(lambda: f"is of no use to this engine ({reason}" in caplog.text)
        assert auth.KEY_FOR_BOTH in caplog.text
        eventually(lambda: refused(cache, "no proof") >= 4)  # they try again
        told = cache.status()["refused_engines"]
        assert [one["reason"] for one in told] == ["no proof"] * 2
        for one in told:
            assert f"pid {os.getpid()}, from 127.0.0.1" in one["who"] and str(cache.socket_dir) in one["remedy"]
            cache.said_once(f"Refused an engine: {one['who']}: {one['remedy']}")
    finally:
        if hidden.exists():
            hidden.rename(cache.socket_dir)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_socket_of_another_user_is_no_server_that_is_still_to_come(server, engine, caplog):
    cache = server()
    os.chown(cache.socket_path(), 65534, 65534)
    cache.address = f"unix://{cache.socket_path()}"
    engine(cache, connect=False)
    eventually(lambda: "is of no use to this engine (its socket" in caplog.text)
    assert "is user 65534's, and this engine is user 0's" in caplog.text


def test_an_engine_with_a_key_and_a_server_without_one_both_say_so(server, engine, tmp_path, caplog):
    cache, key = server(), key_file(tmp_path)
    socket.create_connection(("127.0.0.1", cache.port)).close()  # whoever looks whether the port is open is no engine
    assert knock("127.0.0.1", cache.port, PATIENCE, "CURVE") == "NULL"
    eventually(lambda: refused(cache, "unwanted key"))
    (told,) = cache.status()["refused_engines"]
    assert (told["who"], told["times"]) == ("one from 127.0.0.1", 1) and "unset LMCACHE_AUTH_KEY_FILE" in told["remedy"]
    engine(cache, key_file=str(key), connect=False)
    eventually(
        lambda: (
            f"is of no use to this engine (this engine has the key file {key}, and the server has none" in caplog.text
        )
    )
    cache.said_once("Refused an engine")


def test_a_probe_says_why_no_server_answers(server, tmp_path, monkeypatch):
    """Of these an engine with `--kv-offloading-backend lmcache` tells before it starts a server of its own."""
    key, plain = key_file(tmp_path), server()
    keyed = server(flags=("--auth-key-file", str(key)))
    probe(plain.address, PATIENCE)
    with pytest.raises(ServerUnavailable, match="Connection refused"):
        probe(f"tcp://127.0.0.1:{free_port()}", PATIENCE)
    with pytest.raises(ServerRefused, match="set LMCACHE_AUTH_KEY_FILE to a copy of the server's --auth-key-file"):
        probe(keyed.address, 2.0)
    monkeypatch.setenv("LMCACHE_AUTH_KEY_FILE", str(key))
    probe(keyed.address, PATIENCE)
    with pytest.raises(ServerRefused, match="the server has none"):
        probe(plain.address, 2.0)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=f"{key} holds a secret, but other users may read it"):
        probe(keyed.address, PATIENCE)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(ServerUnavailable, match=r"host 'no\.such\.host' does not resolve: Name or service not known"):
        probe("tcp://no.such.host:5555", PATIENCE)


def test_an_engine_at_another_port_says_what_is_spoken_there(server, engine, caplog):
    cache = server()
    cache.address = f"tcp://localhost:{cache.http_port}"
    engine(cache, connect=False)
    eventually(lambda: f"port {cache.http_port} speaks HTTP: give the engines' port, which is --port" in caplog.text)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert knock("127.0.0.1", port, 0.2) == "silence"
        speaker = threading.Thread(target=lambda: [listener.accept()[0].sendall(b"220 mail\r\n") for _ in range(2)])
        speaker.start()  # the first of these two is the silent one
        assert knock("127.0.0.1", port, PATIENCE) == "something else"
        speaker.join()


def test_a_server_that_was_frozen_is_no_foreign_service(folders):
    """The kernel accepts connections for a stopped process, which says its part when it goes on."""

    def freeze(listener: socket.socket, port: int) -> bytes:
        with listener.accept()[0] as caller, socket.create_connection(("127.0.0.1", port)) as thawed:
            asked = caller.recv(1 << 16)  # the caller has waited in vain, and asks as HTTP clients do
            caller.sendall(thawed.recv(1 << 16))
            return asked

    with server_parts(folders, 8 << 20) as (_, port), socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        frozen = beside(lambda: freeze(listener, port))
        assert knock("127.0.0.1", listener.getsockname()[1], 1.0) == "silence"
        assert frozen.result(PATIENCE).startswith(b"GET ")


def test_what_comes_in_drops_does_not_stretch_the_time_of_a_knock():
    mine, other = socket.socketpair()
    with mine, other:
        stop = threading.Event()
        dripping = beside(lambda: [other.sendall(b"x") for _ in iter(lambda: stop.wait(0.02), True)])
        try:
            assert beside(lambda: receive(mine, 1 << 20, 0.2)).result(PATIENCE).count(b"x") < 1 << 20
        finally:
            stop.set()
        dripping.result(PATIENCE)


def test_the_number_of_an_ended_connection_may_be_another_ones():
    ends = socket.socketpair(socket.AF_UNIX)
    with ends[0], ends[1], open(os.devnull) as file:
        before = len(os.listdir("/proc/self/fd"))
        assert _host_behind(ends[0].fileno()) == _host_behind(file.fileno()) == _host_behind(10**6) == ""
        assert len(os.listdir("/proc/self/fd")) == before, "a duplicate was left open"


def test_the_log_of_refused_engines_is_bounded_and_the_count_is_not(caplog):
    clock = [100.0]
    one = Refused(lambda: clock[0])
    for number in range(3 * MAX_REFUSED):
        one.note(f"host {number}", "no key", "set it")
        one.note("host 0", "wrong key", "set another")
    assert one.counts["no key"] == one.counts["wrong key"] == 3 * MAX_REFUSED
    assert len(one.status()) == MAX_REFUSED and {"host 0", "host 191"} <= {told["who"] for told in one.status()}
    assert len(caplog.records) == MAX_REFUSED + 1
    clock[0] += 10.0
    one.note("host 1000", "no key", "set it")
    assert caplog.records[-1].message.startswith("Refused an engine: host 1000: set it (")
    assert one.status()[0]["who"] == "host 1000" and "host 1000: set it" in one.lately()


def handshake(door: zmq.Socket, address: str) -> zmq.Event:
    """How the first one of this socket ends."""
    monitor = door.get_monitor_socket(
        zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    )
    door.connect(address)
    assert monitor.poll(PATIENCE * 1000)
    ended = recv_monitor_message(monitor)["event"]
    door.disable_monitor()
    return ended


def test_engines_take_the_key_file_from_the_environment(monkeypatch):
    assert ServerSettings().endpoint("e", "worker").auth_key_file is None
    monkeypatch.setenv("LMCACHE_AUTH_KEY_FILE", "/etc/lmcache.key")
    assert ServerSettings().endpoint("e", "worker").auth_key_file == Path("/etc/lmcache.key")


def test_engines_take_the_waiver_from_the_environment(monkeypatch):
    assert not ServerSettings().endpoint("e", "worker").insecure_no_auth
    for text, waived in (("1", True), ("true", True), ("", False), ("no", False)):
        monkeypatch.setenv("LMCACHE_INSECURE_NO_AUTH", text)
        assert ServerSettings().endpoint("e", "worker").insecure_no_auth == waived
    monkeypatch.setenv("LMCACHE_INSECURE_NO_AUTH", "perhaps")
    with pytest.raises(ValueError, match="LMCACHE_INSECURE_NO_AUTH is 'perhaps': it must be true or false"):
        ServerSettings().endpoint("e", "worker")


def test_beyond_loopback_nothing_starts_without_a_key(server):
    with pytest.raises(AssertionError, match="--auth-key-file"):
        server(flags=("--host", "0.0.0.0"))


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
def test_two_network_namespaces(server, engine_process, tmp_path, monkeypatch):
    """The engine sees neither the server's sockets nor its memory: only an address over a veth pair."""
    name, net = f"lm{os.getpid()}"[:14], os.getpid() % 250
    host, guest = f"10.213.{net}.1", f"10.213.{net}.2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    try:
        ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}g", "netns", name)
        ip("addr", "add", f"{host}/30", "dev", f"{name}h")
        ip("link", "set", f"{name}h", "up")
        ip("-n", name, "addr", "add", f"{guest}/30", "dev", f"{name}g")
        ip("-n", name, "link", "set", f"{name}g", "up")
        key = key_file(tmp_path)
        cache = server(flags=("--host", host, "--auth-key-file", str(key)))
        assert any(f"every host with a way to {host}" in line for line in cache.log)
        hide = f'mount -t tmpfs none {cache.socket_dir} && mount -t tmpfs none {cache.arena_dir} && exec "$@"'
        prefix = ("ip", "netns", "exec", name, "unshare", "-m", "sh", "-c", hide, "sh")
        far = engine_process(cache, prefix=prefix, address=f"tcp://{host}:{cache.port}", key_file=str(key))
        ids = list(range(640))
        assert far.ask("store", ids=ids) == 640
        assert far.ask("load", ids=ids) == 640
        assert all(one["payload_frames"] for one in cache.status()["engines"])
        bare = server(flags=("--host", host, "--insecure-no-auth"))
        address = f"tcp://{host}:{bare.port}"
        refused = EngineProcess(prefix, address=address, instance="refused")
        try:
            assert "set LMCACHE_INSECURE_NO_AUTH=1" in refused.line_with(f"{host} is no loopback address")
            assert "the engine does not set LMCACHE_INSECURE_NO_AUTH=1" in bare.line_with(f"pid {refused.pid}, from ")
        finally:
            refused.end()
        monkeypatch.setenv("LMCACHE_INSECURE_NO_AUTH", "1")
        waived = engine_process(bare, prefix=prefix, address=address)
        assert waived.ask("store", ids=ids) == 640 and waived.ask("load", ids=ids) == 640
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", f"{name}h"], check=False, capture_output=True)
