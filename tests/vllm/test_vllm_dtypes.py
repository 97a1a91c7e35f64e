"""Quantized KV: what is loaded gives the answers of what was computed, and scales are as much of it as the numbers.

Without AVX-512 vLLM-CPU has no kernels for it, so these are in PyTorch (`quantized_kv.py`). Specs, tensors and views of scales
are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_processes import Engine, Server

from prompts import assert_same, tokens

PROMPTS = [tokens(300, 900), tokens(300, 900)[:200] + tokens(90, 901), tokens(129, 902)]
WHOLE = [288, 288, 128]
"""Tokens of them in whole chunks, without the last one."""
DTYPES = ["fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head"]


@pytest.fixture(scope="module", params=DTYPES)
def engine(folder: Path, model: Path, server: Server, request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = start(folder, model, server, request.param, "first")
    yield made
    made.end()


def start(folder: Path, model: Path, server: Server, dtype: str, name: str) -> Engine:
    options = {"kv_cache_dtype": dtype, "max_model_len": 1024, "kv_transfer_config": server.config()}
    made = Engine(folder, f"{dtype}-{name}", model, {"KERNELS_IN_PYTORCH": "1"}, **options)
    return made


def test_warm(engine: Engine) -> None:
    engine.connected()
    cold = engine.generate(PROMPTS)
    engine.forget()
    warm = engine.generate(PROMPTS)
    assert_same(warm, cold)
    assert [one["cached"] for one in warm] == WHOLE
