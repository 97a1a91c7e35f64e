"""`python -m benchmarks.tiers_remote`: the Redis tier on a real Valkey and the S3 tier on a real SeaweedFS, both on this machine.

Each figure stands beside the plainest client that could do the same, in turns: for Valkey a socket with SET and GET of 4 MiB
values (sendall, recv_into), for S3 obstore's put and get alone with the same number of threads, for a Mooncake Store and
InfiniStore their own clients in a process of their own (both only where `./run test` has fetched them). *peer* (`served`, with
--peer-python): LMCache 0.5.6's server with its `resp` on the same Valkey, in turns with ours. It needs the test extra:
pip install -e '.[test]'. A full run takes about two minutes and 4 GiB of memory, with the peer three and 6 GiB.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.rows import Goal, Row, share
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import Side, sides_of
from benchmarks.tiers_pools import infinistore, mooncake
from benchmarks.tiers_served import Ended, ours_of, served
from benchmarks.tiers_served import Tier as ServedTier

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
try:
    import obstore
    from valkey import Valkey

    from ports import free_port
    from proxy import Proxy
    from servers import READY, Server
    from stores import ACCESS, SECRET, RedisServer, Seaweed, binary_of
except ImportError as missing:
    sys.exit(f"{missing.name} is not installed: pip install -e '.[test]'")

from lmcache.bench.engine import BenchEngine, Model, Prompt
from lmcache.tiers import OK, Shard, ShardKey, Tier, frame
from lmcache.tiers.registry import make_tier

MIB = 1 << 20
LARGE, SMALL, VALUE = 32 * MIB, MIB // 2, 4 * MIB
BATCH = 8


class PlainClient:
    """SET and GET over one socket, pipelined, and nothing else."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set(self, payload: memoryview, value_bytes: int) -> None:
        count = -(-len(payload) // value_bytes)
        for number in range(count):
            value = payload[number * value_bytes : (number + 1) * value_bytes]
            self._socket.sendall(b"*3\r\n$3\r\nSET\r\n$4\r\nk%03d\r\n$%d\r\n" % (number, len(value)))
            self._socket.sendall(value)
            self._socket.sendall(b"\r\n")
        assert self._exactly(5 * count) == b"+OK\r\n" * count

    def get(self, memory: memoryview, value_bytes: int) -> None:
        count = -(-len(memory) // value_bytes)
        self._socket.sendall(b"".join(b"*2\r\n$3\r\nGET\r\n$4\r\nk%03d\r\n" % number for number in range(count)))
        for number in range(count):
            value = memory[number * value_bytes : (number + 1) * value_bytes]
            self._exactly(len(b"$%d\r\n" % len(value)))
            got = 0
            while got < len(value):
                got += self._socket.recv_into(value[got:])
            self._exactly(2)

    def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            got += self._socket.recv(count - len(got))
        return got


class NoSum(frame.Checksum):
    """The frame without its checksum's cost: all sums are zero."""

    def update(self, piece: bytes | memoryview) -> None:
        self._payload_bytes += len(piece)

    def _digest(self, head: bytes) -> bytes:
        return bytes(16)


class Believing(NoSum):
    """Takes every checksum for right."""

    def check(self, header: bytes | memoryview, key: ShardKey) -> str:
        return OK


def new_shards(payloads: list[memoryview]) -> list[Shard]:
    return [Shard(ShardKey(bytes(16), os.urandom(16), 0, 1), bytes(16), payload) for payload in payloads]


def seconds_of(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def must(outcomes: list[str]) -> None:
    if set(outcomes) != {OK}:
        raise RuntimeError(f"the tier answered {outcomes}")


def valkey(quick: bool) -> list[Row]:
    rows = {
        "store": Row("valkey_store", "Valkey: store, 32 MiB shards, 1 caller", "GB/s", Goal(3.5, "more", 4.5)),
        "load": Row("valkey_load", "Valkey: load, 32 MiB shards, 1 caller", "GB/s", Goal(3.5, "more", 4.5)),
        "small": Row("valkey_small", "Valkey: load, one shard of 0.5 MiB", "ms", Goal(1.5, "less")),
        "contains": Row("valkey_contains", "Valkey: which of 512 are there", "ms", None),
        "sum_store": Row("valkey_sum_store", "Valkey: wall time of the checksum, store", "%", Goal(10, "less")),
        "sum_load": Row("valkey_sum_load", "Valkey: wall time of the checksum, load", "%", Goal(10, "less")),
        "cpu_store": Row("valkey_cpu_store", "Valkey: CPU seconds a GB, store", "s/GB", None),
        "cpu_load": Row("valkey_cpu_load", "Valkey: CPU seconds a GB, load", "s/GB", None),
    }
    payloads = [memoryview(bytearray(os.urandom(LARGE))) for _ in range(BATCH)]
    memory = memoryview(bytearray(LARGE))
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        server = RedisServer(binary_of("valkey"), Path(folder))
        tier = make_tier(server.url("?max_gb=0.25")).tier
        try:
            tier.open()
            plain = PlainClient(server.port)
            for round_ in range(4 if quick else 16):
                _valkey_round(rows, tier, plain, payloads, memory, warm_up=round_ == 0)
            _small_loads(rows, tier, plain, 50 if quick else 400)
        finally:
            tier.close()
            server.end()
    return list(rows.values())


def _valkey_round(
    rows: dict[str, Row], tier: Tier, plain: PlainClient, payloads: list[memoryview], memory: memoryview, warm_up: bool
) -> None:
    """Some shards each way through the plain client, with and without checksums, one after another."""
    walls: dict[str, list[float]] = {name: [] for name in ("set", "get", "store", "load", "bare_store", "bare_load")}
    cpus: dict[str, list[float]] = {"store": [], "load": []}
    for payload in payloads:
        walls["set"].append(seconds_of(lambda: plain.set(payload, VALUE))[0])  # noqa: B023
        walls["get"].append(seconds_of(lambda: plain.get(memory, VALUE))[0])
        for prefix in ("", "bare_"):
            shards = new_shards([payload])
            with mock.patch.object(frame, "Checksum", NoSum) if prefix else mock.MagicMock():
                store = seconds_of(lambda: must(tier.store(shards)))  # noqa: B023
                load = seconds_of(lambda: must(tier.load([shards[0].key], [memory])))  # noqa: B023
            if memory != payload:
                raise RuntimeError("wrong bytes came back")
            walls[f"{prefix}store"].append(store[0])
            walls[f"{prefix}load"].append(load[0])
            if not prefix:
                cpus["store"].append(store[1])
                cpus["load"].append(load[1])
    if warm_up:  # the server's memory is touched for the first time
        return
    for name, limit in (("store", "set"), ("load", "get")):
        rows[name].add("limit", [LARGE / wall / 1e9 for wall in walls[limit]])
        rows[name].add("ours", [LARGE / wall / 1e9 for wall in walls[name]])
        bare = sorted(walls[f"bare_{name}"])[len(payloads) // 2]
        rows[f"sum_{name}"].add("ours", [(sorted(walls[name])[len(payloads) // 2] / bare - 1) * 100])
        rows[f"cpu_{name}"].add("ours", [cpu / LARGE * 1e9 for cpu in cpus[name]])


def _small_loads(rows: dict[str, Row], tier: Tier, plain: PlainClient, count: int) -> None:
    payload, memory = memoryview(os.urandom(SMALL)), memoryview(bytearray(SMALL))
    shards = new_shards([payload] * 8)
    must(tier.store(shards))
    plain.set(payload, VALUE)
    for _ in range(4):
        rows["small"].add("limit", [seconds_of(lambda: plain.get(memory, VALUE))[0] * 1e3 for _ in range(count // 4)])
        rows["small"].add(
            "ours",
            [
                seconds_of(lambda key=shards[number % 8].key: must(tier.load([key], [memory])))[0] * 1e3  # type: ignore[misc]
                for number in range(count // 4)
            ],
        )
        keys = [shard.key for shard in new_shards([payload] * 504)] + [shard.key for shard in shards]
        rows["contains"].add("ours", [seconds_of(lambda: tier.contains(keys))[0] * 1e3 for _ in range(count // 16)])  # noqa: B023


def s3(quick: bool) -> list[Row]:
    threads = 4
    rows = {
        "store": Row("s3_store", f"S3: store, 32 MiB shards, {threads} at once", "GB/s", None),
        "load": Row("s3_load", f"S3: load, 32 MiB shards, {threads} at once", "GB/s", None),
        "of_store": Row("s3_of_store", "S3: store, part of obstore alone", "%", Goal(85, "more")),
        "of_load": Row("s3_of_load", "S3: load, part of obstore alone", "%", Goal(85, "more")),
        "small": Row("s3_small", "S3: load, one shard of 0.5 MiB", "ms", None),
    }
    payloads = [memoryview(bytearray(os.urandom(LARGE))) for _ in range(threads)]
    memories = [memoryview(bytearray(LARGE)) for _ in range(threads)]
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
    # in memory: the disk of this machine is not what is measured
    with tempfile.TemporaryDirectory(prefix="lmbench-", dir="/dev/shm") as folder, ThreadPoolExecutor(threads) as pool:
        seaweed = Seaweed(Path(folder))
        tier = make_tier(seaweed.url("bench", f"&connections={threads}&timeout=60")).tier
        try:
            tier.open()
            plain = seaweed.store()

            def put(number: int) -> None:
                obstore.put(plain, f"plain/{number}", payloads[number], use_multipart=False)

            def get(number: int) -> None:
                """Into memory of the caller, as everybody who wants KV must."""
                data = obstore.get(plain, f"plain/{number}").bytes()
                memories[number][:] = memoryview(data)

            for round_ in range(2 if quick else 7):
                walls = {"put": seconds_of(lambda: list(pool.map(put, range(threads))))[0]}
                shards = new_shards(payloads)
                walls["store"] = seconds_of(lambda: must(tier.store(shards)))[0]  # noqa: B023
                keys = [shard.key for shard in shards]
                walls["get"] = seconds_of(lambda: list(pool.map(get, range(threads))))[0]
                walls["load"] = seconds_of(lambda: must(tier.load(keys, memories)))[0]  # noqa: B023
                if memories != payloads:
                    raise RuntimeError("wrong bytes came back")
                tier.remove(keys)
                if round_ == 0:
                    continue
                for name, limit in (("store", "put"), ("load", "get")):
                    rows[name].add("limit", [threads * LARGE / walls[limit] / 1e9])
                    rows[name].add("ours", [threads * LARGE / walls[name] / 1e9])
                    rows[f"of_{name}"].add("ours", [walls[limit] / walls[name] * 100])
            sums = _s3_sums(tier, payloads, memories, 3 if quick else 6, 1 if quick else 12)
            small = new_shards([memoryview(os.urandom(SMALL))])
            must(tier.store(small))
            memory = memoryview(bytearray(SMALL))
            obstore.put(plain, "plain/small", small[0].payload)
            for _ in range(4):
                each = range(10 if quick else 50)
                rows["small"].add(
                    "limit", [seconds_of(lambda: obstore.get(plain, "plain/small").bytes())[0] * 1e3 for _ in each]
                )
                rows["small"].add(
                    "ours", [seconds_of(lambda: must(tier.load([small[0].key], [memory])))[0] * 1e3 for _ in each]
                )
        finally:
            tier.close()
            seaweed.end()
    return [*rows.values(), *sums]


def _s3_sums(tier: Tier, payloads: list[memoryview], memories: list[memoryview], rounds: int, loads: int) -> list[Row]:
    """Stores and loads with and without checksums, in turns: what they add to the wall and to this process's CPU."""
    walls: dict[str, list[float]] = {name: [] for name in ("store", "load", "bare_store", "bare_load")}
    cpus: dict[str, float] = dict.fromkeys(walls, 0.0)

    def timed(name: str, call: Callable[[], object]) -> None:
        with mock.patch.object(frame, "Checksum", Believing) if name.startswith("bare") else mock.MagicMock():
            wall, cpu = seconds_of(call)
        walls[name].append(wall)
        cpus[name] += cpu

    for round_ in range(rounds):
        first, second = ("", "bare_") if round_ % 2 else ("bare_", "")
        stored = {prefix: new_shards(payloads) for prefix in (first, second)}
        for prefix, shards in stored.items():
            timed(f"{prefix}store", lambda: must(tier.store(shards)))  # noqa: B023
        tier.remove([shard.key for shard in stored["bare_"]])
        keys = [shard.key for shard in stored[""]]
        for _ in range(loads):
            for prefix in (first, second):
                timed(f"{prefix}load", lambda: must(tier.load(keys, memories)))  # noqa: B023
            first, second = second, first
        tier.remove(keys)
    rows: list[Row] = []
    for name in ("store", "load"):
        rows += share(f"S3: wall time of the checksum, {name}", Goal(3, "less"), walls[name], walls[f"bare_{name}"])
        rows.append(Row("", f"S3: CPU seconds a GB of the checksum, {name}", "s/GB", None))
        gigabytes = len(walls[name]) * len(payloads) * LARGE / 1e9
        rows[-1].add("ours", [(cpus[name] - cpus[f"bare_{name}"]) / gigabytes])
    return rows


def stall(quick: bool) -> list[Row]:
    """Lookups that L1 answers in full, while the tier of the same server hangs and other lookups run into it; beside a server
    without a tier, in turns."""
    prompts, lookups = 16, 200 if quick else 2000
    rows = [
        Row("l1_hit", "L1 full hit of 8 chunks, beside a tier that hangs (limit: no tier)", "ms", None),
        Row("l1_hit_p99", "the same: p99 over p99 without a tier", "x", Goal(1.1, "less")),
    ]
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/dev/shm") as arenas:
        store = RedisServer(binary_of("valkey"), Path(name))
        proxy = Proxy(store.port)
        servers, engines = [], []
        stopped = threading.Event()
        try:
            for flags in ((), ("--l2", f"redis://127.0.0.1:{proxy.port}/0")):
                servers.append(Server(Path(name), Path(arenas), 64, 256, free_port(), flags))
                servers[-1].line_with(READY)
                engines.append(BenchEngine(Model("tiny", 1, 1, 64, 256), servers[-1].address))
            stored = []
            for engine in engines:
                mine = [engine.prompt(list(range(seed, seed + 2048))) for seed in range(prompts)]
                for prompt in mine:
                    if not engine.store(prompt, 0, 8, list(range(128))):
                        raise RuntimeError("a prompt was not kept")
                stored.append(mine)
            proxy.freeze()
            engines.append(BenchEngine(Model("tiny", 1, 1, 64, 256), servers[1].address, scheduler_only=True))
            cold = threading.Thread(target=_run_into, args=(engines[-1], stopped))
            cold.start()
            sides = [*zip(("limit", "ours"), engines, stored, strict=False)]
            for round_ in range(4 if quick else 24):
                p99: dict[str, float] = {}
                for side, engine, mine in sides if round_ % 2 else reversed(sides):
                    samples = [_lookup_ms(engine, mine[number % prompts]) for number in range(lookups)]
                    rows[0].add(side, samples)
                    p99[side] = sorted(samples)[lookups * 99 // 100]
                rows[1].add("ours", [p99["ours"] / p99["limit"]])
            stopped.set()
            cold.join()
        finally:
            stopped.set()
            for engine in engines:
                engine.close()
            for server in servers:
                server.end()
            proxy.close()
            store.end()
    return rows


def _lookup_ms(engine: BenchEngine, prompt: Prompt) -> float:
    begin = time.perf_counter()
    found = engine.lookup(prompt)
    seconds = time.perf_counter() - begin
    engine.release(prompt)
    if found != 8:
        raise RuntimeError(f"{found} of 8 chunks were found")
    return seconds * 1e3


def _run_into(engine: BenchEngine, stopped: threading.Event) -> None:
    """Another engine's prompts, which L1 does not have: they ask the tier that hangs, ten a second."""
    seed = 1_000_000
    while not stopped.wait(0.1):
        engine.lookup(engine.prompt(list(range(seed, seed + 2048))))
        seed += 2048


def valkey_served(quick: bool, sides: tuple[Side, ...]) -> list[Row]:
    """Ours beside the peer's `resp`, each in its server, in two databases of one Valkey."""
    with tempfile.TemporaryDirectory(prefix="lmbench-") as folder:
        store = RedisServer(binary_of("valkey"), Path(folder))
        first, second = (Valkey(port=store.port, db=database) for database in (0, 1))
        adapter = json.dumps({"type": "resp", "host": "127.0.0.1", "port": store.port})
        try:
            tiers = {
                "ours": ours_of(f"redis://127.0.0.1:{store.port}/1?max_gb=2", _keys_of(second, _our_keys), 0.001),
                "peer": ServedTier(
                    ("--l2-adapter", adapter),
                    _keys_of(first, lambda chunks, _: chunks),
                    lambda _: first.flushdb(),
                    0.001,
                ),
            }
            return served("Valkey", tiers, sides, quick)
        finally:
            store.end()


def _our_keys(chunks: int, chunk_bytes: int) -> int:
    """As docs/tiers/redis.md says: a header and parts of 4 MiB - 64 for a chunk, and two keys of books."""
    return 2 + chunks * (1 + -(-chunk_bytes // (VALUE - 64)))


def _keys_of(database: Any, keys: Callable[[int, int], int]) -> Ended:
    def ended(chunks: int, chunk_bytes: int) -> float | None:
        return time.time() if database.dbsize() >= keys(chunks, chunk_bytes) else None

    return ended


GROUPS: dict[str, Callable[[bool, tuple[Side, ...]], list[Row]]] = {
    "valkey": lambda quick, _: valkey(quick),
    "s3": lambda quick, _: s3(quick),
    "stall": lambda quick, _: stall(quick),
    "mooncake": lambda quick, _: mooncake(quick),
    "infinistore": lambda quick, _: infinistore(quick),
    "served": valkey_served,
}


def main(argv: list[str] | None = None) -> int:
    parser = arguments("tiers_remote", __doc__)
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with LMCache 0.5.6")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="some of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it work, not how fast is it")
    options = parser.parse_args(argv)
    sides = sides_of(options.peer_python)
    rows = [row for name in options.only for row in GROUPS[name](options.quick, sides)]
    facts = about(sides, argv, "benchmarks.tiers_remote")
    give_out(options, facts, rows, "tiers_remote")
    return 0


if __name__ == "__main__":
    sys.exit(main())
