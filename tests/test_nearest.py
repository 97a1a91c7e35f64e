"""Where a prompt parts from the nearest one, to the token: found by the engine, shown by the server."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from itertools import takewhile

import pytest

from engine_process import Engine
from lmcache.chunks import TokenChain, chunk_root
from lmcache.cli.main import main
from lmcache.engine import nearest
from lmcache.engine.nearest import Nearest
from lmcache.wire import messages as m
from servers import Raw, Server, eventually
from test_requests import Bed

CHUNK = 16


def chain_of(ids: list[int], chunk: int = CHUNK) -> TokenChain:
    chain = TokenChain(chunk_root(b"f" * 16), chunk)
    chain.extend(ids)
    return chain


def missed(known: Nearest, ids: list[int], first: int = 0, chunk: int = CHUNK) -> int:
    return known.missed(chain_of(ids, chunk), ids, first)


def test_the_token_at_which_a_prompt_parts() -> None:
    known, ids = Nearest(), list(range(1000, 1100))
    assert missed(known, ids) == -1, "nothing is known yet"
    assert missed(known, [*ids[:37], 5, *ids[38:]], 2) == 37
    assert missed(known, [5, *ids[1:]]) == 0
    assert missed(known, [*ids[:37], 5, *ids[38:60], 6, *ids[61:]], 2) == 60, "the nearest is the one that parts last"
    assert missed(known, [*ids, *range(60)], 6) == -1, "it goes on where the other one ended"
    assert missed(known, ids, 2) == -1, "all of it is known"
    assert missed(known, ids[:15]) == -1, "no chunk is full"


def test_it_is_right_for_random_prompts_but_for_a_token_now_and_then() -> None:
    dice = random.Random(4)
    known, prompts, late, asked = Nearest(), list[list[int]](), 0, 0
    for _ in range(400):
        base = dice.choice(prompts) if prompts else [dice.randrange(150_000) for _ in range(128)]
        at = dice.randrange(128)
        ids = [*base[:at], *(dice.randrange(150_000) for _ in range(128 - at))]
        shared = [
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, one, strict=True))) for one in prompts
        ]
        found = missed(known, ids, max(shared, default=0) // CHUNK)
        if found >= 0:
            asked, late = asked + 1, late + (found - max(shared))
            assert found - max(shared) in (-1, 0, 1, 2) or max(shared) // CHUNK == found // CHUNK
        prompts.append(ids)
    assert asked > 350 and late < 20


def test_memory_is_bounded_and_holds_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "MOST_CHUNKS", 500)
    known, dice = Nearest(), random.Random(5)
    missed(known, [7] * 2000, chunk=256)
    tracemalloc.start()
    for _ in range(300):
        missed(known, [dice.randrange(1 << 17) for _ in range(2048)], chunk=256)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(known) <= 500 and taken < 500 * 800
    assert sum(map(len, known._branches.values())) == len(known) and max(map(len, known._branches.values())) <= 4
    one, other = Nearest(), Nearest()
    for each in (one, other):
        missed(each, list(range(64)))
    sketches = [b"".join(sketch.tobytes() for _, sketch in each._chunks.values()) for each in (one, other)]
    assert sketches[0] != sketches[1], "another process cannot compare its tokens with them"


def test_why_names_the_token(
    server: Callable[..., Server], engine: Callable[..., Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = server(chunk=CHUNK)
    bed, ids = Bed(engine(cache), name="one"), list(range(100))
    for name, prompt in (("a", ids), ("b", ids[:40] + [7] * 60), ("c", [9, *ids[1:]]), ("d", ids + [1] * 60)):
        request = bed.open(name)
        bed.requests.find(request, prompt)
        bed.store(request, prompt)
        bed.requests.give_back(request)
    records = eventually(lambda: len(now := cache.get("/requests")["requests"]) == 4 and now[0]["number"] == 4 and now)
    told = {one["request"]: (one["reason"], one["chunk"], one["differs_at"]) for one in records}
    assert told["a"] == ("never_seen", 0, -1) and told["d"] == ("longer", 6, -1)
    assert told["b"] == ("differs", 2, 40) and told["c"] == ("never_seen", 0, 0)
    main(["why", "b", "--url", f"http://127.0.0.1:{cache.http_port}"])
    assert "differs from the nearest prompt that the engine knows from token position 40 on" in capsys.readouterr().out


def test_a_position_that_does_not_fit_is_not_shown(server: Callable[..., Server]) -> None:
    cache = server(chunk=CHUNK)
    raw = Raw(cache, "raw")
    for token in (-5, 1 << 40, 999, 17):
        raw.ask(m.Lookup(raw.space, bytes(range(64)), 0, request="r", tokens=64))
        raw.ask(m.Differs("r", token))
    raw.ask(m.Lookup(raw.space, bytes(range(64)), 0, request="s", tokens=64))
    raw.ask(m.Differs("s", 15))
    shown = [one["differs_at"] for one in cache.get("/requests")["requests"]]
    assert shown == [15, -1, -1, -1, -1], "the first chunk is missing, and 17 is in the second one"
    raw.close()
