"""What operators do over HTTP with the KV of prompts, on real servers with engines: pins, lists, deletions, prefetches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from engine_process import Engine
from servers import PATIENCE, Server

StartServer = Callable[..., Server]
StartEngine = Callable[..., Engine]
CHUNK = 16


def prompt(seed: int, tokens: int = 160) -> list[int]:
    return [(seed * 7919 + at * 31) % 50000 for at in range(tokens)]


def call(server: Server, method: str, path: str, content: Any = None, **more: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{server.http_port}{path}"
    return httpx.request(method, url, json=content, timeout=PATIENCE, trust_env=False, **more)


def ask(server: Server, method: str, path: str, content: Any = None, status: int = 200) -> Any:
    answer = call(server, method, path, content)
    assert answer.status_code == status, answer.text
    return answer.json()


def in_l1(server: Server, **named: Any) -> int:
    """Tokens of a prompt that are in L1, as the route says, which touches nothing."""
    (found,) = ask(server, "POST", "/cache/lookup", named)["models"]
    return int(found["l1_tokens"])


def test_a_pinned_prompt_survives_whatever_comes_after_it(server: StartServer, engine: StartEngine) -> None:
    cache = server(l1=4, chunk=CHUNK)
    one = engine(cache)
    kept = prompt(1)
    assert one.store(kept) == 160
    looked = ask(cache, "POST", "/cache/lookup", {"tokens": kept})
    (found,) = looked["models"]
    assert (found["tokens"], found["l1_tokens"], looked["chunk_size"]) == (160, 160, CHUNK)
    pin = ask(cache, "POST", "/cache/pins", {"tokens": [*kept, 1, 2], "seconds": 3000, "note": "the system prompt"})
    assert (pin["pinned_tokens"], pin["tokens"], pin["chunks"]) == (160, 162, 10)
    other = 2
    while cache.counters()["evicted_chunks_total"] < 300:
        one.store(prompt(other, 1600))
        other += 1
    assert one.hit_tokens(kept) == 160 and one.hit_tokens(prompt(2, 1600)) < 1600
    listed = ask(cache, "GET", "/cache/pins")
    assert [row["id"] for row in listed["pins"]] == [pin["id"]] and listed["pins"][0]["note"] == "the system prompt"
    index, counters = cache.status()["index"], cache.counters()
    assert listed["pinned_bytes"] == index["pinned_bytes"] == counters["pinned_bytes"] == pin["bytes"] > 0
    assert index["pins"] == 1 and counters["pinned_chunks"] == 10
    ask(cache, "DELETE", f"/cache/pins/{pin['id']}")
    assert ask(cache, "GET", "/cache/pins")["pins"] == [] and cache.counters()["pinned_bytes"] == 0
    while in_l1(cache, tokens=kept):  # without touching it
        one.store(prompt(other, 1600))
        other += 1
