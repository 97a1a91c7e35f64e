"""Servers that pull from each other: real servers and engines, whose KV is compared bit for bit, and impostors."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine_process import pause_once
from lmcache import __version__
from lmcache.chunks import Split, space_fingerprint
from lmcache.config.options import peers
from lmcache.engine.known import TIERS
from lmcache.errors import ConfigError
from lmcache.peers import dial, roster
from lmcache.peers import tier as peer_tier
from lmcache.peers.dial import Myself, Name
from lmcache.peers.pulls import Pulling, take
from lmcache.peers.tier import PeersTier
from lmcache.runtime import RUNTIME
from lmcache.server import zmq_endpoint
from lmcache.server.sessions import MAX_HELD_BYTES_OF_PEERS
from lmcache.tiers import ABSENT, OK, ShardKey, TierError
from lmcache.tiers.frame import CHECKSUM, OTHER_SHARD, OTHER_SIZE, make_header
from lmcache.tiers.operation import Clear, Close, Contains, Load, Open, Operation, Store
from lmcache.tiers.registry import make_tier
from lmcache.wire import messages as m
from lmcache.wire.carriers import ZmqCarrier
from ports import free_port
from prompts import tokens
from proxy import Proxy
from servers import PATIENCE, Impostor, Process, Raw, Server, beside, eventually, key_file, server_parts
from test_followers import Publisher
from test_groups import CHUNK, HybridEngine, ids_of
from test_groups import engines as engines
from test_splits import Ranks
from test_splits import ranks as ranks

IDS = tokens(640, 5)
PATIENT = "--worth", "always"
Servers = Callable[..., Server]
Engines = Callable[..., Any]


def tier_of(server: Server) -> dict[str, Any]:
    """The tier of peers in /status."""
    (tier,) = [one for one in server.status()["tiers"] if one["name"] == "peers"]
    found: dict[str, Any] = tier
    return found


def connected(server: Server, port: int) -> None:
    """Wait until `server` may pull from that port."""
    eventually(lambda: f"Peer 127.0.0.1:{port}: connected" in "".join(server.log))


def pulling_from(start: Servers, *ports: int, flags: tuple[str, ...] = (), **more: Any) -> Server:
    """A server that is connected to the servers at these ports."""
    names = ",".join(f"127.0.0.1:{port}" for port in ports)
    one = start(flags=("--peers", names, *PATIENT, *flags), **more)
    for port in ports:
        connected(one, port)
    return one


def nothing_lent(server: Server) -> None:
    eventually(lambda: server.status()["index"]["leases"] == 0)


# What is there is found


def test_what_one_server_has_is_a_hit_at_another(server: Servers, engine: Engines) -> None:
    here = server()
    there = pulling_from(server, here.port)
    assert engine(here, "writer").store(IDS) == 640
    assert engine(there, "reader").load(IDS) == 640
    assert tier_of(there)["counters"]["loaded_shards"] == 40
    status = here.status()
    assert status["counters"]["lent_shards_total"] == 40
    assert {one["instance"] for one in status["engines"]} == {"writer"} and status["counters"]["pulling_servers"] == 1
    here.clear()
    assert engine(there, "again").load(IDS) == 640, "it has its own copy now"
    nothing_lent(here)


def test_what_is_not_kept_leaves_the_memory_when_it_has_been_read(server: Servers, engine: Engines) -> None:
    here = server()
    there = pulling_from(server, here.port, flags=("--peer-keep", "no"))
    engine(here, "writer").store(IDS)
    own = tokens(320, 6)
    reader = engine(there, "reader")
    reader.store(own)
    for times in (1, 2):
        assert reader.load(IDS) == 640
        eventually(lambda: there.status()["index"]["chunks"] == 20)
        assert tier_of(there)["counters"]["loaded_shards"] == 40 * times
    assert reader.load(own) == 320 and there.counters()["evicted_chunks_total"] == 80
    nothing_lent(here)
    nothing_lent(there)


def test_the_commands_of_the_page_make_two_servers_that_read_from_each_other(
    folders: Callable[[str], Path], engine: Engines
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "peers.md").read_text()
    section = page.partition("## Two servers on one machine")[2].partition("\n## ")[0]
    commands = [line.split()[1:] for line in section.splitlines() if line.startswith("    lmcache server")]
    assert len(commands) == 2
    ports = {number: str(free_port()) for number in ("5555", "5556", "8080", "8081")}
    more = ["--chunk-size", "16", "--http-host", "127.0.0.1", "--socket-dir", str(folders("/tmp"))]
    more += ["--arena-dir", str(folders("/dev/shm"))]
    started = []
    try:
        for words in commands:
            own = [_with_ports(word, ports) for word in words]
            started.append(Process([sys.executable, "-m", "lmcache.cli.main", *own, *more]))
        for one in started:
            eventually(lambda: ": connected; lookups find" in "".join(one.log))  # noqa: B023
        first, second = (SimpleNamespace(address=f"tcp://127.0.0.1:{ports[port]}") for port in ("5555", "5556"))
        assert engine(first, "writer").store(IDS) == 640
        assert eventually(lambda: engine(second, "reader").load(IDS) == 640)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['8080']}/metrics", timeout=PATIENCE) as answer:
            assert b"lmcache_lent_shards_total 40" in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['8081']}/status", timeout=PATIENCE) as answer:
            (tier,) = json.load(answer)["tiers"]
        assert (tier["name"], tier["state"]) == ("peers", "serving")
    finally:
        for one in started:
            one.end()


def _with_ports(word: str, ports: dict[str, str]) -> str:
    for number, port in ports.items():
        word = word.replace(number, port) if word == number or word.endswith(f":{number}") else word
    return word


def test_each_chunk_comes_from_a_server_that_has_it_and_two_that_ask_each_other_do_not_loop(
    server: Servers, engine: Engines
) -> None:
    """Four servers: two with different prompts, one that knows nothing and asks the last one back, and the last one, which asks
    all of them and itself."""
    first, second = server(), server()
    other = tokens(320, 6)
    engine(first, "a").store(IDS)
    engine(second, "b").store(other)
    last_port = free_port()
    third = server(flags=("--peers", f"127.0.0.1:{last_port}", *PATIENT))
    names = (f"127.0.0.1:{first.port},127.0.0.1:{second.port}", f"127.0.0.1:{third.port},127.0.0.1:{last_port}")
    last = server(port=last_port, flags=("--peers", names[0], "--peers", names[1], *PATIENT))
    for one in (first.port, second.port, third.port):
        connected(last, one)
    connected(third, last_port)
    reader = engine(last, "reader")
    assert reader.load(IDS) == 640 and reader.load(other) == 320
    assert reader.hit_tokens(tokens(320, 7)) == 0
    assert third.counters().get("fetches_total", 0) == 0, "what a peer asks is answered from L1 alone"
    own = f"server {last.status()['server_id'][:16]}"
    eventually(lambda: own not in [one["instance"] for one in last.status()["pulling_servers"]])
    eventually(lambda: tier_of(last)["state"] == "serving")
    assert engine(third, "hears").load(IDS) == 640, "from the copy of the last one"
    assert first.counters()["lent_shards_total"] == 40


def test_models_with_groups_and_with_other_splits_are_pulled(
    server: Servers, engines: Callable[..., HybridEngine], ranks: Callable[..., Ranks]
) -> None:
    here = server(chunk=CHUNK)
    there = pulling_from(server, here.port, chunk=CHUNK)
    ids = ids_of(1, 200)
    engines(here).compute(ids, [64, 96, 160, 192, 200])
    assert engines(there).load(ids) == 192
    small = server()
    big = pulling_from(server, small.port)
    prompt = tokens(160, 9)
    ranks(small, "two", Split((), 2)).store(prompt)
    assert ranks(big, "two", Split((), 2)).load(prompt) == 160
    other = tokens(160, 10)
    ranks(small, "again", Split((), 2)).store(other)
    assert ranks(big, "one", Split((), 1)).load(other) == 160, "by the sister that the other engine has opened"
    nothing_lent(here)
    nothing_lent(small)


def test_what_was_pulled_is_told_to_routers_as_l1s_and_not_as_stored(server: Servers, engine: Engines) -> None:
    """A peer evicts by itself, and tells nobody."""
    here = server()
    there = pulling_from(server, here.port)
    engine(here, "writer").store(IDS)
    reader, later = engine(there, "reader", follows=True), tokens(64, 9)
    router = Publisher(reader)
    eventually(lambda: router.look_up(IDS, name="first") == 40)
    router.look_up(later, name="second")
    reader.store(later)
    router.until(lambda: router.told(IDS) and router.told(later))  # so all that was before it has been told
    assert not any(router.has[TIERS].values())


def test_what_is_evicted_while_it_is_pulled_is_whole_or_a_miss(server: Servers, engine: Engines) -> None:
    """The first server has room for a few prompts only, and evicts all the time."""
    here = server(l1=1.5)
    there = pulling_from(server, here.port, l1=1.5)
    writer, reader = engine(here, "writer"), engine(there, "reader")
    prompts = [tokens(320, 100 + number) for number in range(60)]
    stored = queue.SimpleQueue[list[int]]()

    def write() -> None:
        for ids in prompts:
            writer.store(ids)
            stored.put(ids)

    writing, hits = beside(write), 0
    for _ in prompts:
        found = reader.load(stored.get(timeout=PATIENCE))  # compares every byte
        assert found >= 0
        hits += found
    writing.result(PATIENCE)
    assert hits > 0 and here.counters()["evicted_chunks_total"] > 0
    nothing_lent(here)


# What is not there costs little


def with_key(start: Servers, key: Path, proxy: Callable[[int], Proxy]) -> tuple[Server, Proxy, Server]:
    """A server, a proxy before it, and another server that pulls through the proxy. Only a key lets anything pass on the way.
    The other server is patient."""
    flags = "--auth-key-file", str(key)
    here = start(flags=flags)
    between = proxy(here.port)
    there = start(flags=(*flags, "--l2", f"peer://127.0.0.1:{between.port}?name=peers&timeout=60", *PATIENT))
    connected(there, between.port)
    return here, between, there


@pytest.fixture
def proxies() -> Iterator[Callable[[int], Proxy]]:
    made: list[Proxy] = []

    def make(port: int) -> Proxy:
        made.append(Proxy(port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_server_that_is_killed_amid_a_pull_is_a_miss_and_comes_back(
    server: Servers, engine: Engines, folders: Callable[[str], Path], proxies: Callable[[int], Proxy]
) -> None:
    key = key_file(folders("/tmp"))
    here, between, there = with_key(server, key, proxies)
    engine(here, "writer", key_file=str(key)).store(IDS)
    reader = engine(there, "reader", key_file=str(key))

    def die() -> None:
        here.kill()
        between.cut()

    between.answers.after(100_000, die)
    assert reader.hit_tokens(IDS) < 640
    counters = eventually(lambda: (found := tier_of(there)["counters"]).get("missed:lost") and found)
    assert counters["missed:lost"] > 0
    eventually(lambda: tier_of(there)["state"] == "serves in part")
    assert f"127.0.0.1:{between.port}: " in tier_of(there)["reason"]
    assert there.healthy()
    again = server(port=here.port, flags=("--auth-key-file", str(key)))
    engine(again, "writer2", key_file=str(key)).store(tokens(320, 8))
    eventually(lambda: tier_of(there)["state"] == "serving")
    assert eventually(lambda: reader.hit_tokens(tokens(320, 8)) == 320)


def test_a_server_that_hangs_is_a_miss_and_delays_few_lookups(server: Servers, engine: Engines) -> None:
    here = server()
    there = pulling_from(server, here.port, flags=("--l2-patience-seconds", "600"))
    engine(here, "writer").store(IDS)
    reader = engine(there, "reader")
    here.freeze()
    assert reader.hit_tokens(IDS) == 0  # the deadline of the peer ends it, not the patience
    assert tier_of(there)["counters"]["failed:unreachable"] >= 1
    assert "has not answered for 2 s" in eventually(lambda: tier_of(there)["reason"])
    assert reader.hit_tokens(tokens(320, 8)) == 0
    here.thaw()
    eventually(lambda: tier_of(there)["state"] == "serving")
    assert eventually(lambda: reader.hit_tokens(IDS) == 640)


def test_servers_that_do_not_fit_tell_it_on_both_sides(server: Servers, folders: Callable[[str], Path]) -> None:
    one, other = (key_file(folders("/tmp")) for _ in range(2))
    here = server(flags=("--auth-key-file", str(one)))
    wrong = server(flags=("--auth-key-file", str(other), "--peers", f"127.0.0.1:{here.port}"))
    without = server(
        flags=(
            "--peers",
            f"127.0.0.1:{here.port}",
        )
    )
    eventually(lambda: "its key is not this" in "".join(wrong.log))
    eventually(lambda: "it has a key file" in "".join(without.log))
    eventually(lambda: "its key is another one" in "".join(here.log))
    eventually(lambda: "it has no key file" in "".join(here.log) or "no hello" in str(here.status()["refused_engines"]))
    coarse = server(chunk=32, flags=("--auth-key-file", str(one), "--peers", f"127.0.0.1:{here.port}"))
    eventually(lambda: "give both the same --chunk-size" in "".join(coarse.log))
    eventually(lambda: here.status()["counters"]["pulling_servers"] == 0)
    assert tier_of(wrong)["state"] == "serves in part" and wrong.healthy()


# The server that is asked


def peer_of(server: Server, **more: Any) -> ZmqCarrier:
    """What another server is to this one: a connection of the role `peer`, which needs no proof here."""
    carrier = ZmqCarrier(server.address)
    hello = m.Hello(
        m.PROTOCOL_VERSION, "test", "server x", m.PEER, 0, os.getpid(), True, session=os.urandom(16), **more
    )
    assert isinstance(carrier.exchange(hello, PATIENCE)[0], m.Welcome)
    return carrier


def test_a_peer_reads_what_it_names_and_may_do_nothing_else(server: Servers, raw: Callable[..., Raw]) -> None:
    one = server(flags=("--insecure-no-auth",))
    client, hashes = raw(one), os.urandom(64)
    client.store(hashes)
    name = one.status()["engines"][0]["layout"]["fingerprint"]
    peer = peer_of(one)

    def ask(request: m.Message) -> tuple[Any, list[bytes]]:
        return peer.exchange(request, PATIENCE)

    space = space_of(client)
    present = ask(m.Has(space, 1, hashes[16:] + bytes(16) + hashes[:16]))[0]
    assert present == m.Having(b"\1\1\1\0\1")
    assert ask(m.Has(space, 2, hashes))[0] == m.Having(bytes(4)), "another split"
    assert ask(m.Has(bytes(16), 1, hashes))[0] == m.Having(bytes(4)) and name
    answer, frames = ask(m.Pull(space, 1, 0, bytes(16) + hashes))
    assert [len(one) for one in answer.headers] == [0, 128, 128, 128, 128] and len(frames) == 1
    for at, header in enumerate(answer.headers[1:]):
        into, frame = memoryview(bytearray(4096)), memoryview(frames[0])[4096 * at :][:4096]
        assert take(header, frame, ShardKey(space, hashes[16 * at :][:16], 0, 1), into) == OK
    client.ask(m.Clear())
    assert ask(m.Pull(space, 1, 0, hashes)) == (m.Pulled([b""] * 4), []), "it has lost what it said it had"
    client.store(hashes)
    for bad in (m.Pull(space, 1, 1, hashes), m.Pull(space, 0, 0, hashes), m.Pull(space, 1, -1, hashes)):
        assert ask(bad)[0].code == "refused"
    for wrong in (m.Has(b"", 1, hashes), m.Has(space, 1, bytes(16 * 513)), m.Pull(space, 1, 0, bytes(16 * 513))):
        assert ask(wrong)[0].code == "malformed"
    assert ask(m.Pull(space, 1, 0, bytes(15)))[0].code == "refused"
    not_for_peers: list[m.Message] = [
        m.Lookup(client.space, hashes),
        m.Reserve(client.space, 0, b"", True, os.urandom(16)),
        m.Clear(),
        m.Fetch(1, 0, 0, 1),
        m.Fill(1, 0),
        m.Commit(1, True),
        m.Release([1]),
    ]
    for request in not_for_peers:
        answer, frames = ask(request)
        assert answer.code == "refused" and "is not for other servers" in answer.text and not frames
    assert client.hits(hashes) == 4
    assert client.ask(m.Pull(space, 1, 0, hashes)).code == "refused", "an engine on this host has no use for it"
    assert ask(m.Bye())[0] == m.Ok()
    peer.close()
    nothing_lent(one)


def test_an_answer_has_few_frames_since_each_keeps_the_loop(server: Servers, raw: Callable[..., Raw]) -> None:
    one = server(flags=("--insecure-no-auth",))
    peer, hashes = peer_of(one), os.urandom(16 * 512)
    peer.trust()
    small, large = raw(one, "small", shard_bytes=4096), raw(one, "large", shard_bytes=m.JOINED_BYTES)
    assert small.store(hashes) == 512 and large.store(hashes[: 16 * 65]) == 65
    answer, frames = peer.exchange(m.Pull(space_of(small), 1, 0, hashes), PATIENCE)
    assert [len(frame) for frame in frames] == [512 * 4096] and all(answer.headers)
    answer, frames = peer.exchange(m.Pull(space_of(large), 1, 0, hashes[: 16 * 64]), PATIENCE)
    assert len(frames) == 64 and all(answer.headers)
    answer, _ = peer.exchange(m.Pull(space_of(large), 1, 0, hashes), PATIENCE)
    assert answer.code == "refused" and "at most 64" in answer.text
    peer.close()
    nothing_lent(one)


def test_chunks_that_are_being_stored_are_awaited_for_a_short_time(server: Servers, raw: Callable[..., Raw]) -> None:
    one = server(flags=("--insecure-no-auth",))
    client, hashes = raw(one), os.urandom(64)
    space, peer = space_of(client), peer_of(one)
    client.store(hashes[:16])
    for ends_well in (True, False):
        granted = client.reserve(hashes[16:], hashes[:16])
        assert peer.exchange(m.Has(space, 1, hashes), PATIENCE)[0] == m.Having(b"\1\2\2\2")
        peer.send(m.Pull(space, 1, 0, hashes))
        peer.send(m.Has(space, 1, hashes[:16]))
        assert eventually(peer.receive)[1] == m.Having(b"\1"), "it waits, and holds up nothing"
        client.ask(m.Commit(granted.reservation, ends_well))
        _, answer, frames = eventually(peer.receive)
        assert [len(header) for header in answer.headers] == [128] * (4 if ends_well else 1) + [0] * (not ends_well) * 3
        assert sum(map(len, frames)) == 4096 * (4 if ends_well else 1)
        client.ask(m.Clear())
        client.store(hashes[:16])
    granted = client.reserve(hashes[16:], hashes[:16])
    answer, _ = peer.exchange(m.Pull(space, 1, 0, hashes), PATIENCE)
    assert [len(header) for header in answer.headers] == [128, 0, 0, 0], "the engine takes too long"
    for _ in range(40):
        peer.send(m.Pull(space, 1, 0, hashes))
    peer.post(m.Bye())
    client.ask(m.Commit(granted.reservation, True))
    peer.close()
    nothing_lent(one)


def test_what_an_engine_stores_at_this_moment_is_a_hit_at_another_server(
    server: Servers, engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = server()
    there = pulling_from(server, here.port)
    writer, reader = engine(here, "writer"), engine(there, "reader")
    filled, looks = threading.Event(), threading.Event()

    def midway() -> None:
        looks.set()
        assert filled.wait(PATIENCE)

    pause_once(writer.worker._access.parts[0].copier, "gather", midway)
    job = writer.submit_store(IDS)
    assert looks.wait(PATIENCE)
    looked_up = beside(lambda: reader.load(IDS))
    eventually(lambda: here.counters()["awaited_pulls_total"] > 0)
    filled.set()
    writer.wait(job)
    found = looked_up.result(PATIENCE)
    assert found == 640 or tier_of(there)["counters"]["missed:absent"], "on a slow machine the pull waits in vain"
    assert eventually(lambda: reader.load(IDS) == 640)


def test_waiting_for_an_engine_in_vain_does_not_make_the_peers_slow(
    server: Servers, raw: Callable[..., Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = server()
    there = pulling_from(server, here.port)
    for one in (here, there):
        mine = str(one.socket_dir / f"{one.status()['server_id'][:16]}.sock")
        monkeypatch.setattr(one, "socket_path", lambda mine=mine: mine)
    writer, reader = raw(here, "writer"), raw(there, "reader")

    def look(hashes: bytes) -> int:
        def answer() -> Any:
            found = reader.ask(m.Lookup(reader.space, hashes, request=hashes.hex()))
            return None if found.loading else found

        found = eventually(answer)
        reader.ask(m.Release([found.lease]))
        return int(found.chunks)

    first, second = os.urandom(16 * 20), os.urandom(16 * 4)
    writer.store(first)
    assert eventually(lambda: look(first) == 20)
    pace = eventually(lambda: tier_of(there)["load_bytes_per_second"])
    granted = writer.reserve(second)
    eventually(lambda: look(second) == 0 and here.counters()["awaited_pulls_total"])
    eventually(lambda: tier_of(there)["counters"].get("missed:absent"))
    assert tier_of(there)["load_bytes_per_second"] == pace
    writer.ask(m.Commit(granted.reservation, True))


def space_of(client: Raw) -> bytes:
    """The name of the client's space."""
    layout = msgspec.structs.replace(client.layout, chunk_tokens=client.carrier.welcome.chunk_tokens)
    return space_fingerprint(layout, [], None)


def test_peers_that_do_not_read_hold_a_bounded_part_of_memory_until_they_end(
    server: Servers, raw: Callable[..., Raw]
) -> None:
    size = 48 << 20
    one = server(l1=2 * size / 2**20, flags=("--insecure-no-auth",))
    client, hashes = raw(one, shard_bytes=size), os.urandom(16)
    client.store(hashes)
    space, deaf = space_of(client), [peer_of(one) for _ in range(4)]
    for peer in deaf:
        for _ in range(6):
            peer.send(m.Pull(space, 1, 0, hashes))
    eventually(lambda: one.counters()["refused_requests_total"] > 0)
    held = sum(peer["held_bytes"] for peer in one.status()["pulling_servers"])
    assert held <= MAX_HELD_BYTES_OF_PEERS + 4 * 4096
    assert held > size and one.status()["index"]["leases"] >= held // size
    assert client.hits(hashes) == 1
    for peer in deaf:
        peer.close()  # without a word, as one that was killed
    nothing_lent(one)


# The server that asks


class Asked:
    """A tier of peers in this process, and the outcome of its operations."""

    def __init__(self, names: Sequence[Name], open_door: bool = True, timeout: float = PATIENCE) -> None:
        self.tier = PeersTier(names, RUNTIME, 1, timeout)
        self.tier.introduce(Myself(open_door=open_door))
        assert self.do(Open) is None

    def do(self, kind: Any, *arguments: Any) -> Any:
        """The result of an operation, or its error."""
        ended: queue.Queue[Any] = queue.Queue()
        operation: Operation[Any] = kind(RUNTIME.now() + PATIENCE, lambda *end: ended.put(end), *arguments)
        self.tier.submit(operation)
        result, error = ended.get(timeout=PATIENCE)
        return result if error is None else error

    def connected(self, count: int = 1) -> None:
        eventually(lambda: sum(one.asks is not None for one in self.tier._roster.peers) == count)

    def load(self, keys: Sequence[ShardKey], size: int = 4096) -> tuple[list[str], list[bytes]]:
        into = [memoryview(bytearray(size)) for _ in keys]
        return self.do(Load, keys, into), [bytes(one) for one in into]


@pytest.fixture
def asked() -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def make(*arguments: Any, **more: Any) -> Asked:
        made.append(Asked(*arguments, **more))
        return made[-1]

    yield make
    for one in made:
        assert one.do(Close) is None


KEYS = [ShardKey(b"space".ljust(16), bytes([number]) * 16, 0, 1) for number in range(3)]
PAYLOADS = [bytes([number]) * 4096 for number in range(3)]


def impostor(
    answers: Callable[[m.Message], tuple[m.Message, list[bytes]] | None],
    server: bytes = b"s" * 16,
    host: str = "127.0.0.1",
    port: int = 0,
    meets: bool = False,
) -> Impostor:
    """A server of this id that answers everything but hellos and pings by `answers`."""

    def answer(sequence: int, request: m.Message) -> list[bytes] | None:
        if isinstance(request, m.Hello):
            welcome = m.Welcome(m.PROTOCOL_VERSION, __version__, server, 16, "", b"a" * 16, 1 << 20, meets=meets)
            return [m.encode(sequence, welcome)]
        told = (m.Ok(), list[bytes]()) if isinstance(request, m.Ping | m.Bye) else answers(request)
        return None if told is None else [m.encode(sequence, told[0]), *told[1]]

    return Impostor(answer, port, host)


def sealed(number: int) -> bytes:
    return make_header(KEYS[number], bytes(16), PAYLOADS[number])


DAMAGED = {
    "absent": (m.Pulled([b""] * 3), [], [ABSENT] * 3),
    "one absent": (m.Pulled([sealed(0), b"", sealed(2)]), [PAYLOADS[0], PAYLOADS[2]], [OK, ABSENT, OK]),
    "other bytes": (m.Pulled([sealed(0), sealed(1), sealed(2)]), [PAYLOADS[0], PAYLOADS[1], PAYLOADS[0]], [OK, OK, CHECKSUM]),
    "other chunk": (m.Pulled([sealed(1), sealed(0), sealed(2)]), PAYLOADS, [OTHER_SHARD, OTHER_SHARD, OK]),
    "joined": (m.Pulled([sealed(0), b"", sealed(2)]), [PAYLOADS[0] + PAYLOADS[2]], [OK, ABSENT, OK]),
    "joined and short": (m.Pulled([sealed(0), b"", sealed(2)]), [PAYLOADS[0] + b"x"], [OK, ABSENT, OTHER_SIZE]),
    "short": (m.Pulled([sealed(0), sealed(1), sealed(2)]), [PAYLOADS[0], b"x", PAYLOADS[2]], [OK, OTHER_SIZE, OK]),
    "too few frames": (m.Pulled([sealed(0), sealed(1), sealed(2)]), PAYLOADS[:2], [OK, OK, OTHER_SIZE]),
    "too few headers": (m.Pulled([sealed(0)]), PAYLOADS, ["wrong answer"] * 3),
    "another answer": (m.Ok(3), PAYLOADS, ["wrong answer"] * 3),
    "refused": (m.Error("refused", "no"), [], ["refused"] * 3),
    "no header": (m.Pulled([b"x" * 128, sealed(1), sealed(2)]), PAYLOADS, ["not a frame", OK, OK]),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_what_a_peer_sends_wrongly_is_a_miss_with_a_name(asked: Callable[..., Asked], what: str) -> None:
    answer, frames, outcomes = DAMAGED[what]
    rogue = impostor(
        lambda request: (m.Having(b"\1\1\1"), []) if isinstance(request, m.Has) else (answer, list(frames))
    )
    try:
        one = asked([("127.0.0.1", rogue.port)])
        one.connected()
        assert one.do(Contains, KEYS) == [True] * 3
        found, loaded = one.load(KEYS)
        assert found == outcomes
        assert all(found[at] != OK or loaded[at] == PAYLOADS[at] for at in range(3))
    finally:
        rogue.close()


def test_a_tier_that_is_closed_amid_a_copy_ends_the_load_first(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on, copy = threading.Event(), threading.Event(), Pulling.take

    def take(pull: Pulling, *arguments: Any) -> list[str]:
        began.set()
        assert goes_on.wait(PATIENCE)
        return copy(pull, *arguments)

    monkeypatch.setattr(Pulling, "take", take)
    right = m.Pulled([sealed(0), sealed(1), sealed(2)]), PAYLOADS
    peer = impostor(lambda request: (m.Having(b"\1\1\1"), []) if isinstance(request, m.Has) else right)
    try:
        one = asked([("127.0.0.1", peer.port)])
        one.connected()
        assert one.do(Contains, KEYS) == [True] * 3
        ended: queue.Queue[Any] = queue.Queue()
        into = [memoryview(bytearray(4096)) for _ in KEYS]
        one.tier.submit(Load(RUNTIME.now() + PATIENCE, lambda *end: ended.put(("load", end[0])), KEYS, into))
        assert began.wait(PATIENCE)
        one.tier.submit(Close(RUNTIME.now() + PATIENCE, lambda *end: ended.put(("close", end[0]))))
        eventually(lambda: one.tier._closing is not None)
        for _ in range(10):
            turned = threading.Event()
            assert one.tier._soon(turned.set), "the thread has ended, and nobody hears of the end of the copy"
            assert turned.wait(PATIENCE)
        goes_on.set()
        assert [ended.get(timeout=PATIENCE) for _ in range(2)] == [("load", [OK] * 3), ("close", None)]
    finally:
        goes_on.set()
        peer.close()


def test_what_one_peer_does_not_deliver_another_one_does(asked: Callable[..., Asked]) -> None:
    right = m.Pulled([sealed(0), sealed(1), sealed(2)]), PAYLOADS

    def answers(good: bool) -> Callable[[m.Message], tuple[m.Message, list[bytes]]]:
        def answer(request: m.Message) -> tuple[m.Message, list[bytes]]:
            if isinstance(request, m.Has):
                return m.Having(b"\1\1\1"), []
            return right if good else (m.Pulled([sealed(1), b"", sealed(2)]), [PAYLOADS[1], PAYLOADS[0]])

        return answer

    rogues = [impostor(answers(good), bytes([good]) * 16) for good in (False, True)]
    try:
        one = asked([("127.0.0.1", rogue.port) for rogue in rogues])
        one.connected(2)
        assert one.do(Contains, KEYS) == [True] * 3
        for _ in range(2):  # whichever is asked first
            assert one.load(KEYS) == ([OK] * 3, PAYLOADS)
            assert one.do(Contains, KEYS) == [True] * 3
    finally:
        for rogue in rogues:
            rogue.close()


def test_answers_that_do_not_fit_are_no_answers(asked: Callable[..., Asked]) -> None:
    for wrong in (m.Having(b"\1"), m.Ok(), m.Error("malformed", "what is Has?")):
        rogue = impostor(lambda request, wrong=wrong: (wrong, []))  # type: ignore[misc]
        try:
            one = asked([("127.0.0.1", rogue.port)])
            one.connected()
            error = one.do(Contains, KEYS)
            assert isinstance(error, TierError) and error.reason == "unreachable"
            assert one.load(KEYS)[0] == [ABSENT] * 3
        finally:
            rogue.close()


def test_a_peer_that_sends_more_than_was_asked_for_is_cut_off_before_its_answer_is_complete(
    asked: Callable[..., Asked],
) -> None:
    much = [bytes(1 << 20)] * 64
    rogue = impostor(lambda request: (m.Having(b"\1\1\1"), []) if isinstance(request, m.Has) else (m.Pulled([]), much))
    with Proxy(rogue.port) as between:
        try:
            one = asked([("127.0.0.1", between.port)])
            one.connected()
            assert one.do(Contains, KEYS) == [True] * 3
            between.answers.after(16 << 20, between.answers.hold)
            assert one.load(KEYS)[0] == ["lost"] * 3
            eventually(lambda: "12288 were asked for" in one.tier.degraded())
        finally:
            between.thaw()
            rogue.close()


def test_a_shard_may_take_longer_than_the_timeout_while_it_arrives(asked: Callable[..., Asked]) -> None:
    size = 4 << 20
    payload = bytes(size)
    answer = m.Pulled([make_header(KEYS[0], bytes(16), payload)]), [payload]
    rogue = impostor(lambda request: (m.Having(b"\1"), []) if isinstance(request, m.Has) else answer)
    with Proxy(rogue.port) as between:
        try:
            one = asked([("127.0.0.1", between.port)], timeout=2.0)
            one.connected()
            assert one.do(Contains, KEYS[:1]) == [True]
            between.rate = size / 4
            assert one.load(KEYS[:1], size) == ([OK], [payload])
        finally:
            rogue.close()


def test_large_shards_are_asked_for_one_after_the_other(asked: Callable[..., Asked]) -> None:
    size, count = 12 << 20, 8
    keys = [KEYS[0]._replace(chunk=bytes([number]) * 16) for number in range(count)]
    open_pulls, most, lock = [0], [0], threading.Lock()

    def answer(request: m.Message) -> tuple[m.Message, list[bytes]] | None:
        if isinstance(request, m.Has):
            return m.Having(b"\1" * count), []
        with lock:
            open_pulls[0] += 1
            most[0] = max(most[0], open_pulls[0])
        return None

    rogue = impostor(answer)
    try:
        one = asked([("127.0.0.1", rogue.port)], timeout=2.0)
        one.connected()
        assert one.do(Contains, keys) == [True] * count
        assert one.load(keys, size)[0] == ["lost"] * count
        assert most[0] == 1, "one link, and two pulls would be more than the bound"
    finally:
        rogue.close()


def test_of_a_load_that_is_cancelled_nothing_more_is_asked(asked: Callable[..., Asked]) -> None:
    size, count = 4 << 20, 12
    keys = [KEYS[0]._replace(chunk=bytes([number]) * 16) for number in range(count)]
    answering, pulled = threading.Event(), queue.Queue[bytes]()

    def answer(request: m.Message) -> tuple[m.Message, list[bytes]]:
        if isinstance(request, m.Has):
            return m.Having(b"\1" * (len(request.hashes) // 16)), []
        assert isinstance(request, m.Pull)
        pulled.put(request.hashes)
        assert answering.wait(PATIENCE)
        return m.Pulled([b""] * (len(request.hashes) // 16)), []

    rogue = impostor(answer)
    try:
        one = asked([("127.0.0.1", rogue.port)])
        one.connected()
        assert one.do(Contains, keys) == [True] * count
        ended: queue.Queue[Any] = queue.Queue()
        into = [memoryview(bytearray(size)) for _ in keys]
        load = Load(RUNTIME.now() + PATIENCE, lambda *end: ended.put(end), keys, into)
        one.tier.submit(load)
        first = pulled.get(timeout=PATIENCE)
        one.tier.cancel(load)
        assert ended.get(timeout=PATIENCE)[1].reason == "cancelled"
        answering.set()
        assert one.load(keys[-1:], size)[0] == [ABSENT], "it is still known who had it"
        heard = [first, *(pulled.get_nowait() for _ in range(pulled.qsize()))]
        assert heard == [one.chunk for one in (*keys[:4], keys[-1])], "one link, with four pulls"
    finally:
        answering.set()
        rogue.close()


def test_one_silent_peer_does_not_hold_up_the_answers_of_others(asked: Callable[..., Asked]) -> None:
    silent = impostor(lambda request: None, b"1" * 16)
    quick = impostor(lambda request: (m.Having(b"\0\1\0"), []), b"2" * 16)
    try:
        one = asked([("127.0.0.1", silent.port), ("127.0.0.1", quick.port)])
        one.connected(2)
        assert one.do(Contains, KEYS) == [False, True, False]

        def left_alone() -> bool:
            heard = silent.asked
            assert one.do(Contains, KEYS) == [False, True, False]
            return silent.asked == heard

        eventually(left_alone)  # it owes an answer
    finally:
        silent.close()
        quick.close()


def test_a_peer_of_another_version_is_refused_with_what_to_upgrade(asked: Callable[..., Asked]) -> None:
    rogue = Impostor(
        lambda sequence, request: [m.encode(sequence, m.Error("version", m.version_error(1, "0.1", 2, "0.2")))]
    )
    try:
        one = asked([("127.0.0.1", rogue.port)])
        assert "upgrade" in eventually(one.tier.degraded)
        assert one.do(Contains, KEYS) == [False] * 3, "without a connection nothing is waited for"
    finally:
        rogue.close()


def test_status_tells_of_a_peer_when_its_connection_is_made_or_fails(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_tier, "_TICK_SECONDS", 1000)
    one = asked([("127.0.0.1", free_port())])
    assert "refused" in eventually(one.tier.degraded), "said at once, not at the next tick"


def test_without_a_proof_nothing_is_pulled(asked: Callable[..., Asked]) -> None:
    rogue = impostor(lambda request: (m.Having(b"\1\1\1"), []))
    try:
        one = asked([("127.0.0.1", rogue.port)], open_door=False)
        assert "nothing was sent to it" in eventually(one.tier.degraded)
        assert not any(isinstance(request, m.Has) for request, _ in rogue.heard)
    finally:
        rogue.close()


def test_a_name_stands_for_all_its_addresses_as_they_change(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "RESOLVE_SECONDS", 0.1)
    port = free_port()
    found: list[str] = ["127.0.0.1"]
    monkeypatch.setattr(dial, "addresses", lambda host: resolved(host, found))
    answers = {"127.0.0.1": b"1", "127.0.0.2": b"2"}
    rogues = [
        impostor(lambda request: (m.Having(b"\1\0\0"), []), server * 16, host, port) for host, server in answers.items()
    ]
    try:
        one = asked([("servers", port)])
        one.connected()
        found.append("127.0.0.2")
        one.connected(2)
        assert one.do(Contains, KEYS) == [True, False, False]
        found.pop(0)
        one.connected(1)
        assert [peer.address for peer in one.tier._roster.peers] == [f"127.0.0.2:{port}"]
        found.clear()
        eventually(lambda: "does not resolve" in one.tier.degraded())
        one.connected(1)  # a resolver that fails does not end what works
    finally:
        for rogue in rogues:
            rogue.close()


def test_a_name_that_never_resolves_keeps_no_addresses_of_others(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "RESOLVE_SECONDS", 0.01)
    found = ["127.0.1.1"]
    monkeypatch.setattr(dial, "addresses", lambda host: resolved(host, found if host == "servers" else []))
    one = asked([("misspelt", 1), ("servers", 1)])
    eventually(lambda: [peer.address for peer in one.tier._roster.peers] == ["127.0.1.1:1"])
    found[0] = "127.0.1.2"
    eventually(lambda: [peer.address for peer in one.tier._roster.peers] == ["127.0.1.2:1"])


def test_addresses_beyond_the_most_are_named_once(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(roster, "RESOLVE_SECONDS", 0.01)
    monkeypatch.setattr(roster, "MAX_PEERS", 2)
    looked: list[str] = []

    def addresses(host: str) -> tuple[str, ...]:
        looked.append(host)
        return tuple(f"127.0.1.{number}" for number in range(1, 6))

    monkeypatch.setattr(dial, "addresses", addresses)
    one = asked([("servers", 1)])
    eventually(lambda: len(looked) > 3)
    assert len(one.tier._roster.peers) == 2
    assert caplog.text.count("3 addresses of peers are left out, such as 127.0.1.3:1") == 1


def test_all_peers_leave_room_for_engines() -> None:
    assert dial.MAX_PEERS * (dial.MAX_CONNECTIONS + 1) <= 0.75 * zmq_endpoint.MAX_PEERS


def test_what_is_not_sent_is_not_counted_as_lent(folders: Callable[[str], Path]) -> None:
    with server_parts(folders, 32 << 20) as (service, _):
        one, answers, hashes = service.l1, list[Any](), os.urandom(32)
        peer: Any = SimpleNamespace(process=901, role=m.PEER, who="a test", busy=0, gone=False, held_bytes=0)

        def pull() -> None:
            one.join(900, "one")
            space = one.open_space(900, bytes(16), 1, 0, 4096)
            one.commit(0.0, 900, one.reserve(0.0, 900, space, 0, b"", True, hashes).reservation, True)
            one.join(901, "two")
            service.handle(peer, m.Pull(bytes(16), 1, 0, hashes), [], reply)

        def reply(answer: Any, frames: Any, sent: Callable[[], None] = lambda: None) -> None:
            answers.append(answer)
            sent()

        work = service._payload._workers.submit
        ran = threading.Event()
        service._payload._workers.submit = lambda call: work(lambda: (ran.wait(PATIENCE), call()))  # type: ignore
        service.sessions.gone = lambda peer: None  # type: ignore[method-assign]
        service.loop.ask(pull)
        peer.gone = True
        ran.set()
        eventually(lambda: answers)
        assert service.loop.ask(lambda: service.counters["lent_shards"]) == 0
        peer.gone = False
        service.loop.ask(lambda: service.handle(peer, m.Pull(bytes(16), 1, 0, hashes), [], reply))
        eventually(lambda: len(answers) == 2)
        assert service.loop.ask(lambda: service.counters["lent_shards"]) == 2


def test_peers_that_do_not_read_leave_room_for_stores(folders: Callable[[str], Path]) -> None:
    """Each pulls one of eight small shards, and thereby holds all of the chunk."""
    with server_parts(folders, 32 << 20) as (service, _):
        l1, answers, hashes = service.l1, list[Any](), os.urandom(16 * 24)
        peer: Any = SimpleNamespace(process=908, role=m.PEER, who="a test", busy=0, gone=False, held_bytes=0)

        def store(space: int, chunks: bytes) -> bool:
            grants = [l1.reserve(0.0, 900 + at, space, at, b"", True, chunks) for at in range(8)]
            return all(l1.commit(0.0, 900 + at, one.reservation, True) for at, one in enumerate(grants))

        def run() -> tuple[bool, int, bool]:
            for number in range(9):
                l1.join(900 + number, f"{number}")
            space = 0
            for at in range(8):
                space = l1.open_space(900 + at, bytes(16), 8, at, 1 << 17)
            stored = store(space, hashes)
            for at in range(24):
                service.handle(peer, m.Pull(bytes(16), 8, 0, hashes[16 * at : 16 * at + 16]), [], reply)
            refused = sum(isinstance(one, m.Error) for one in answers)
            return stored, refused, store(space, os.urandom(16 * 8))

        def reply(answer: Any, frames: Any, sent: Callable[[], None] = lambda: None) -> None:
            answers.append(answer)  # and never sent

        assert service.loop.ask(run, PATIENCE) == (True, 8, True)


def resolved(host: str, found: list[str]) -> tuple[str, ...]:
    if not found:
        raise OSError(f"host {host!r} does not resolve")
    return tuple(found)


def test_two_addresses_of_one_server_are_one_peer(asked: Callable[..., Asked]) -> None:
    rogue = impostor(lambda request: (m.Having(b"\0\0\0"), []))
    with Proxy(rogue.port) as other:
        try:
            one = asked([("127.0.0.1", rogue.port), ("127.0.0.1", other.port)])
            eventually(lambda: any(peer.is_needless for peer in one.tier._roster.peers))
            one.connected(1)
            assert one.tier.degraded() == ""
        finally:
            rogue.close()


def test_the_tier_only_reads(asked: Callable[..., Asked], server: Servers) -> None:
    one = asked([("127.0.0.1", 1)])
    error = one.do(Store, [])
    assert isinstance(error, TierError) and error.reason == "read-only"
    assert one.do(Clear) is None and one.do(Close) is None and one.do(Open) is None
    with pytest.raises(ConfigError, match=r"write=through: peer:// only reads"):
        make_tier("peer://a:1?write=through")
    for text in (
        "peer:///path",
        "peer://a:1/path",
        "peer://a:1?also=b:x",
        "peer://a:1?timeout=0.5",
        "peer://a:1?keep=2",
    ):
        with pytest.raises(ConfigError):
            make_tier(text)
    spec = make_tier("peer://[::1]:7?also=b,c:8")
    assert isinstance(spec.tier, PeersTier) and spec.tier._names == [("::1", 7), ("b", 5555), ("c", 8)]
    assert spec.write == "none"


def test_the_flag_names_servers() -> None:
    assert peers("a, b:6,[::1]:7,,::2\nb:6") == ("a:5555", "b:6", "[::1]:7", "[::2]:5555")
    for text in ("a:0", "a:b", "tcp://a:5", "a b", "[::1", "a:70000", "@a:5"):
        with pytest.raises(ValueError, match="must be HOST:PORT,HOST:PORT"):
            peers(text)
