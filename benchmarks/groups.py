"""What is measured: each function here makes a few rows of the report, round by round and side by side."""

from __future__ import annotations

import collections
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import limits
from benchmarks.index import index_in_process
from benchmarks.rows import Goal, Row
from benchmarks.scenarios import SHAPES, Shape
from benchmarks.sides import Plan, Server, Worker

GB = 1e9
SMALL_GOAL = Goal(0.3, "less", 0.15)


Pair = dict[str, tuple[Server, Worker]]


@contextlib.contextmanager
def sessions(plan: Plan, l1_gb: float, shape: Shape, threads: int = 1) -> Iterator[Pair]:
    """A server and an engine of each side, all up at once."""
    with contextlib.ExitStack() as stack:
        pair: Pair = {}
        for side in plan.sides:
            server = stack.enter_context(side.serve(l1_gb, shape.chunk_tokens))
            pair[side.name] = server, stack.enter_context(side.session(server, shape, threads))
        for server, _ in pair.values():
            server.settle()
        yield pair


@contextlib.contextmanager
def copy_limit(plan: Plan, shape: Shape) -> Iterator[limits.CopyLimit]:
    with tempfile.TemporaryDirectory() as directory:
        yield limits.CopyLimit(shape, limits.compile_copy(Path(directory)), plan.rng)


def calls(plan: Plan) -> list[Row]:
    """Round trips: the empty call, and lookups that hit fully."""
    empty = Row("empty-call", "empty call, same host", "ms", Goal(0.05, "less", 0.023))
    goals = {
        (1, False): Goal(0.1, "less", 0.042),
        (1, True): None,
        (32, False): Goal(0.3, "less", 0.16),
        (32, True): None,
        (512, False): Goal(3.0, "less", 2.9),
        (512, True): Goal(0.5, "less", 0.38),
    }
    rows = {
        (chunks, known): Row(
            f"lookup-{chunks}{'-known' if known else ''}",
            f"lookup, {chunks} chunk{'s' if chunks > 1 else ''}, {'hashes known' if known else 'from a list of ids'}",
            "ms",
            goal,
        )
        for (chunks, known), goal in goals.items()
    }
    with limits.echo_server() as echo, limits.echo_server(1024) as index, sessions(plan, 1, SHAPES["small"]) as pair:
        for _, worker in pair.values():
            for chunks in (1, 32, 512):
                worker.call("keep", chunks=chunks)
        for _ in range(plan.rounds):
            empty.add("limit", ms(limits.round_trips(echo, b"x" * 16, plan.count(1000))))
            for side, (_, worker) in pair.items():
                empty.add(side, ms(worker.call("empty_calls", count=plan.count(1000))))
            for (chunks, known), row in rows.items():
                count = plan.count({1: 500, 32: 200, 512: 40}[chunks])
                row.add("limit", ms(_lookup_limit(plan, index, chunks, known, count)))
                for side, (_, worker) in pair.items():
                    fewer = count if side == "ours" else max(2, count // 4)
                    row.add(side, ms(worker.call("lookups", chunks=chunks, count=fewer, known=known)))
    return [empty, *rows.values()]


def _lookup_limit(plan: Plan, index: str, chunks: int, known: bool, count: int) -> list[float]:
    """Hashing plus one round trip to a server that does nothing but dictionary lookups."""
    payload = limits.lookup_payload(chunks)
    if known:
        return limits.round_trips(index, payload, count)
    token_ids = plan.rng.choices(range(150_000), k=chunks * 256)
    trips = limits.round_trips(index, payload, count)
    hashing = statistics.median(limits.times(lambda: limits.hash_tokens(token_ids, 256), max(5, count // 4)))
    return [one + hashing for one in trips]


def small(plan: Plan) -> list[Row]:
    """One small chunk: what a call costs beside the copy."""
    store = Row("store-small", "store, small, 1 chunk (0.5 MiB)", "ms", SMALL_GOAL)
    retrieve = Row("retrieve-small", "retrieve, small, 1 chunk", "ms", SMALL_GOAL)
    shape = SHAPES["small"]
    with limits.echo_server() as echo, copy_limit(plan, shape) as copies, sessions(plan, 1, shape) as pair:
        for turn in range(plan.rounds + 1):
            count = plan.count(100)
            trip = statistics.median(limits.round_trips(echo, b"x" * 64, 100))
            hop = statistics.median(limits.thread_hops(100))
            gathers = [copies.copy(False, 1, 1) + 2 * trip + hop for _ in range(count)]
            scatters = [copies.copy(True, 1, 1) + hop for _ in range(count)]
            sides = {side: _store_and_retrieve(worker, 1, count) for side, (_, worker) in pair.items()}
            if not turn:
                continue  # warms up
            store.add("limit", ms(gathers))
            retrieve.add("limit", ms(scatters))
            for side, (stores, retrieves) in sides.items():
                store.add(side, ms(stores))
                retrieve.add(side, ms(retrieves))
    return [store, retrieve]


def _store_and_retrieve(worker: Worker, chunks: int, count: int) -> tuple[list[float], list[float]]:
    stored = worker.call("stores", chunks=chunks, count=count)
    return stored["seconds"], worker.call("retrieves", chunks=chunks, count=count)["seconds"]


def big(plan: Plan) -> list[Row]:
    """8 big chunks, pool touched: one and two copy threads, CPU time, and one core busy with something else."""
    rows = []
    for threads, store_goal, retrieve_goal in (
        (1, Goal(9, "more", 10.9), Goal(9.5, "more", 11.6)),
        (2, Goal(12, "more", 14.4), Goal(13, "more", 15.5)),
    ):
        named = f"{threads} thread{'s' if threads > 1 else ''}"
        store = Row(f"store-big-{threads}", f"store, big, 8 chunks, {named}", "GB/s", store_goal)
        retrieve = Row(f"retrieve-big-{threads}", f"retrieve, big, 8 chunks, {named}", "GB/s", retrieve_goal)
        rows += [store, retrieve]
        with copy_limit(plan, SHAPES["big"]) as copies, sessions(plan, 3, SHAPES["big"], threads) as pair:
            _touch_pools(pair, 3)
            costs = _cpu_rows() if threads == 1 else None
            _big_rounds(plan, threads, copies, pair, store, retrieve, costs)
            if costs:
                rows += list(costs.values())
                rows += _busy(plan, pair)
    return rows


def _cpu_rows() -> dict[str, Row]:
    goal = Goal(0.15, "less", 0.09)
    return {
        "stores": Row("cpu-store", "CPU seconds a GB, store", "s/GB", goal, "engine and server together"),
        "retrieves": Row("cpu-retrieve", "CPU seconds a GB, retrieve", "s/GB", goal, "engine and server together"),
    }


def _touch_pools(pair: Pair, l1_gb: float) -> None:
    """Fill each pool once, so that its pages exist; the peer keeps only about 80 % of its size."""
    gb = SHAPES["big"].chunk_bytes * 8 / 2**30
    for server, worker in pair.values():
        for _ in range(int(l1_gb * 0.75 / gb)):
            worker.call("stores", chunks=8, count=1)
        server.clear()


def _big_rounds(
    plan: Plan,
    threads: int,
    copies: limits.CopyLimit,
    pair: Pair,
    store: Row,
    retrieve: Row,
    costs: dict[str, Row] | None,
) -> None:
    size, count = 8 * SHAPES["big"].chunk_bytes, 6
    for _ in range(plan.rounds):
        for row, scatter in ((store, False), (retrieve, True)):
            began = time.process_time()
            row.add("limit", rates(size, [copies.copy(scatter, 8, threads) for _ in range(count)]))
            if costs:
                spent = time.process_time() - began
                costs["retrieves" if scatter else "stores"].add("limit", [spent / (count * size / GB)])
        for side, (server, worker) in pair.items():
            server.clear()
            for call, row in (("stores", store), ("retrieves", retrieve)):
                before = server.cpu_seconds()
                answer = worker.call(call, chunks=8, count=count)
                row.add(side, rates(size, answer["seconds"]))
                if costs:
                    cpu = answer["cpu"] + server.cpu_seconds() - before
                    costs[call].add(side, [cpu / (count * size / GB)])


def _busy(plan: Plan, pair: Pair) -> list[Row]:
    """The same with an endless loop beside it: how much of the idle rate is left."""
    rows = []
    size = 8 * SHAPES["big"].chunk_bytes
    store = Row("store-big-busy", "store, big, one core busy: part of idle", "%", Goal(80, "more"))
    retrieve = Row("retrieve-big-busy", "retrieve, big, one core busy: part of idle", "%", Goal(80, "more"))
    rows += [store, retrieve]
    for _ in range(plan.rounds):
        for side, (server, worker) in pair.items():
            medians: dict[str, list[float]] = {"stores": [], "retrieves": []}
            for busy in (False, True):
                server.clear()
                with burner() if busy else contextlib.nullcontext():
                    for call, kept in medians.items():
                        kept.append(statistics.median(rates(size, worker.call(call, chunks=8, count=6)["seconds"])))
            for call, row in (("stores", store), ("retrieves", retrieve)):
                idle, loaded = medians[call]
                row.add(side, [100 * loaded / idle])
    return rows


@contextlib.contextmanager
def burner() -> Iterator[None]:
    """A process that keeps one core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def fresh(plan: Plan) -> list[Row]:
    """The first stores of a server's life, each into slots that were never used."""
    at_once = Row(
        "store-fresh-at-once",
        "store, big, from the moment the server is ready",
        "GB/s",
        None,
        "pre-faulting still runs",
    )
    soon = Row(
        "store-fresh", "store, big, first use of a pool that had 6 s to pre-fault", "GB/s", Goal(9, "more", 10.9)
    )
    size = 8 * SHAPES["big"].chunk_bytes
    for row, wait in ((at_once, 0.0), (soon, 6.0)):
        for _ in range(1 if plan.quick else 3):
            row.add("limit", [limits.first_touch() / GB])
            for side in plan.sides:
                with side.serve(2.5) as server:
                    started = time.monotonic()
                    with side.session(server, SHAPES["big"]) as worker:
                        time.sleep(max(0.0, started + wait - time.monotonic()))
                        row.add(side.name, rates(size, worker.call("stores", chunks=8, count=7)["seconds"]))
    return [at_once, soon]


def burst(plan: Plan) -> list[Row]:
    """New data at 2 GB/s into a 2 GiB L1: what of it is there right after its store."""
    kept = Row("burst", "new data kept, 2 GB/s offered to a 2 GiB L1", "%", Goal(100, "more", 100))
    rate = Row("burst-rate", "rate at which it was offered", "GB/s", None)
    documents = 100 if plan.quick else 400
    with sessions(plan, 2, SHAPES["mid"]) as pair:
        for side, (_, worker) in pair.items():
            answer = worker.call("burst", chunks=4, documents=documents, bytes_per_second=2e9)
            kept.add(side, [100 * answer["kept"]])
            rate.add(side, [answer["bytes_per_second"] / GB])
    kept.add("limit", [100.0])
    return [kept, rate]


def hits(plan: Plan) -> list[Row]:
    """Hit rates when twice as much is wanted as fits, against an exact LRU over the same accesses."""
    rows, shape, chunks, l1_gb = [], SHAPES["mid"], 4, 2
    fit = int(l1_gb * 2**30) // (chunks * shape.chunk_bytes)
    documents, accesses = 2 * fit, 200 if plan.quick else 600
    weights = {"uniform": [1.0] * documents, "zipf": [1 / rank for rank in range(1, documents + 1)]}
    for pattern, weight in weights.items():
        order = plan.rng.choices(range(documents), weights=weight, k=accesses)
        exact = lru_hit_rate(order, fit, accesses // 3)
        row = Row(f"hit-rate-{pattern}", f"hit rate at 2 x L1, {pattern}", "", Goal(exact, "more"), "goal: exact LRU")
        row.add("limit", [exact])
        with sessions(plan, l1_gb, shape) as pair:
            for side, (_, worker) in pair.items():
                answer = worker.call(
                    "hit_rate", chunks=chunks, documents=documents, accesses=order, measured_from=accesses // 3
                )
                row.add(side, [answer["rate"]])
        rows.append(row)
    return rows


def lru_hit_rate(order: list[int], capacity: int, measured_from: int) -> float:
    """Part of the accesses from `measured_from` on that an exact LRU of `capacity` documents answers."""
    held: collections.OrderedDict[int, None] = collections.OrderedDict()
    found = 0
    for turn, document in enumerate(order):
        if document in held:
            held.move_to_end(document)
            found += turn >= measured_from
            continue
        held[document] = None
        if len(held) > capacity:
            held.popitem(last=False)
    return found / (len(order) - measured_from)


def start(plan: Plan) -> list[Row]:
    """How long a server takes to be ready, and what it weighs when nothing happens."""
    ready = Row(
        "ready", "server ready, 8 GB L1", "s", Goal(1.0, "less"), "limit: Python and our dependencies, imported"
    )
    memory = Row("memory", "idle memory beside the arena, 8 GB L1", "MiB", Goal(150, "less"))
    for _ in range(plan.rounds):
        seconds, resident = limits.interpreter_start()
        ready.add("limit", [seconds])
        memory.add("limit", [resident / 2**20])
        for side in plan.sides:
            with side.serve(8) as server:
                time.sleep(1.0 if plan.quick else 3.0)
                ready.add(side.name, [server.ready_seconds])
                memory.add(side.name, [server.memory_bytes()["private"] / 2**20])
    return [ready, memory]


def clients(plan: Plan) -> list[Row]:
    """8 processes that ask at once."""
    row = Row("clients-8", "one-chunk lookups a second, 8 processes in all", "1/s", Goal(5000, "more"))
    seconds = 2.0 if plan.quick else 5.0
    with limits.echo_server(1024) as echo:
        row.add("limit", [limits.shared_round_trips(echo, 8, seconds)])
    for side in plan.sides:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(side.serve(1))
            first = stack.enter_context(side.session(server, SHAPES["small"]))
            first.call("keep", chunks=1)
            others = [stack.enter_context(side.session(server, SHAPES["small"], scheduler_only=True)) for _ in range(8)]
            kept = first.call("kept_tokens", chunks=1)
            for worker in others:
                worker.call("expect", token_ids=kept)
            server.settle()
            for worker in others:
                worker.begin("lookups_for", seconds=seconds)
            answers = [worker.end() for worker in others]
            row.add(side.name, [sum(one["lookups"] / one["seconds"] for one in answers)])
    return [row]


def index(plan: Plan) -> list[Row]:
    """A 512-chunk lookup in an index of 1,000 and of 1,000,000 chunks, beside a plain dictionary."""
    most = 100_000 if plan.quick else 1_000_000
    rows = index_in_process(plan, most)
    ours = next(side for side in plan.sides if side.name == "ours")
    socket_rows = [
        Row("index-socket-small", "the same over the socket, 1,024 chunks", "ms", None),
        Row("index-socket", f"the same over the socket, {most:,} chunks", "ms", Goal(0.9, "less")),
    ]
    shape = SHAPES["tiny"]
    with ours.serve(most * 4096 * 1.1 / 2**30, shape.chunk_tokens) as server, ours.session(server, shape) as worker:
        server.settle()
        for row, prompts in zip(socket_rows, (2, most // 512 - 2), strict=True):
            worker.call("fill", prompts=prompts, chunks=512)
            for _ in range(plan.rounds):
                row.add("ours", ms(worker.call("filled_lookups", chunks=512, count=plan.count(100))))
    return rows + socket_rows


def ms(seconds: list[float]) -> list[float]:
    return [one * 1e3 for one in seconds]


def rates(size: int, seconds: list[float]) -> list[float]:
    """GB/s."""
    return [size / GB / one for one in seconds]


GROUPS: dict[str, Callable[[Plan], list[Row]]] = {
    "calls": calls,
    "small": small,
    "big": big,
    "fresh": fresh,
    "burst": burst,
    "hits": hits,
    "start": start,
    "clients": clients,
    "index": index,
}
