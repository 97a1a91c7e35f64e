"""The Mooncake and InfiniStore tiers beside the stores' own clients, in turns; `tiers_remote` calls this."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import Row

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from lmcache.tiers import OK, Shard, ShardKey, Tier
from lmcache.tiers.registry import make_tier
from stores import INFINISTORE, MOONCAKE, InfiniStoreServer, MooncakeClient, MooncakeMaster, mooncake_environment

MIB = 1 << 20
SIZE, COUNT = 4 * MIB, 8
"""A call moves 32 MiB, as those of a server do."""


def mooncake(quick: bool) -> list[Row]:
    """Both clients read from and write to memory that a third process lends."""
    if not (MOONCAKE / "site").exists():
        return []
    os.environ |= mooncake_environment()
    sys.path.append(str(MOONCAKE / "site"))
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        master = MooncakeMaster(Path(folder))
        lender, own = MooncakeClient(master, 1536), MooncakeClient(master, 0)
        tier = make_tier(master.url("?timeout=30")).tier
        assert isinstance(tier, Tier)
        tier.open()
        number = iter(range(1_000_000))

        def theirs() -> tuple[float, float]:
            keys = [f"own{next(number)}" for _ in range(COUNT)]
            return own.ask("seconds_to_put", keys, SIZE), own.ask("seconds_to_get", keys, SIZE)

        try:
            return _rows("mooncake", "Mooncake", tier, theirs, lambda: lender.ask("remove_all", True), quick)
        finally:
            tier.close()
            for one in (own, lender, master):
                one.kill()


def infinistore(quick: bool) -> list[Row]:
    if not (INFINISTORE / "site").exists():
        return []
    server = InfiniStoreServer()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(INFINISTORE / "lib"),
        "PYTHONPATH": os.pathsep.join([str(INFINISTORE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = Path(__file__).with_name("infinistore_own.py")
    own = subprocess.Popen(
        [sys.executable, str(script), str(server.port), str(SIZE), str(COUNT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    tier = make_tier(server.url("?timeout=60")).tier
    assert isinstance(tier, Tier)
    tier.open()

    def theirs() -> tuple[float, float]:
        assert own.stdin and own.stdout
        print(file=own.stdin, flush=True)
        while not (line := own.stdout.readline()).startswith("seconds"):
            if not line:
                raise RuntimeError("InfiniStore's own client has ended")
        _, stored, read = line.split()
        return float(stored), float(read)

    try:
        return _rows("infinistore", "InfiniStore", tier, theirs, tier.clear, quick)
    finally:
        tier.close()
        own.kill()
        own.wait()
        server.kill()


def _rows(
    name: str,
    title: str,
    tier: Tier,
    theirs: Callable[[], tuple[float, float]],
    empty: Callable[[], object],
    quick: bool,
) -> list[Row]:
    """theirs: seconds in which the store's own client stores and reads as much. empty: removes all values."""
    store = Row(f"{name}_store", f"{title}: store, {COUNT} shards of 4 MiB, 1 caller", "GB/s", None)
    load = Row(f"{name}_load", f"{title}: load, {COUNT} shards of 4 MiB, 1 caller", "GB/s", None)
    contains = Row(f"{name}_contains", f"{title}: which of 512 are there", "ms", None)
    payloads = [memoryview(bytearray(os.urandom(SIZE))) for _ in range(COUNT)]
    memories = [memoryview(bytearray(SIZE)) for _ in range(COUNT)]
    for round_ in range(4 if quick else 20):
        seconds = [*theirs()]
        shards = [Shard(ShardKey(bytes(16), os.urandom(16), 0, 1), bytes(16), payload) for payload in payloads]
        keys = [shard.key for shard in shards]
        for call in (lambda: tier.store(shards), lambda: tier.load(keys, memories)):  # noqa: B023
            began = time.perf_counter()
            if set(call()) != {OK}:
                raise RuntimeError("a shard was not stored or loaded")
            seconds.append(time.perf_counter() - began)
        if memories != payloads:
            raise RuntimeError("wrong bytes came back")
        asked = [*keys, *(ShardKey(bytes(16), os.urandom(16), 0, 1) for _ in range(512 - COUNT))]
        began = time.perf_counter()
        tier.contains(asked)
        asking = time.perf_counter() - began
        empty()
        if round_:  # the first one touches the memory of the store
            for row, limit, ours in ((store, seconds[0], seconds[2]), (load, seconds[1], seconds[3])):
                row.add("limit", [COUNT * SIZE / limit / 1e9])
                row.add("ours", [COUNT * SIZE / ours / 1e9])
            contains.add("ours", [asking * 1e3])
    return [store, load, contains]
