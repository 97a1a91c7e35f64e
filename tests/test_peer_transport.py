"""Pulls by NIXL: real servers whose movers read from each other's arenas over loopback TCP and shared memory."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.config.load import load
from lmcache.errors import ConfigError, ServerUnavailable
from lmcache.memory.arena import Arena
from lmcache.peers.dial import Myself
from lmcache.peers.mover import Mover
from lmcache.peers.mover_words import Forget, Meeting
from lmcache.peers.moving import Nixl
from lmcache.peers.tier import PeersTier
from lmcache.runtime import RUNTIME
from lmcache.server.lending import LENT_SECONDS, Lending
from lmcache.tiers import OK, Region, ShardKey, child
from lmcache.tiers.frame import CHECKSUM, make_header
from lmcache.tiers.operation import Close, Contains, Load, Open, Operation
from lmcache.wire import messages as m
from ports import free_port
from prompts import tokens
from servers import PATIENCE, Raw, Server, beside, eventually
from stores import nixl_environment
from test_peers import connected, impostor, nothing_lent, peer_of, space_of, tier_of

IDS = tokens(640, 5)
NIXL = "--peer-transport", "nixl"
PATIENT = "--worth", "always"
BY_NIXL, BY_TCP = "pulls go by NIXL", "pulls go by TCP"
Servers = Callable[..., Server]
Engines = Callable[..., Any]


@pytest.fixture
def nixl(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets NIXL up for all servers, over what UCX is told to use; "": what LMCache tells it. Over TCP the owner's mover must
    answer each read."""

    def set_up(ways: str) -> None:
        monkeypatch.setenv("UCX_TLS", ways)
        if not ways:
            monkeypatch.delenv("UCX_TLS")

    for name, value in nixl_environment().items():
        monkeypatch.setenv(name, value)
        if name == "PYTHONPATH":
            monkeypatch.syspath_prepend(value.rpartition(os.pathsep)[2])
    set_up("tcp")
    return set_up


def said(server: Server, words: str) -> int:
    return "".join(server.log).count(words)


def two(start: Servers, *flags: str, **more: Any) -> tuple[Server, Server]:
    """Two servers, of which the second pulls from the first by NIXL."""
    here = start(flags=NIXL, **more)
    there = start(flags=("--peers", f"127.0.0.1:{here.port}", *PATIENT, *NIXL, *flags), **more)
    connected(there, here.port)
    eventually(lambda: said(there, BY_NIXL))
    return here, there


def read_under_way(here: Server, there: Server, engine: Engines) -> Any:
    """The outcome to come of a load at `there` that a mover reads from `here`, and that does not end: the mover that is read from
    is stopped."""
    stop(lender_of(here))
    loaded = beside(lambda: engine(there, "reader").load(IDS))
    eventually(lambda: lent_by_nixl(here))
    return loaded


def mover_of(server: Server, does: str = "reads from other servers") -> int:
    """The pid of the newest mover that does this."""
    return int(re.findall(rf"Process (\d+) {does}", "".join(server.log))[-1])


def lender_of(server: Server) -> int:
    return mover_of(server, "lets other servers read")


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def lent_by_nixl(server: Server) -> float:
    return server.counters()["lent_by_nixl_bytes_total"]


# What is there is found


@pytest.mark.parametrize("ways", ["tcp", ""])
def test_kv_is_read_from_the_other_servers_arena(
    server: Servers, engine: Engines, nixl: Callable[[str], None], ways: str
) -> None:
    nixl(ways)
    here, there = two(server)
    assert engine(here, "writer").store(IDS) == 640
    assert engine(there, "reader").load(IDS) == 640
    assert tier_of(there)["counters"]["loaded_shards"] == 40
    counters = here.counters()
    assert counters["lent_by_nixl_bytes_total"] == counters["lent_bytes_total"] > 0
    nothing_lent(here)
    listening = [line for line in here.log if "It listens on 127.0.0.1:" in line]
    assert len(listening) == 1 and "0.0.0.0" not in listening[0] and "[::]" not in listening[0]


def test_who_reaches_a_mover_finds_the_arena_and_nothing_else(
    server: Servers, nixl: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_PASSWORD", "of-the-server")
    here, there = two(server)
    for pid, may in ((lender_of(here), "r--s"), (mover_of(there), "rw-s")):
        assert b"of-the-server" not in Path(f"/proc/{pid}/environ").read_bytes()
        maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        assert {one[1] for one in maps if one[-1].endswith(".arena")} == {may}


def test_a_peer_that_gives_back_some_of_its_loans_keeps_half_of_l1_at_most(
    server: Servers, raw: Callable[..., Raw], nixl: Callable[[str], None]
) -> None:
    one = server(l1=16, flags=(*NIXL, "--insecure-no-auth"))
    client, peer = raw(one, shard_bytes=1 << 20), peer_of(one)
    hashes = [os.urandom(16) for _ in range(14)]
    for chunk in hashes:
        client.store(chunk)
    eventually(lambda: said(one, "lets other servers read by NIXL (UCX"))
    met = eventually(lambda: (answer := peer.exchange(m.Meet(), PATIENCE)[0]).mover and answer)
    kept = 0
    for chunk in hashes:
        loans = [peer.exchange(m.Pull(space_of(client), 1, 0, chunk, met.mover), PATIENCE)[0] for _ in range(2)]
        if isinstance(loans[0], m.Pulled):
            assert loans[0].lease and loans[1].lease
            peer.exchange(m.Release([loans[0].lease]), PATIENCE)
            kept += 1
    assert kept == 8
    peer.close()


# What is not there goes over TCP


def test_without_the_library_or_the_others_consent_pulls_go_over_tcp(
    server: Servers, engine: Engines, nixl: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = server()
    there = server(flags=("--peers", f"127.0.0.1:{plain.port}", *PATIENT, *NIXL))
    there.said_once(
        f"Peer 127.0.0.1:{plain.port}: {BY_TCP}, since it is an older server or has no --peer-transport nixl"
    )
    engine(plain, "writer").store(IDS)
    assert engine(there, "reader").load(IDS) == 640
    assert lent_by_nixl(plain) == 0
    (tmp_path / "nixl_cu12").mkdir()
    (tmp_path / "nixl_cu12/__init__.py").write_text("raise ImportError('nothing here')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    without = server(flags=("--peers", f"127.0.0.1:{plain.port}", *PATIENT, *NIXL))
    eventually(lambda: said(without, "NIXL cannot be used, so pulls go over TCP: not installed: nothing here") == 2)
    assert engine(without, "reader").load(IDS) == 640


def test_beyond_loopback_the_devices_must_be_named() -> None:
    flags: dict[str, Any] = {"host": "0.0.0.0", "insecure_no_auth": "true", "peer_transport": "nixl"}
    with pytest.raises(ConfigError, match="name the network devices of the servers' own network with --peer-devices"):
        load(flags, {})
    assert load({**flags, "peer_devices": "mlx5_0:1"}, {}).config.nixl_devices == "mlx5_0:1"
    assert load({"peer_transport": "nixl"}, {}).config.nixl_devices == "lo"
    assert load({}, {}).config.nixl_devices == ""


# Processes that die or freeze


@pytest.mark.parametrize("which", [mover_of, lender_of])
def test_a_mover_that_is_killed_amid_a_read_is_replaced_by_tcp_and_comes_back(
    server: Servers, engine: Engines, nixl: Callable[[str], None], which: Callable[[Server], int]
) -> None:
    here, there = two(server)
    engine(here, "writer").store(IDS)
    victim = which(there if which is mover_of else here)
    loaded = read_under_way(here, there, engine)
    os.kill(victim, signal.SIGKILL)
    if which is mover_of:
        os.kill(lender_of(here), signal.SIGCONT)
    assert loaded.result(PATIENCE) == 640
    nothing_lent(here)
    eventually(lambda: said(there, BY_NIXL) == 2)
    here.clear()
    there.clear()
    before = lent_by_nixl(here)
    engine(here, "writer again").store(IDS)
    assert engine(there, "reader again").load(IDS) == 640
    assert lent_by_nixl(here) > before


def test_a_mover_that_was_replaced_while_nobody_read_is_asked_for_again(
    server: Servers, engine: Engines, nixl: Callable[[str], None]
) -> None:
    here, there = two(server)
    os.kill(lender_of(here), signal.SIGKILL)
    eventually(lambda: said(here, "lets other servers read by NIXL (UCX") == 2)
    engine(here, "writer").store(IDS)
    assert engine(there, "reader").load(IDS) == 640
    assert lent_by_nixl(here) == 0, "the mover that was asked for is no more"
    eventually(lambda: said(there, BY_NIXL) == 2)
    here.clear()
    there.clear()
    engine(here, "writer again").store(IDS)
    assert engine(there, "reader again").load(IDS) == 640
    assert lent_by_nixl(here) > 0


@pytest.mark.parametrize("which", [mover_of, lender_of])
def test_a_mover_that_is_frozen_amid_a_read_is_replaced_by_tcp(
    server: Servers, engine: Engines, nixl: Callable[[str], None], which: Callable[[Server], int]
) -> None:
    here, there = two(server)
    engine(here, "writer").store(IDS)
    reader, frozen = mover_of(there), which(there if which is mover_of else here)
    stop(frozen)
    try:
        assert engine(there, "reader").load(IDS) == 640
        assert gone(reader), "nothing else shows that it writes no more"
        assert f"a read from 127.0.0.1:{here.port} took longer than it may" in "".join(there.log)
    finally:
        if not gone(frozen):
            os.kill(frozen, signal.SIGCONT)
    nothing_lent(here)
    eventually(lambda: said(there, BY_NIXL) == 2)


def test_a_server_that_is_killed_amid_a_read_is_a_miss_and_comes_back(
    server: Servers, engine: Engines, nixl: Callable[[str], None]
) -> None:
    port = free_port()
    here = server(flags=NIXL, port=port)
    there = server(flags=("--peers", f"127.0.0.1:{port}", *PATIENT, *NIXL))
    eventually(lambda: said(there, BY_NIXL))
    engine(here, "writer").store(IDS)
    lender = lender_of(here)
    loaded = read_under_way(here, there, engine)
    here.kill()
    assert loaded.result(PATIENCE) in (0, -1)
    eventually(lambda: gone(lender))
    again = server(flags=NIXL, port=port)
    eventually(lambda: said(there, BY_NIXL) == 2)
    engine(again, "writer again").store(IDS)
    assert eventually(lambda: engine(there, "reader again").load(IDS)) == 640
    assert lent_by_nixl(again) > 0


def test_an_owner_that_is_frozen_amid_a_read_is_a_miss_or_right(
    server: Servers, engine: Engines, nixl: Callable[[str], None]
) -> None:
    here, there = two(server)
    engine(here, "writer").store(IDS)
    loaded = read_under_way(here, there, engine)
    here.freeze()
    os.kill(lender_of(here), signal.SIGCONT)
    assert loaded.result(PATIENCE) in (640, 0, -1)
    here.thaw()
    assert eventually(lambda: engine(there, "reader again").load(IDS)) == 640


def test_a_server_that_is_killed_while_it_reads_takes_its_mover_along(
    server: Servers, engine: Engines, nixl: Callable[[str], None]
) -> None:
    here, there = two(server)
    engine(here, "writer").store(IDS)
    reader, lender = mover_of(there), lender_of(here)
    loaded = read_under_way(here, there, engine)
    there.kill()
    eventually(lambda: gone(reader))
    os.kill(lender, signal.SIGCONT)
    assert loaded.result(PATIENCE) in (0, -1)
    assert engine(here, "another").load(IDS) == 640
    again = server(flags=("--peers", f"127.0.0.1:{here.port}", *PATIENT, *NIXL))
    eventually(lambda: said(again, BY_NIXL))
    before = lent_by_nixl(here)
    assert engine(again, "reader again").load(IDS) == 640
    assert lent_by_nixl(here) > before and lender_of(here) == lender, "nothing has happened to who is read from"


def test_a_frozen_server_that_reads_keeps_nothing_from_the_other_and_goes_on(
    server: Servers, engine: Engines, nixl: Callable[[str], None]
) -> None:
    here, there = two(server)
    engine(here, "writer").store(IDS)
    loaded = read_under_way(here, there, engine)
    there.freeze()
    os.kill(lender_of(here), signal.SIGCONT)
    assert engine(here, "another").load(IDS) == 640
    there.thaw()
    assert loaded.result(PATIENCE) in (640, 0, -1), "right, or a miss"
    assert eventually(lambda: engine(there, "reader again").load(IDS)) == 640


# Memory that is used again


class Reading:
    """A tier of peers with an arena in this process."""

    def __init__(self, folder: Path, port: int, timeout: float = 2.0) -> None:
        self.arena = Arena(folder, 8 << 20)
        self.arena.back([0], 8 << 20)
        self.memory = self.arena.mapping.view(0, self.arena.size_bytes)
        self.tier = PeersTier([("127.0.0.1", port)], RUNTIME, 1, timeout)
        self.tier.introduce(Myself(open_door=True, devices="lo"))
        self.tier.attach(Region(self.arena.mapping.address, self.arena.size_bytes, self.arena.descriptor, self.memory))
        assert self.do(Open) is None
        eventually(lambda: self.peer is not None and self.peer.source is not None)

    @property
    def peer(self) -> Any:
        return next(iter(self.tier._roster.peers), None)

    def do(self, kind: Any, *arguments: Any) -> Any:
        ended: queue.Queue[Any] = queue.Queue()
        operation: Operation[Any] = kind(RUNTIME.now() + PATIENCE, lambda *end: ended.put(end), *arguments)
        self.tier.submit(operation)
        result, error = ended.get(timeout=PATIENCE)
        return result if error is None else error

    def into(self, count: int) -> list[memoryview]:
        return [self.memory[at << 12 : (at + 1) << 12] for at in range(count)]

    def close(self) -> None:
        assert self.do(Close) is None
        del self.memory
        self.arena.close()


class Lender:
    """A mover that lets others read from an arena in this process, and an impostor that names places in it."""

    def __init__(self, folder: Path) -> None:
        self.arena = Arena(folder, 8 << 20)
        self.arena.back([0], 8 << 20)
        self.mover = Mover(RUNTIME, self.arena.descriptor, self.arena.size_bytes, "lo", writes=False)
        self.mover.start()
        self.offer = eventually(lambda: self.mover.offer)
        self.pid = 0
        self.lends = m.Pulled([])
        self.answers = threading.Event()
        """Pulls wait for it."""
        self.answers.set()
        self.returned: queue.Queue[m.Message] = queue.Queue()
        self.server = impostor(self._answer, meets=True)

    def _answer(self, request: m.Message) -> tuple[m.Message, list[bytes]]:
        if isinstance(request, m.Has):
            return m.Having(b"\1" * (len(request.hashes) // 16)), []
        if isinstance(request, m.Meet):
            return m.Met(self.offer.number, self.offer.agent, self.offer.address), []
        if isinstance(request, m.Release):
            self.returned.put(request)
            return m.Ok(), []
        assert isinstance(request, m.Pull)
        assert self.answers.wait(PATIENCE)
        return (self.lends, []) if request.mover == self.offer.number else (m.Pulled([b""] * len(KEYS)), [])

    def close(self) -> None:
        self.server.close()
        self.mover.close()
        self.arena.close()


KEYS = [ShardKey(b"space".ljust(16), bytes([number]) * 16, 0, 1) for number in range(3)]
PAYLOADS = [bytes([number + 1]) * 4096 for number in range(3)]
HEADERS = [make_header(key, bytes(16), payload) for key, payload in zip(KEYS, PAYLOADS, strict=True)]


@pytest.fixture
def pair(folders: Callable[[str], Path], nixl: Callable[[str], None]) -> Iterator[tuple[Lender, Reading]]:
    lender = Lender(folders("/dev/shm"))
    for number, payload in enumerate(PAYLOADS):
        lender.arena.mapping.view((number + 5) << 12, 4096)[:] = payload
    reading = Reading(folders("/dev/shm"), lender.server.port)
    yield lender, reading
    reading.close()
    lender.close()


def sectors(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def test_what_is_lent_is_checked_when_it_has_been_read(pair: tuple[Lender, Reading]) -> None:
    lender, reading = pair
    assert reading.do(Contains, KEYS) == [True] * 3
    lender.lends = m.Pulled([HEADERS[0], b"", HEADERS[2]], 9, sectors(5, 7))
    assert reading.do(Load, KEYS, reading.into(3)) == [OK, "absent", OK]
    assert [bytes(one) for one in reading.into(3)] == [PAYLOADS[0], bytes(4096), PAYLOADS[2]]
    assert lender.returned.get(timeout=PATIENCE) == m.Release([9])
    # Another chunk has taken the memory meanwhile.
    assert reading.do(Contains, KEYS) == [True] * 3
    lender.lends = m.Pulled(HEADERS, 10, sectors(5, 6, 5))
    assert reading.do(Load, KEYS, reading.into(3)) == [OK, OK, CHECKSUM]
    assert lender.returned.get(timeout=PATIENCE) == m.Release([10])
    # What names too few or too many places is not read.
    for wrong in (sectors(5, 6), sectors(5, 6, 7, 8), b"x", sectors(5, 6, 7) + b"x"):
        assert reading.do(Contains, KEYS) == [True] * 3
        lender.lends = m.Pulled(HEADERS, 11, wrong)
        eventually(lambda: reading.peer.source is not None)
        assert OK not in reading.do(Load, KEYS, reading.into(3))
        assert lender.returned.get(timeout=PATIENCE) == m.Release([11])


def test_memory_is_not_used_again_before_nothing_can_write_to_it(pair: tuple[Lender, Reading]) -> None:
    lender, reading = pair
    assert reading.do(Contains, KEYS) == [True] * 3
    lender.lends = m.Pulled(HEADERS, 9, sectors(5, 6, 7))
    (frozen,) = [pid for pid in children() if maps(pid, str(lender.arena.path))]
    (reader,) = [pid for pid in children() if maps(pid, str(reading.arena.path))]
    stop(frozen)
    ended: queue.Queue[Any] = queue.Queue()
    load = Load(
        RUNTIME.now() + PATIENCE,
        lambda *end: ended.put((end, reader in children())),
        KEYS,
        reading.into(3),
    )
    reading.tier.submit(load)
    eventually(lambda: reading.tier._direct and reading.tier._direct.is_reading)
    reading.tier.cancel(load)
    (_, error), reader_lives = ended.get(timeout=PATIENCE)
    assert error.reason == "cancelled" and not reader_lives
    reading.memory[: 3 << 12] = b"\xaa" * (3 << 12)
    os.kill(frozen, signal.SIGCONT)
    eventually(lambda: reading.peer.source is not None)
    assert reading.do(Contains, KEYS) == [True] * 3
    other = [reading.memory[at << 12 : (at + 1) << 12] for at in (10, 11, 12)]
    assert reading.do(Load, KEYS, other) == [OK] * 3, "the other mover has caught up with all that it had been asked"
    assert bytes(reading.memory[: 3 << 12]) == b"\xaa" * (3 << 12)


def test_a_peer_is_asked_how_to_read_even_if_the_first_question_was_lost(pair: tuple[Lender, Reading]) -> None:
    def hung_up(now: float, question: object) -> None:
        raise ServerUnavailable("it has hung up")

    _, reading = pair
    direct, peer = reading.tier._direct, reading.peer
    assert direct is not None
    tried = threading.Event()

    def lose_the_question() -> None:
        peer.no_source()
        peer.asks.ask = hung_up
        direct.tick([peer])
        tried.set()

    reading.tier._soon(lose_the_question)
    assert tried.wait(PATIENCE)
    eventually(lambda: peer.source is not None)


def test_a_mover_that_was_met_again_stays_known_when_its_former_name_is_forgotten() -> None:
    known: set[str] = set()

    class Agent(SimpleNamespace):
        def add_remote_agent(self, agent: bytes) -> bytes:
            known.add(agent.decode())
            return agent

        def remove_remote_agent(self, name: str) -> None:
            known.remove(name)

    agent = Agent(register_memory=lambda *_: None, get_agent_metadata=lambda: b"", get_new_notifs=dict)
    library = SimpleNamespace(nixl_agent_config=lambda **_: None, nixl_agent=lambda *_: agent)
    nixl = Nixl(library, 0, 0, lambda said: None)
    nixl.told(Meeting(b"1", b"other"))
    nixl.told(Forget(b"1"))
    nixl.told(Meeting(b"2", b"other"))  # the connection was lost and made again
    nixl.look()
    assert known == {"other"}
    nixl.told(Forget(b"2"))
    nixl.look()
    assert not known


def test_what_is_lent_to_a_load_that_was_cancelled_is_not_read(pair: tuple[Lender, Reading]) -> None:
    lender, reading = pair
    assert reading.do(Contains, KEYS) == [True] * 3
    lender.lends = m.Pulled(HEADERS, 9, sectors(5, 6, 7))
    lender.answers.clear()
    ended: queue.Queue[Any] = queue.Queue()
    load = Load(RUNTIME.now() + PATIENCE, lambda *end: ended.put(end), KEYS, reading.into(3))
    reading.tier.submit(load)
    eventually(lambda: any(isinstance(request, m.Pull) for request, _ in lender.server.heard))
    reading.tier.cancel(load)
    assert ended.get(timeout=PATIENCE)[1].reason == "cancelled"
    reading.memory[: 3 << 12] = b"\xaa" * (3 << 12)  # the memory is another chunk's now
    lender.answers.set()
    assert lender.returned.get(timeout=PATIENCE) == m.Release([9])
    assert bytes(reading.memory[: 3 << 12]) == b"\xaa" * (3 << 12)


def test_a_tier_that_is_closed_amid_a_read_ends_it_first(pair: tuple[Lender, Reading]) -> None:
    lender, reading = pair
    assert reading.do(Contains, KEYS) == [True] * 3
    lender.lends = m.Pulled(HEADERS, 9, sectors(5, 6, 7))
    (frozen,) = [pid for pid in children() if maps(pid, str(lender.arena.path))]
    (reader,) = [pid for pid in children() if maps(pid, str(reading.arena.path))]
    stop(frozen)
    ended: queue.Queue[Any] = queue.Queue()
    reading.tier.submit(
        Load(RUNTIME.now() + PATIENCE, lambda *end: ended.put(reader in children()), KEYS, reading.into(3))
    )
    eventually(lambda: reading.tier._direct and reading.tier._direct.is_reading)
    assert reading.do(Close) is None
    assert ended.get(timeout=PATIENCE) is False
    os.kill(frozen, signal.SIGCONT)


def children() -> list[int]:
    return [int(one) for one in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()] + [
        int(one)
        for task in Path("/proc/self/task").iterdir()
        if task.name != str(os.getpid())
        for one in (task / "children").read_text().split()
    ]


def maps(pid: int, path: str) -> bool:
    return path in Path(f"/proc/{pid}/maps").read_text()


def test_a_child_says_where_it_listens_on_a_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path) -> str:
        if path.name == "tcp6":
            raise FileNotFoundError(str(path))
        return path.read_bytes().decode()

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "tcp6")
    with socket.create_server(("127.0.0.1", 0)) as one:
        assert f"127.0.0.1:{one.getsockname()[1]}" in child.listening()


def test_what_is_not_given_back_is_lent_for_a_time() -> None:
    now, told = [0.0], list[Any]()
    loop = SimpleNamespace(now=lambda: now[0], on_tick=[], call_soon=lambda call: call(), runtime=RUNTIME)
    lending = Lending.__new__(Lending)
    lending._loop, lending._lent, lending._mover = loop, {}, SimpleNamespace(tell=told.append)  # type: ignore[assignment]
    ends: list[int] = []
    peers: Any = object(), object()
    for number, peer in enumerate(peers):
        lending.lend(peer, number, lambda number=number: ends.append(number))  # type: ignore[misc]
    lending.released(peers[1], m.Release([0, 5]))
    assert not ends, "it is not that peer's"
    lending.released(peers[1], m.Release([1]))
    lending.released(peers[1], m.Release([1]))
    now[0] = LENT_SECONDS
    lending._tick()
    lending.released(peers[0], m.Release([0]))
    assert ends == [1, 0]
    assert [one.on for one in told] == [True, False]
