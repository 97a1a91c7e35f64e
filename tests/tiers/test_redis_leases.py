"""Leases in real stores: with the rights of the tier's user, in a cluster and behind Sentinels, and beside a tier."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from test_redis_deployments import watch as watch

from lmcache.tiers import OK, TierError
from lmcache.tiers.redis.address import nodes_of
from lmcache.tiers.redis.leases import Leases
from lmcache.tiers.redis.remedies import RIGHTS
from lmcache.tiers.url import parse_url
from ports import free_port
from servers import eventually
from stores import RedisServer, Sentinel, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("redis")
Start = Callable[..., RedisServer]


def leases_of(url: str) -> Leases:
    return Leases(nodes_of(parse_url(url)), "lmcache", 20.0)


def test_the_rights_of_a_tiers_user_suffice_and_a_clear_of_the_tier_leaves_the_leases(start: Start) -> None:
    store = start()
    store.raw.execute_command("ACL", "SETUSER", "kv", "on", ">s3cret", "~{lmcache}*", *RIGHTS.split())
    url = f"redis://kv:s3cret@127.0.0.1:{store.port}/0"
    one, two, tier = leases_of(url), leases_of(url), tier_of(url)
    assert one.renew("one", 30.0) == [b"one"] and sorted(two.renew("two", 30.0)) == [b"one", b"two"]
    assert sorted(two.renew("", 30.0)) == [b"one", b"two"], "who keeps none reads"
    assert tier.store(shards_of(2, 1000)) == [OK] * 2
    tier.clear()
    assert store.raw.dbsize() == 1 and len(one.renew("one", 30.0)) == 2
    tier.close()
    one.close()
    two.close()


def test_leases_end_by_the_stores_clock(start: Start) -> None:
    store = start()
    one = leases_of(store.url())
    one.renew("short", 0.01)
    eventually(lambda: one.renew("long", 60.0) == [b"long"])
    assert store.raw.zcard("{lmcache}-peers") == 1
    one.renew("long", 0.01)
    eventually(lambda: not store.raw.exists("{lmcache}-peers"), 20)
    one.close()


def test_leases_in_a_cluster(start: Start) -> None:
    nodes = [start("--cluster-enabled", "yes", "--cluster-port", str(free_port())) for _ in range(2)]
    one, two = nodes
    one.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    two.raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    one.raw.execute_command("CLUSTER", "MEET", "127.0.0.1", two.port, two.bus_port)
    eventually(lambda: all(b"cluster_state:ok" in each.raw.execute_command("CLUSTER", "INFO") for each in nodes))
    found = [leases_of(node.url("?cluster=yes")) for node in nodes]
    for number, leases in enumerate(found):
        eventually(lambda leases=leases, number=number: _renewed(leases, str(number)))  # type: ignore[misc]
    assert sorted(found[0].renew("0", 30.0)) == [b"0", b"1"] and found[0].own_address() == "127.0.0.1"
    for leases in found:
        leases.close()


def test_leases_follow_the_primary_that_sentinels_name(start: Start, watch: Callable[..., Sentinel]) -> None:
    primary = start()
    replica = start("--replicaof", "127.0.0.1", str(primary.port))
    sentinel = watch(primary)
    eventually(lambda: sentinel.replicas() == 1)
    one = leases_of(f"redis-sentinel://127.0.0.1:{sentinel.port}/kv/0")
    assert one.renew("one", 30.0) == [b"one"]
    sentinel.raw.execute_command("SENTINEL", "FAILOVER", "kv")
    eventually(lambda: sentinel.primary() == replica.port)
    primary.child.kill()
    primary.child.wait()
    eventually(lambda: _renewed(one, "one") and replica.raw.zcard("{lmcache}-peers") == 1)
    one.close()


def _renewed(leases: Leases, text: str) -> bool:
    with contextlib.suppress(TierError):
        return text.encode() in leases.renew(text, 30.0)
    return False


def test_what_is_no_list_of_texts_is_an_error(start: Start) -> None:
    store = start()
    store.raw.set("{lmcache}-peers", "text")
    one = leases_of(store.url())
    with pytest.raises(TierError, match="WRONGTYPE"):
        one.renew("one", 30.0)
    one.close()
