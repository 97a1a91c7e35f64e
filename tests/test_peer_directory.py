"""A directory of peers in a real Valkey: servers find each other, strangers are not dialled, and a dead store changes nothing."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache.config.options import peers_or_directory
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import redacted
from lmcache.peers import directory as module
from lmcache.peers import roster
from lmcache.peers.dial import Myself
from lmcache.peers.directory import LEASE_SECONDS, Directory
from lmcache.peers.tier import PeersTier
from lmcache.runtime import RUNTIME
from lmcache.server.report import _check_reads_no_secrets
from lmcache.tiers import TierError
from lmcache.tiers.operation import Close
from lmcache.tiers.redis.leases import MAX_LEASES, MAX_TEXT_BYTES, Leases
from lmcache.tiers.redis.nodes import Nodes
from lmcache.tiers.redis.resp import Login, Node
from lmcache.tiers.registry import make_tier
from ports import free_port
from prompts import tokens
from servers import PATIENCE, Server, eventually, key_file
from stores import RedisServer, binary_of, freeze

Servers, Engines = Callable[..., Server], Callable[..., Any]
IDS = tokens(640, 5)
KEY = b"{lmcache}-peers"


@pytest.fixture(params=["valkey"])
def valkey(request: pytest.FixtureRequest, folders: Callable[[str], Path]) -> Iterator[RedisServer]:
    one = RedisServer(binary_of(request.param), folders("/tmp"))
    yield one
    one.end()


class Here:
    """One server's side of the directory, on a made-up clock."""

    def __init__(
        self, store: RedisServer, key: Path, port: int = 5555, address: str = "", host: str = "0.0.0.0"
    ) -> None:
        self.now = 100.0
        spec = make_tier(f"peer://?directory=redis://127.0.0.1:{store.port}/0?timeout=0.5")
        assert isinstance(spec.tier, PeersTier) and spec.tier._directory is not None
        self.directory: Directory = spec.tier._directory
        self.directory._now = lambda: self.now
        self.directory.introduce(Myself(key_file=key, host=host, port=port, address=address))

    def names(self) -> list[str]:
        return [f"{host}:{port}" for host, port in self.directory.look_up()]


@pytest.mark.parametrize("valkey", ["valkey", "redis"], indirect=True)
def test_servers_find_each_other_and_leave_with_their_lease(
    valkey: RedisServer, folders: Callable[[str], Path]
) -> None:
    key = key_file(folders("/tmp"))
    one, two, named = (Here(valkey, key, 1), Here(valkey, key, 2), Here(valkey, key, 3, "host-c:7"))
    assert one.names() == [] and two.names() == ["127.0.0.1:1"]
    assert sorted(named.names()) == ["127.0.0.1:1", "127.0.0.1:2"]
    assert sorted(one.names()) == ["127.0.0.1:2", "host-c:7"]
    assert 0 < valkey.raw.pttl(KEY) <= LEASE_SECONDS * 1000
    # The store's clock decides about the entry of one that has gone, and this server's about how long it is tried afterwards.
    (gone,) = [entry for entry in valkey.raw.zrange(KEY, 0, -1) if entry.startswith(b"127.0.0.1:2 ")]
    valkey.raw.zadd(KEY, {gone: 1})
    one.now += LEASE_SECONDS
    assert sorted(one.names()) == ["127.0.0.1:2", "host-c:7"]
    one.now += 1
    assert one.names() == ["host-c:7"] and gone not in valkey.raw.zrange(KEY, 0, -1)


def test_after_a_failure_at_the_start_somebody_else_may_have_the_directory(valkey: RedisServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        ports = [dead.getsockname()[1], valkey.port]
        dead.close()

        class Sentinels(Nodes):
            moves = True

            def refresh(self, deadline: float) -> None:
                self._seed, self.stale = Node("127.0.0.1", ports.pop(0), Login(), 1), False

        leases = Leases(Sentinels("127.0.0.1", 1, Login(), 1), "lmcache", PATIENCE)
        with pytest.raises(TierError):
            leases.own_address()
        assert leases.own_address() == "127.0.0.1" and leases.renew("me", 1.0) == [b"me"]
        leases.close()


def test_a_server_beside_the_store_says_that_others_do_not_find_it(
    valkey: RedisServer, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    key = key_file(folders("/tmp"))
    for host, address in (("0.0.0.0", "host-a:5555"), ("127.0.0.1", "")):
        Here(valkey, key, 1, address, host).names()
    assert "--peer-address" not in caplog.text
    one = Here(valkey, key, 1)
    one.names(), one.names()
    assert caplog.text.count("--peer-address HOST:1") == 1


def test_an_emptied_directory_ends_nothing(valkey: RedisServer, folders: Callable[[str], Path]) -> None:
    key = key_file(folders("/tmp"))
    one, two = Here(valkey, key, 1), Here(valkey, key, 2)
    two.names()
    assert one.names() == ["127.0.0.1:2"]
    valkey.raw.flushall()
    valkey.raw.script_flush()
    one.now += 10
    assert one.names() == ["127.0.0.1:2"] and two.names() == ["127.0.0.1:1"]


def test_what_strangers_write_is_ignored(
    valkey: RedisServer, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = Here(valkey, key_file(folders("/tmp")), 1), Here(valkey, key_file(folders("/tmp")), 2)
    one.names()
    (mine,) = valkey.raw.zrange(KEY, 0, -1)
    proof = mine.partition(b" ")[2]
    later = 1 << 50
    entries = [
        b"",
        b"10.0.0.1:5555",
        b"10.0.0.1:5555 " + proof,
        mine + b"x",
        b"\xff\0 " + proof,
        bytes(MAX_TEXT_BYTES + 1),
    ]
    valkey.raw.zadd(KEY, dict.fromkeys(entries, later))
    assert other.names() == []  # with another key
    assert one.names() == []
    assert one.names() == []
    assert caplog.text.count("entries without a proof by this server's key") == 2, "each server says it once"
    valkey.raw.zadd(KEY, {b"%d" % number: later + number for number in range(2 * MAX_LEASES)})
    assert one.names() == []
    valkey.raw.delete(KEY)
    valkey.raw.set(KEY, b"something else")
    assert one.names() == [] and "WRONGTYPE" in one.directory.trouble
    valkey.raw.delete(KEY)
    one.names()
    assert one.directory.trouble == ""


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_dead_store_leaves_the_last_list_and_one_warning(
    valkey: RedisServer, folders: Callable[[str], Path], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    key = key_file(folders("/tmp"))
    one, two = Here(valkey, key, 1), Here(valkey, key, 2)
    two.names()
    one.names()
    caplog.set_level(logging.INFO)
    if how == "killed":
        valkey.child.kill()
        valkey.child.wait()
    else:
        freeze(valkey.child.pid)
    for _ in range(3):
        one.now += 100
        assert one.names() == ["127.0.0.1:2"]
    assert caplog.text.count("The directory of peers fails; the 1 peers that it named last stay") == 1
    assert one.directory.trouble.startswith("the directory of peers: Redis at 127.0.0.1")
    if how == "killed":
        valkey.start()
    else:
        valkey.child.send_signal(18)
    two.names()
    assert eventually(lambda: one.names() == ["127.0.0.1:2"] and not one.directory.trouble)
    assert caplog.text.count("answers again") == 1


def test_a_server_for_its_own_host_is_not_listed_at_others(
    valkey: RedisServer, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Here(valkey, key_file(folders("/tmp")), host="127.0.0.1")
    monkeypatch.setattr(one.directory._leases, "own_address", lambda: "192.0.2.7")
    one.names()
    assert valkey.raw.zcard(KEY) == 0
    for host, own, said in [("0.0.0.0", "192.0.2.7", "192.0.2.7:5"), ("::", "2001:db8::1", "[2001:db8::1]:5")]:
        other = Here(valkey, key_file(folders("/tmp")), 5, host=host)
        monkeypatch.setattr(other.directory._leases, "own_address", lambda own=own: own)
        assert other.directory._address() == said
    assert Here(valkey, key_file(folders("/tmp")), 5, host="192.0.2.9").directory._address() == "192.0.2.9:5"


def test_a_directory_needs_a_key_and_a_port(folders: Callable[[str], Path]) -> None:
    key = key_file(folders("/tmp"))
    for myself, why in [
        (Myself(port=5555), "needs --auth-key-file"),
        (Myself(port=5555, open_door=True), "needs --auth-key-file"),
        (Myself(key_file=key, host="0.0.0.0"), "--port 0 has no address"),
    ]:
        tier = make_tier("peer://?directory=redis://:secret@127.0.0.1:1/0").tier
        assert isinstance(tier, PeersTier)
        with pytest.raises(ConfigError, match=why) as error:
            tier.introduce(myself)
        assert "secret" not in str(error.value)


def test_the_setting_and_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://me:${SECRET}@store:7/3?prefix=x&timeout=1"
    monkeypatch.setenv("SECRET", "p@ss/w%rd&x=1")
    assert peers_or_directory(f"a,b:6\n{url}") == ("a:5555", "b:6", url)
    for text in (f"{url}\n{url}x", "http://a", "redis://a redis://b", "redis://"):
        with pytest.raises(ValueError):
            peers_or_directory(text)
    (text,) = ServerConfig(peers=(url,), peer_keep="no").tier_urls
    spec = make_tier(text)
    assert isinstance(spec.tier, PeersTier) and spec.tier._names == [] and spec.tier.fleeting
    assert spec.tier._directory is not None
    node = spec.tier._directory._leases._nodes._seed
    assert (node.host, node.port, node._login.password) == ("store", 7, "p@ss/w%rd&x=1")
    assert spec.name == "peers" and "SECRET" not in spec.url and "p@ss" not in spec.url and not spec.warning
    (text,) = ServerConfig(peers=("a:1", "redis://:inline@store", "b:2")).tier_urls
    spec = make_tier(text)
    assert isinstance(spec.tier, PeersTier) and spec.tier._names == [("a", 1), ("b", 2)]
    assert "a password in the URL" in spec.warning and "inline" not in spec.warning
    assert "inline" not in str(ServerConfig(peers=("redis://:inline@store",)).redacted())
    for url in (
        text,
        "peer://?directory=redis%3A%2F%2F%3Ainline%40store&keep=no",
        "peer://?directory=redis://%3Ainline%40store",
    ):
        assert "inline" not in str(ServerConfig(l2=(url,)).redacted()) and "directory=***" in redacted(url)
    assert redacted("dir:///a?note=50%25&x=b%2Fc") == "dir:///a?note=50%25&x=b%2Fc"
    for wrong in ("s3://a/b", "redis://a/0?max_gb=5", "redis://a/0?prefix=ä"):
        with pytest.raises(ConfigError):
            make_tier(ServerConfig(peers=(wrong,)).tier_urls[0])
    for attached in (text, "peer://?directory=redis%253A%252F%252F%2524%257BHOME%257D"):
        with pytest.raises(ConfigError, match="no directory of peers"):
            _check_reads_no_secrets(attached)


def test_real_servers_find_each_other(
    server: Servers,
    engine: Engines,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has the same command, but for its ports. A stranger's entry is not connected to."""
    store = RedisServer(binary_of("valkey"), folders("/tmp"), password="p@ss/w%rd")
    key = key_file(folders("/tmp"))
    monkeypatch.setenv("DIRECTORY_PASSWORD", store.password)
    url = f"redis://:${{DIRECTORY_PASSWORD}}@127.0.0.1:{store.port}/0"
    flags = ("--auth-key-file", str(key), "--peers", url, "--worth", "always")
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        stranger.settimeout(0)
        text = f"127.0.0.1:{stranger.getsockname()[1]} {'0' * 64}"
        store.raw.zadd(KEY, {text: 1 << 50})
        here = server(port=free_port(), flags=flags)
        there = server(port=free_port(), flags=flags)
        eventually(lambda: f"Peer 127.0.0.1:{here.port}: connected" in "".join(there.log))
        eventually(lambda: f"Peer 127.0.0.1:{there.port}: connected" in "".join(here.log))
        engine(here, "writer", key_file=str(key)).store(IDS)
        assert engine(there, "reader", key_file=str(key)).load(IDS) == 640
        for one in (here, there):
            one.said_once("entries without a proof")
            assert "p@ss" not in "".join(one.log) + str(one.status()) + str(one.get("/config"))
        with pytest.raises(BlockingIOError):
            stranger.accept()
    store.end()
    eventually(lambda: "the directory of peers: " in str(there.status()["tiers"]))
    other = tokens(320, 6)
    engine(here, "writer 2", key_file=str(key)).store(other)
    assert engine(there, "reader 2", key_file=str(key)).load(other) == 320, "the last list stays"
    there.said_once("The directory of peers fails")


def test_a_peer_that_leaves_the_directory_is_let_go(
    valkey: RedisServer, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "RESOLVE_SECONDS", 0.05)
    monkeypatch.setattr(module, "LEASE_SECONDS", 0.5)
    key = key_file(folders("/tmp"))
    other = Here(valkey, key, 7)
    tier = make_tier(f"peer://?directory=redis://127.0.0.1:{valkey.port}/0").tier
    assert isinstance(tier, PeersTier)
    tier.introduce(Myself(key_file=key, host="127.0.0.1", port=9))
    tier._open()
    try:

        def seen() -> bool:
            other.names()
            return [peer.address for peer in tier._roster.peers] == ["127.0.0.1:7"]

        eventually(seen)
        eventually(lambda: not tier._roster.peers)
    finally:
        closed = threading.Event()
        tier.submit(Close(RUNTIME.now() + PATIENCE, lambda *end: closed.set()))
        assert closed.wait(PATIENCE)


def test_a_look_up_that_fails_by_a_bug_is_made_again(
    valkey: RedisServer,
    folders: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(roster, "RESOLVE_SECONDS", 0.05)
    key = key_file(folders("/tmp"))
    Here(valkey, key, 7).names()
    tier = make_tier(f"peer://?directory=redis://127.0.0.1:{valkey.port}/0").tier
    assert isinstance(tier, PeersTier) and tier._directory is not None
    tier.introduce(Myself(key_file=key, host="127.0.0.1", port=9))
    look_up, fails = tier._directory.look_up, [True]
    monkeypatch.setattr(tier._directory, "look_up", lambda: 1 / 0 if fails[0] else look_up())
    tier._open()
    try:
        eventually(lambda: caplog.text.count("Looking up the peers failed") > 2)
        fails[0] = False
        eventually(lambda: [peer.address for peer in tier._roster.peers] == ["127.0.0.1:7"])
    finally:
        closed = threading.Event()
        tier.submit(Close(RUNTIME.now() + PATIENCE, lambda *end: closed.set()))
        assert closed.wait(PATIENCE)


def test_an_answer_of_another_kind_is_no_list(valkey: RedisServer, folders: Callable[[str], Path]) -> None:
    one = Here(valkey, key_file(folders("/tmp")))

    def fails(text: str, seconds: float) -> list[bytes]:
        raise TierError("protocol", "unexpected answer")

    one.directory._leases.renew = fails  # type: ignore[method-assign]
    assert one.names() == [] and "unexpected answer" in one.directory.trouble
