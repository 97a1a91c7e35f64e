"""Without a key: neither a server nor an engine gets anything from the other before both have proved whose they are."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zmq

from lmcache.engine.proofs import prove
from lmcache.errors import ServerRefused, ServerUnavailable
from lmcache.server import refused as refused_module
from lmcache.server import zmq_endpoint
from lmcache.wire import auth
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier
from proxy import Proxy
from servers import PATIENCE, Impostor, beside, eventually, server_parts

IDS = list(range(320))
WELCOME = m.Welcome(m.PROTOCOL_VERSION, "test", b"s" * 16, 16, "", b"a" * 16, 1 << 20)
HELLO = m.Hello(m.PROTOCOL_VERSION, "test", "remote", "worker", 0, 1, session=b"x")
KNOCKS = (m.Hello, m.Challenge, m.Declined)


def ask(carrier: ZmqCarrier, request: m.Message, frames=()):
    return carrier.exchange(request, PATIENCE, frames)[0]


def said(carrier: ZmqCarrier, welcome: m.Welcome) -> m.Hello:
    """The hello of an engine of the server's user, once the server has proved itself."""
    return m.Hello(m.PROTOCOL_VERSION, "test", "remote", "worker", 0, 1, True, prove(carrier, welcome, HELLO, False))


@pytest.fixture
def carrier():
    made = []

    def make(address: str) -> ZmqCarrier:
        made.append(ZmqCarrier(address))
        return made[-1]

    yield make
    for one in made:
        one.close()


def cookie_file(folder: Path, owner: int = 0) -> tuple[bytes, str]:
    path = folder / "rogue.cookie"
    path.write_bytes(secret := os.urandom(auth.COOKIE_BYTES))
    path.chmod(0o600)
    if owner:
        os.chown(path, owner, owner)
    return secret, str(path)


def greedy(sequence: int, request: m.Message, welcome: m.Welcome, proven: m.Message | None) -> list[bytes] | None:
    """What a server says that wants KV: everything is granted."""
    answers: dict[type, m.Message | None] = {
        m.Hello: welcome,
        m.Challenge: proven,
        m.Register: m.Registered(0),
        m.Lookup: m.Found(0, 0, b""),
        m.Reserve: m.Reserved(7, b"\1\0\0\0" * (len(getattr(request, "hashes", b"")) // 16), 0),
    }
    answer = answers.get(type(request), m.Ok())
    return None if answer is None else [m.encode(sequence, answer)]


def refused(cache) -> float:
    return cache.counters()['refused_engines_total{reason="no proof"}']


def warnings(caplog) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]


def got_nothing(rogue: Impostor) -> bool:
    return all(
        isinstance(request, KNOCKS) and not frames and not getattr(request, "payload", False)
        for request, frames in rogue.heard
    )


# The engine's side


@pytest.mark.parametrize(
    ("proven", "owner", "told"),
    [
        (m.Ok(), 0, "no server of this user"),
        (m.Error("malformed", "what?\nFORGED"), 0, "no server of this user"),
        (m.Proven(bytes(32), b"", "x"), 0, "no server of this user"),
        (m.Proven(bytes(32), bytes(32), "x"), 0, "no server of this user"),
        (None, 0, "does not prove itself (no answer within the deadline)"),
        (m.Proven(bytes(32), bytes(32), ""), 12345, "is of user 12345, and this engine runs as 0"),
    ],
)
def test_who_bound_the_port_first_gets_neither_kv_nor_hashes(engine, impostor, tmp_path, caplog, proven, owner, told):
    if owner and os.getuid():
        pytest.skip("only root can give a file to another user")
    _, path = cookie_file(tmp_path, owner)
    welcome = m.Welcome(m.PROTOCOL_VERSION, "test", b"s" * 16, 16, "", b"a" * 16, 1 << 20, path)
    rogue = impostor(lambda sequence, request: greedy(sequence, request, welcome, proven))
    one = engine(rogue, connect=False)
    eventually(lambda: sum(isinstance(request, m.Hello) for request, _ in rogue.heard) >= 6 and warnings(caplog))
    assert not one.worker.connected and one.scheduler.new_chain() is None
    assert got_nothing(rogue), rogue.heard
    warned = warnings(caplog)
    assert len(warned) == 1, "one line for the process, however often its sessions try"
    assert told in warned[0] and "LMCACHE_AUTH_KEY_FILE" in warned[0] and "FORGED" not in caplog.text
    assert any(isinstance(request, m.Declined) for request, _ in rogue.heard) == bool(owner)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_path_that_a_rogue_names_makes_one_short_line_of_the_log(engine, impostor, tmp_path, caplog):
    """Of a file of another user, since its name is told, and of none."""
    theirs = tmp_path / "x\n[2026-01-01 00:00:00] LMCache ERROR: FORGED"
    theirs.touch()
    os.chown(theirs, 12345, 12345)
    for path in (str(theirs), "/no\nFORGED/" + "a" * 4000):
        welcome = m.Welcome(m.PROTOCOL_VERSION, "test", b"s" * 16, 16, path, b"a" * 16, 1 << 20, "/no.cookie")
        rogue = impostor(
            lambda sequence, request, welcome=welcome: greedy(sequence, request, welcome, m.Error("x", ""))
        )
        caplog.clear()
        engine(rogue, connect=False)
        for line in eventually(lambda: warnings(caplog)):
            assert "?" in line and line.isprintable() and len(line) < 1000, line


def test_a_recorded_proof_of_the_server_is_worth_nothing_to_who_takes_its_port(server, engine, impostor, carrier):
    """The rogue has the id of the dead server, whose cookie file is still there, and a proof that it gave."""
    cache = server()
    listener = carrier(cache.address)
    welcome = ask(listener, HELLO)
    recorded = ask(listener, m.Challenge(bytes(32)))
    welcome = m.Welcome(m.PROTOCOL_VERSION, "test", welcome.server, 16, "", b"a" * 16, 1 << 20, welcome.cookie_path)
    one = engine(cache, mode="payload")
    assert one.store(IDS[:160]) == 160
    cache.kill()
    rogue = impostor(lambda sequence, request: greedy(sequence, request, welcome, recorded), port=cache.port)
    eventually(lambda: sum(isinstance(request, m.Challenge) for request, _ in rogue.heard) >= 4)
    assert one.store(IDS) == 0 and one.lookup(IDS) is None
    assert got_nothing(rogue), rogue.heard
    rogue.close()
    server(port=cache.port)
    one.connect()
    assert one.store(IDS) == 320 and one.load(IDS) == 320


@pytest.mark.parametrize("request_, frames", [(m.Ping(), ()), (m.Fill(1, 0), (b"KV" * 4096,))])
def test_what_is_meant_for_one_connection_goes_to_no_other(impostor, carrier, request_, frames):
    first = impostor(lambda sequence, request: [m.encode(sequence, m.Ok())])
    one = carrier(first.address)
    assert ask(one, m.Ping()) == m.Ok()
    first.close()
    second = impostor(lambda sequence, request: [m.encode(sequence, m.Ok())], port=first.port)
    with pytest.raises(ServerUnavailable):
        one.exchange(request_, 1.0, frames)
    assert ask(carrier(second.address), m.Clear()) == m.Ok()
    with pytest.raises(ServerUnavailable):
        one.exchange(request_, 1.0, frames)
    assert [request for request, _ in second.heard] == [m.Clear()]


def test_a_server_reached_through_a_relay_is_refused_and_hears_why(server, engine, caplog):
    cache = server()
    with Proxy(cache.port) as relay:
        cache.address = f"tcp://127.0.0.1:{relay.port}"
        one = engine(cache, mode="payload", connect=False)
        line = cache.line_with("forwards to this server's port: give it the address of the port itself")
        assert "rank 0" in line and f"pid {os.getpid()}" in line
        eventually(lambda: refused(cache) > 4)
        assert not one.worker.connected and one.scheduler.new_chain() is None
        here, there = (f" to 127.0.0.1:{port} in net:" for port in (relay.port, cache.port))
        assert re.search(f"this connection is .*{here}.* at this end, and .*{there}.* at the server's", caplog.text)
        one.close()
    assert sum("forwards to this server's port" in line for line in cache.log) <= 2, "a line for each session"
    assert cache.counters()["engine_processes"] == 0


def pump(source: socket.socket, sink: socket.socket, told: tuple[bytes, bytes] = (b"", b"")) -> None:
    """Pass on what `source` says, with other words in place of some, until it ends."""
    with contextlib.suppress(OSError):
        while said := source.recv(1 << 16):
            sink.sendall(said.replace(*told) if told[0] else said)


@pytest.mark.parametrize(("lies", "told"), [(False, "this connection is"), (True, "no server of this user")])
def test_a_relay_that_had_the_port_before_the_server_is_refused(server, carrier, monkeypatch, lies, told):
    """It keeps the engine's connection, lets go of the port, and passes on what either side says."""
    monkeypatch.setitem(
        zmq.Context.instance().sockopts, zmq.HANDSHAKE_IVL, 0
    )  # for as long as the server needs to start
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        one = carrier(f"tcp://127.0.0.1:{port}")
        front, engine_end = listener.accept()
    cache = server(port=port)
    back = socket.create_connection(("127.0.0.1", port))
    names = [f"127.0.0.1:{port} to ".encode() for port in (back.getsockname()[1], engine_end[1])]
    pumps = [beside(lambda: pump(front, back)), beside(lambda: pump(back, front, tuple(names) if lies else (b"", b"")))]
    with front, back:
        with pytest.raises(ServerRefused, match=told):
            prove(one, ask(one, HELLO), HELLO, False)
        assert one.connection_name().startswith(names[1].decode()), "the engine has got an answer to its challenge"
        for end in (front, back):
            end.shutdown(socket.SHUT_RDWR)
        for each in pumps:
            each.result(PATIENCE)
    direct = carrier(cache.address)
    assert isinstance(ask(direct, said(direct, ask(direct, HELLO))), m.Welcome)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_loopback_of_another_network_namespace_is_another_connection(impostor, carrier):
    """The same connection, seen by a process there that was given its descriptor."""
    rogue = impostor(lambda sequence, request: [m.encode(sequence, m.Ok())])
    one = carrier(rogue.address)
    ask(one, m.Ping())
    show = (
        "import types; from lmcache.wire.auth import connection_name;"
        "print(connection_name(types.SimpleNamespace(get=lambda _: 0), 'engine'))"
    )
    descriptor = int(one._head.get(zmq.SRCFD))
    here, there = (
        subprocess.run([*prefix, sys.executable, "-c", show], stdin=descriptor, capture_output=True, text=True)
        for prefix in ((), ("unshare", "-n"))
    )
    if there.returncode:
        pytest.skip(f"no network namespaces here: {there.stderr}")
    assert here.stdout.strip() == one.connection_name()
    ends, _, _ = one.connection_name().partition("net:")
    assert there.stdout.startswith(f"{ends}net:") and there.stdout != here.stdout


# The server's side


def test_a_replayed_handshake_gets_nothing_and_is_counted(server, engine, carrier, monkeypatch):
    recorded: list[m.Message] = []
    post = ZmqCarrier.post
    monkeypatch.setattr(
        ZmqCarrier, "post", lambda self, request, *more: (recorded.append(request), post(self, request, *more))
    )
    cache = server()
    engine(cache, mode="payload", scheduler=False)
    monkeypatch.undo()
    hello, challenge, proof = recorded[:3]
    assert isinstance(challenge, m.Challenge) and proof.payload and len(proof.proof) == 96
    attacker = carrier(cache.address)
    for messages in ((hello, challenge, proof), (proof,), (challenge, challenge, proof)):
        *before, answer = [ask(attacker, one) for one in messages]
        assert isinstance(answer, m.Error) and answer.code == "refused" and len(before) == len(messages) - 1
    assert ask(attacker, m.Lookup(0, bytes(16))).code == "hello"
    assert refused(cache) == 3
    assert f"worker rank 0, pid {os.getpid()}, from 127.0.0.1" in cache.line_with("Refused an engine")
    attacker.close()
    fresh = carrier(cache.address)
    assert ask(fresh, said(fresh, ask(fresh, hello))).server == ask(fresh, hello).server
    assert sum("Refused an engine" in line for line in cache.log) == 1


def test_a_proof_counts_once_and_on_its_own_connection(folders, carrier):
    with server_parts(folders, 8 << 20, open_door=False) as (service, port):
        one, other = carrier(f"tcp://127.0.0.1:{port}"), carrier(f"tcp://127.0.0.1:{port}")
        proof = said(one, service.sessions.welcome())
        assert ask(other, proof).code == "refused"
        assert isinstance(ask(one, proof), m.Welcome)
        assert ask(one, m.Bye()) == m.Ok()
        assert ask(one, proof).code == "refused", "after Bye it is a stranger again"
        assert service.sessions.refused.counts["no proof"] == 2


def test_challenges_of_strangers_take_no_nonce_from_an_engine(folders, carrier, monkeypatch):
    monkeypatch.setattr(zmq_endpoint, "MAX_PEERS", 2)
    with server_parts(folders, 8 << 20, open_door=False) as (service, port):
        one, strangers = carrier(f"tcp://127.0.0.1:{port}"), [carrier(f"tcp://127.0.0.1:{port}") for _ in range(3)]
        proof = said(one, service.sessions.welcome())
        for each in strangers:
            assert isinstance(ask(each, m.Challenge(bytes(32))), m.Proven)
        assert isinstance(ask(one, proof), m.Welcome)


def test_a_flood_of_challenges_costs_a_bounded_number_of_proofs_a_tick(folders, monkeypatch, carrier):
    """Of each connection and of all of them, while an engine that was let in gets every answer."""
    monkeypatch.setattr(zmq_endpoint, "MAX_STRANGER_ANSWERS", 4)
    monkeypatch.setattr(zmq_endpoint, "MAX_STRANGERS_ANSWERS", 10)
    proofs: list[Counter[str]] = [Counter()]
    prove_it = zmq_endpoint.ZmqEndpoint._prove
    monkeypatch.setattr(
        zmq_endpoint.ZmqEndpoint,
        "_prove",
        lambda self, *asked: (proofs[-1].update([asked[1]]), prove_it(self, *asked))[1],
    )
    with server_parts(folders, 8 << 20, open_door=False) as (service, port), zmq.Context() as context:
        one = carrier(f"tcp://127.0.0.1:{port}")
        assert isinstance(ask(one, said(one, service.sessions.welcome())), m.Welcome)
        service.loop.on_tick.append(lambda: proofs.append(Counter()))
        service.loop.call_soon(lambda: proofs.append(Counter()))
        doors = [context.socket(zmq.DEALER) for _ in range(5)]
        for door in doors:
            door.linger = 0
            door.connect(f"tcp://127.0.0.1:{port}")
            for number in range(200):
                door.send(m.encode(number, m.Challenge(bytes(32))))
        for _ in range(100):
            assert ask(one, m.Ping()) == m.Ok()
        eventually(lambda: service.counters["unanswered_messages"] + sum(one.total() for one in proofs) == 1001)
        for door in doors:
            door.close()
        assert service.counters["unanswered_messages"] > 0
        assert max(one.total() for one in proofs) <= 10 and max(max(one.values(), default=0) for one in proofs) <= 4


def test_a_proof_counts_for_a_short_time(folders, carrier, monkeypatch):
    with server_parts(folders, 8 << 20, open_door=False) as (service, port):
        one = carrier(f"tcp://127.0.0.1:{port}")
        proof = said(one, service.sessions.welcome())
        with monkeypatch.context() as later:
            later.setattr(zmq_endpoint, "PROOF_SECONDS", 0.0)
            assert "came later than 0 s" in ask(one, proof).text
        for _ in range(2):
            assert isinstance(ask(one, said(one, service.sessions.welcome())), m.Welcome), (
                "with a nonce of its own each time"
            )
            assert ask(one, m.Bye()) == m.Ok()


def test_messages_of_strangers_are_short_and_what_is_kept_of_them_is_bounded(folders, carrier, monkeypatch):
    monkeypatch.setattr(zmq_endpoint, "MAX_PEERS", 4)
    with server_parts(folders, 8 << 20, open_door=False) as (service, port):
        one, others = carrier(f"tcp://127.0.0.1:{port}"), [carrier(f"tcp://127.0.0.1:{port}") for _ in range(4)]
        long = m.Hello(m.PROTOCOL_VERSION, "x" * zmq_endpoint.MAX_HELLO_BYTES, "", "", 0, 0)
        with pytest.raises(ServerUnavailable, match="1 frames, the first of 16"):
            ask(one, long)  # not read at all, so its number is not known
        one = carrier(f"tcp://127.0.0.1:{port}")
        for request, frames in ((HELLO, [b""]), (m.Challenge(bytes(32)), [b"x" * 4096])):
            assert ask(one, request, frames).code == "malformed"
        proofs = [said(each, service.sessions.welcome()) for each in (one, *others)]
        answers = [ask(each, proof) for each, proof in zip((one, *others), proofs, strict=True)]
        assert [isinstance(answer, m.Welcome) for answer in answers] == [True, True, True, True, False]
        assert ask(others[-1], said(others[-1], service.sessions.welcome())).text.startswith(
            "4 engines use payload frames already"
        )


def test_what_engines_say_when_they_decline_makes_one_line_each(folders, carrier, caplog, monkeypatch):
    monkeypatch.setattr(refused_module, "MAX_PEERS", 4)
    monkeypatch.setattr(zmq_endpoint, "MAX_STRANGER_ANSWERS", 1000)  # one stands for many
    with server_parts(folders, 8 << 20) as (service, port):
        one = carrier(f"tcp://127.0.0.1:{port}")
        for reason in (auth.OTHER_USER, auth.OTHER_USER, "new\nFORGED"):
            assert ask(one, m.Declined(reason, "engine", "worker\nFORGED", 0, 7, 8)) == m.Ok()
        warned = warnings(caplog)
        assert len(warned) == 1 and "run both as the same user, or give both the same key" in warned[0]
        assert "worker?FORGED rank 0, pid 7, from 127.0.0.1" in warned[0] and "as user 8" in warned[0]
        assert "\n" not in warned[0]
        for pid in range(100):
            ask(one, m.Declined(auth.NO_FILE, "engine", "worker", 0, pid))
        warned = warnings(caplog)
        assert len(warned) == 5, "the others share a line every few seconds"
        assert service.sessions.refused.counts["no proof"] == 103


def test_nobody_can_guess_the_name_of_a_connection(impostor, carrier):
    """ZMQ lets a client name itself, and go on as the connection of that name as soon as that has ended."""
    router = impostor(lambda sequence, request: [m.encode(sequence, m.Ok())])
    for _ in range(3):
        ask(carrier(router.address), m.Ping())
    assert len(router.names) == 3 and all(len(name) > 16 and name[0] for name in router.names)
