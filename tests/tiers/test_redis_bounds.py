"""The Redis tier beside others on one server: no command of its own is long, however much it has to do, on real servers."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from lmcache.tiers import ABSENT, KEPT, OK, Shard, TierError, frame
from lmcache.tiers.redis import tier as tier_module
from lmcache.tiers.redis.booking import booked_bytes
from lmcache.tiers.redis.tier import FULL, RedisTier
from proxy import Proxy
from servers import eventually
from stores import RedisServer, load, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("redis")
ENTRIES = 20_000
MOST = 512
"""Keys of shards and fields of books that one command, or one call of the script, may name."""
NAMES = ("{lmcache}/", b"space".ljust(16).hex() + "/")
OPEN_ENDED = {"HGETALL", "HKEYS", "HVALS", "KEYS", "SMEMBERS"}


def opened(store: RedisServer, options: str = "", port: int = 0) -> RedisTier:
    tier = tier_of(store.url(f"?timeout=60{options}", port))  # no test here is about time
    assert isinstance(tier, RedisTier)
    return tier


def filled(store: RedisServer, count: int) -> list[Shard]:
    """So many small shards, written with their books as the tier writes them, oldest first."""
    shards = shards_of(count, 10)
    size = booked_bytes(10)
    pipeline = store.raw.pipeline(transaction=False)
    for start in range(0, count, 1000):
        some = shards[start : start + 1000]
        names = [shard.key.text for shard in some]
        headers = [bytes(frame.make_header(shard.key, shard.parent, shard.payload)) for shard in some]
        pipeline.mset({f"{{lmcache}}/{name}": header for name, header in zip(names, headers, strict=True)})
        pipeline.mset({f"{{lmcache}}/{shard.key.text}.0": bytes(shard.payload) for shard in some})
        pipeline.hset("{lmcache}.index", mapping=dict.fromkeys(names, f"{size} 1 "))
        pipeline.zadd("{lmcache}.uses", {name: 1_000_000 + start + place for place, name in enumerate(names)})
    pipeline.hset("{lmcache}.index", "used", size * count)
    pipeline.execute()
    return shards


@contextlib.contextmanager
def watched(store: RedisServer) -> Iterator[list[list[list[str]]]]:
    """What MONITOR tells: each command that a client sent, followed by those that it ran as a script."""
    calls: list[list[list[str]]] = []
    with socket.create_connection(("127.0.0.1", store.port)) as connection, connection.makefile("rb") as lines:
        connection.sendall(f"AUTH {store.password}\r\nMONITOR\r\n".encode())
        assert [lines.readline() for _ in range(2)] == [b"+OK\r\n"] * 2

        def listen() -> None:
            for line in lines:
                words = line.decode().split('"')[1::2]  # the script itself is no name, wherever it is split
                if words == ["ECHO", "the end"]:
                    return
                if b" lua] " not in line[:60]:
                    calls.append([])
                calls[-1].append(words)

        listener = threading.Thread(target=listen)
        listener.start()
        yield calls
        store.raw.echo("the end")
        listener.join()


def longest(calls: list[list[list[str]]]) -> int:
    """The most names of shards, parts and fields that one of these calls dealt with; each of them can be only so long."""
    most = 0
    for call in calls:
        for verb, *words in call:
            assert verb.upper() not in OPEN_ENDED, f"{verb} answers with whatever is there"
            if verb.upper() == "ZRANGE":
                assert 0 <= int(words[2]) < MOST
            if verb.upper() in ("SCAN", "HSCAN"):
                assert int(words[words.index("COUNT") + 1]) <= MOST
        commands = call[1:] or call
        most = max(most, len({word for _, *words in commands for word in words if word.startswith(NAMES)}))
    return most


def _lose_the_index(store: RedisServer) -> None:
    store.raw.delete("{lmcache}.index")


def _lose_the_uses(store: RedisServer) -> None:
    store.raw.delete("{lmcache}.uses")


def _lose_a_record(store: RedisServer) -> None:
    store.raw.hdel("{lmcache}.index", store.raw.zrange("{lmcache}.uses", 7, 7)[0])


LOSSES = [_lose_the_index, _lose_the_uses, _lose_a_record]


def stores(tier: RedisTier, shards: list[Shard]) -> bool:
    return set(tier.store(shards)) <= {OK, KEPT}


def _is_alone(store: RedisServer, shard: Shard) -> None:
    """Nothing is there but this one, and the books agree."""
    name = shard.key.text
    keys = {key.decode() for key in store.raw.keys("*")}
    assert keys == {f"{{lmcache}}/{name}", f"{{lmcache}}/{name}.0", "{lmcache}.index", "{lmcache}.uses"}
    assert set(store.raw.hkeys("{lmcache}.index")) == {b"used", name.encode()}
    assert store.raw.zrange("{lmcache}.uses", 0, -1) == [name.encode()]
    assert int(store.raw.hget("{lmcache}.index", "used")) == booked_bytes(shard.payload.nbytes)


@pytest.mark.parametrize("lose", LOSSES)
def test_books_that_lost_a_half_are_given_up_in_short_calls(
    empty: RedisServer, lose: Callable[[RedisServer], None]
) -> None:
    filled(empty, ENTRIES)
    lose(empty)
    (shard,) = shards_of(1, 10)
    with watched(empty) as calls:
        tier = opened(empty, "&max_gb=1")
        eventually(lambda: stores(tier, [shard]))
    assert 0 < longest(calls) <= MOST
    assert load(tier, [shard]) == [OK]
    _is_alone(empty, shard)


def test_a_clear_is_made_of_short_calls(empty: RedisServer) -> None:
    filled(empty, ENTRIES)
    tier = opened(empty)
    empty.raw.mset({f"{{lmcache}}/left behind {number}.0": b"by a dead writer" for number in range(2000)})
    with watched(empty) as calls:
        tier.clear()
    assert 0 < longest(calls) <= MOST
    assert empty.raw.dbsize() == 0 and tier.usage() == (0, 0, None)


def test_room_under_a_smaller_cap_is_made_in_short_calls(empty: RedisServer) -> None:
    """One large shard in place of thousands of small ones, and a cap below what is there."""
    before = filled(empty, ENTRIES)
    (shard,) = shards_of(1, 500_000)
    with watched(empty) as calls:
        tier = opened(empty, "&max_gb=0.001")
        eventually(lambda: stores(tier, [shard]))
    assert 0 < longest(calls) <= MOST
    assert tier.usage().stored_bytes <= 0.001 * (1 << 30)
    assert tier.contains([before[0].key, before[-1].key]) == [False, True], "the newest stay"


def test_room_in_a_full_server_is_made_in_short_calls(empty: RedisServer) -> None:
    filled(empty, ENTRIES)
    tier = opened(empty)
    empty.raw.config_set("maxmemory", empty.raw.info("memory")["used_memory"] - 1)
    (shard,) = shards_of(1, 3 << 20)
    with watched(empty) as calls:
        assert tier.store([shard]) == [FULL]
    assert 0 < longest(calls) <= MOST
    assert ENTRIES - tier.usage().shards >= booked_bytes(3 << 20) // booked_bytes(10), "as much as the shard needs"


def test_a_shard_that_was_not_booked_waits_for_room_that_takes_more_than_a_call(empty: RedisServer) -> None:
    filled(empty, ENTRIES)
    tier, (shard,) = opened(empty, "&max_gb=1"), shards_of(1, 2_000_000)
    tier.store([shard])
    empty.raw.hincrby("{lmcache}.index", "used", -booked_bytes(2_000_000))
    empty.raw.hdel("{lmcache}.index", shard.key.text)
    empty.raw.zrem("{lmcache}.uses", shard.key.text)
    small = opened(empty, "&max_gb=0.02")
    with watched(empty) as calls:
        eventually(lambda: load(small, [shard]) == [OK] and empty.raw.hexists("{lmcache}.index", shard.key.text))
    assert 0 < longest(calls) <= MOST
    assert int(empty.raw.hget("{lmcache}.index", "used")) <= 0.02 * (1 << 30)


@pytest.mark.parametrize("options", ["", "&ttl=1000"])
def test_a_large_load_is_noted_in_short_calls_and_in_its_order(empty: RedisServer, options: str) -> None:
    shards = filled(empty, 1000)
    tier = opened(empty, options)
    with watched(empty) as calls:
        assert load(tier, shards) == [OK] * 1000
    assert 0 < longest(calls) <= MOST
    by_use = empty.raw.zrange("{lmcache}.uses", 0, -1)
    assert by_use == [shard.key.text.encode() for shard in reversed(shards)], "the first of a call is used last"


# ---- what others see of torn books


@pytest.mark.parametrize("lose", LOSSES)
def test_readers_get_right_bytes_or_none_and_nobody_books_before_all_is_gone(
    empty: RedisServer, lose: Callable[[RedisServer], None]
) -> None:
    shards = filled(empty, 3000)
    sample = shards[::75]
    tier, reader = opened(empty, "&max_gb=1"), opened(empty, "&max_gb=1")
    lose(empty)
    was, steps = [OK] * len(sample), 0
    while left := tier._everywhere("usage"):
        steps += 1
        outcomes = load(reader, sample)  # compares the bytes
        assert all(now in (before, ABSENT) for before, now in zip(was, outcomes, strict=True))
        assert left == "not ready" and not empty.raw.exists("{lmcache}.uses")
        was = outcomes
    assert steps > 3 and load(reader, shards) == [ABSENT] * 3000
    assert stores(reader, shards[:1]) and load(tier, shards[:1]) == [OK]
    _is_alone(empty, shards[0])


def test_several_servers_at_once_repair_read_and_store(empty: RedisServer) -> None:
    shards = filled(empty, 5000)
    tiers = [opened(empty, "&max_gb=1") for _ in range(3)]
    _lose_the_uses(empty)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            mine = shards[number::3][:40]
            for start in range(0, 5000, 500):
                assert set(load(tiers[number], shards[start : start + 50])) <= {OK, ABSENT}
            eventually(lambda: stores(tiers[number], mine))
            assert load(tiers[number], mine) == [OK] * 40
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures
    assert tiers[0]._everywhere("usage") == "" and tiers[0].usage() == (120 * booked_bytes(10), 120, 1 << 30)
    assert len(empty.raw.keys("{lmcache}/*")) == 240


@pytest.mark.parametrize("lose", LOSSES)
def test_a_repair_that_is_cut_off_is_gone_on_with_by_another(
    empty: RedisServer, proxy: Callable[..., Proxy], lose: Callable[[RedisServer], None]
) -> None:
    shards = filled(empty, 6000)
    through = proxy(empty.port)
    first = opened(empty, "&max_gb=1", through.port)
    lose(empty)
    through.questions.after(4_000, through.cut)
    with pytest.raises(TierError) as caught:
        first.store(shards_of(1, 10))
    assert caught.value.reason == "unreachable"
    left = eventually(lambda: empty.raw.dbsize())
    assert 100 < left < 11_900 and empty.raw.exists("{lmcache}.uses") == 0
    assert {OK} < set(load(first, shards[::15])) <= {OK, ABSENT}
    second = opened(empty, "&max_gb=1")
    eventually(lambda: stores(second, shards[:1]))
    _is_alone(empty, shards[0])


@pytest.mark.parametrize("half", ["index", "uses"])
def test_half_of_torn_books_is_enough_to_go_on_with(empty: RedisServer, half: str) -> None:
    shards = filled(empty, 3000)
    tier, name = opened(empty, "&max_gb=1"), shards[7].key.text
    assert empty.raw.hdel("{lmcache}.index", name) if half == "index" else empty.raw.zrem("{lmcache}.uses", name)
    assert tier._everywhere("usage") == "not ready"
    assert empty.raw.delete(f"{{lmcache}}.{half}.torn") == 1
    eventually(lambda: stores(tier, shards[:1]))
    _is_alone(empty, shards[0])


def test_a_clear_that_is_cut_off_is_gone_on_with_and_stores_wait_for_it(
    empty: RedisServer, proxy: Callable[..., Proxy]
) -> None:
    shards = filled(empty, 6000)
    through = proxy(empty.port)
    first, second = opened(empty, port=through.port), opened(empty)
    through.questions.after(1_500, through.cut)
    with pytest.raises(TierError):
        first.clear()
    assert {OK} < set(load(second, shards[::15])) <= {OK, ABSENT}
    eventually(lambda: stores(second, shards[:1]))
    _is_alone(empty, shards[0])


def test_a_clear_that_never_ends_is_given_up(empty: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = opened(empty)
    filled(empty, 3000)
    with monkeypatch.context() as patch:
        patch.setattr(tier_module, "_CLEAR_SECONDS", 0.0)
        with pytest.raises(TierError, match="not empty after 0 s of a clear; clear it again") as caught:
            tier.clear()
        assert caught.value.reason == "timeout"
        patch.setattr(tier_module, "_CLEAR_SECONDS", 0.5)
        patch.setattr(tier_module, "_unlink_all", lambda connection, pattern: itertools.repeat(None))
        with pytest.raises(TierError, match="not empty"):  # the server says for ever that there is more
            tier.clear()
    tier.clear()
    assert not empty.raw.keys("*/*")
    assert tier.store(shards_of(1, 10)) == [OK]
