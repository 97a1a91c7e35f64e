"""With pages of 1, 16 and 64 tokens: whatever is reused, the answer is the one without reuse, and reuse there is."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import CHUNK, LONG, POOL_TOKENS, Engine, World

from prompts import assert_same, mixed, tokens
from servers import eventually


@pytest.fixture(scope="module", params=[1, 16, 64])
def engine(request: pytest.FixtureRequest, world: World, folder: Path, model: Path) -> Iterator[Engine]:
    if request.param == 1:
        yield world.first
        return
    made = Engine(folder, model, request.param, {"mp_host": "tcp://127.0.0.1", "mp_port": world.server.port})
    made.connected()
    yield made
    made.end()


def reusable(prompt: list[int], page_size: int) -> int:
    """SGLang computes the last token always, and takes whole pages; LMCache has whole chunks."""
    pages = (len(prompt) - 1) // page_size * page_size
    return pages // CHUNK * CHUNK // page_size * page_size


def test_what_an_engine_with_other_pages_has_stored(engine: Engine, world: World) -> None:
    """For the first engine there is nothing yet."""
    found = engine.answer(mixed()[4])
    assert_same([found], world.expected[4:5])
    assert found["cached"] == (0 if engine.page_size == 1 else reusable(mixed()[4], engine.page_size))


def test_cold_and_then_a_hit(engine: Engine, world: World) -> None:
    salt = f"pages of {engine.page_size}"
    assert_same(engine.answers(mixed(), extra_key=salt), world.expected)
    for number, prompt in enumerate(mixed()):
        engine.flush()
        hit = engine.answer(prompt, extra_key=salt)
        assert_same([hit], world.expected[number : number + 1])
        assert hit["cached"] == reusable(prompt, engine.page_size)
    engine.flush()
    other = engine.answer(mixed()[0], extra_key=salt + ", another tenant")
    assert_same([other], world.expected[:1])
    assert other["cached"] == 0


def test_many_at_once(engine: Engine, world: World) -> None:
    engine.answers(mixed())
    engine.flush()
    hits = engine.answers(mixed())
    assert_same(hits, world.expected)
    for prompt, hit in zip(mixed(), hits, strict=True):
        assert hit["cached"] >= reusable(prompt, engine.page_size)


def test_a_prompt_that_is_computed_in_parts(engine: Engine, world: World) -> None:
    cold = engine.answer(LONG, extra_key=f"parts {engine.page_size}")
    engine.flush()
    hit = engine.answer(LONG, extra_key=f"parts {engine.page_size}")
    assert_same([cold, hit], [world.long, world.long])
    assert (cold["cached"], hit["cached"]) == (0, reusable(LONG, engine.page_size))


def test_a_local_hit_and_then_more_from_lmcache(engine: Engine, world: World) -> None:
    engine.answer(LONG)
    engine.flush()
    engine.answer(LONG[:700], max_tokens=1)
    hit = engine.answer(LONG)
    assert_same([hit], [world.long])
    assert hit["cached"] >= reusable(LONG, engine.page_size)


def test_the_answer_is_kept_as_well(engine: Engine) -> None:
    """A conversation goes on: what was said is part of the next prompt."""
    prompt = tokens(200, 30 + engine.page_size)
    said = engine.answer(prompt, max_tokens=200)["tokens"]
    longer = prompt + said + tokens(40, 31)
    engine.flush()
    warm = engine.answer(longer)
    engine.flush()
    assert warm["cached"] == (len(prompt) + len(said) - 1) // max(CHUNK, engine.page_size) * max(
        CHUNK, engine.page_size
    )
    assert_same([engine.answer(longer, extra_key="not seen")], [warm])


def test_what_the_radix_tree_had_to_evict(engine: Engine, world: World) -> None:
    engine.answer(LONG)
    for number in range(3):
        engine.answer(tokens(POOL_TOKENS // 2, 40 + number), max_tokens=1)
    before = engine.text().count("Retrieved")
    hit = engine.answer(LONG)
    eventually(lambda: engine.text().count("Retrieved") > before)
    assert_same([hit], [world.long])
    assert hit["cached"] >= reusable(LONG, engine.page_size)


def test_aborted_requests(engine: Engine, world: World) -> None:
    """At every stage, as its log tells: waiting, computing its parts, loaded. Nothing stays locked, and nothing is mixed up."""
    engine.flush()
    prompts = [LONG, *mixed()[:5], tokens(1400, 50), tokens(900, 51)]
    for stage, line in enumerate(("", "Prefill batch", "Retrieved")):
        asking = [
            threading.Thread(target=_ask_in_vain, args=(engine, prompt, f"aborted-{stage}-{number}"))
            for number, prompt in enumerate(prompts)
        ]
        for number, thread in enumerate(asking):
            before = engine.text().count(line)
            thread.start()
            if line:
                eventually(lambda: engine.text().count(line) > before or not thread.is_alive())  # noqa: B023
            engine.post("/abort_request", {"rid": f"aborted-{stage}-{number}"})
        engine.post("/abort_request", {"abort_all": True})
        for thread in asking:
            thread.join()
        assert_same(engine.answers(mixed()), world.expected)
        engine.flush()
    assert_same([engine.answer(LONG)], [world.long])


def _ask_in_vain(engine: Engine, prompt: list[int], request_id: str) -> None:
    """What SGLang says of an aborted request depends on how far it was."""
    with contextlib.suppress(urllib.error.HTTPError):
        engine.ask(prompt, max_tokens=40, rid=request_id)
