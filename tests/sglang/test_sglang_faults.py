"""Whatever happens to the daemon or to the engine, requests are answered, rightly, and what was stored is found again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import Daemons, Engine, Output, World

from prompts import assert_same, tokens
from servers import Server, eventually

PAGE_SIZE = 16
DEADLINE_SECONDS = 2.0
NOISE_SECONDS = 3.0
"""A shared machine's: what a short request may take longer for no reason of ours."""
PROBE = tokens(600, 70)


@pytest.fixture(scope="module")
def server(world: World) -> Server:
    return world.server


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path, world: World) -> Iterator[Engine]:
    """Another one, after the first has been killed."""
    world.first.answer(PROBE)
    eventually(lambda: "out of total 607 tokens" in world.first.text())
    world.first.kill()
    settings = {"mp_host": "127.0.0.1", "mp_port": world.server.port, "blocking_timeout_secs": DEADLINE_SECONDS}
    made = Engine(folder, model, PAGE_SIZE, settings)
    yield made
    made.end()


@pytest.fixture(scope="module")
def expected(engine: Engine) -> Output:
    return engine.answer(PROBE, extra_key="seen by nobody")


def test_a_new_engine_finds_what_a_killed_one_has_stored(engine: Engine, expected: Output) -> None:
    hit = engine.answer(PROBE)
    assert (expected["cached"], hit["cached"]) == (0, (len(PROBE) - 1) // PAGE_SIZE * PAGE_SIZE)
    assert_same([hit], [expected])


def test_a_frozen_daemon_costs_one_deadline(engine: Engine, server: Server, expected: Output) -> None:
    normal = _timed(engine, expected)
    server.freeze()
    try:
        assert _timed(engine, expected) < normal + DEADLINE_SECONDS + NOISE_SECONDS
        assert _timed(engine, expected) < normal + NOISE_SECONDS
    finally:
        server.thaw()
    _await_hit(engine, expected)


def test_a_killed_daemon_and_one_started_later(
    engine: Engine, server: Server, daemons: Daemons, expected: Output
) -> None:
    """The later one has other chunks."""
    normal = _timed(engine, expected)
    server.kill()
    assert _timed(engine, expected) < normal + DEADLINE_SECONDS + NOISE_SECONDS
    assert _timed(engine, expected) < normal + NOISE_SECONDS
    daemons(server.port, chunk=24)
    _await_hit(engine, expected)


def test_a_cleared_cache(engine: Engine, expected: Output) -> None:
    _await_hit(engine, expected)
    engine.post("/hicache/storage-backend/clear")
    engine.flush()
    found = engine.answer(PROBE)
    assert found["cached"] == 0
    assert_same([found], [expected])


def test_new_weights_find_nothing_of_the_old_ones(engine: Engine, model: Path, expected: Output) -> None:
    """They are the same here, so that the answer can be compared; SGLang does not know that, and neither do we."""
    _await_hit(engine, expected)
    engine.post("/update_weights_from_disk", {"model_path": str(model)})
    found = engine.answer(PROBE)
    assert found["cached"] == 0
    assert_same([found], [expected])
    _await_hit(engine, expected)


def _timed(engine: Engine, expected: Output) -> float:
    engine.flush()
    begin = time.monotonic()
    assert_same([engine.answer(PROBE)], [expected])
    return time.monotonic() - begin


def _await_hit(engine: Engine, expected: Output, seconds: float = 60.0) -> None:
    """Until the engine has found the daemon again and reuses what it stored there."""

    def hit() -> bool:
        engine.flush()
        found = engine.answer(PROBE)
        assert_same([found], [expected])
        return bool(found["cached"])

    eventually(hit, seconds)
