"""The server as a whole, spoken to in its own messages: who is there, what is kept, what is given away and when."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import httpx
import msgspec
import pytest
import zmq

from extent_headers import DamagedHeaders, read_headers
from lmcache.cache import L1
from lmcache.cache.heart import MAX_SHARDS
from lmcache.chunks import Layout, Split, TokenChain, space_fingerprint
from lmcache.cli.main import main
from lmcache.config import ServerConfig
from lmcache.engine.endpoint import Endpoint
from lmcache.engine.groups import GroupShape
from lmcache.engine.scheduler import SchedulerSession
from lmcache.memory.arena import Arena
from lmcache.runtime import Runtime
from lmcache.server import unix_endpoint
from lmcache.server.http import HttpEndpoint
from lmcache.server.loop import Loop
from lmcache.server.report import Report
from lmcache.server.service import Service
from lmcache.server.unix_endpoint import UnixEndpoint
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier
from lmcache.wire.frames import FrameReader, frame
from lmcache.wire.sockets import listen_unix
from servers import PATIENCE, Raw, eventually, server_parts


def chain(seed: int, chunks: int) -> bytes:
    return random.Random(seed).randbytes(16 * chunks)


# What is kept


def test_a_burst_keeps_all_of_the_newest_and_the_order_is_exact(server, raw):
    """Three times what fits is offered; a prompt that was asked for in between counts as new again."""
    client = raw(server(l1=8))
    prompts = [chain(n, 32) for n in range(192)]  # 64 of them fit
    for n, one in enumerate(prompts):
        assert client.store(one) == 32, "new data is never dropped while something older may go"
        if n % 20 == 0:
            assert client.hits(prompts[0]) == 32, "touched again and again, so never the oldest"
    kept = [n for n, one in enumerate(prompts) if client.hits(one) == 32]
    assert kept == [0, *range(192 - 63, 192)]
    assert all(client.hits(one) == 0 for n, one in enumerate(prompts) if n not in kept)


def test_the_tail_of_a_prompt_goes_first(server, raw):
    client = raw(server(l1=8))
    long = chain(1, 1500)
    client.store(long)
    assert client.store(chain(2, 1000)) == 1000
    assert client.hits(long) == 2048 - 1000


def test_what_was_never_committed_is_never_there(server, raw):
    cache = server(l1=8)
    client, other = raw(cache, "one"), raw(cache, "two")
    hashes = chain(3, 8)
    granted = client.reserve(hashes)
    assert other.hits(hashes) == 0
    assert other.reserve(hashes).reservation == 0, "one at a time fills a slot"
    assert client.ask(m.Commit(granted.reservation, False)) == m.Ok(0)
    assert other.hits(hashes) == 0
    granted = client.reserve(hashes)
    assert isinstance(other.ask(m.Commit(granted.reservation, True)), m.Error), "only who reserved commits"
    assert other.hits(hashes) == 0
    client.ask(m.Commit(granted.reservation, True))
    assert other.hits(hashes) == 8
    assert cache.counters()["reservations"] == 0


def test_clear_empties_the_index_at_once_and_leased_extents_later(server, engine, raw):
    """The reader's bytes stay as they were, though all of L1 is filled anew."""
    cache = server(l1=8)
    one, filler = engine(cache, num_blocks=64), raw(cache, "filler")
    ids = [n * 3 for n in range(960)]
    one.store(ids)
    hit = one.lookup(ids)
    cache.clear()
    assert one.hit_tokens(ids) == 0
    assert cache.counters()["chunks"] == 0
    assert cache.status()["arena"]["used_bytes"] == 60 * 4096, "the reader's slots are not free yet"
    other = engine(cache, "another", num_blocks=70)
    for n in range(40):
        other.store([n] * 1024)
    assert one.load(ids, hit=hit) == 960
    assert one.hit_tokens(ids) == 0
    filler.store(chain(4, 2048))
    assert cache.status()["arena"]["used_bytes"] > 7 << 20


# Whether it serves


def test_a_server_whose_arena_was_removed_is_unhealthy(server):
    cache = server(l1=8)

    def health() -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{cache.http_port}/healthcheck", timeout=PATIENCE)

    eventually(lambda: health().json() == {"status": "healthy"})
    (arena,) = cache.arena_dir.glob("*.arena")
    arena.unlink()
    answer = eventually(lambda: (one := health()).status_code == 503 and "heart" not in one.text and one)
    assert str(arena) in answer.json()["reason"]


def test_a_server_whose_heart_stands_still_is_unhealthy(folders):
    """The faces of a loop that does not run."""
    loop, arena = Loop(), Arena(folders("/dev/shm"), 1 << 20)
    config = ServerConfig(http_host="127.0.0.1", http_port=0)
    endpoint = HttpEndpoint(config, Report(config, loop, Service(loop, L1(arena), 16, None)))
    endpoint.start()
    try:
        answer = httpx.get(f"http://127.0.0.1:{endpoint.port}/healthcheck", timeout=PATIENCE)
        assert answer.status_code == 503 and "main loop does not answer" in answer.json()["reason"]
    finally:
        endpoint.stop()
        arena.close()
        loop.close()


def test_verbs_tell_a_frozen_server_from_none(server, monkeypatch, capsys):
    frozen = server(l1=8)
    url = f"http://127.0.0.1:{frozen.http_port}"
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", 1.0)
    frozen.freeze()
    try:
        for words in (["ping"], ["describe", "status"], ["clear"]):
            assert main([*words, "--url", url]) == 1
            said = capsys.readouterr().err
            assert f"{url} accepts connections, but there was no answer within 1 s" in said and "no server" not in said
            assert "its process is stopped, hangs or is overloaded: look at its state" in said
            assert ("it may still do what it was asked to" in said) == (words == ["clear"])
    finally:
        frozen.thaw()


# When something of ours fails


@pytest.fixture
def small(folders):
    """A server's parts in this process, in a running loop: its service, and the path of its Unix socket."""
    with server_parts(folders, 8 << 20) as (service, _):
        yield service, Path(service.sessions.socket_path)


class Client(Raw):
    """A `Raw` for a socket at a known path."""

    def __init__(self, path: Path) -> None:
        class Here:
            socket_path = staticmethod(lambda: str(path))

        super().__init__(Here())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["committed", "freed", "cleared"])
def test_an_effect_that_fails_fails_no_request(small, monkeypatch, caplog, kind):
    """What the headers said is void then: a later server must not take the chunks of one failure for those of another."""
    service, path = small
    client = Client(path)
    client.store(chain(1, 4))
    headers = service.l1.arena.headers
    assert len(read_headers(headers.path).extents) == 4
    with monkeypatch.context() as broken:
        broken.setattr(headers, kind, lambda *_: 1 // 0)
        for seed in range(2, 8):  # more than L1 holds, so that some are evicted, and freed
            assert client.store(chain(seed, 512)) == 512
            assert client.hits(chain(seed, 512)) == 512
        if kind == "cleared":
            assert [client.ask(m.Clear()).count > 0 for _ in range(2)] == [True, False]
        assert client.ask(m.Ping()) == m.Ok()
    counters = service.loop.ask(lambda: service.l1.events.counters | service.counters, PATIENCE)
    assert counters["failed_effects"] > 1 and "internal_errors" not in counters
    told = [one for one in caplog.records if "Processing an L1 event" in one.getMessage()]
    assert len({id(one) for one in told}) == 1, "told once"
    with pytest.raises(DamagedHeaders):
        read_headers(headers.path)
    client.ask(m.Clear())
    client.store(chain(9, 4))
    assert len(read_headers(headers.path).extents) == 4, "from a clear on they count again"


def test_a_hello_that_fails_is_answered(small, monkeypatch):
    service, path = small
    monkeypatch.setattr(service.l1, "join", lambda *_: 1 // 0)
    answer = UnixCarrier(str(path), m.Hello(1, "test", "i", "raw", 0, os.getpid()), PATIENCE).welcome
    assert isinstance(answer, m.Error) and answer.code == "internal"


# Who is there


def test_a_killed_engine_leaves_nothing_behind(server, engine_process, raw):
    """kill -9 with leases and with a copy under way: both end."""
    cache = server(l1=8)
    process, ids = engine_process(cache, num_blocks=64), list(range(320))
    process.ask("store", ids=ids)
    assert process.ask("hold", ids=ids) == 20
    process.ask("pause", what="gather")
    process.say(do="store", ids=list(range(1000, 1640)))
    assert process.hear() == {"midway": True}
    before = cache.counters()
    assert (before["leases"], before["reservations"], before["engine_processes"]) == (1, 1, 2)
    process.kill()
    eventually(lambda: cache.counters()["engine_processes"] == 0)
    after = cache.counters()
    assert (after["leases"], after["reservations"], after["chunks"]) == (0, 0, 20)
    assert raw(cache).store(chain(5, 2048)) == 2048


def test_a_death_is_noticed_when_it_happens(folders, engine_process, monkeypatch):
    """The kernel tells of it: nothing here is looked for now and then."""
    monkeypatch.setattr("lmcache.server.loop.TICK_SECONDS", 3600.0)
    with server_parts(folders, 8 << 20) as (service, port):
        process = engine_process(SimpleNamespace(address=f"tcp://127.0.0.1:{port}"))
        assert len(service.sessions.peers) == 2, "its scheduler and its rank"
        process.kill()
        eventually(lambda: not service.sessions.peers)


def test_a_child_that_holds_the_socket_does_not_hide_its_parents_death(server, engine_process):
    cache = server(l1=8)
    process = engine_process(cache)
    child = process.ask("fork")
    try:
        process.kill()
        eventually(lambda: cache.counters()["engine_processes"] == 0)
    finally:
        os.kill(child, 9)


def test_leases_hold_until_the_last_process_of_the_instance_is_gone(server, engine_process, raw):
    """The scheduler is dead, but a rank may still be reading."""
    cache = server(l1=8)
    rank, scheduler = engine_process(cache, "tp", scheduler=False), engine_process(cache, "tp")
    scheduler.ask("store", ids=list(range(320)))
    scheduler.ask("hold", ids=list(range(320)))
    scheduler.kill()
    eventually(lambda: cache.counters()["engine_processes"] == 1)
    assert cache.counters()["leases"] == 1
    other = raw(cache)
    assert other.store(chain(6, 2048)) < 2048, "the region of the leased slots is not to be had"
    rank.kill()
    eventually(lambda: cache.counters()["leases"] == 0)
    assert other.store(chain(7, 2048)) == 2048


def test_leases_whose_answers_got_lost_end_when_the_engine_is_back(server, raw):
    cache = server(l1=8)
    client, hashes = raw(cache), chain(7, 10)
    client.store(hashes)
    known = client.ask(m.Lookup(client.space, hashes)).lease
    client.carrier.post(m.Lookup(client.space, hashes))  # nobody waits for this answer
    eventually(lambda: cache.counters()["leases"] == 2)
    client.close()
    client.connect()
    assert client.ask(m.Hold([known])) == m.Ok(1)
    assert cache.counters()["leases"] == 1
    assert client.ask(m.Release([known])) == m.Ok(1)
    assert cache.counters()["leases"] == 0


def test_a_session_that_comes_back_is_known_and_its_former_connection_counts_no_more(server, raw):
    cache = server(l1=8)
    client, hashes = raw(cache), chain(8, 4)
    reservation = client.reserve(hashes).reservation
    former = client.carrier
    client.connect()
    assert former.wait_for_end(PATIENCE)
    assert cache.counters()["reservations"] == 0
    assert isinstance(client.ask(m.Commit(reservation, True)), m.Error), "its claim has ended"
    assert client.hits(hashes) == 0
    assert len(cache.status()["engines"]) == 1
    descriptors = len(os.listdir(f"/proc/{cache.pid}/fd"))
    for _ in range(20):
        client.connect()
    assert len(os.listdir(f"/proc/{cache.pid}/fd")) <= descriptors + 1


def test_one_connection_is_one_session(server, raw):
    cache = server(l1=8)
    client = raw(cache)
    answer = client.ask(msgspec.structs.replace(client.hello, instance="another"))
    assert isinstance(answer, m.Error) and "before" in answer.text
    assert cache.counters()["engine_processes"] == 1


def test_what_an_engine_said_before_it_hung_up_is_heard_though_answers_no_longer_reach_it(small, monkeypatch):
    """While the server handles one message, the engine sends its last one and hangs up."""
    service, path = small
    client, handle = Client(path), service.handle

    def slowly(peer, request, frames, reply):
        if type(request) is m.Ping:
            client.carrier.post(m.Dropped(7, "last words"))
            client.close()
        handle(peer, request, frames, reply)

    monkeypatch.setattr(service, "handle", slowly)
    client.carrier.post(m.Ping())
    eventually(lambda: service.counters["engine_dropped:last words"] == 7)


def test_goodbye_ends_every_claim(server, raw):
    cache = server(l1=8)
    client, hashes = raw(cache), chain(9, 4)
    client.store(hashes)
    client.ask(m.Lookup(client.space, hashes))
    client.reserve(chain(10, 4))
    client.ask(m.Bye())
    counters = cache.counters()
    assert (counters["leases"], counters["reservations"], counters["engine_processes"]) == (0, 0, 0)
    assert isinstance(client.ask(m.Lookup(client.space, hashes)), m.Error)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_is_turned_away(server, folders):
    cache = server(l1=8)
    stranger = (
        "import os, sys, socket; s = socket.socket(socket.AF_UNIX); s.settimeout(60); os.setgid(65534); os.setuid(65534)\n"
        "try: s.connect(sys.argv[1]); print(s.recv(4096))\n"
        "except PermissionError: print('no way in')"
    )

    def attempt() -> str:
        command = [sys.executable, "-c", stranger, cache.socket_path()]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout

    assert "no way in" in attempt()
    os.chmod(cache.socket_dir, 0o755)
    os.chmod(cache.socket_path(), 0o666)  # even if somebody opened the door
    assert "user 65534" in attempt()
    (arena,) = cache.arena_dir.glob("*.arena")
    assert arena.stat().st_mode & 0o777 == 0o600
    assert cache.counters()['refused_engines_total{reason="other user"}'] == 1
    (told,) = cache.status()["refused_engines"]
    assert told["who"].endswith("of user 65534") and "run the engine as the same user" in told["remedy"]
    assert told["who"] in cache.line_with("Refused an engine")


# What strangers send


def absurd_messages(client_space: int) -> list[bytes]:
    """Messages of the right form with numbers that make no sense."""
    out = []
    for number in (-1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1):
        out += [
            [4, number, bytes(16)],
            [4, client_space, bytes(16), number],
            [5, [number] * 3],
            [6, client_space, number, b"", True, bytes(16)],
            [6, number, 0, bytes(16), False, bytes(16)],
            [7, number, True],
            [8, "load", number, 1e308, number],
            [8, "store", 1, float("inf"), 0],
            [8, "store", 1, float("nan"), 0],
            [9, number, number, number, number],
            [10, number, number],
            [12, number, 'odd"}\n{reason'],
            [14, [number]],
            [3, layout(), number, 0, 4096],
            [3, layout(), 2, number, 4096],
            [3, layout(), 1, 0, number],
            [3, layout(num_layers=number), 1, 0, 4096],
            [3, layout(chunk_tokens=number), 1, 0, 4096],
        ]
    out += [
        [4, client_space, bytes(17)],
        [6, client_space, 0, b"short", False, bytes(16)],
        [5, []],
        [4, client_space, b""],
    ]
    out += [
        [6, client_space, 0, b"", True, bytes(15)],
        [3, layout(num_layers=0), 1, 0, 1],
        [3, layout(kv_dtype="int3"), 1, 0, 1],
    ]
    out += [[1, 99, "future", "i", "r", 0, 1], [1, -5, "past", "i", "r", 0, 1], [2, "more", "fields"], [99], [], [None]]
    out += [[5, [1] * 70_000], [6, client_space, 0, b"", True, bytes(16 * 20_000)]]
    return [msgspec.msgpack.encode([n + 1, body]) for n, body in enumerate(out)]


def layout(**changes: object) -> dict[str, object]:
    good = {
        "model_id": "m",
        "kv_dtype": "bfloat16",
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_size": 8,
        "chunk_tokens": 16,
    }
    return good | changes


def garbage(seed: int, count: int) -> list[bytes]:
    """Random bytes, cut-off messages, huge announced lengths, deep nests, wrong types."""
    dice, out = random.Random(seed), []
    samples = absurd_messages(0)[:100]
    for _ in range(count):
        match dice.randrange(5):
            case 0:
                out.append(dice.randbytes(dice.randrange(60)))
            case 1:
                good = dice.choice(samples)
                out.append(good[: dice.randrange(len(good))])
            case 2:
                out.append(dice.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb"]) + b"\xff\xff\xff\xfe" + dice.randbytes(8))
            case 3:
                out.append(dice.choice([b"\x91", b"\x81"]) * dice.choice([10, 5000, 200_000]))
            case _:
                flipped = bytearray(dice.choice(samples))
                flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
                out.append(bytes(flipped))
    return out


def test_malformed_messages_over_zmq_never_stop_anything(server, raw):
    cache = server(l1=8, flags=("--insecure-no-auth",))
    client = raw(cache)
    client.store(chain(11, 4))
    with zmq.Context() as context, context.socket(zmq.DEALER) as door:
        door.linger = 0
        door.rcvhwm = door.sndhwm = 0
        door.connect(cache.address)
        door.send(m.encode(1, m.Hello(m.PROTOCOL_VERSION, "", "zmq", "worker", 0, 1, payload=True, session=b"x")))
        assert door.poll(PATIENCE * 1000)  # it is let in now, so it may send as much as it wants
        assert isinstance(m.decode_answer(door.recv())[1], m.Welcome)
        messages = garbage(1, 1500) + absurd_messages(0)
        for at in range(0, len(messages), 50):
            for one in messages[at : at + 50]:
                door.send(one)
            for _ in messages[at : at + 50]:
                assert door.poll(PATIENCE * 1000), "every message gets an answer"
                m.decode_answer(door.recv())
        for frames in ([b""], [b"", b""], [b"x"] * 100, [msgspec.msgpack.encode([7, [2]]), b"y" * 100_000]):
            door.send_multipart(frames)
            assert door.poll(PATIENCE * 1000)
            m.decode_answer(door.recv())
    with socket.create_connection(("127.0.0.1", cache.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
    assert client.hits(chain(11, 4)) == 4
    assert cache.healthy()
    counters = cache.counters()
    assert counters["internal_errors_total"] == 0 and counters["loop_errors_total"] == 0, cache.complaints()
    assert counters["malformed_messages_total"] > 1000


def test_malformed_messages_over_the_unix_socket_never_stop_anything(server, raw):
    cache = server(l1=8)
    client = raw(cache)
    client.store(chain(12, 4))
    mad = raw(cache, "mad")
    messages = garbage(2, 1500) + absurd_messages(mad.space)
    sock, reader, answers = mad.carrier._socket, FrameReader(m.MAX_MESSAGE_BYTES), []
    for at in range(0, len(messages), 20):
        sock.sendall(b"".join(frame(one) for one in messages[at : at + 20]))
        while len(answers) < min(at + 20, len(messages)):
            sock.settimeout(PATIENCE)
            data = sock.recv(1 << 18)
            assert data, "well-framed nonsense must not end the connection"
            answers += [m.decode_answer(raw_answer) for raw_answer in reader.feed(data)]
    count = len(absurd_messages(0))
    assert [sequence for sequence, _ in answers[-count:]] == list(range(1, count + 1)), "each answer names its request"
    for announced in (m.MAX_MESSAGE_BYTES + 1, 2**32 - 1):
        torn = raw(cache, "torn").carrier._socket
        torn.sendall(struct.pack("<I", announced) + b"x" * 100)
        reply = FrameReader(m.MAX_MESSAGE_BYTES).feed(torn.recv(4096))
        assert isinstance(m.decode_answer(reply[0])[1], m.Error), (
            "and then it hangs up: where the next begins is unknown"
        )
        assert torn.recv(1) == b""
    half = raw(cache, "half").carrier._socket
    half.sendall(struct.pack("<I", 100) + b"only half")
    half.close()
    assert client.hits(chain(12, 4)) == 4
    assert cache.healthy()
    counters = cache.counters()
    assert counters["internal_errors_total"] == 0 and counters["loop_errors_total"] == 0, cache.complaints()
    assert all(line.isprintable() for line in counters), "what engines say of themselves must not break the metrics"


def test_who_says_no_hello_is_hung_up_on_and_who_did_is_not(small, monkeypatch):
    path = small[1]
    client = Client(path)
    silent = socket.socket(socket.AF_UNIX)
    silent.settimeout(PATIENCE)
    silent.connect(str(path))
    monkeypatch.setattr(unix_endpoint, "HELLO_SECONDS", 0.0)
    assert silent.recv(1) == b"", "the server ended it"
    assert client.ask(m.Ping()) == m.Ok()
    silent.close()


def test_one_process_cannot_take_all_connections(small, monkeypatch):
    """Sessions that ended without a goodbye count for as long as their process lives: it may still be copying."""
    monkeypatch.setattr(unix_endpoint, "MAX_CONNECTIONS_OF_PROCESS", 3)
    service, path = small
    for _ in range(3):
        client = Client(path)
        client.carrier._socket.close()
    stranger = UnixCarrier(str(path), msgspec.structs.replace(client.hello, session=os.urandom(16)), PATIENCE)
    assert f"process {os.getpid()} has opened 3 already" in stranger.welcome.text
    assert service.sessions.refused.counts["too many"] == 1


def test_a_session_that_comes_back_again_and_again_takes_one_place(small, monkeypatch):
    monkeypatch.setattr(unix_endpoint, "MAX_CONNECTIONS_OF_PROCESS", 3)
    client = Client(small[1])
    for _ in range(8):
        client.carrier._socket.close()
        client.connect()


def test_a_flood_of_malformed_messages_is_counted_and_hardly_logged(folders, caplog):
    clock = [100.0]
    with server_parts(folders, 8 << 20, runtime=Runtime(now=lambda: clock[0])) as (service, _):
        client = Client(Path(service.sessions.socket_path))
        sock, reader = client.carrier._socket, FrameReader(m.MAX_MESSAGE_BYTES)
        sock.settimeout(PATIENCE)

        def send(count: int) -> list[str]:
            caplog.clear()
            sock.sendall(frame(b"\xc1") * count)
            answers = 0
            while answers < count:
                answers += len(reader.feed(sock.recv(1 << 16)))
            return [one.getMessage() for one in caplog.records if "malformed" in one.getMessage()]

        assert len(send(1000)) == 1
        clock[0] += 10.0
        (line,) = send(1)
        assert "999 more such lines were left out" in line
        assert service.counters["malformed_messages"] == 1001


def test_a_layout_whose_name_is_a_book_is_refused(small):
    client = Client(small[1])
    fair = msgspec.structs.replace(client.layout, chunk_tokens=client.carrier.welcome.chunk_tokens)
    raw = m.encode(9, m.Register(fair, 1, 0, 4096)).replace(b"\xa3raw", b"\xda\xff\xff" + b"n" * 0xFFFF)
    client.carrier._socket.sendall(frame(raw))
    sequence, answer = m.decode_answer(FrameReader(m.MAX_MESSAGE_BYTES).feed(client.carrier._socket.recv(1 << 16))[0])
    assert sequence == 9 and isinstance(answer, m.Error) and "65535 characters" in answer.text


def test_a_client_that_never_reads_is_hung_up_and_costs_a_bounded_memory(server, raw):
    cache = server(l1=16)
    client, deaf = raw(cache), raw(cache, "deaf")
    deaf.store(chain(13, 4000))
    request = frame(m.encode(1, m.Lookup(deaf.space, chain(13, 4000), 0)))
    deaf.carrier._socket.settimeout(PATIENCE)
    with pytest.raises(ConnectionError):
        for _ in range(10_000):
            deaf.carrier._socket.sendall(request)
    assert client.hits(chain(14, 1)) == 0
    assert cache.healthy()


def test_of_clients_that_never_read_the_greediest_is_hung_up_on_first(small, monkeypatch):
    """Each keeps to its own bound; together they would hold too much."""
    monkeypatch.setattr(unix_endpoint, "MAX_UNSENT_BYTES", 1 << 40)
    monkeypatch.setattr(unix_endpoint, "MAX_ALL_UNSENT_BYTES", 4 << 20)
    _, path = small
    modest, greedy = Client(path), Client(path)
    modest.store(chain(19, 2000))
    request = frame(m.encode(99, m.Lookup(modest.space, chain(19, 2000))))
    modest.carrier._socket.sendall(request * 200)  # 8000 bytes each
    with pytest.raises(ConnectionError):
        for _ in range(10_000):
            greedy.carrier._socket.sendall(request)
    modest.carrier._socket.settimeout(PATIENCE)
    reader, answers = FrameReader(m.MAX_ANSWER_BYTES), []
    while len(answers) < 200:
        data = modest.carrier._socket.recv(1 << 16)
        assert data, "it was hung up on"
        answers += reader.feed(data)
    assert modest.ask(m.Ping()) == m.Ok()


@pytest.fixture
def session():
    """Schedulers over either face: session(service, port, face, shards)."""
    made = []

    def make(service: Service, port: int, endpoint: str, shards: int) -> SchedulerSession:
        address = f"unix://{service.sessions.socket_path}" if endpoint == "unix" else f"tcp://127.0.0.1:{port}"
        mode = "auto" if endpoint == "unix" else "payload"
        endpoint = Endpoint(address, "long", "scheduler", deadline_seconds=PATIENCE, transfer_mode=mode)
        made.append(
            SchedulerSession(endpoint, GroupShape(lambda chunk: Layout("l", "bfloat16", 1, 1, 64, chunk), shards))
        )
        assert made[-1].wait_connected(PATIENCE)
        return made[-1]

    yield make
    for one in made:
        one.close()


def named(hashes: bytes) -> TokenChain:
    """A chain of these hashes."""
    made = TokenChain(bytes(16), 16)
    made.hashes = hashes
    return made


def test_the_extents_of_a_million_tokens_are_one_answer(folders, session, monkeypatch):
    """As many slots as 65,536 chunks of 16 shards have, which are more than one request may have bytes."""
    chunks, shards = m.MAX_RESERVED_CHUNKS, 65
    hashes = chain(16, chunks)
    monkeypatch.setattr(Arena, "back", lambda *_: None)  # no byte is copied, so the slots need no memory
    with server_parts(folders, chunks * (shards + 1) * 4096) as (service, port):
        for endpoint in ("unix", "zmq"):
            scheduler = session(service, port, endpoint, shards)
            if endpoint == "unix":
                fill(service.l1, next(iter(service.sessions.peers)).process, scheduler.new_chain().root, hashes, shards)
            hit = scheduler.lookup(named(hashes))
            assert hit is not None and hit.chunks == chunks and len(hit.extents) == 4 * chunks * shards > 4 << 20
            assert scheduler.connected and not scheduler.misses


def fill(l1: L1, process: int, root: bytes, hashes: bytes, shards: int) -> None:
    layout = Layout("l", "bfloat16", 1, 1, 64, 16)
    for shard in range(shards):
        space = l1.open_space(process, space_fingerprint(layout, []), shards, shard, 4096)
        grant = l1.reserve(time.monotonic(), process, space, shard, root, True, hashes)
        assert l1.commit(time.monotonic(), process, grant.reservation, True) == len(hashes) // 16


@pytest.mark.parametrize("endpoint", ["unix", "zmq"])
@pytest.mark.parametrize("shards", [1, MAX_SHARDS])
def test_a_lookup_beyond_what_its_messages_hold_is_cut(folders, session, endpoint, shards):
    """With one shard a chunk the request is too long, with the most shards the answer."""
    with server_parts(folders, 8 << 20) as (service, port):
        scheduler = session(service, port, endpoint, shards)
        hashes = chain(17, 300_000 if shards == 1 else 5_000)
        if shards == 1:
            fill(
                service.l1, next(iter(service.sessions.peers)).process, scheduler.new_chain().root, hashes[:64], shards
            )
        hit = scheduler.lookup(named(hashes))
        assert (hit.chunks if hit else 0) == (4 if shards == 1 else 0)
        assert scheduler.connected and not scheduler.misses, "it was answered"


def test_a_lookup_beyond_what_one_answer_holds_is_refused(server, raw):
    client = raw(server(l1=8))
    layout = msgspec.structs.replace(client.layout, chunk_tokens=16)
    client.space = client.ask(m.Register(layout, MAX_SHARDS, -1, 0)).space
    most = m.most_looked_up(0, MAX_SHARDS)
    answer = client.ask(m.Lookup(client.space, chain(18, most + 1)))
    assert answer.code == "refused" and f"ask for {most}" in answer.text
    assert client.ask(m.Lookup(client.space, chain(18, most))) == m.Found(0, 0, b"")


def test_a_layout_of_any_number_of_heads_keeps_nobody_waiting(server, raw, folders):
    """With a tier, the server lists by which splits of the heads KV may be there."""
    client = raw(server(l1=8, flags=("--l2", f"disk://{folders('/tmp')}?io=buffered&max_gb=1")))
    layout = Layout("wide", "bfloat16", 1, 1 << 40, 1, 16)
    assert isinstance(client.ask(m.Register(layout, 1, -1, 0)), m.Registered)
    assert client.store(chain(19, 4)) == 4


def test_a_message_costs_no_large_buffer(folders):
    """From the kernel it would come as pages that have to be faulted in, for each message anew."""
    loop, arena, path = Loop(), Arena(folders("/dev/shm"), 1 << 20), folders("/tmp") / "socket"
    endpoint = UnixEndpoint(loop, Service(loop, L1(arena), 16, None), listen_unix(path), path)
    thread = threading.Thread(target=loop.run)
    thread.start()
    request = frame(m.encode(1, m.Lookup(0, chain(15, 4))))
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(path))

            def ask() -> None:
                client.sendall(request)
                assert client.recv(4096)

            ask()
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(20):
                ask()
            assert tracemalloc.get_traced_memory()[1] - before < 1 << 16
    finally:
        tracemalloc.stop()
        loop.stop()
        thread.join()
        endpoint.close()
        arena.close()
        loop.close()


def test_both_sides_name_both_versions(server):
    cache = server(l1=8)
    hello = m.Hello(m.PROTOCOL_VERSION + 1, "9.9", "e", "worker", 0, os.getpid())
    answer = UnixCarrier(cache.socket_path(), hello, PATIENCE).welcome
    assert isinstance(answer, m.Error) and answer.code == "version"
    for word in (str(m.PROTOCOL_VERSION), str(m.PROTOCOL_VERSION + 1), "9.9", "upgrade the lmcache server"):
        assert word in answer.text
    assert "upgrade the engine's lmcache package" in m.version_error(1, "0.1", 2, "0.2")


def test_another_pipeline_split_is_another_space(server, raw):
    """The same layout in as many shards of the same size, split by layers instead of heads."""
    cache = server(l1=8)
    heads, stages = raw(cache, "heads"), raw(cache, "stages")
    layout = Layout("split", "bfloat16", 2, 2, 64, 16)
    size = 16 * 2 * 2 * 64 * 2
    for client, split in ((heads, []), (stages, [1, 2])):
        for shard in range(2):
            client.space = client.ask(m.Register(layout, 2, shard, size, split)).space
    hashes = chain(77, 4)
    for shard in range(2):
        granted = heads.reserve(hashes, shard=shard)
        heads.ask(m.Commit(granted.reservation, True))
    assert (heads.hits(hashes), stages.hits(hashes)) == (4, 0)
    found = stages.ask(m.Lookup(stages.space, hashes, sisters=True))
    assert found.chunks == 4 and found.extents == b"" and [one.split for one in found.foreign] == [Split((), 2)]
    stages.ask(m.Release([found.lease]))
    stages.space = stages.ask(m.Register(layout, 1, 0, 2 * size + 16)).space
    other = stages.ask(m.Lookup(stages.space, hashes, sisters=True))
    assert other.chunks == 0, "what does not hold exactly its layers and heads has nothing in common with others"
    refused = stages.ask(m.Register(layout, 2, 0, size, [1, 3]))
    assert isinstance(refused, m.Error) and "do not cover 2 layers" in refused.text
