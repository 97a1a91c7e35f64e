"""Whatever happens to the daemon or to the engine, requests are answered, rightly, and what was stored is found again."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import Daemons, Engine, Output, World
from spoiler import FOLDER, HOLD

from prompts import assert_same, tokens
from servers import Server, beside, eventually

PAGE_SIZE = 16
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
    settings = {"mp_host": "127.0.0.1", "mp_port": world.server.port}
    made = Engine(folder, model, PAGE_SIZE, settings, **{FOLDER: str(folder)})
    made.connected()
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
    engine.flush()
    before = _missed_deadlines(engine)
    server.freeze()
    try:
        for _ in range(3):
            _compute(engine, expected)
        eventually(lambda: _missed_deadlines(engine) > before)
        assert _missed_deadlines(engine) <= before + 2, "one a connection, not one a call"
    finally:
        server.thaw()
    _await_hit(engine, expected)


def test_a_killed_daemon_and_one_started_later(
    engine: Engine, server: Server, daemons: Daemons, expected: Output
) -> None:
    """The later one has other chunks."""
    engine.flush()
    before = _missed_deadlines(engine)
    server.kill()
    for _ in range(2):
        _compute(engine, expected)
    assert _missed_deadlines(engine) == before, "the connection's end tells of a death"
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
    _update_weights(engine, model)
    found = engine.answer(PROBE)
    assert found["cached"] == 0
    assert_same([found], [expected])
    _await_hit(engine, expected)


def test_new_weights_wait_for_a_store(engine: Engine, model: Path, folder: Path, expected: Output) -> None:
    """SGLang does not empty its radix tree while a store runs, and then says that the update has failed."""
    _await_hit(engine, expected)
    engine.flush()
    changes, hold = engine.text().count("The weights of this engine change"), folder / HOLD
    hold.touch()
    engine.answer(tokens(400, 71))
    for _ in range(3):  # after so many steps of the scheduler only the store runs
        engine.get("/server_info")
    update = beside(lambda: _update_weights(engine, model))
    eventually(lambda: engine.text().count("The weights of this engine change") > changes)
    hold.unlink()
    assert not update.result(300)
    assert engine.answer(PROBE)["cached"] == 0
    _await_hit(engine, expected)


def test_weights_that_change_while_the_radix_tree_is_empty(engine: Engine, model: Path, expected: Output) -> None:
    """Nothing of the old weights is left then, though the update itself empties nothing."""
    _await_hit(engine, expected)
    engine.flush()
    engine.post("/update_weights_from_disk", {"model_path": str(model), "flush_cache": False})
    assert engine.answer(PROBE)["cached"] == 0
    _await_hit(engine, expected)


def _update_weights(engine: Engine, model: Path) -> str:
    """Returns what SGLang has refused. Its answers come before its scheduler has let go of their last step, and until then it
    loads the weights and does not empty its radix tree."""
    refused = ""

    def updated() -> bool:
        nonlocal refused
        try:
            engine.post("/update_weights_from_disk", {"model_path": str(model)})
        except urllib.error.HTTPError as error:
            refused = error.read().decode()
            assert "was not flushed because requests are still running" in refused
            return False
        return True

    eventually(updated)
    return refused


def _compute(engine: Engine, expected: Output) -> None:
    """An answer without the daemon; returns once what it would have stored is given up."""
    found = engine.answer(PROBE)
    assert_same([found], [expected])
    assert found["cached"] == 0
    engine.flush()


def _missed_deadlines(engine: Engine) -> int:
    """Calls that got no answer: each ends its connection, which is one line."""
    return sum("Lost the LMCache server" in line and "within the deadline" in line for line in engine.log)


def _await_hit(engine: Engine, expected: Output) -> None:
    """Until the engine has found the daemon again and reuses what it stored there."""

    def hit() -> bool:
        engine.flush()
        found = engine.answer(PROBE)
        assert_same([found], [expected])
        return bool(found["cached"])

    eventually(hit, 120.0)
