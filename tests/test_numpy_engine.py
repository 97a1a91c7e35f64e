"""The NumPy engine, alone and with a real server: the same answers whatever the cache does, and faults that are noticed."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from demo.numpy_engine import KV_ORDERS, Engine, EngineConfig, ModelConfig, OutOfBlocks, UnfilledKV
from demo.numpy_engine.cached import CacheConnection, Loaded, Prompt

from engine_process import set_deadline
from lmcache.errors import ServerUnavailable
from lmcache.wire.carriers import ZmqCarrier
from servers import PATIENCE, Process, Server, eventually

TINY = ModelConfig.tiny()
FOR_EVER = 10 * PATIENCE
"""Seconds of a deadline that must not be waited for: the test has been called off before."""
StartServer = Callable[..., Server]


def prompt(seed: int, length: int = 300) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, TINY.vocab, length)]


def small(**changes: Any) -> EngineConfig:
    return EngineConfig(**({"model": TINY, "num_blocks": 64} | changes))


def assert_same(result: Any, right: Any) -> None:
    assert result.tokens == right.tokens
    np.testing.assert_allclose(result.logits_first, right.logits_first, atol=1e-3)


@pytest.fixture
def engines() -> Iterator[Any]:
    """Make engines that are closed after the test; with an address they are connected when they are returned."""
    made: list[Engine] = []

    def make(config: EngineConfig, address: str | None = None, **more: Any) -> Engine:
        made.append(engine := Engine(config, address, **{"deadline_seconds": PATIENCE} | more))
        assert address is None or engine.wait_connected(PATIENCE)
        return engine

    yield make
    for engine in made:
        engine.close()


# Alone


@pytest.mark.parametrize("order", KV_ORDERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_order_ranks_blocks_and_prefill_steps_change_no_answer(order: str, ranks: int) -> None:
    right = Engine(small()).generate(prompt(1), 6)
    other = Engine(small(kv_order=order, ranks=ranks, block_tokens=5, num_blocks=80, prefill_tokens=33))
    assert_same(other.generate(prompt(1), 6), right)


def test_own_prefix_cache_changes_no_answer() -> None:
    engine, alone = Engine(small(prefix_caching=True)), Engine(small())
    shared = prompt(2, 200)
    for tail in ([], [1], prompt(3, 50), []):
        result = engine.generate(shared + tail, 4)
        assert_same(result, alone.generate(shared + tail, 4))
    assert result.own_tokens == 192
    engine.drop()
    assert engine.pool.free_count == 64
    assert engine.generate(shared, 4).own_tokens == 0


def test_every_run_of_16_tokens_matters() -> None:
    engine, tokens = Engine(small()), prompt(4)
    right = engine.generate(tokens, 1).logits_first
    for at in range(0, 288, 48):
        changed = tokens[:at] + prompt(5, 16) + tokens[at + 16 :]
        assert np.abs(engine.generate(changed, 1).logits_first - right).max() > 0.01, f"tokens {at}..{at + 16}"


def test_blocks_come_back_and_too_many_are_refused() -> None:
    engine = Engine(small(num_blocks=20))
    with pytest.raises(OutOfBlocks, match="20 of 20 free"):
        engine.generate(prompt(6), 40)
    for seed in range(5):
        engine.generate(prompt(seed), 4)
    assert engine.pool.free_count == 20


# With a server


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [256, 16, 7, 1])
def test_hits_change_no_answer_and_cross_memory_orders(
    server: StartServer, engines: Any, chunk: int, ranks: int
) -> None:
    """What one engine stores another loads, whatever its block size and memory order; hits end inside blocks."""
    address, tokens = server(chunk=chunk).address, prompt(7)
    right = engines(small()).generate(tokens, 6)
    first = engines(small(ranks=ranks, block_tokens=12), address)
    cold = first.generate(tokens, 6)
    assert first.flush(PATIENCE)
    assert_same(cold, right)
    assert cold.hit_tokens == 0
    for order in KV_ORDERS:
        second = engines(small(ranks=ranks, kv_order=order, block_tokens=32), address)
        warm = second.generate(tokens, 6)
        assert_same(warm, right)
        assert warm.hit_tokens == min(len(tokens) // chunk * chunk, len(tokens) - 1)


@pytest.mark.parametrize("order", KV_ORDERS)
def test_every_memory_order_can_be_stored_from(server: StartServer, engines: Any, order: str) -> None:
    address, tokens = server(chunk=16).address, prompt(8)
    writer = engines(small(kv_order=order, ranks=2), address)
    right = writer.generate(tokens, 6)
    assert writer.flush(PATIENCE)
    warm = engines(small(ranks=2), address).generate(tokens, 6)
    assert_same(warm, right)
    assert warm.hit_tokens == 288


def test_hits_begin_where_the_engines_own_prefix_ends(server: StartServer, engines: Any) -> None:
    address = server(chunk=16).address
    alone, writer = engines(small()), engines(small(), address)
    tokens = prompt(8)
    writer.generate(tokens, 1)
    assert writer.flush(PATIENCE)
    reader = engines(small(prefix_caching=True), address)
    reader.generate(tokens[:50], 1)
    warm = reader.generate(tokens, 6)
    assert_same(warm, alone.generate(tokens, 6))
    assert warm.own_tokens == 48
    assert warm.hit_tokens == 288 - 48


def test_shared_prefixes_under_block_reuse(server: StartServer, engines: Any) -> None:
    """Twenty requests through a pool for one and a half, with freed blocks full of NaN."""
    alone, engine = engines(small()), engines(small(num_blocks=30), server(chunk=7).address)
    rng, hits = np.random.default_rng(9), 0
    for number in range(20):
        tokens = prompt(40 + number % 3, int(rng.integers(20, 250))) + prompt(number, int(rng.integers(0, 60)))
        result = engine.generate(tokens, 4)
        assert_same(result, alone.generate(tokens, 4))
        hits += result.hit_tokens
    assert hits > 1000


def test_other_salts_and_models_share_nothing(server: StartServer, engines: Any) -> None:
    address = server().address
    engine = engines(small(), address)
    engine.generate(prompt(10), 1, cache_salt="a")
    assert engine.flush(PATIENCE)
    assert engine.generate(prompt(10), 1, cache_salt="b").hit_tokens == 0
    assert engine.generate(prompt(10), 1, cache_salt="a").hit_tokens > 0
    other = engines(small(model=ModelConfig.tiny(seed=99)), address)
    assert other.generate(prompt(10), 1, cache_salt="a").hit_tokens == 0


# Faults that must be noticed


def test_kv_that_was_never_loaded_is_noticed(
    monkeypatch: pytest.MonkeyPatch, server: StartServer, engines: Any
) -> None:
    def claim(self: CacheConnection, request: Prompt, tokens: list[int], blocks: list[int], have: int) -> Loaded:
        return Loaded(160)

    engine = engines(small(), server().address)
    monkeypatch.setattr(CacheConnection, "load", claim)
    with pytest.raises(UnfilledKV, match="tokens 160 to 300"):
        engine.generate(prompt(11), 1)


@pytest.mark.parametrize("at", [0, 112, 272])
def test_one_wrong_run_of_16_tokens_is_noticed(
    monkeypatch: pytest.MonkeyPatch, server: StartServer, engines: Any, at: int
) -> None:
    engine = engines(small(), server().address)
    right = engine.generate(prompt(12), 1)
    assert engine.flush(PATIENCE)
    load = CacheConnection.load

    def load_and_spoil(
        self: CacheConnection, request: Prompt, tokens: list[int], blocks: list[int], have: int
    ) -> Loaded:
        loaded = load(self, request, tokens, blocks, have)
        for view in (*engine.ranks[0].keys, *engine.ranks[0].values):
            view[blocks[at // 16]] = view[blocks[5]]
        return loaded

    assert_same(engine.generate(prompt(12), 1), right)
    monkeypatch.setattr(CacheConnection, "load", load_and_spoil)
    spoiled = engine.generate(prompt(12), 1)
    assert spoiled.hit_tokens == 288
    assert np.abs(spoiled.logits_first - right.logits_first).max() > 0.01


# Deaths


def test_without_a_server_the_engine_answers_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the attempt to connect that is at hand, nor for an answer."""
    trying, go, in_time = threading.Event(), threading.Event(), list[bool]()

    def held(*all: Any) -> None:
        trying.set()
        in_time.append(go.wait(PATIENCE))
        raise ServerUnavailable("it was not there")

    monkeypatch.setattr(ZmqCarrier, "exchange", held)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = Engine(small(), f"127.0.0.1:{silent.getsockname()[1]}", deadline_seconds=FOR_EVER)
        assert trying.wait(PATIENCE)
        for _ in range(2):
            assert_same(engine.generate(prompt(13), 2), Engine(small()).generate(prompt(13), 2))
        go.set()
        engine.close()
    assert all(in_time)


def test_a_killed_server_is_survived_and_found_again(server: StartServer, engines: Any) -> None:
    first, right = server(), Engine(small()).generate(prompt(14), 4)
    engine = engines(small(), first.address)
    assert_same(engine.generate(prompt(14), 4), right)
    assert engine.flush(PATIENCE)
    first.kill()
    for _ in range(3):
        assert_same(engine.generate(prompt(14), 4), right)
    server(port=first.port)

    def hit() -> int:
        result = engine.generate(prompt(14), 4)
        assert_same(result, right)
        engine.flush(PATIENCE)
        return int(result.hit_tokens)

    eventually(hit)


def test_a_frozen_server_costs_one_deadline(server: StartServer, engines: Any) -> None:
    frozen, right = server(), Engine(small()).generate(prompt(15), 4)
    engine = engines(small(), frozen.address)
    engine.generate(prompt(15), 4)
    assert engine.flush(PATIENCE)
    sessions = engine.cache._scheduler, *engine.cache._workers
    set_deadline(0.5, *sessions)
    frozen.freeze()
    assert_same(engine.generate(prompt(15), 4), right)
    assert engine.flush(PATIENCE)
    set_deadline(FOR_EVER, *sessions)  # of which nothing is waited for: the server is known to be frozen
    for _ in range(2):
        assert_same(engine.generate(prompt(15), 4), right)


def test_a_killed_engine_leaves_its_kv_to_the_next(server: StartServer, engines: Any) -> None:
    address = server().address
    process = Process([sys.executable, "-m", "demo.numpy_engine", "--tiny", "--address", address])
    try:
        process.line_with('{"ready"')
        answer = eventually(lambda: (one := ask(process))["stored_tokens"] and one)  # once it is connected
    finally:
        process.kill()
        process.end()
    result = engines(small(), address).generate(prompt(16), 4)
    assert result.tokens == answer["tokens"]
    assert result.hit_tokens == answer["stored_tokens"] == 288


def ask(process: Process) -> Any:
    assert process.child.stdin is not None
    process.child.stdin.write(json.dumps({"tokens": prompt(16), "max_tokens": 4}) + "\n")
    process.child.stdin.flush()
    return json.loads(process.line_with('{"tokens"'))


# Two engines that compute one prompt


class Waiting:
    """Two engine processes of one server. The first one computes a long prompt, and the second one waits for that."""

    def __init__(self, server: Server) -> None:
        self.server = server
        command = [sys.executable, "-m", "demo.numpy_engine", "--tiny", "--address", server.address]
        command += ["--deadline-seconds", str(PATIENCE)]
        self.engines = [Process(command) for _ in range(2)]
        self.tokens: list[int] = []

    def begin(self) -> None:
        for at, engine in enumerate(self.engines):
            engine.line_with('{"ready"')
            eventually(lambda engine=engine, at=at: self.ask(engine, prompt(30 + at), wait=True)["stored_tokens"])

    def ask(self, engine: Process, tokens: list[int], wait: bool = False) -> Any:
        assert engine.child.stdin is not None
        engine.child.stdin.write(json.dumps({"tokens": tokens, "max_tokens": 4}) + "\n")
        engine.child.stdin.flush()
        return self.answer(engine) if wait else None

    @staticmethod
    def answer(engine: Process) -> Any:
        return json.loads(engine.line_with('{"tokens"'))

    def counter(self, name: str) -> float:
        return self.server.counters().get(name, 0)

    def wait(self, seed: int) -> bool:
        """Ask both engines the same, and return once the second one waits; False if the first one was too fast to see that."""
        self.tokens = prompt(seed, 3000)
        self.ask(self.engines[0], self.tokens)
        computes = eventually(lambda: self.counter("promised_chunks") or self.ended(self.engines[0]))
        self.ask(self.engines[1], self.tokens)
        return (
            computes is not True
            and eventually(lambda: self.counter("fetches_open") or self.ended(self.engines[1])) is not True
        )

    def wait_for_one(self, seed: int) -> None:
        """As `wait`, with other prompts until the second engine has been seen to wait."""
        for number in range(seed, seed + 5):
            if self.wait(number):
                return
            for engine in self.engines:
                self.answer(engine)
        raise AssertionError("the second engine waits for none of five prompts")

    @staticmethod
    def ended(engine: Process) -> bool:
        """Whether the engine has answered."""
        return any('{"tokens"' in line for line in list(engine.lines.queue) if line)

    def close(self) -> None:
        for engine in self.engines:
            engine.end()


@pytest.fixture
def waiting(server: StartServer) -> Iterator[Waiting]:
    both = Waiting(
        server(flags=("--worth", "always"))
    )  # however busy the machine was when the engines measured their paces
    try:
        both.begin()
        yield both
    finally:
        both.close()


def right_answer(tokens: list[int]) -> list[int]:
    return Engine(small(num_blocks=256)).generate(tokens, 4).tokens


def test_the_second_engine_waits_for_what_the_first_one_computes(waiting: Waiting) -> None:
    for seed in range(40, 45):
        waiting.wait(seed)
        first, second = map(waiting.answer, waiting.engines)
        assert first["tokens"] == second["tokens"]
        if waiting.counter("awaited_tokens_total"):
            break
    assert waiting.counter("awaited_tokens_total") > 0 and second["hit_tokens"] > 0
    assert second["tokens"] == right_answer(waiting.tokens)
    eventually(lambda: not waiting.counter("leases") and not waiting.counter("promised_chunks"))


def test_a_wait_for_an_engine_that_is_killed_ends_and_the_answer_is_right(waiting: Waiting) -> None:
    waiting.wait_for_one(50)
    waiting.engines[0].kill()
    second = waiting.answer(waiting.engines[1])
    assert second["tokens"] == right_answer(waiting.tokens)
    eventually(lambda: not waiting.counter("leases") and not waiting.counter("promised_chunks"))
    assert not waiting.counter("fetches_open") and waiting.counter("reservations") == 0


def test_a_wait_for_an_engine_that_is_stopped_ends_and_both_answers_are_right(waiting: Waiting) -> None:
    waiting.wait_for_one(60)
    waiting.engines[0].freeze()
    second = waiting.answer(waiting.engines[1])
    assert waiting.ask(waiting.engines[1], waiting.tokens, wait=True)["tokens"] == second["tokens"]
    waiting.engines[0].thaw()
    assert waiting.answer(waiting.engines[0])["tokens"] == second["tokens"] == right_answer(waiting.tokens)
    eventually(lambda: not waiting.counter("leases") and not waiting.counter("promised_chunks"))
