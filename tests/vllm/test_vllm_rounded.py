"""KV that an engine rounds (`lossy_kv=int8-l1`): answers from it are those from KV that NumPy has rounded, to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import Engine, Server

from prompts import differs, tokens

PROMPT = tokens(385, 910)
"""Three blocks of vLLM-CPU, and the token that is always computed."""


@contextlib.contextmanager
def engine_with(folder: Path, name: str, model: Path, server: Server, dtype: str, lossy_kv: str) -> Iterator[Engine]:
    config = server.config(**{"lmcache.mp.lossy_kv": lossy_kv})
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024, "kv_transfer_config": config}
    engine = Engine(folder, name, model, **options)
    try:
        engine.connected()
        yield engine
        assert "Traceback" not in engine.text()
    finally:
        engine.end()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hits_are_what_numpy_rounds(folder: Path, model: Path, server: Server, dtype: str) -> None:
    with engine_with(folder, f"rounding-{dtype}", model, server, dtype, "int8-l1") as engine:
        (cold,) = engine.generate([PROMPT])
        assert cold["cached"] == 0
        (exact,) = engine.generate([PROMPT])
        assert exact["cached"] == 384, "of vLLM's own cache"
        engine.ask("round_trip")
        (rounded,) = engine.generate([PROMPT])
        assert rounded["cached"] == 384 and differs([rounded], [exact])
        engine.forget()
        (loaded,) = engine.generate([PROMPT])
        assert loaded["cached"] == 384
        assert (loaded["tokens"], loaded["logprobs"]) == (rounded["tokens"], rounded["logprobs"])
        near = [abs(a - b) for a, b in zip(loaded["logprobs"], exact["logprobs"], strict=True)]
        assert loaded["tokens"][0] == exact["tokens"][0] and near[0] < 0.1
        layouts = [told["layout"] for told in server.status()["engines"] if told["role"] == "worker"]
        (rank,) = [one for one in layouts if one["l1_codec"] == "int8" and one["kv_dtype"] == dtype]
        values = rank["num_layers"] * 2 * rank["num_kv_heads"] * rank["head_size"]
        assert rank["token_bytes"] == values + values // rank["head_size"] * 4
    with engine_with(folder, f"exact-{dtype}", model, server, dtype, "none") as engine:
        (computed,) = engine.generate([PROMPT])
        assert computed["cached"] == 0, "an exact engine finds nothing of it"
