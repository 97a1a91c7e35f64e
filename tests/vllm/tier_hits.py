"""What tests of tiers with real vLLM share: prompts are stored, the server ends, and another one has them from the tier alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import Engine, Server

from prompts import assert_same, tokens

CHUNKS = 18 + 4
"""Of 16 tokens, in both prompts: 300 tokens, and 60 behind the first 200 of those."""


def prompts_of(seed: int) -> list[list[int]]:
    """Return two prompts that begin alike."""
    return [tokens(300, seed), tokens(300, seed)[:200] + tokens(60, seed + 1)]


def generate_after(engine: Engine, sessions: int, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Generate once the engine has connected so many times: two for each server, which it finds by itself."""
    engine.connected(sessions)
    engine.forget()
    return engine.generate(prompts)


@contextmanager
def restarted(folder: Path, name: str, model: Path) -> Iterator[Callable[..., None]]:
    """Start an engine, which outlives its servers. Yields hits(tier, url, prompts, **environment of the servers), which stores in
    the tier through one server, and checks that the next one hits all of it, with the same answers."""
    server = Server(folder, 16, 0, f"{name}-l1-only")
    engine, port, sessions = None, server.port, 2

    def serve(log: str, url: str, environment: dict[str, str]) -> None:
        nonlocal server
        server.end()
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            server = Server(folder, 16, port, log, "--l2", url, "--worth", "always")

    def generate(prompts: list[list[int]]) -> list[dict[str, Any]]:
        nonlocal sessions
        assert engine is not None
        sessions += 2
        return generate_after(engine, sessions, prompts)

    def counters() -> dict[str, int]:
        (tier,) = server.status()["tiers"]
        return dict(tier["counters"])

    def hits(tier: str, url: str, prompts: list[list[int]], **environment: str) -> None:
        serve(f"{tier}-writes", url, environment)
        cold = generate(prompts)
        shards = CHUNKS + 1  # the first answer fills one more
        server.wait_until(lambda: counters().get("kept_shards", 0) >= shards, f"{shards} shards in {tier}", 60)
        serve(f"{tier}-reads", url, environment)
        warm = generate(prompts)
        assert_same(warm, cold)
        assert [output["cached"] for output in warm] == [288, 256], tier
        assert counters()["loaded_shards"] == CHUNKS and not counters().get("written_shards")
        records = [one for one in server.status()["fetches"] if one["outcome"] == "arrived"]
        assert len({one["request"] for one in records} - {""}) == 2, "each under vLLM's id of the request"

    try:
        engine = Engine(folder, name, model, kv_transfer_config=server.config(), max_model_len=1024)
        engine.connected(sessions)
        yield hits
        assert engine.text().count("Traceback") == 0
    finally:
        if engine is not None:
            engine.end()
        server.end()
