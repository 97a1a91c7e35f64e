"""The Redis tier on real servers: its books, its caps, and every way in which a server or a network lets it down."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import valkey

from lmcache.errors import ConfigError
from lmcache.testing.conformance import ConformanceSuite, EncodedSuite
from lmcache.tiers import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, frame
from lmcache.tiers.redis.booking import PART_BYTES, booked_bytes
from lmcache.tiers.redis.remedies import RIGHTS
from lmcache.tiers.redis.tier import FULL, RedisTier
from lmcache.tiers.registry import make_tier, make_tiers
from proxy import Proxy
from servers import PATIENCE, beside, eventually, free_port, signed_by_itself
from stores import RedisServer, load, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("redis")
MIB = 1 << 20
GIB = 1 << 30
PATIENT = "?timeout=3600"
"""Options of a tier that no busy machine makes give up."""


def header_name(shard: Shard) -> str:
    return f"{{lmcache}}/{shard.key.text}"


def opened(url: str) -> RedisTier:
    tier = tier_of(url)
    assert isinstance(tier, RedisTier)
    return tier


# ---- shards, and what they are in the store


def test_sizes_around_the_parts_come_back_and_are_kept(empty: RedisServer) -> None:
    tier = opened(empty.url())
    sizes = [0, 1, 4095, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES + 17]
    shards = [shards_of(1, size)[0] for size in sizes]
    assert tier.contains([shard.key for shard in shards]) == [False] * len(sizes)
    assert load(tier, shards) == [ABSENT] * len(sizes)
    assert tier.store(shards) == [OK] * len(sizes)
    assert tier.store(shards) == [KEPT] * len(sizes)
    assert tier.contains([shard.key for shard in shards]) == [True] * len(sizes)
    assert load(tier, shards) == [OK] * len(sizes)
    assert tier.usage() == (sum(map(booked_bytes, sizes)), len(sizes), None)


def test_the_keys_are_those_of_the_documentation(empty: RedisServer) -> None:
    (shard,) = shards_of(1, PART_BYTES + 5)
    opened(empty.url("?max_gb=1")).store([shard])
    names = {f"{{lmcache}}/{shard.key.text}{end}" for end in ("", ".0", ".1")} | {"{lmcache}.index", "{lmcache}.uses"}
    assert {name.decode() for name in empty.raw.keys("*")} == names
    assert frame.check(empty.raw.get(header_name(shard)), shard.payload, shard.key) == OK
    assert empty.raw.get(f"{header_name(shard)}.1") == shard.payload[PART_BYTES:]
    assert empty.raw.hgetall("{lmcache}.index") == {
        b"used": b"%d" % booked_bytes(PART_BYTES + 5),
        shard.key.text.encode(): b"%d 2 " % booked_bytes(PART_BYTES + 5),
    }
    assert all(empty.raw.ttl(name) == -1 for name in names)


def test_what_is_booked_is_no_less_than_what_the_server_uses(empty: RedisServer) -> None:
    """A little of Redis's own is allowed for: buffers and hash tables that grow in steps."""
    for count, size in ((300, 2000), (8, 5 * MIB)):
        tier = opened(empty.url())
        empty.raw.flushall()
        before = empty.raw.info("memory")["used_memory"]
        assert set(tier.store(shards_of(count, size))) == {OK}
        tier.close()  # with the server's buffers for it
        most = before + tier.usage().stored_bytes + 256 * 1024
        eventually(lambda: empty.raw.info("memory")["used_memory"] <= most)  # noqa: B023


def test_an_altered_value_is_damage_with_a_name_and_is_removed(empty: RedisServer) -> None:
    tier = opened(empty.url())
    (shard,) = shards_of(1, PART_BYTES + 1000)
    name, others = header_name(shard), shards_of(1, PART_BYTES + 1000)
    other_header = frame.make_header(others[0].key, bytes(16), shard.payload)

    def flip(key: str, at: int) -> Callable[[], object]:
        def do() -> None:
            value = bytearray(empty.raw.get(key))
            value[at] ^= 0x10
            empty.raw.set(key, bytes(value))

        return do

    for damage, want in (
        (flip(f"{name}.0", 12345), frame.CHECKSUM),
        (flip(f"{name}.1", 999), frame.CHECKSUM),
        (flip(name, 70), frame.CHECKSUM),
        (flip(name, 0), frame.NOT_A_FRAME),
        (flip(name, 8), frame.OTHER_VERSION),
        (lambda: empty.raw.set(f"{name}.1", bytes(999)), frame.TRUNCATED),
        (lambda: empty.raw.set(f"{name}.0", bytes(PART_BYTES + 9)), frame.TRUNCATED),
        (lambda: empty.raw.set(name, other_header), frame.OTHER_SHARD),
        (lambda: empty.raw.set(name, b"short"), frame.TRUNCATED),
        (lambda: empty.raw.append(name, b"longer"), frame.NOT_A_FRAME),
        (lambda: (empty.raw.delete(name), empty.raw.rpush(name, b"a list")), frame.NOT_A_FRAME),
        (lambda: (empty.raw.delete(f"{name}.0"), empty.raw.rpush(f"{name}.0", b"a list")), frame.NOT_A_FRAME),
        (lambda: empty.raw.delete(f"{name}.1"), ABSENT),
        (lambda: empty.raw.delete(name), ABSENT),
    ):
        assert tier.store([shard]) == [OK]
        damage()
        assert load(tier, [shard]) == [want]
        assert tier.usage().stored_bytes == 0 and not empty.raw.keys("*{lmcache}/*")
    tier.store([shard])
    smaller = Shard(shard.key, shard.parent, shard.payload[:100])
    assert load(tier, [smaller]) == [frame.OTHER_SIZE]


def test_a_frame_key_is_needed_to_read_what_was_stored_with_one(empty: RedisServer, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    (shard,) = shards_of(1, 5000)
    keyed = opened(empty.url(f"?key_file={key}"))
    assert keyed.store([shard]) == [OK] and load(keyed, [shard]) == [OK]
    assert load(opened(empty.url()), [shard]) == [frame.OTHER_VERSION]


# ---- caps and the order of use


def test_the_cap_holds_and_what_was_used_longest_ago_goes(empty: RedisServer) -> None:
    size = 100_000
    cap = 4 * booked_bytes(size) + 10
    tier = opened(empty.url(f"?max_gb={max(cap / GIB, 0.001)}"))
    cap = tier.usage().max_bytes or 0
    count = cap // booked_bytes(size)
    shards = shards_of(count + 3, size)
    assert tier.store(shards[:count]) == [OK] * count
    assert load(tier, shards[:2]) == [OK, OK]
    for more in shards[count:]:
        assert tier.store([more]) == [OK]
        assert tier.usage().stored_bytes <= cap
    gone = [not found for found in tier.contains([shard.key for shard in shards])]
    assert gone == [False, False, True, True, True] + [False] * (count - 2)
    assert _accounting_agrees(empty)


def test_recency_outlives_every_client(empty: RedisServer) -> None:
    url = empty.url("?max_gb=0.001")
    first = opened(url)
    count = (first.usage().max_bytes or 0) // booked_bytes(90_000)
    shards = shards_of(count, 90_000)
    first.store(shards)
    load(first, shards[:1])
    first.close()
    second = opened(url)
    assert second.usage().shards == count
    assert second.store(shards_of(1, 90_000)) == [OK]
    assert second.contains([shard.key for shard in shards[:2]]) == [True, False]


def test_a_call_larger_than_the_cap_keeps_the_newest(empty: RedisServer) -> None:
    tier = opened(empty.url("?max_gb=0.001"))
    shards = shards_of(25, 90_000)
    assert tier.store(shards) == [OK] * 25
    assert tier.contains([shard.key for shard in shards])[-3:] == [True] * 3
    assert tier.usage().stored_bytes <= 0.001 * GIB
    assert tier.store(shards_of(1, 2 * MIB)) == ["too large"]


def test_two_clients_share_one_cap_and_one_copy(empty: RedisServer) -> None:
    url = empty.url("?max_gb=0.02")
    tiers = [opened(url), opened(url)]
    cap = tiers[0].usage().max_bytes or 0
    shared = shards_of(4, 500_000)
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            see()
        see()

    def see() -> None:
        peak[0] = max(peak[0], int(empty.raw.hget("{lmcache}.index", "used") or 0))

    def write(tier: RedisTier) -> None:
        for _ in range(15):
            assert set(tier.store([*shards_of(4, 500_000), *shared])) <= {OK, KEPT}

    watcher = threading.Thread(target=watch)
    writers = [threading.Thread(target=write, args=(tier,)) for tier in tiers]
    for thread in (watcher, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    watcher.join()
    assert cap / 2 < peak[0] <= cap
    assert _accounting_agrees(empty)
    assert load(tiers[0], shared) == [OK] * 4


def test_ttl_counts_from_the_last_use_and_frees_the_books(empty: RedisServer) -> None:
    tier = opened(empty.url("?ttl=1000"))
    used, unused = shards_of(2, 5 * MIB)
    tier.store([used, unused])
    names = [f"{header_name(shard)}{end}" for shard in (used, unused) for end in ("", ".0", ".1")]
    for name in names:
        assert empty.raw.ttl(name) > 900 and empty.raw.expire(name, 500)
    assert load(tier, [used]) == [OK]
    assert [empty.raw.ttl(name) > 900 for name in names] == [True] * 3 + [False] * 3
    empty.raw.flushall()
    brief = opened(empty.url("?ttl=1"))
    brief.store([used, unused])
    eventually(lambda: not empty.raw.keys("{lmcache}/*"))
    brief.store(shards_of(1, 10))
    assert brief.usage().shards == 1 and _accounting_agrees(empty)


def test_a_full_server_is_an_outcome_and_is_left_behind_when_there_is_room(empty: RedisServer) -> None:
    tier = opened(empty.url("?max_gb=1"))
    shards = shards_of(12, 3 * MIB)
    assert tier.store(shards[:4]) == [OK] * 4
    empty.raw.config_set("maxmemory", empty.raw.info("memory")["used_memory"] + 4 * MIB)
    outcomes = [tier.store([shard])[0] for shard in shards[4:]]
    assert FULL in outcomes and OK in outcomes  # it degrades to what the server has room for
    assert set(load(tier, shards)) == {OK, ABSENT}
    empty.raw.config_set(
        "maxmemory", empty.raw.info("memory")["used_memory"] - 8 * MIB
    )  # more than its buffers take and give back
    assert tier.store(shards_of(1, MIB)) == [FULL]  # and the oldest goes, so that
    eventually(lambda: tier.store(shards_of(1, MIB)) == [OK])
    empty.raw.config_set("maxmemory", 1000)
    assert tier.store(shards_of(1, MIB)) == [FULL]
    assert set(load(tier, shards)) <= {OK, ABSENT}
    empty.raw.config_set("maxmemory", 0)
    assert tier.store(shards_of(1, MIB)) == [OK]
    assert _accounting_agrees(empty)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
def test_a_server_that_drops_keys_of_its_own_makes_misses_and_the_books_follow(empty: RedisServer, policy: str) -> None:
    tier = opened(empty.url("?max_gb=1"))
    empty.raw.config_set("maxmemory-policy", policy)
    shards = shards_of(8, 2 * PART_BYTES)
    tier.store(shards)
    empty.raw.config_set("maxmemory", empty.raw.info("memory")["used_memory"] - 20 * MIB)
    more = shards_of(10, 2 * PART_BYTES)
    for shard in more:
        assert tier.store([shard])[0] in (OK, FULL)
    outcomes = load(tier, shards + more)
    assert set(outcomes) <= {OK, ABSENT}
    empty.raw.config_set("maxmemory", 0)
    again = load(tier, shards + more)
    assert all(outcome in (was, ABSENT) for was, outcome in zip(outcomes, again, strict=True))
    assert _accounting_agrees(empty)
    assert tier.usage().shards == again.count(OK)


@pytest.mark.parametrize("lost", ["{lmcache}.index", "{lmcache}.uses"])
def test_half_of_the_books_lost_takes_the_shards_along(empty: RedisServer, lost: str) -> None:
    tier = opened(empty.url("?max_gb=1"))
    shards = shards_of(5, 1000)
    tier.store(shards)
    empty.raw.delete(lost)
    assert load(tier, shards) == [ABSENT] * 5
    assert tier.usage().stored_bytes == 0 and empty.raw.dbsize() <= 1
    assert tier.store(shards) == [OK] * 5 and _accounting_agrees(empty)


def test_shards_without_books_are_booked_again_when_they_are_read(empty: RedisServer) -> None:
    tier = opened(empty.url("?max_gb=1"))
    shards = shards_of(5, 1000)
    tier.store(shards)
    empty.raw.delete("{lmcache}.index", "{lmcache}.uses")
    assert load(tier, shards) == [OK] * 5
    assert tier.usage().shards == 5 and _accounting_agrees(empty)


def _accounting_agrees(store: RedisServer) -> bool:
    """Every record has its keys, every key its record, and the sum is the sum."""
    index = {name.decode(): value.decode() for name, value in store.raw.hgetall("{lmcache}.index").items()}
    used = int(index.pop("used", 0))
    keys = {name.decode() for name in store.raw.keys("{lmcache}/*")}
    named = set()
    for name, record in index.items():
        _, parts, is_open = record.split(" ")
        assert not is_open, f"{name} is still being written"
        named |= {f"{{lmcache}}/{name}", *(f"{{lmcache}}/{name}.{part:x}" for part in range(int(parts)))}
    assert keys <= named, f"not booked: {keys - named}"
    assert used == sum(int(record.split(" ")[0]) for record in index.values())
    return set(index) == {name.decode() for name in store.raw.zrange("{lmcache}.uses", 0, -1)}


# ---- removing


def test_clear_takes_what_is_ours_and_nothing_else(empty: RedisServer) -> None:
    tier, other = opened(empty.url("?prefix=lm")), opened(empty.url("?prefix=lm2"))
    shards = shards_of(20, 100)
    tier.store(shards)
    other.store(shards)
    empty.raw.set("{lm}/left behind.0", b"by an older version")
    empty.raw.set("lm", b"not ours")
    tier.clear()
    assert tier.usage().stored_bytes == 0 and not tier.contains([shards[0].key])[0]
    assert other.contains([shard.key for shard in shards]) == [True] * 20
    assert empty.raw.get("lm") == b"not ours" and not empty.raw.keys("{lm}*")
    other.remove([shard.key for shard in shards[:5]])
    assert other.contains([shard.key for shard in shards]) == [False] * 5 + [True] * 15
    assert other.usage().shards == 15


def test_a_shard_that_is_cleared_while_it_is_written_is_gone(empty: RedisServer, proxy: Callable[..., Proxy]) -> None:
    through = proxy(empty.port)
    tier, other = opened(empty.url(PATIENT, port=through.port)), opened(empty.url())
    (shard,) = shards_of(1, 2 * PART_BYTES)
    frozen = threading.Event()
    through.questions.after(PART_BYTES + 100_000, lambda: (through.freeze(), frozen.set()))
    stored = beside(lambda: tier.store([shard]))
    assert frozen.wait(PATIENCE)
    eventually(lambda: empty.raw.exists(f"{header_name(shard)}.0"))
    other.clear()
    assert not stored.done() and not empty.raw.keys("{lmcache}/*")
    through.thaw()
    assert stored.result(PATIENCE) == [OK] and other.contains([shard.key]) == [False]
    assert not empty.raw.keys("{lmcache}/*")


# ---- half-written shards


@pytest.mark.parametrize("cut_at", [0, 2000, 100_000, PART_BYTES + 3000, 2 * PART_BYTES + 5400])
def test_a_connection_cut_in_a_store_leaves_a_miss_that_can_be_stored_again(
    empty: RedisServer, proxy: Callable[..., Proxy], cut_at: int
) -> None:
    through = proxy(empty.port)
    tier, other = opened(empty.url(port=through.port)), opened(empty.url())
    (shard,) = shards_of(1, 2 * PART_BYTES + 5000)
    through.questions.after(cut_at, through.cut)
    with pytest.raises(TierError):  # "unreachable", or "timeout" where it was cut while nothing was expected from it
        tier.store([shard])
    assert other.contains([shard.key]) == [False] and load(other, [shard]) == [ABSENT]
    assert other.store([shard]) == [OK]
    assert load(tier, [shard]) == [OK]
    assert _accounting_agrees(empty)


def test_parts_without_a_header_go_by_themselves(empty: RedisServer, proxy: Callable[..., Proxy]) -> None:
    through = proxy(empty.port)
    tier, (shard,) = opened(empty.url("?timeout=1000", port=through.port)), shards_of(1, 2 * PART_BYTES)
    through.questions.after(PART_BYTES + 100_000, through.cut)
    with pytest.raises(TierError):
        tier.store([shard])
    left = eventually(lambda: empty.raw.keys("{lmcache}/*"))
    assert left == [f"{header_name(shard)}.0".encode()] and 0 < empty.raw.pttl(left[0]) <= 2 * 1_000_000


WRITER = """
import os, sys
from stores import shards_of, tier_of
tier = tier_of(sys.argv[1])
print("ready", flush=True)
while True:
    for shard in shards_of(4, 9_000_000):
        if tier.store([shard]) == [""]:
            print(shard.key.packed.hex(), flush=True)
"""


def test_a_writer_killed_in_the_middle_of_stores_leaves_whole_shards_only(empty: RedisServer) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    acknowledged = set()
    for stores in (1, 3, 2):
        command = [sys.executable, "-c", WRITER, empty.url("?timeout=4&max_gb=0.5")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout and child.stdout.readline() == "ready\n"
            for _ in range(stores):
                acknowledged.add(child.stdout.readline().strip())
            child.send_signal(signal.SIGKILL)
            child.wait()
            acknowledged |= {line.strip() for line in child.stdout if line.endswith("\n")}
    tier = opened(empty.url("?timeout=60&max_gb=0.5"))
    headers = {name.decode().partition("/")[2] for name in empty.raw.keys("{lmcache}/*") if b"." not in name}
    assert len(headers) >= len(acknowledged) >= 6

    def settled() -> bool:
        """The next stores take away what the dead left, when their leases are over."""
        assert tier.store(shards_of(1, 10)) == [OK]
        return not any(
            record.split(b" ")[2] for name, record in empty.raw.hgetall("{lmcache}.index").items() if name != b"used"
        )

    eventually(settled)
    assert _accounting_agrees(empty)
    keys = [ShardKey.unpack(bytes.fromhex(line)) for line in acknowledged]
    memory = memoryview(bytearray(9_000_000))
    assert [tier.load([key], [memory]) for key in keys] == [[OK]] * len(keys)


# ---- servers and networks that let us down


def test_a_wrong_password_and_none_are_said_in_one_line_without_it(empty: RedisServer) -> None:
    for url in (f"redis://:wrong@127.0.0.1:{empty.port}/0", f"redis://nobody:wrong@127.0.0.1:{empty.port}/0"):
        with pytest.raises(
            TierError, match=rf"127\.0\.0\.1:{empty.port}: WRONGPASS .*check user and password"
        ) as caught:
            tier_of(url)
        assert caught.value.reason == "denied" and "wrong@" not in str(caught.value)
    with pytest.raises(TierError, match=r"NOAUTH .*[^.]; give its password: redis://.*password_file="):
        tier_of(f"redis://127.0.0.1:{empty.port}/0")


def test_an_acl_user_needs_no_more_than_the_documentation_says(empty: RedisServer) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/tiers/redis.md").read_text()
    assert RIGHTS.split() == page.partition("~{lmcache* ")[2].partition("\n\n")[0].split()
    empty.raw.execute_command("ACL", "SETUSER", "kv", "on", ">s3cret", "~{lmcache}*", *RIGHTS.split())
    tier = tier_of(f"redis://kv:s3cret@127.0.0.1:{empty.port}/0?max_gb=0.01&ttl=100")
    shards = shards_of(4, 4 * MIB)
    assert tier.store(shards) == [OK] * 4 and load(tier, shards[-2:]) == [OK, OK]
    tier.remove([shards[-1].key])
    tier.clear()
    with pytest.raises(TierError, match="NOPERM") as caught:
        tier_of(f"redis://kv:s3cret@127.0.0.1:{empty.port}/0?prefix=other")
    assert caught.value.reason == "denied"
    empty.raw.execute_command("ACL", "DELUSER", "kv")


def test_nobody_there_a_silent_server_and_one_that_is_none(proxy: Callable[..., Proxy], empty: RedisServer) -> None:
    """The silent one is waited for as long as the URL says: one caller has given up while the other still waits."""
    silent = proxy(empty.port)
    silent.freeze()
    patient = beside(lambda: opened(empty.url(PATIENT, port=silent.port)))
    eventually(lambda: silent.questions.arrived)
    began = time.monotonic()
    with pytest.raises(TierError, match=r"did not answer in time; check it, or raise \?timeout=") as caught:
        tier_of(empty.url("?timeout=0.3", port=silent.port))
    assert caught.value.reason == "timeout" and time.monotonic() - began >= 0.3
    assert not patient.done()
    silent.thaw()
    assert patient.result(PATIENCE).usage().shards == 0
    gone = proxy(empty.port)
    gone.close()
    with pytest.raises(TierError, match="refused") as caught:
        tier_of(empty.url(port=gone.port))
    assert caught.value.reason == "unreachable"


def test_a_frozen_server_costs_one_timeout_and_a_restarted_one_nothing(
    start: Callable[..., RedisServer], proxy: Callable[..., Proxy]
) -> None:
    server = start()
    through = proxy(server.port)
    tier, patient = (
        make_tier(server.url("?timeout=1", port=through.port)).tier,
        opened(server.url(PATIENT, through.port)),
    )
    eventually(lambda: _tries(lambda: tier.open() or [OK]))
    (shard,) = shards_of(1, MIB)
    assert patient.store([shard]) == [OK]
    through.freeze()
    before = through.questions.arrived
    waiting = beside(lambda: load(patient, [shard]))
    eventually(lambda: through.questions.arrived > before)
    for call in (
        lambda: load(tier, [shard]),
        lambda: tier.contains([shard.key]),
        lambda: tier.store(shards_of(1, 10 * MIB)),
    ):
        began = time.monotonic()
        with pytest.raises(TierError) as caught:
            call()
        assert caught.value.reason == "timeout" and time.monotonic() - began >= 1.0
    assert not waiting.done()
    through.thaw()
    assert waiting.result(PATIENCE) == [OK]
    assert eventually(lambda: _tries(lambda: load(tier, [shard]))) == [OK]
    through.cut()
    assert load(patient, [shard]) == [OK]  # connections that were closed while idle are seen before they are used
    server.child.kill()
    server.child.wait()
    with pytest.raises(TierError) as caught:
        load(patient, [shard])
    assert caught.value.reason == "unreachable"
    server.start()
    assert load(patient, [shard]) == [ABSENT]
    assert patient.store([shard]) == [OK] and load(patient, [shard]) == [OK]


def test_a_failover_behind_one_address_fails_one_call(
    start: Callable[..., RedisServer], proxy: Callable[..., Proxy]
) -> None:
    """The former primary lives on as a replica, and connections to it stay open."""
    primary, replica = start(), start()
    through, shards = proxy(primary.port), shards_of(3, MIB)
    tier = opened(primary.url(PATIENT, port=through.port))
    through.freeze()
    at_once = [beside(lambda shard=shard: tier.store([shard])) for shard in shards]
    eventually(lambda: through.accepted >= len(shards))
    through.thaw()
    assert [one.result(PATIENCE) for one in at_once] == [[OK]] * len(shards)
    replica.raw.replicaof("127.0.0.1", str(primary.port))

    def is_copied() -> bool:
        with contextlib.suppress(valkey.exceptions.BusyLoadingError):
            return bool(replica.raw.dbsize() == primary.raw.dbsize())
        return False

    eventually(is_copied)
    replica.raw.replicaof("NO", "ONE")
    primary.raw.replicaof("127.0.0.1", str(replica.port))
    through.target = replica.port
    with pytest.raises(TierError, match="READONLY"):
        load(tier, shards)
    assert load(tier, shards) == [OK] * len(shards)


def _tries(call: Callable[[], list[str]]) -> list[str]:
    try:
        return call()
    except TierError:
        return []


@pytest.mark.parametrize("cut_at", [0, 1000, 9 * MIB])
def test_a_load_that_is_cut_raises_and_the_next_one_is_whole(
    empty: RedisServer, proxy: Callable[..., Proxy], cut_at: int
) -> None:
    through = proxy(empty.port)
    tier = opened(empty.url(PATIENT, port=through.port))
    shards = shards_of(3, 8 * MIB)
    tier.store(shards)
    through.answers.after(cut_at, through.cut)
    with pytest.raises(TierError) as caught:
        load(tier, shards)
    assert caught.value.reason == "unreachable"
    assert load(tier, shards) == [OK] * 3


def test_more_callers_than_connections_wait_their_turn(empty: RedisServer) -> None:
    before = len(empty.raw.client_list())
    tier = opened(empty.url("?connections=2&timeout=3600"))
    shards = shards_of(4, MIB)
    tier.store(shards)
    outcomes: list[list[str]] = []
    callers = [threading.Thread(target=lambda: outcomes.append(load(tier, shards))) for _ in range(10)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert outcomes == [[OK] * 4] * 10
    assert len(empty.raw.client_list()) <= before + 2


def test_a_call_is_one_round_trip_however_many_shards(empty: RedisServer, proxy: Callable[..., Proxy]) -> None:
    """All that a call asks is on its way before the first answer is let through; how much that is, a call before it tells."""
    through = proxy(empty.port)
    tier, shards = opened(empty.url(PATIENT, port=through.port)), shards_of(40, 30_000)

    def asked(call: Callable[[], object]) -> int:
        before = through.questions.arrived
        call()
        return through.questions.arrived - before

    for call in (
        lambda: load(tier, shards),
        lambda: tier.contains([shard.key for shard in shards]),
        lambda: tier.remove([shard.key for shard in shards]),
    ):
        tier.store(shards)
        count, before = asked(call), through.questions.arrived
        through.freeze()
        ended = beside(call)
        eventually(lambda: through.questions.arrived == before + count)  # noqa: B023
        through.thaw()
        ended.result(PATIENCE)
        assert through.questions.arrived == before + count


def test_a_store_is_two_round_trips_however_many_shards(empty: RedisServer, proxy: Callable[..., Proxy]) -> None:
    """It books them all before the first answer is let through, and then writes them all before the next one is."""
    through = proxy(empty.port)
    tier = opened(empty.url(PATIENT, port=through.port))
    before = through.questions.arrived
    assert tier.store(shards_of(40, 30_000)) == [OK] * 40
    count, before = through.questions.arrived - before, through.questions.arrived
    empty.raw.flushall()
    through.answers.hold()
    ended = beside(lambda: tier.store(shards_of(40, 30_000)))
    eventually(lambda: empty.raw.zcard("{lmcache}.uses") == 40)
    through.questions.hold()
    through.answers.release()
    eventually(lambda: through.questions.arrived == before + count)
    through.questions.release()
    assert ended.result(PATIENCE) == [OK] * 40
    assert through.questions.arrived == before + count


def test_connections_end_with_the_tier(empty: RedisServer) -> None:
    before = len(empty.raw.client_list())
    tier = opened(empty.url())
    load(tier, shards_of(1, 10))
    tier.close()
    eventually(lambda: len(empty.raw.client_list()) <= before)


GARBAGE = [
    b"",
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"+PONG\r\n:12\r\n",
    b"+PONG\r\n*3\r\n$2\r\nok\r\n:x\r\n:1\r\n",
    b"+PONG\r\n$99999999999\r\n",
    b"+PONG\r\n$-x\r\n",
    b"+PONG\r\n*99999999\r\n",
    b"+PONG\r\n" + b"*1\r\n" * 2000,
    b"+PONG\r\n-ERR what is that\r\n",
    b"-ERR what\nFORGED \x1b[2J" + b"x" * 10_000 + b"\r\n",
    b"+PONG\r\n+" + b"x" * 70_000,
    b"-WRONGPASS \xff\xfe\r\n",
    *(b"+PONG\r\n" + random.Random(seed).randbytes(200).replace(b"\x00", b"\r\n") for seed in range(30)),
]


@pytest.mark.parametrize("said", GARBAGE, ids=range(len(GARBAGE)))
def test_whatever_is_answered_there_is_one_kind_of_error(said: bytes) -> None:
    def serve() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):  # the client may hang up first
            client.recv(100)
            client.sendall(said)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(TierError) as caught:
            tier_of(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
        thread.join()


# ---- TLS and clusters


def test_a_scheme_that_is_not_the_ports_is_named(
    empty: RedisServer, proxy: Callable[..., Proxy], tmp_path: Path
) -> None:
    context, certificate = signed_by_itself(tmp_path)
    through, who = proxy(empty.port, tls=context), f":{empty.password}@localhost"

    def why(url: str) -> str:
        with pytest.raises(TierError) as caught:
            tier_of(url)
        return f"{caught.value.reason}: {caught.value}"

    plain, tls = f"rediss://{who}:{empty.port}/0?timeout=1&ca_file={certificate}", f"redis://{who}:{through.port}/0"
    expected = f"localhost:{empty.port} speaks no TLS: write redis:// in place of rediss://"
    eventually(lambda: why(plain) == f"protocol: Redis at {expected}")
    eventually(
        lambda: why(tls) == f"protocol: localhost:{through.port} speaks TLS: write rediss:// in place of redis://"
    )


def test_tls_with_a_ca_file_and_without(empty: RedisServer, proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    context, certificate = signed_by_itself(tmp_path)
    through = proxy(empty.port, tls=context)
    url = f"rediss://:{empty.password}@localhost:{through.port}/0"
    tiers = make_tiers([f"{url}?ca_file={certificate}", f"{url}?ca_file={certificate}"])
    assert [spec.name for spec in tiers] == ["rediss", "rediss2"]
    tier, shards = tiers[0].tier, shards_of(3, 5 * MIB)
    tier.open()
    assert tier.store(shards) == [OK] * 3 and load(tier, shards) == [OK] * 3
    tier.close()
    with pytest.raises(TierError, match="ca_file") as caught:
        tier_of(url)
    assert caught.value.reason == "denied"
    with pytest.raises(ConfigError, match="ca_file"):
        make_tier(f"{url}?ca_file={tmp_path / 'nothing'}")
    with pytest.raises(ConfigError, match="rediss://"):
        make_tier(f"{empty.url()}?ca_file={certificate}")


def test_a_cluster_spreads_shards_and_a_moved_slot_is_followed(start: Callable[..., RedisServer]) -> None:
    nodes = [start("--cluster-enabled", "yes", "--cluster-port", str(port)) for port in (free_port(), free_port())]
    one, two = nodes
    one.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    two.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    one.raw.execute_command("CLUSTER", "MEET", "127.0.0.1", two.port, two.bus_port)
    eventually(
        lambda: all(b"cluster_state:ok" in _info(node) and b"cluster_known_nodes:2" in _info(node) for node in nodes)
    )
    with pytest.raises(TierError, match="cluster=yes"):
        eventually(lambda: [tier_of(node.url()) for node in nodes])
    tier = opened(one.url("?cluster=yes&max_gb=1"))
    shards = shards_of(80, 20_000)
    assert tier.store(shards) == [OK] * 80
    assert all(node.raw.dbsize() > 20 for node in nodes)
    assert load(tier, shards) == [OK] * 80 and tier.usage().shards == 80
    assert tier.contains([shard.key for shard in shards]) == [True] * 80
    # one slot, emptied first, goes to the other node behind the client's back
    moved = [shard for shard in shards if tier._tag(shard.key) == tier._tag(shards[0].key)]
    slot = one.raw.execute_command("CLUSTER", "KEYSLOT", tier._tag(shards[0].key))
    tier.remove([shard.key for shard in moved])
    source, target = (one, two) if slot < 8192 else (two, one)
    for key in source.raw.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.raw.delete(key)
    identity = target.raw.execute_command("CLUSTER", "MYID")
    for node in (target, source):
        node.raw.execute_command("CLUSTER", "SETSLOT", slot, "NODE", identity)
    assert tier.store(moved) == [OK] * len(moved) and load(tier, shards) == [OK] * 80
    tier.clear()
    assert [node.raw.dbsize() for node in nodes] == [0, 0] and tier.usage().shards == 0


def _info(node: RedisServer) -> bytes:
    return bytes(node.raw.execute_command("CLUSTER", "INFO"))


def test_a_server_that_is_no_cluster_is_named(empty: RedisServer) -> None:
    with pytest.raises(TierError, match="cluster"):
        tier_of(empty.url("?cluster=yes"))


# ---- what every tier must do


class TestConformance(ConformanceSuite):
    corruptions = 300

    @pytest.fixture(autouse=True)
    def _store(self, empty: RedisServer) -> None:
        self.store = empty

    def tag(self, place: Path) -> str:
        return f"{place.parent.name}.{place.name}"[-60:]

    def url(self, place: Path) -> str:
        return self.store.url(f"?prefix={self.tag(place)}")

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        name, part, stored = f"{{{self.tag(place)}}}/{key.text}", 0, b""
        stored = self.store.raw.get(name)
        while (value := self.store.raw.get(f"{name}.{part:x}")) is not None:
            stored, part = stored + value, part + 1
        return stored

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        """Where the new bytes end, what was behind them is cut off: short values, and then none."""
        name = f"{{{self.tag(place)}}}/{key.text}"
        self.store.raw.set(name, stored[: frame.HEADER_BYTES])
        parts, payload = len(self.store.raw.keys(f"{name}.*")), stored[frame.HEADER_BYTES :]
        for part in range(parts):
            self.store.raw.set(f"{name}.{part:x}", payload[part * PART_BYTES : (part + 1) * PART_BYTES])
        if len(payload) > parts * PART_BYTES:
            self.store.raw.append(f"{name}.{parts - 1:x}", payload[parts * PART_BYTES :])

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        pipeline = self.store.raw.pipeline(transaction=False)
        for name in self.store.raw.keys(f"{{{self.tag(place)}}}*"):
            pipeline.memory_usage(name)
        return sum(pipeline.execute())


class TestConformanceEncoded(EncodedSuite, TestConformance):
    def url(self, place: Path) -> str:
        return f"{super().url(place)}&codec=pack12"


# ---- URLs


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis:///0", "write redis://host"),
        ("redis://host/zero", "number of a database"),
        ("redis://host/1?cluster=yes", "0 in a cluster"),
        ("redis://host/0?prefix=a b", "letters"),
        ("redis://host/0?ttl=0", "ttl"),
        ("redis://host/0?max_bg=3", "did you mean max_gb"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tier(url)
