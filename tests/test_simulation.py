"""A complete server with its tiers, and two engines, in one process on a made-up clock: a minute and a half take a second.

Sockets keep real time-outs, since what answers them is real. All else takes made-up time, and whoever asks the operating system
for the time meanwhile, or waits for real time to pass, is noted and fails the test.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from demo.numpy_engine import Engine, EngineConfig, ModelConfig

from lmcache.config import ServerConfig
from lmcache.runtime import RUNTIME, Runtime
from lmcache.server import main
from lmcache.tiers import OK, Shard, ShardKey, Tier, TierError, TierURL, Usage, registry
from lmcache.wire import messages as m
from made_up_time import MadeUpTime
from ports import free_port
from servers import PATIENCE, Raw
from test_floors import REAL_TIME

CHUNK = 16
WALL = 4e9
"""A time that no real clock shows."""


class Failing(Tier):
    """A tier all of whose calls fail while `broken` is set. calls: when each was made."""

    scheme = "failing"
    broken = True
    runtime: Runtime
    calls: ClassVar[list[tuple[str, float]]] = []

    @classmethod
    def from_url(cls, url: TierURL) -> Failing:
        cls.runtime, cls.broken, cls.calls = url.runtime, True, []
        return cls()

    def _call(self, method: str) -> None:
        self.calls.append((method, self.runtime.now()))
        if self.broken:
            raise TierError("unreachable", "nothing answers there")

    def open(self) -> None:
        self._call("open")

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._call("contains")
        return [False] * len(keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        raise AssertionError("it has nothing")

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._call("store")
        return [OK] * len(shards)

    def remove(self, keys: Sequence[ShardKey]) -> None: ...

    def clear(self) -> None: ...

    def usage(self) -> Usage:
        return Usage(0, 0, None)

    def close(self) -> None: ...


class World:
    """A server, which runs in a thread of its own, and what asks it."""

    def __init__(self, folders: Callable[[str], Path], stack: ExitStack) -> None:
        self.time, self._stack = MadeUpTime(WALL), stack
        self.shared, self.socket_dir = folders("/dev/shm"), folders("/tmp")
        self.port, self.http_port = free_port(), free_port()
        config = ServerConfig(
            l1_size_gb=0.02,
            chunk_size=CHUNK,
            l2=(f"dir://{self.shared}?max_gb=0.01", "failing://here"),
            port=self.port,
            http_host="127.0.0.1",
            http_port=self.http_port,
            socket_dir=self.socket_dir,
            arena_dir=folders("/dev/shm"),
        )
        loop = main.start(config, None, self.time.runtime, stack)
        thread = self.time.runtime.start(loop.run, "loop")
        stack.callback(thread.join)
        stack.callback(loop.stop)
        self.began = self.time.time

    def engine(self, kind: type[Engine] = Engine) -> Engine:
        config = EngineConfig(model=ModelConfig.tiny(), num_blocks=64)
        kind.runtime = self.time.runtime  # type: ignore[attr-defined]
        engine = kind(config, f"127.0.0.1:{self.port}", deadline_seconds=PATIENCE, runtime=self.time.runtime)
        self._stack.callback(engine.close)
        assert engine.wait_connected(10.0)
        return engine

    def get(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def status(self) -> Any:
        return self.get("/status")

    def tier(self, name: str) -> Any:
        return next(one for one in self.status()["tiers"] if one["name"] == name)

    def socket_path(self) -> str:
        (path,) = self.socket_dir.glob("*.sock")
        return str(path)


@pytest.fixture
def world(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setitem(registry._OWN, "failing", (__name__, "Failing", ""))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with no_real_time(monkeypatch) as seen:
        try:
            with ExitStack() as stack:
                yield World(folders, stack)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert not seen, f"these ask the operating system for the time, or wait for it: {sorted(seen)}"


@contextmanager
def no_real_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The modules of lmcache that read a real clock, wait for real time or use the runtime of the operating system meanwhile."""
    seen, wait = set[str](), threading.Condition.wait

    def note(what: str) -> None:
        frame = sys._getframe(2)
        while frame.f_globals["__name__"].partition(".")[0] in ("threading", "concurrent") and frame.f_back:
            frame = frame.f_back
        name = frame.f_globals["__name__"]
        if name.startswith("lmcache.") and not name.startswith(tuple(REAL_TIME)):
            seen.add(f"{name}:{frame.f_lineno} ({what})")

    def noting(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            note(what)
            return call(*arguments)

        return noted

    def timed_wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        if timeout:
            note("wait")
        return wait(condition, timeout)

    with monkeypatch.context() as patch:
        for name in ("monotonic", "monotonic_ns", "time", "time_ns", "sleep"):
            patch.setattr(time, name, noting(name, getattr(time, name)))
        patch.setattr(threading.Condition, "wait", timed_wait)
        real = {field.name: getattr(RUNTIME, field.name) for field in fields(RUNTIME)}
        for name, call in real.items():
            object.__setattr__(RUNTIME, name, noting(f"RUNTIME.{name}", call))
        try:
            yield seen
        finally:
            for name, call in real.items():
                object.__setattr__(RUNTIME, name, call)


def has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it; what it has sent before is left out of account."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def test_a_server_its_tiers_and_two_engines_live_by_a_made_up_clock(world: World) -> None:
    began = time.perf_counter()
    prompt, one, two = list(range(10 * CHUNK)), world.engine(), world.engine()
    connected = world.time.time
    answer = one.generate(prompt)
    assert one.flush() and not answer.hit_tokens
    again = two.generate(prompt)
    assert two.flush() and again.hit_tokens == 10 * CHUNK - 1 and again.tokens == answer.tokens

    # Leases live for 30 seconds. An engine renews those that it holds; one that says nothing more loses its own.
    assert two.cache is not None
    chain = two.cache._scheduler.new_chain()
    assert chain is not None
    chain.extend(prompt)
    hit = two.cache._scheduler.lookup(chain)
    assert hit is not None
    raw = Raw(world, "silent", shard_bytes=4096)  # type: ignore[arg-type]
    raw.store(b"c" * 16)
    assert raw.ask(m.Lookup(raw.space, b"c" * 16)).lease
    silent = [socket.socket(socket.AF_UNIX), socket.create_connection(("127.0.0.1", world.port))]
    silent[0].connect(world.socket_path())
    assert silent[1].recv(1)  # ZMQ has accepted it
    world.time.advance(9.75)
    assert not any(map(has_ended, silent))
    world.time.advance(0.5)
    assert all(map(has_ended, silent)), "connections that say nothing are closed after 10 seconds"
    world.time.advance(19.5)
    assert not world.status()["arena"]["quarantined_bytes"]
    world.time.advance(0.5)
    status = world.status()
    assert status["arena"]["quarantined_bytes"] == 4096 and status["counters"]["expired_chunks_total"] == 1
    assert status["counters"]["renewed_leases_total"] == 3
    two.cache._scheduler.release(hit)
    for connection in silent:
        connection.close()
    raw.close()

    # A tier that fails is probed after pauses of 1, 2, 4 ... seconds, and serves again at the first probe after it was mended.
    probes = [when for method, when in Failing.calls if method == "open"]
    assert [later - earlier for earlier, later in pairwise(probes)] == [1.0, 2.0, 4.0, 8.0]
    Failing.broken = False
    world.time.advance(probes[-1] + 15.75 - world.time.time)
    assert world.tier("failing")["state"] == "failing"
    world.time.advance(0.5)
    assert world.tier("failing")["state"] == "serving"

    # What L1 has lost comes back from the shared directory.
    assert world.get("/clear-cache", "POST")["status"] == "ok"
    assert one.generate(prompt).hit_tokens == 10 * CHUNK - 1
    assert world.status()["counters"]['tier_loaded_shards_total{tier="dir"}'] == 10

    # What other machines write to the shared directory is found by the next count, and what exceeds the cap is removed.
    assert world.tier("dir")["shards"] == 11
    foreign = world.shared / ("f" * 32) / "ff"
    foreign.mkdir(parents=True)
    for number in range(300):
        (foreign / f"{'f' * 28}{number:04x}-0-1").write_bytes(bytes(40_000))
    world.time.advance(60.0)
    tier = world.tier("dir")
    assert 200 < tier["shards"] < 300 and tier["stored_bytes"] <= 0.01 * 2**30
    assert tier["shards"] == sum(len(files) for _, _, files in os.walk(world.shared)) - 2  # the lease and the count

    # Everybody has the age that the clock gives, to a tenth of a second.
    status = world.status()
    assert status["uptime_seconds"] == pytest.approx(world.time.time - world.began, abs=0.06)
    ages = [peer["connected_seconds"] for peer in status["engines"]]
    assert len(ages) == 5 and all(age == pytest.approx(world.time.time - connected, abs=0.3) for age in ages)
    assert two.generate(prompt).hit_tokens == 10 * CHUNK - 1
    counters = world.status()["counters"]
    assert accounted(counters) > 0 and counters['lookup_tokens_total{source="dir"}'] == 10 * CHUNK
    assert world.time.time < 92
    print(f"{world.time.time:.2f} made-up seconds, {time.perf_counter() - began:.2f} real ones")


def accounted(counters: dict[str, float]) -> float:
    """The tokens that were looked up, each of which was found or is missing for a reason."""
    parts = ("lookup_tokens_total{", "missed_tokens_total{")
    assert counters["requested_tokens_total"] == sum(n for name, n in counters.items() if name.startswith(parts))
    gone = counters["evicted_chunks_total"] + counters["cleared_chunks_total"]
    assert counters["stored_chunks_total"] == counters["complete_chunks"] + gone
    return counters["requested_tokens_total"]


ENGINES, BURSTS, SHARED = 8, 25, 12
"""Engines, prompts that all of them get at once, and chunks that these share."""


class Timed(Engine):
    """An engine whose forward passes take made-up time: a millisecond a token."""

    runtime: Runtime

    def _forward(self, tokens: list[int], first: int, end: int, blocks: list[int]) -> Any:
        self.runtime.sleep(0.001 * (end - first))
        return super()._forward(tokens, first, end, blocks)


def at_once(world: World, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What these calls return, each made in a thread of its own, at the same made-up moment."""
    done: dict[int, Any] = {}
    for number, call in enumerate(calls):
        world.time.runtime.start(lambda number=number, call=call: done.__setitem__(number, call()), f"call {number}")
    world.time.until(lambda: len(done) == len(calls), 60.0)
    return [done[number] for number in range(len(calls))]


def test_engines_that_get_one_prompt_at_once_compute_it_once(world: World) -> None:
    engines = [world.engine(Timed) for _ in range(ENGINES)]
    for number, engine in enumerate(engines):  # so that each knows its pace
        engine.generate([500 + number] * 8 * CHUNK, max_tokens=1)
    computed, longest = 0, 0.0
    for burst in range(BURSTS):
        prompt = [(burst * 7 + at * at) % 500 for at in range(SHARED * CHUNK)]
        began = world.time.time

        def ask(number: int, prompt: list[int] = prompt, began: float = began) -> tuple[Any, float]:
            result = engines[number].generate([*prompt, number], max_tokens=1)
            return result, world.time.time - began

        answers = at_once(world, [lambda number=number: ask(number) for number in range(ENGINES)])  # type: ignore[misc]
        computed += sum(max(0, len(prompt) - result.hit_tokens) for result, _ in answers)
        longest = max(longest, *(seconds for _, seconds in answers))
        for engine in engines:
            engine.flush()
    once = BURSTS * SHARED * CHUNK
    again = (computed - once) / (once * (ENGINES - 1))
    counters = world.status()["counters"]
    print(f"{1 - again:.3f} of the shared tokens were computed once; the longest answer took {longest:.3f} s")
    assert 1 - again >= 0.9
    assert longest < 2 * 0.001 * (SHARED * CHUNK + 1) + 0.1
    assert counters["awaited_tokens_total"] >= 0.9 * SHARED * CHUNK * BURSTS
    assert not counters["promised_chunks"] and counters['awaits_by_end_total{reason="arrived"}'] >= 0.9 * BURSTS
    assert accounted(counters) == ENGINES * (8 * CHUNK + BURSTS * (SHARED * CHUNK + 1)), (
        "each prompt once, to the token"
    )
    from_others = counters['lookup_tokens_total{source="other_engine"}']
    assert from_others >= 0.9 * once * (ENGINES - 1), "for all of them"
