"""The InfiniStore tier on a real server: what is kept how, and every way in which server, network and other writers fail."""

from __future__ import annotations

import mmap
import select
import socket
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from lmcache.errors import ConfigError
from lmcache.tiers import ABSENT, KEPT, OK, Shard, ShardKey, TierError, frame
from lmcache.tiers.infinistore.tier import MOST_BYTES, PART_BYTES, TOO_LARGE, InfiniStoreTier, Marker
from lmcache.tiers.infinistore.wire import Connection, Connections
from lmcache.tiers.registry import make_tier
from ports import free_port
from proxy import Proxy
from servers import PATIENCE, Server, beside, eventually
from stores import InfiniStoreServer, load, shards_of

pytestmark = pytest.mark.xdist_group("infinistore")
MIB = 1 << 20
TOKENS = list(range(160))


@pytest.fixture
def prefix() -> str:
    """The servers cannot be emptied."""
    return uuid.uuid4().hex


def opened(server: InfiniStoreServer, prefix: str, options: str = "", port: int = 0) -> InfiniStoreTier:
    """A tier that no busy machine makes give up, unless the options say so; open, however long that takes."""
    tier = make_tier(server.url(f"?prefix={prefix}{options or '&timeout=3600'}", port)).tier
    assert isinstance(tier, InfiniStoreTier)
    eventually(lambda: _tries(lambda: tier.open() or [OK]))
    return tier


def names_of(server: InfiniStoreServer, prefix: str, shard: Shard) -> tuple[bytes, bytes]:
    """The names of a shard's marker and of the first part of its frame."""
    name = f"{prefix}/{shard.key.text}".encode()
    packed = server.raw().get(name)
    assert packed is not None
    marker = Marker.unpack(packed)
    assert marker is not None
    return name, name + b"/" + marker.once.hex().encode() + b".0"


def reason_of(call: Callable[[], object]) -> str:
    with pytest.raises(TierError) as caught:
        call()
    return caught.value.reason


def test_sizes_come_back_and_are_kept(infinistore: InfiniStoreServer, prefix: str) -> None:
    tier, sizes = (
        opened(infinistore, prefix),
        [0, 1, 2176, 4096, PART_BYTES - 128, PART_BYTES - 127, PART_BYTES, 32 * MIB],
    )
    shards = [shards_of(1, size)[0] for size in sizes]
    assert load(tier, shards) == [ABSENT] * len(sizes)
    assert tier.store(shards) == [OK] * len(sizes)
    assert tier.store(shards) == [KEPT] * len(sizes)
    assert load(tier, shards) == [OK] * len(sizes)
    assert tier.usage() == (sum(sizes) + 128 * len(sizes), len(sizes), None)
    many = shards_of(1100, 10)
    assert tier.store(many) == [OK] * 1100 and tier.contains([one.key for one in many]) == [True] * 1100


def test_a_shard_is_a_frame_and_a_marker_that_names_it(infinistore: InfiniStoreServer, prefix: str) -> None:
    (shard,) = shards_of(1, 5000)
    opened(infinistore, prefix).store([shard])
    name, frame_name = names_of(infinistore, prefix, shard)
    stored, marker = infinistore.raw().get(frame_name), infinistore.raw().get(name)
    assert stored is not None and frame.check(stored[:128], stored[128:], shard.key) == OK
    assert marker is not None and marker[:8] == b"LMCmark1" and len(marker) == 40


def test_a_damaged_marker_is_a_miss_and_goes(infinistore: InfiniStoreServer, prefix: str) -> None:
    tier, (shard, other) = opened(infinistore, prefix), shards_of(2, 5000)
    tier.store([other])
    others = infinistore.raw().get(names_of(infinistore, prefix, other)[0])
    assert others is not None
    other_size = Marker.unpack(others)
    assert other_size is not None
    for wrong, outcome in (
        (b"x", frame.NOT_A_FRAME),
        (bytes(40), frame.NOT_A_FRAME),
        (bytes(9000), frame.NOT_A_FRAME),
        (others[:20] + b"?" + others[21:], frame.NOT_A_FRAME),
        (others, ABSENT),  # names a frame of another shard, by a name that is not there
        (other_size._replace(frame_bytes=7).packed, frame.OTHER_SIZE),
    ):
        assert tier.store([shard]) == [OK]
        name, _ = names_of(infinistore, prefix, shard)
        assert infinistore.raw().put(name, wrong) == 200
        assert load(tier, [shard]) == [outcome]
        assert not infinistore.raw().exists(name) and tier.contains([shard.key]) == [False]
    assert infinistore.lives and load(tier, [other]) == [OK]


def test_another_size_replaces_and_the_frame_before_goes(infinistore: InfiniStoreServer, prefix: str) -> None:
    tier, (shard,) = opened(infinistore, prefix), shards_of(1, 5000)
    tier.store([Shard(shard.key, shard.parent, shard.payload[:100])])
    _, former = names_of(infinistore, prefix, shard)
    assert tier.store([shard]) == [OK] and load(tier, [shard]) == [OK]
    _, now = names_of(infinistore, prefix, shard)
    assert now != former and not infinistore.raw().exists(former)


def test_a_writer_that_dies_in_the_middle_harms_nobody(own_infinistore: InfiniStoreServer, prefix: str) -> None:
    """The server ends when somebody reads or deletes what was written halfway. Nobody knows the name."""
    server, proxy = own_infinistore, Proxy(own_infinistore.port)
    dying, tier, (shard,) = opened(server, prefix, port=proxy.port), opened(server, prefix), shards_of(1, 4 * MIB)
    for cut_at in (100, 1000, MIB, 4 * MIB + 150):
        proxy.questions.after(cut_at, proxy.cut)
        assert reason_of(lambda: dying.store([shard])) == "unreachable"
        assert tier.contains([shard.key]) == [False] and load(tier, [shard]) == [ABSENT]
    dying.remove([shard.key])
    assert tier.store([shard]) == [OK] and load(tier, [shard]) == [OK]
    tier.remove([shard.key])
    tier.clear()
    assert server.lives
    proxy.close()
    with pytest.raises(ConnectionError):  # the trap that this test is about is there
        raw = server.raw()
        raw.begin_put(b"half", MIB, bytes(1000))
        server.raw().get(b"half")


def test_the_server_evicts_by_itself_which_makes_misses(own_infinistore: InfiniStoreServer, prefix: str) -> None:
    tier, shards = opened(own_infinistore, prefix), shards_of(4, 32 * MIB)
    copies = [Shard(shards_of(1, 1)[0].key, bytes(16), shards[n % 4].payload) for n in range(40)]
    assert [tier.store([one])[0] for one in copies].count(OK) > 20
    outcomes = load(tier, copies)
    assert set(outcomes) == {OK, ABSENT} and outcomes.count(OK) < 32
    assert tier.usage().shards == outcomes.count(OK)
    name, frame_name = names_of(own_infinistore, prefix, copies[outcomes.index(OK)])
    own_infinistore.raw().delete(frame_name)
    assert load(tier, [copies[outcomes.index(OK)]]) == [ABSENT] and not own_infinistore.raw().exists(name)
    assert own_infinistore.lives


def test_a_very_large_shard_is_not_stored(infinistore: InfiniStoreServer, prefix: str) -> None:
    tier, (before, after) = opened(infinistore, prefix), shards_of(2, 1000)
    huge = Shard(shards_of(1, 1)[0].key, bytes(16), memoryview(mmap.mmap(-1, MOST_BYTES)))
    assert tier.store([before, huge, after]) == [OK, TOO_LARGE, OK]
    assert load(tier, [before, after]) == [OK, OK] and tier.contains([huge.key]) == [False]


def test_two_servers_share_a_store(
    server: Callable[..., Server], engine: Callable[..., Any], infinistore: InfiniStoreServer, prefix: str
) -> None:
    flags = (
        "--l2",
        infinistore.url(f"?timeout=60&prefix={prefix}"),
        "--worth",
        "always",
        "--l2-patience-seconds",
        "600",
    )
    here, there = server(flags=flags), server(flags=flags)
    assert engine(here, "writer").store(TOKENS) == len(TOKENS)
    eventually(lambda: here.status()["tiers"][0]["counters"].get("kept_shards", 0) >= 10)
    assert engine(there, "reader").load(TOKENS) == len(TOKENS)
    assert there.status()["tiers"][0]["counters"]["loaded_shards"] == 10


def test_clear_takes_what_is_known_and_says_so(
    infinistore: InfiniStoreServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier, other = opened(infinistore, prefix), opened(infinistore, prefix)
    mine, theirs = shards_of(600, 10), shards_of(3, 10)
    tier.store(mine)
    other.store(theirs)
    tier.clear()
    assert tier.contains([one.key for one in [*mine, *theirs]]) == [False] * 600 + [True] * 3
    assert "600 shards that this server has stored or read were removed, those of other servers" in caplog.text


def test_usage_waits_for_no_clear(infinistore: InfiniStoreServer, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's loop asks for it again and again, and a clear may go through a million keys."""
    tier, shards, free = opened(infinistore, prefix), shards_of(3, 1000), []
    assert tier.store(shards) == [OK] * 3
    unpack = ShardKey.unpack

    def look(packed: bytes) -> ShardKey:
        free.append(not tier._noted._lock.locked())
        return unpack(packed)

    monkeypatch.setattr(ShardKey, "unpack", look)
    tier.clear()
    assert free == [True] * 3 and load(tier, shards) == [ABSENT] * 3


def test_nobody_there_a_frozen_server_and_one_that_restarts(own_infinistore: InfiniStoreServer, prefix: str) -> None:
    server = own_infinistore
    gone = make_tier(f"infinistore://127.0.0.1:{free_port()}").tier
    assert reason_of(lambda: gone.open()) == "unreachable"  # type: ignore[attr-defined]
    tier, hasty, shards = opened(server, prefix), opened(server, prefix, "&timeout=1"), shards_of(2, MIB)
    assert tier.store(shards) == [OK] * 2
    server.freeze()
    waiting = beside(lambda: load(tier, shards))
    for call in (
        lambda: load(hasty, shards),
        lambda: hasty.contains([shards[0].key]),
        lambda: hasty.store(shards_of(1, 10 * MIB)),
    ):
        assert reason_of(call) == "timeout"
    assert not waiting.done()
    server.thaw()
    assert waiting.result(PATIENCE) == [OK] * 2 and server.lives
    server.kill()
    assert reason_of(lambda: load(tier, shards)) == "unreachable"
    server.start()
    assert load(tier, shards) == [ABSENT] * 2 and tier.store(shards) == [OK] * 2 and load(tier, shards) == [OK] * 2


@pytest.mark.parametrize("cut_at", [0, 30, 500, 9 * MIB])
def test_a_load_that_is_cut_raises_and_the_next_one_is_whole(
    infinistore: InfiniStoreServer, prefix: str, proxy: Callable[..., Proxy], cut_at: int
) -> None:
    through, shards = proxy(infinistore.port), shards_of(3, 8 * MIB)
    tier = opened(infinistore, prefix, port=through.port)
    tier.store(shards)
    through.answers.after(cut_at, through.cut)
    assert reason_of(lambda: load(tier, shards)) == "unreachable"
    assert load(tier, shards) == [OK] * 3 and infinistore.lives


def test_bytes_that_come_too_late_go_nowhere(
    infinistore: InfiniStoreServer, prefix: str, proxy: Callable[..., Proxy]
) -> None:
    through, (shard,) = proxy(infinistore.port), shards_of(1, 8 * MIB)
    opened(infinistore, prefix).store([shard])
    tier = opened(infinistore, prefix, "&timeout=1", port=through.port)
    memory = bytearray(8 * MIB)
    through.answers.after(4 * MIB + 300_000, through.freeze)
    assert reason_of(lambda: tier.load([shard.key], [memoryview(memory)])) == "timeout"
    memory[:] = b"\xaa" * len(memory)
    through.thaw()
    eventually(lambda: _tries(lambda: load(tier, [shard])) == [OK])
    assert memory == b"\xaa" * len(memory) and infinistore.lives


def test_readers_that_hang_up_do_not_end_the_server(own_infinistore: InfiniStoreServer, prefix: str) -> None:
    """They do so in the middle of values of 8 MiB, which is why frames are in parts."""
    server, (shard,) = own_infinistore, shards_of(1, 8 * MIB)
    opened(server, prefix).store([shard])
    _, part = names_of(server, prefix, shard)
    for _ in range(20):
        raw = server.raw()
        raw.begin_get(part)
        raw.close()
        assert server.raw().exists(part)
    assert server.lives
    server.raw().put(b"large", bytes(8 * MIB))

    def hang_up() -> bool:
        try:
            raw = server.raw()
            raw.begin_get(b"large")
            raw.close()
            return not server.raw().exists(b"large")
        except OSError:
            return True

    eventually(hang_up)
    eventually(lambda: not server.lives)


def _tries(call: Callable[[], list[str]]) -> list[str]:
    try:
        return call()
    except TierError:
        return []


def test_what_cannot_be_done_is_refused_by_name() -> None:
    for url, said in (
        ("infinistore://h/?device=mlx5_1", r"device: RDMA \(mlx5_1\) is not supported with InfiniStore: leave it out"),
        ("infinistore://h?max_gb=3", "max_gb: is not enforced by this store"),
        ("infinistore://h/path", "write infinistore://host:22345"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_tier(url)


def test_a_server_that_sends_without_end_holds_nobody_up() -> None:
    """On a connection that was given up: the next call forgets what has arrived there."""
    connection, reads = Connection.__new__(Connection), []

    class Endless(socket.socket):
        def recv_into(self, buffer: Any, *_: Any) -> int:
            reads.append(len(buffer))
            assert sum(reads) < 1 << 30, "it reads for ever"
            return len(buffer)

    with Endless() as connection._socket:
        assert connection.forget() and sum(reads) < 64 * MIB


def test_after_a_failure_no_idle_connection_is_used() -> None:
    """The host may have vanished without a word, and each of them would wait for the time-out."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = Connections("127.0.0.1", listener.getsockname()[1], 4)
        with connections.lend(PATIENCE), connections.lend(PATIENCE):
            ends = [listener.accept()[0] for _ in range(2)]
        with pytest.raises(TierError), connections.lend(PATIENCE):
            raise TierError("timeout", "no answer")
        # the one that failed stays open for a while
        closed, _, _ = select.select(ends, [], [], PATIENCE)
        assert [one.recv(1) for one in closed] == [b""]
        connections.close()
        for one in ends:
            one.close()
