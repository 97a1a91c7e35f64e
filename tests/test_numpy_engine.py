"""The NumPy engine, alone and with a real server: the same answers whatever the cache does, and faults that are noticed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache.integration.numpy import KV_ORDERS, Engine, EngineConfig, ModelConfig, OutOfBlocks, UnfilledKV
from lmcache.integration.numpy.cached import CacheLink, Loaded, Prompt

TINY = ModelConfig.tiny()


def prompt(seed: int, length: int = 300) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, TINY.vocab, length)]


def small(**changes: Any) -> EngineConfig:
    return EngineConfig(**({"model": TINY, "num_blocks": 64} | changes))


def assert_same(result: Any, right: Any) -> None:
    assert result.tokens == right.tokens
    np.testing.assert_allclose(result.logits_first, right.logits_first, atol=1e-3)


class Server:
    """`lmcache server` as a process, on ports and with a log of its own."""

    def __init__(self, folder: Path, chunk_tokens: int, port: int = 0) -> None:
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        self.port, http_port = port or free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        command = [
            sys.executable,
            "-m",
            "lmcache.cli.main",
            "server",
            "--l1-size-gb",
            "0.1",
            "--eviction-policy",
            "LRU",
        ]
        command += ["--chunk-size", str(chunk_tokens), "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(http_port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.await_log("LMCache cache server is running...")

    def await_log(self, text: str, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        self.process.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=[16, 7, 1])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("server"), request.param)
    one.chunk_tokens = request.param  # type: ignore[attr-defined]
    yield one
    one.end()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path, 16)
    yield one
    one.end()


@pytest.fixture
def engines() -> Iterator[Any]:
    """Make engines that are closed after the test; with an address they are connected when they are returned."""
    made: list[Engine] = []

    def make(config: EngineConfig, address: str | None = None, **more: Any) -> Engine:
        made.append(engine := Engine(config, address, **more))
        assert address is None or engine.wait_connected(10.0)
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


@pytest.mark.parametrize("order", KV_ORDERS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_hits_change_no_answer_and_cross_memory_orders(server: Server, engines: Any, order: str, ranks: int) -> None:
    """What one engine stores another loads, whatever its block size and memory order; hits end inside blocks."""
    model = ModelConfig.tiny(seed=100 * ranks + KV_ORDERS.index(order))
    size: int = server.chunk_tokens  # type: ignore[attr-defined]
    tokens = prompt(7)
    right = engines(small(model=model)).generate(tokens, 6)
    first = engines(small(model=model, ranks=ranks, block_tokens=12), server.address)
    cold = first.generate(tokens, 6)
    assert first.flush()
    assert_same(cold, right)
    assert cold.hit_tokens == 0
    second = engines(small(model=model, ranks=ranks, kv_order=order, block_tokens=32), server.address)
    for _ in range(2):
        warm = second.generate(tokens, 6)
        assert_same(warm, right)
        assert warm.hit_tokens == min(len(tokens) // size * size, len(tokens) - 1)


def test_hits_begin_where_the_engines_own_prefix_ends(server: Server, engines: Any) -> None:
    model = ModelConfig.tiny(seed=31)
    alone, writer = engines(small(model=model)), engines(small(model=model), server.address)
    tokens = prompt(8)
    writer.generate(tokens, 1)
    assert writer.flush()
    reader = engines(small(model=model, prefix_caching=True), server.address)
    reader.generate(tokens[:50], 1)
    warm = reader.generate(tokens, 6)
    assert_same(warm, alone.generate(tokens, 6))
    assert warm.own_tokens == 48
    assert warm.hit_tokens >= 288 - 48


def test_shared_prefixes_under_block_reuse(server: Server, engines: Any) -> None:
    """Twenty requests through a pool for one and a half, with freed blocks full of NaN."""
    model = ModelConfig.tiny(seed=32)
    alone, engine = engines(small(model=model)), engines(small(model=model, num_blocks=30), server.address)
    rng, hits = np.random.default_rng(9), 0
    for number in range(20):
        tokens = prompt(40 + number % 3, int(rng.integers(20, 250))) + prompt(number, int(rng.integers(0, 60)))
        result = engine.generate(tokens, 4)
        assert_same(result, alone.generate(tokens, 4))
        hits += result.hit_tokens
    assert hits > 1000


def test_other_salts_and_models_share_nothing(own_server: Server, engines: Any) -> None:
    engine = engines(small(), own_server.address)
    engine.generate(prompt(10), 1, cache_salt="a")
    assert engine.flush()
    assert engine.generate(prompt(10), 1, cache_salt="b").hit_tokens == 0
    assert engine.generate(prompt(10), 1, cache_salt="a").hit_tokens > 0
    other = engines(small(model=ModelConfig.tiny(seed=99)), own_server.address)
    assert other.generate(prompt(10), 1, cache_salt="a").hit_tokens == 0


# Faults that must be noticed


def test_kv_that_was_never_loaded_is_noticed(monkeypatch: pytest.MonkeyPatch, own_server: Server, engines: Any) -> None:
    def claim(self: CacheLink, request: Prompt, tokens: list[int], blocks: list[int], have: int) -> Loaded:
        return Loaded(160)

    engine = engines(small(), own_server.address)
    monkeypatch.setattr(CacheLink, "load", claim)
    with pytest.raises(UnfilledKV, match="tokens 160 to 300"):
        engine.generate(prompt(11), 1)


@pytest.mark.parametrize("at", [0, 112, 272])
def test_one_wrong_run_of_16_tokens_is_noticed(
    monkeypatch: pytest.MonkeyPatch, own_server: Server, engines: Any, at: int
) -> None:
    engine = engines(small(), own_server.address)
    right = engine.generate(prompt(12), 1)
    assert engine.flush()
    load = CacheLink.load

    def load_and_spoil(self: CacheLink, request: Prompt, tokens: list[int], blocks: list[int], have: int) -> Loaded:
        loaded = load(self, request, tokens, blocks, have)
        for view in (*engine.ranks[0].keys, *engine.ranks[0].values):
            view[blocks[at // 16]] = view[blocks[5]]
        return loaded

    assert_same(engine.generate(prompt(12), 1), right)
    monkeypatch.setattr(CacheLink, "load", load_and_spoil)
    spoiled = engine.generate(prompt(12), 1)
    assert spoiled.hit_tokens == 288
    assert np.abs(spoiled.logits_first - right.logits_first).max() > 0.01


# Deaths


def test_without_a_server_the_engine_answers_and_waits_for_nothing() -> None:
    engine = Engine(small(), f"127.0.0.1:{free_port()}")
    began = time.monotonic()
    right = Engine(small()).generate(prompt(13), 2)
    alone_seconds = time.monotonic() - began
    result = engine.generate(prompt(13), 2)
    engine.close()
    assert_same(result, right)
    assert result.seconds < alone_seconds + 0.5


def test_a_killed_server_is_survived_and_found_again(tmp_path: Path, engines: Any) -> None:
    server = Server(tmp_path, 16)
    engine, right = engines(small(), server.address), Engine(small()).generate(prompt(14), 4)
    assert_same(engine.generate(prompt(14), 4), right)
    server.end(signal.SIGKILL)
    for _ in range(3):
        assert_same(engine.generate(prompt(14), 4), right)
    server = Server(tmp_path, 16, server.port)
    try:
        end = time.monotonic() + 20
        while (result := engine.generate(prompt(14), 4)).hit_tokens == 0:
            assert time.monotonic() < end, "the engine did not find the new server"
            assert_same(result, right)
            engine.flush()
            time.sleep(0.05)
        assert_same(result, right)
    finally:
        server.end()


def test_a_frozen_server_costs_one_deadline(own_server: Server, engines: Any) -> None:
    engine, right = engines(small(), own_server.address, deadline_seconds=0.5), Engine(small()).generate(prompt(15), 4)
    engine.generate(prompt(15), 4)
    assert engine.flush()
    own_server.process.send_signal(signal.SIGSTOP)
    for _ in range(2):
        result = engine.generate(prompt(15), 4)
        assert_same(result, right)
        assert result.ttft_seconds < 0.5 + 1.5, "one deadline, and the time to compute on a busy machine"


def test_a_killed_engine_leaves_its_kv_to_the_next(own_server: Server, engines: Any) -> None:
    command = [sys.executable, "-m", "lmcache.integration.numpy", "--tiny", "--address", own_server.address]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"ready": True, "connected": True}
    process.stdin.write(json.dumps({"tokens": prompt(16), "max_tokens": 4}) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    result = engines(small(num_blocks=512), own_server.address).generate(prompt(16), 4)
    assert result.tokens == answer["tokens"]
    assert result.hit_tokens == answer["stored_tokens"] // 16 * 16 == 288
