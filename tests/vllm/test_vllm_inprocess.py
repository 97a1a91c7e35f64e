"""In-process mode with real vLLM: a server of the engine's own, loads within the step, and the lines that users look for."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import Engine, Server
from vllm_prompts import assert_same, mixed, tokens

IN_PROCESS = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
WALK = [tokens(63, 200), [*tokens(63, 200), 17]]
"""The documentation's 31 and 32 tokens on 16-token blocks; vLLM-CPU has blocks of 32 at least."""
COST = r"size: \d+\.\d{4} gb, cost \d+\.\d\d ms, throughput: \d+\.\d\d GB/s"
TIMES = r"offload_time: \d+\.\d\d ms, put_time: \d+\.\d\d ms"


def start(folder: Path, name: str, model: Path, environ: dict[str, str] | None = None, **options: Any) -> Engine:
    small = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5", "XDG_RUNTIME_DIR": str(folder), **(environ or {})}
    config = options.pop("kv_transfer_config", IN_PROCESS)
    return Engine(folder, name, model, small, kv_transfer_config=config, max_model_len=2048, **options)


def find(log: str, *patterns: str) -> None:
    """Each pattern is in the log, behind the one before."""
    at = 0
    for pattern in patterns:
        found = re.search(pattern, log[at:])
        assert found, f"{pattern!r} is not in the rest of the log\n{log[-4000:]}"
        at += found.end()


@pytest.fixture(scope="module")
def expected(folder: Path, model: Path) -> dict[str, list[dict[str, Any]]]:
    """What vLLM answers without LMCache."""
    engine = Engine(folder, "inprocess-reference", model, max_model_len=2048, block_size=32)
    try:
        walk = [engine.generate([prompt])[0] for prompt in WALK]
        return {"walk": walk, "mixed": engine.generate(mixed())}
    finally:
        engine.end()


def test_the_documented_walk_through(folder: Path, model: Path, expected: dict[str, list[dict[str, Any]]]) -> None:
    engine = start(folder, "walk-through", model, {"LMCACHE_CHUNK_SIZE": "8"}, block_size=32)
    try:
        first = engine.generate([WALK[0]])
        second = engine.generate([WALK[1]])
        assert_same(first + second, expected["walk"])
        assert [first[0]["cached"], second[0]["cached"]] == [0, 56]
        engine.forget()  # returns when the stores have ended
        find(
            engine.text(),
            r"Reqid: \S+, Total tokens 63, LMCache hit tokens: 0, need to load: 0",
            r"Storing KV cache for 63 out of 63 tokens \(skip_leading_tokens=0\)",
            rf"Stored 63 out of total 63 tokens\. {COST}; {TIMES}",
            r"Reqid: \S+, Total tokens 64, LMCache hit tokens: 56, need to load: 24",
            rf"Retrieved 24 out of 56 required tokens \(from 64 total tokens\)\. {COST}",
            r"Storing KV cache for 8 out of 64 tokens \(skip_leading_tokens=56\)",
            rf"Stored 8 out of total 8 tokens\. {COST}; {TIMES}",
        )
    finally:
        engine.end()
