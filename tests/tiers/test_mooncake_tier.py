"""The Mooncake tier on a real store: what is kept how, and every way in which master, owners and the client process fail."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache.errors import ConfigError
from lmcache.tiers import ABSENT, KEPT, OK, Shard, TierError, frame
from lmcache.tiers.mooncake import process
from lmcache.tiers.mooncake.tier import FULL, LOST, TOO_LARGE, MooncakeTier
from lmcache.tiers.registry import make_tier
from ports import free_port
from servers import PATIENCE, Server, beside, eventually
from stores import MooncakeClient, MooncakeMaster, freeze, load, shards_of

pytestmark = pytest.mark.xdist_group("mooncake")
MIB = 1 << 20
Store = tuple[MooncakeMaster, MooncakeClient]
Start = Callable[..., tuple[MooncakeMaster, list[MooncakeClient]]]
TOKENS = list(range(160))


@pytest.fixture
def opened(mooncake_paths: None) -> Any:
    """Open tiers: opened(url). They are closed at the end."""
    running: list[MooncakeTier] = []

    def make(url: str) -> MooncakeTier:
        tier = make_tier(url).tier
        assert isinstance(tier, MooncakeTier)
        running.append(tier)
        tier.open()
        return tier

    yield make
    for tier in running:
        tier.close()


def client_of(tier: MooncakeTier) -> int:
    assert tier._process is not None
    return tier._process.pid


def fails(call: Callable[[], object]) -> str:
    """The reason with which a call fails."""
    with pytest.raises(TierError) as caught:
        call()
    return caught.value.reason


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def tries(call: Callable[[], list[str]]) -> list[str]:
    try:
        return call()
    except TierError:
        return []


def store_all(tier: MooncakeTier, shards: list[Shard]) -> None:
    """Until all are stored, however hasty the tier and slow the machine."""
    eventually(lambda: sum(outcome in (OK, KEPT) for outcome in tries(lambda: tier.store(shards))) == len(shards))


def load_all(tier: MooncakeTier, shards: list[Shard]) -> None:
    eventually(lambda: tries(lambda: load(tier, shards)) == [OK] * len(shards))


# ---- shards, and what they are in the store


def test_sizes_around_pages_come_back_and_are_kept(mooncake: Store, opened: Any) -> None:
    tier = opened(mooncake[0].url("?timeout=60"))
    sizes = [0, 1, 3967, 3968, 3969, 4096, MIB, 32 * MIB]
    shards = [shards_of(1, size)[0] for size in sizes]
    assert load(tier, shards) == [ABSENT] * len(sizes)
    assert tier.store(shards) == [OK] * len(sizes)
    assert tier.store(shards) == [KEPT] * len(sizes)
    assert tier.contains([shard.key for shard in shards]) == [True] * len(sizes)
    assert load(tier, shards) == [OK] * len(sizes)
    assert tier.usage() == (sum(sizes) + 128 * len(sizes), len(sizes), None)


def test_more_than_a_lane_and_more_than_a_packet_go_in_several_calls(
    mooncake: Store, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "LANE_BYTES", 8 * MIB)
    monkeypatch.setattr("lmcache.tiers.mooncake.tier.LANE_BYTES", 8 * MIB)
    tier = opened(mooncake[0].url("?timeout=60"))
    large, tiny, huge = shards_of(5, 3 * MIB), shards_of(1100, 10), shards_of(2, 8 * MIB)
    assert tier.store([*large, huge[0], *tiny, huge[1]]) == [*[OK] * 5, TOO_LARGE, *[OK] * 1100, TOO_LARGE]
    assert load(tier, [*large, huge[0], *tiny]) == [*[OK] * 5, ABSENT, *[OK] * 1100]
    tier.remove([shard.key for shard in tiny])
    assert tier.contains([shard.key for shard in [*tiny, *large]]) == [False] * 1100 + [True] * 5


def test_a_value_is_a_frame_under_the_documented_name(mooncake: Store, opened: Any) -> None:
    master, raw = mooncake
    (shard,) = shards_of(1, 5000)
    opened(master.url("?timeout=60&prefix=kv")).store([shard])
    stored = raw.ask("get", f"kv/{shard.key.text}")
    assert frame.check(stored[:128], stored[128:], shard.key) == OK


def test_another_value_under_our_name_is_never_served_and_can_be_replaced(mooncake: Store, opened: Any) -> None:
    """The store keeps the first value whatever is put later, so what is wrong has to go."""
    master, raw = mooncake
    tier, (shard, other) = opened(master.url("?timeout=60")), shards_of(2, 5000)
    name = f"lmcache/{shard.key.text}"
    tier.store([other])
    for wrong in (b"x", bytes(5128), raw.ask("get", f"lmcache/{other.key.text}")):
        assert raw.ask("put", name, wrong) == 0
        (outcome,) = load(tier, [shard])
        assert outcome in frame.DAMAGE
        assert raw.ask("get", name) is None and tier.store([shard]) == [OK] and load(tier, [shard]) == [OK]
    assert raw.ask("put", name, bytes(9000)) == 0  # another size is replaced even by a store alone
    assert tier.store([shard]) == [OK] and load(tier, [shard]) == [OK]


def test_clear_takes_what_is_ours_and_nothing_else(mooncake: Store, opened: Any) -> None:
    master, raw = mooncake
    tier, other = opened(master.url("?timeout=60&prefix=l.m")), opened(master.url("?timeout=60&prefix=lxm"))
    shards = shards_of(20, 100)
    tier.store(shards)
    other.store(shards)
    raw.ask("put", "mine", b"not yours")
    assert load(tier, shards) == [OK] * 20  # which leases them
    tier.clear()
    assert tier.contains([shard.key for shard in shards]) == [False] * 20 and tier.usage().shards == 0
    assert other.contains([shard.key for shard in shards]) == [True] * 20 and raw.ask("get", "mine") == b"not yours"


def test_two_servers_share_a_store(server: Callable[..., Server], engine: Callable[..., Any], mooncake: Store) -> None:
    flags = ("--l2", mooncake[0].url("?timeout=60"), "--worth", "always", "--l2-patience-seconds", "600")
    here, there = server(flags=flags), server(flags=flags)
    assert engine(here, "writer").store(TOKENS) == len(TOKENS)
    eventually(lambda: here.status()["tiers"][0]["counters"].get("kept_shards", 0) >= 10)
    assert engine(there, "reader").load(TOKENS) == len(TOKENS)
    assert there.status()["tiers"][0]["counters"]["loaded_shards"] == 10


# ---- the pool


def test_the_store_evicts_by_itself_which_makes_misses(start_mooncake: Start, opened: Any) -> None:
    master, _ = start_mooncake("--default_kv_lease_ttl=1000", segments=(64,))
    tier, shards = opened(master.url("?timeout=60")), shards_of(30, 4 * MIB)
    outcomes = [tier.store([shard])[0] for shard in shards]
    assert set(outcomes) <= {OK, FULL} and outcomes.count(OK) > 8
    loaded = [load(tier, [shard])[0] for shard in shards]
    assert set(loaded) == {OK, ABSENT} and loaded.count(OK) < 16
    assert tier.usage().shards == loaded.count(OK)
    eventually(lambda: tier.store(shards_of(1, 4 * MIB)) == [OK])


def test_a_store_without_lent_memory_is_full(start_mooncake: Start, opened: Any) -> None:
    master, _ = start_mooncake(segments=())
    tier = opened(master.url("?timeout=60"))
    assert tier.store(shards_of(2, 100)) == [FULL, FULL]
    lender = opened(master.url("?timeout=60&segment_gb=0.1"))
    (shard,) = shards_of(1, MIB)
    assert tier.store([shard]) == [OK] and load(lender, [shard]) == [OK] and load(tier, [shard]) == [OK]
    lender.close()
    assert tier.contains([shard.key]) == [False] and tier.store(shards_of(1, 100)) == [FULL]


def test_replicas_that_are_not_made_are_told_once(
    start_mooncake: Start, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    master, lenders = start_mooncake(segments=(64,))
    tier = opened(master.url("?timeout=60&replicas=2"))
    assert tier.store(shards_of(1, 1000)) == tier.store(shards_of(1, 1000)) == [OK]
    assert tier.degraded() == "the store makes 1 replicas of 2"
    assert caplog.text.count("2 replicas were asked for and 1 made: so many clients must lend memory") == 1
    second = opened(master.url("?timeout=60&segment_gb=0.06&replicas=2"))
    shards = shards_of(4, 1000)
    assert second.store(shards) == [OK] * 4 and second.degraded() == ""
    lenders[0].kill()
    eventually(lambda: tries(lambda: load(second, shards)) == [OK] * 4)  # the other replica


def test_a_cap_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mooncake://h\?max_gb=3: max_gb: is not enforced by this store"):
        make_tier("mooncake://h?max_gb=3")


# ---- what the client process does to others


def test_the_addresses_on_which_the_client_listens_are_told(
    mooncake: Store, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tier = opened(mooncake[0].url("?timeout=60"))
    (line,) = [record.getMessage() for record in caplog.records if "listens on" in record.getMessage()]
    assert "asks nobody for credentials" in line and f"process {client_of(tier)}," in line
    told = {int(one.rpartition(":")[2].rstrip(",")) for one in line.split("listens on ")[1].split(" and ")[0].split()}
    tables = [Path(f"/proc/{client_of(tier)}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    ports = {
        int(row.split()[1][-4:], 16) for table in tables for row in table.splitlines()[1:] if row.split()[3] == "0A"
    }
    assert told and told <= ports


HOLDER = """
import sys, time
from lmcache.tiers.registry import make_tier
tier = make_tier(sys.argv[1]).tier
tier.open()
print(tier._process.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("is_frozen", [False, True])
def test_the_client_dies_with_its_server(start_mooncake: Start, is_frozen: bool) -> None:
    master, _ = start_mooncake(segments=())
    command = [sys.executable, "-c", HOLDER, master.url("?timeout=60&segment_gb=0.1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        pid = int(holder.stdout.readline())
        assert not is_gone(pid)
        if is_frozen:
            os.kill(pid, signal.SIGSTOP)
        holder.kill()
        holder.wait()
        eventually(lambda: is_gone(pid))


def test_a_client_that_dies_fails_its_calls_and_is_replaced(mooncake: Store, opened: Any) -> None:
    tier, shards = opened(mooncake[0].url("?timeout=60")), shards_of(3, MIB)
    assert tier.store(shards) == [OK] * 3
    first = client_of(tier)
    freeze(first)
    waiting = [beside(lambda: load(tier, shards)), beside(lambda: tier.contains([shards[0].key]))]
    eventually(lambda: len(_lanes_taken(tier)) == 2)
    os.kill(first, signal.SIGKILL)
    for one in waiting:
        assert fails(lambda one=one: one.result(PATIENCE)) == "no client"
    assert eventually(lambda: tries(lambda: load(tier, shards))) == [OK] * 3
    assert client_of(tier) != first and is_gone(first)
    os.kill(client_of(tier), signal.SIGKILL)
    eventually(lambda: tier._process is not None and not tier._process.alive)
    assert load(tier, shards) == [OK] * 3  # one that died between calls costs nothing but a start


def test_a_client_that_hangs_is_ended_before_its_buffers_are_used_again(mooncake: Store, opened: Any) -> None:
    tier, shards = opened(mooncake[0].url("?timeout=0.3")), shards_of(3, 100_000)
    store_all(tier, shards)
    hung = client_of(tier)
    freeze(hung)
    memories = [bytearray(b"\x55") * 100_000 for _ in shards]
    assert fails(lambda: tier.load([shard.key for shard in shards], list(map(memoryview, memories)))) == "timeout"
    assert is_gone(hung) and all(memory == b"\x55" * 100_000 for memory in memories)
    load_all(tier, shards)


def _lanes_taken(tier: MooncakeTier) -> list[int]:
    assert tier._process is not None
    free = [*tier._process._moving._lanes, *tier._process._asking._lanes]
    return [lane.offset for lane in tier._process._lanes if lane not in free]


# ---- masters and owners that fail


def test_nobody_there_and_a_port_that_is_no_master(mooncake_paths: None, tmp_path: Path) -> None:
    tier = make_tier(f"mooncake://127.0.0.1:{free_port()}").tier
    with pytest.raises(TierError, match="no master answers there: Connection refused") as caught:
        tier.open()  # type: ignore[attr-defined]
    assert caught.value.reason == "unreachable"
    assert fails(lambda: load(tier, shards_of(1, 10))) == "closed"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "reason", "said"),
    [
        (
            "raise ImportError('libibverbs.so.1: cannot open')",
            "not installed",
            "so.1: cannot open: pip install .*libibverbs1",
        ),
        ("import os; os._exit(3)", "no client", "its client process died during the start"),
        (
            "class MooncakeDistributedStore:\n    def setup(self, *given): return -1\nReplicateConfig = int",
            "unreachable",
            r"cannot be joined \(its error -1\)",
        ),
    ],
)
def test_a_client_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, reason: str, said: str
) -> None:
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake/__init__.py").touch()
    (tmp_path / "mooncake/store.py").write_text(module)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        tier = make_tier(f"mooncake://127.0.0.1:{somebody.getsockname()[1]}").tier
        with pytest.raises(TierError, match=said) as caught:
            tier.open()  # type: ignore[attr-defined]
    assert caught.value.reason == reason


def test_a_frozen_master_fails_the_start_and_each_call_until_it_goes_on(start_mooncake: Start, opened: Any) -> None:
    master, _ = start_mooncake()
    tier, other = opened(master.url("?timeout=1")), make_tier(master.url("?timeout=1")).tier
    shards = shards_of(2, MIB)
    store_all(tier, shards)
    master.freeze()
    for call in (
        lambda: tier.contains([shards[0].key]),
        lambda: load(tier, shards),
        lambda: tier.store(shards_of(1, 1000)),
        lambda: tier.remove([shards_of(1, 1)[0].key]),
        lambda: other.open(),  # type: ignore[attr-defined]
    ):
        assert fails(call) in ("timeout", "unreachable")
    master.thaw()
    load_all(tier, shards)


def test_a_master_that_restarts_has_forgotten_everything(start_mooncake: Start, opened: Any) -> None:
    master, _ = start_mooncake()
    tier, shards = opened(master.url("?timeout=5")), shards_of(2, MIB)
    assert tier.store(shards) == [OK] * 2
    master.kill()
    assert fails(lambda: load(tier, shards)) in ("unreachable", "timeout")
    assert fails(lambda: tier.contains([shards[0].key])) in ("unreachable", "timeout")
    master.start()
    assert eventually(lambda: tries(lambda: load(tier, shards))) == [ABSENT] * 2
    store_all(tier, shards)  # once the lender has joined again
    load_all(tier, shards)


def test_an_owner_that_dies_takes_its_values_along_and_no_others(start_mooncake: Start, opened: Any) -> None:
    master, lenders = start_mooncake(segments=(128, 128))
    tier, shards = opened(master.url("?timeout=5")), shards_of(40, MIB)
    assert tier.store(shards) == [OK] * 40
    lenders[0].kill()
    outcomes = load(tier, shards)
    assert {OK} < set(outcomes) <= {OK, LOST, ABSENT}
    client = client_of(tier)
    eventually(lambda: tries(lambda: tier.store(shards_of(1, MIB))) == [OK])
    assert [one == OK for one in load(tier, shards)] == [one == OK for one in outcomes]
    eventually(lambda: set(load(tier, shards)) == {OK, ABSENT})  # the master has seen that it is gone
    assert client_of(tier) == client, "nothing of this needs another client"


def test_an_owner_that_is_frozen_writes_nothing_late(start_mooncake: Start, opened: Any) -> None:
    master, (lender,) = start_mooncake()
    tier, shards = opened(master.url("?timeout=1")), shards_of(4, 8 * MIB)
    store_all(tier, shards)
    load_all(tier, shards)
    lender.freeze()
    memories = [bytearray(b"\x55") * (8 * MIB) for _ in shards]
    assert fails(lambda: tier.load([shard.key for shard in shards], list(map(memoryview, memories)))) == "unreachable"
    marked = [bytearray(b"\xaa") * (8 * MIB) for _ in shards]
    for memory, mark in zip(memories, marked, strict=True):
        memory[:] = mark
    lender.thaw()
    load_all(tier, shards)
    assert memories == marked


def test_a_size_that_was_read_halfway_is_no_value(mooncake: Store, opened: Any) -> None:
    """The buffer of the client still holds the whole value from before."""
    master, raw = mooncake
    tier, (shard,) = opened(master.url("?timeout=60&workers=1")), shards_of(1, 50_000)
    tier.store([shard])
    assert load(tier, [shard]) == [OK]
    stored = raw.ask("get", f"lmcache/{shard.key.text}")
    raw.ask("put", f"lmcache/{shard.key.text}", stored[:30_000])
    assert load(tier, [shard]) == [frame.TRUNCATED]
    shorter = Shard(shard.key, shard.parent, shard.payload[:100])
    tier.store([shard])
    assert load(tier, [shorter]) == [frame.OTHER_SIZE]


def test_bytes_that_the_store_writes_late_are_not_stored_as_right(
    mooncake: Store, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a lane, which is another call's already: between the copy and its checksum."""
    tier, (shard,) = opened(mooncake[0].url()), shards_of(1, MIB)
    copy = np.copyto

    def and_damage(written: Any, read: Any) -> None:
        copy(written, read)
        written[-1] ^= 1

    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", and_damage)
        tier.store([shard])
    assert load(tier, [shard]) == [frame.CHECKSUM] and load(tier, [shard]) == [ABSENT]


def test_the_client_runs_nothing_that_lies_in_the_working_directory(
    mooncake: Store, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may have written there, as in /tmp."""
    for name in ("lmcache", "mmap", "ctypes"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    (shard,) = shards_of(1, 1000)
    assert opened(mooncake[0].url()).store([shard]) == [OK]
    assert not (tmp_path / "ran").exists()
