"""What Redis itself refuses: each error names the cause and what to type, and what is typed helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lmcache.tiers import KEPT, OK, TierError
from lmcache.tiers.redis.tier import RedisTier
from ports import free_port
from servers import eventually
from stores import RedisServer, load, shards_of, tier_of

pytestmark = pytest.mark.xdist_group("redis")


def why(call: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(TierError) as caught:
        call()
    return caught.value.reason, str(caught.value)


def test_a_right_that_is_missing_is_granted_by_what_the_error_says(empty: RedisServer) -> None:
    """From a user without any right on, only by typing what each error names."""
    empty.raw.execute_command("ACL", "SETUSER", "few", "on", ">s3cret", "+ping")
    url, shards, said = f"redis://few:s3cret@127.0.0.1:{empty.port}/0?max_gb=0.01&ttl=100", shards_of(2, 1000), []

    def use() -> None:
        tier = tier_of(url)
        assert set(tier.store(shards)) <= {OK, KEPT} and load(tier, shards) == [OK] * 2
        tier.remove([shards[0].key])
        tier.clear()

    while True:
        try:
            use()
            break
        except TierError as error:
            assert error.reason == "denied" and str(error) not in said, said
            said.append(str(error))
            typed = str(error).partition("type `")[2].partition("`")[0].replace("'", "")
            empty.raw.execute_command(*typed.partition(" (")[0].split())
    empty.raw.execute_command("ACL", "DELUSER", "few")
    assert len(said) >= 3 and not any("s3cret" in text for text in said)


def test_errors_of_a_server_that_cannot_serve_say_what_to_type(start: Callable[..., RedisServer]) -> None:
    server = start("--databases", "2")
    url = server.url()
    (shard,) = shards_of(1, 1000)
    assert why(lambda: tier_of(url.replace("/0", "/7"))) == (
        "refused",
        f"Redis at 127.0.0.1:{server.port}: ERR DB index is out of range; write /0, or raise `databases` in its configuration",
    )
    reason, text = why(lambda: tier_of(url.replace("127.0.0.1", ":secret@127.0.0.1")))
    assert reason == "denied" and "password" in text and "secret" not in text
    server.raw.config_set("min-replicas-to-write", 1)
    reason, text = why(lambda: tier_of(url).store([shard]))
    assert reason == "not ready" and "NOREPLICAS" in text and "CONFIG SET min-replicas-to-write 0" in text
    server.raw.config_set("min-replicas-to-write", 0)
    server.raw.replicaof("127.0.0.1", "1")
    reason, text = why(lambda: tier_of(url).store([shard]))
    assert reason == "denied" and "READONLY" in text and "name the primary" in text
    server.raw.config_set("replica-serve-stale-data", "no")
    reason, text = why(lambda: tier_of(url).store([shard]))
    assert reason == "not ready" and "MASTERDOWN" in text and "name the primary" in text
    server.raw.replicaof("NO", "ONE")
    assert tier_of(url).store([shard]) == [OK]


def test_a_snapshot_that_cannot_be_written_is_named_with_its_remedy(start: Callable[..., RedisServer]) -> None:
    server = start("--dbfilename", "there-is-no.rdb")
    server.raw.set("something", "to save")
    server.raw.config_set("save", "3600 1")
    (shard,) = shards_of(1, 1000)
    tier = tier_of(server.url())
    folder = server.raw.config_get("dir")["dir"]
    Path(folder, "there-is-no.rdb").mkdir()  # the snapshot cannot be renamed to a folder
    server.raw.bgsave()
    eventually(lambda: server.raw.info("persistence")["rdb_last_bgsave_status"] == "err")
    reason, text = why(lambda: tier.store([shard]))
    assert reason == "io" and "MISCONF" in text and 'CONFIG SET save ""' in text
    server.raw.config_set("save", "")
    assert tier.store([shard]) == [OK]


def test_too_many_clients_are_named(start: Callable[..., RedisServer]) -> None:
    server = start()
    server.raw.config_set("maxclients", 1)
    reason, text = why(lambda: tier_of(server.url()))
    assert reason == "busy" and "lower ?connections= here, or `CONFIG SET maxclients N` there" in text


def test_a_cluster_that_is_down_is_named(start: Callable[..., RedisServer]) -> None:
    server = start("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    reason, text = why(lambda: tier_of(server.url()))
    assert reason == "not ready" and "CLUSTERDOWN" in text and "redis-cli --cluster check" in text
    reason, text = why(lambda: tier_of(server.url().replace("/0", "/1")))
    assert reason == "refused" and "write /0" in text
    reason, text = why(lambda: tier_of(server.url("?cluster=yes")))
    assert reason == "not ready"


def test_a_forgotten_script_costs_nothing(empty: RedisServer) -> None:
    """It is sent once a connection, and again where the server has forgotten it."""
    tier = tier_of(empty.url("?timeout=3600"))
    assert isinstance(tier, RedisTier)
    before = _calls(empty, "eval")
    shards = shards_of(6, 1000)
    assert tier.store(shards[:2]) == [OK] * 2 and load(tier, shards[:2]) == [OK] * 2
    assert _calls(empty, "eval") == before and _calls(empty, "evalsha") >= 5
    for call, expected in (
        (lambda: tier.store(shards[2:4]), [OK] * 2),
        (lambda: load(tier, shards[:4]), [OK] * 4),
        (lambda: tier.remove([shards[0].key]), None),
        (lambda: tier.clear(), None),
    ):
        empty.raw.script_flush()
        assert call() == expected
    assert tier.usage().shards == 0 and not empty.raw.keys("*")


def _calls(server: RedisServer, command: str) -> int:
    return int(server.raw.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_a_server_that_runs_no_scripts_is_named(start: Callable[..., RedisServer]) -> None:
    server = start("--rename-command", "EVAL", "")
    reason, text = why(lambda: tier_of(server.url()))
    assert reason == "refused" and "needs Redis 6 or later" in text


def test_a_server_that_repeats_the_password_does_not_get_it_into_an_error(start: Callable[..., RedisServer]) -> None:
    """Redis repeats the arguments of commands that it does not have."""
    server = start("--rename-command", "AUTH", "")
    for who in (":s3cret", "kv:s3cret"):
        reason, text = why(lambda who=who: tier_of(f"redis://{who}@127.0.0.1:{server.port}/0"))
        assert reason == "refused" and "unknown command 'AUTH'; the tier needs" in text
        assert "s3cret" not in text
