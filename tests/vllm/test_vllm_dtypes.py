"""Quantized KV: what is loaded gives the answers of what was computed, and scales are as much of it as the numbers.

Without AVX-512 vLLM-CPU has no kernels for it, so those here are in PyTorch (`quantized_kv.py`). Specs, tensors, static scales
and views of scales are vLLM's own.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_processes import PYTHON, Engine, Server, environment

from prompts import assert_same, differs, tokens
from real_engines import ROOT

PROMPTS = [tokens(300, 900), tokens(429, 901)]
WHOLE = [288, 416]
"""Their tokens in whole chunks."""
Outputs = list[dict[str, Any]]


@contextlib.contextmanager
def engine_with(folder: Path, name: str, model: Path, server: Server, dtype: str) -> Iterator[Engine]:
    options = {"kv_cache_dtype": dtype, "max_model_len": 1024, "kv_transfer_config": server.config()}
    options |= {"enable_prefix_caching": False, "num_gpu_blocks_override": 12}
    engine = Engine(folder, name, model, {"KERNELS_IN_PYTORCH": "1"}, **options)
    try:
        engine.connected()
        yield engine
        assert "Traceback" not in engine.text()
    finally:
        engine.end()


def one_by_one(engine: Engine) -> Outputs:
    """In the same steps every time: a rounding that differs may be the next number of eight bits."""
    return [engine.generate([prompt])[0] for prompt in PROMPTS]


def cached(outputs: Outputs) -> list[int]:
    return [output["cached"] for output in outputs]


def comes_back(engine: Engine) -> Outputs:
    """Check that the answers, and the bytes of whole blocks, are the same when KV is loaded. Returns the computed answers."""
    cold = one_by_one(engine)
    assert cached(cold) == [0, 0], "nobody's KV of another dtype or of other scales is ours"
    engine.forget()  # returns once the stores have let go of their blocks
    stored = engine.ask("digests", wipe=True)["blocks"]
    last = engine.generate(PROMPTS[1:])  # the blocks of the first prompt may have been given to it
    loaded = [digest for digest in engine.ask("digests")["blocks"] if digest in stored and digest != stored[-1]]
    assert len(loaded) == 3, "the three whole blocks of the prompt are back, byte for byte"
    warm = one_by_one(engine)
    assert cached(warm) == WHOLE
    assert_same(warm + last, cold + cold[1:])
    return cold


def matters(engine: Engine, **how: Any) -> None:
    """Check that answers differ where something else than the prompt's KV is loaded. It stays in the server."""
    right = one_by_one(engine)[:1]
    engine.ask("spoil", group=0, **how)
    wrong = engine.generate(PROMPTS[:1])
    assert cached(wrong) == cached(right) == WHOLE[:1]
    assert differs(wrong, right)


@pytest.mark.parametrize("dtype", ["int8_per_token_head", "fp8_per_token_head"])
def test_scales_of_tokens_and_heads_travel_with_them(folder: Path, model: Path, server: Server, dtype: str) -> None:
    """An engine that has not computed anything yet loads them, too: vLLM sets all scales to 1.0 in its first forward."""
    with engine_with(folder, f"{dtype}-first", model, server, dtype) as engine:
        cold = comes_back(engine)
    with engine_with(folder, f"{dtype}-second", model, server, dtype) as engine:
        warm = one_by_one(engine)
        assert cached(warm) == WHOLE
        assert_same(warm, cold)
        matters(engine, scales=True)


@pytest.fixture(scope="module")
def scaled(folder: Path, model: Path) -> list[Path]:
    """The model with static scales of its KV, and with others."""
    made = [folder / "scales-of-one", folder / "scales-of-another"]
    for path, scales in zip(made, ("0.02", "0.3"), strict=True):
        command = [PYTHON, str(ROOT / "tests/scripts/kv_scales.py"), str(path), str(model), scales]
        subprocess.run(command, check=True, timeout=600)
    return made


def test_static_scales_are_part_of_the_model(folder: Path, scaled: list[Path], server: Server) -> None:
    answers = []
    for path in scaled:
        with engine_with(folder, path.name, path, server, "fp8") as engine:
            answers.append(comes_back(engine))
            matters(engine)
    assert differs(*answers)


def test_copies_of_every_dtype_in_vllms_own_tensors() -> None:
    """In every order of memory that vLLM has, also those of GPUs; and vLLM-CPU's own packing, found by asking its kernel."""
    script = [PYTHON, str(Path(__file__).with_name("dtypes.py"))]
    done = subprocess.run(script, env=environment(), stdout=subprocess.PIPE, text=True, timeout=400, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    refused = found.pop("refused")
    assert len(found) > 30 and set(found.values()) == {""}, found
    for dtype, line in refused.items():
        assert line.startswith(f"refused: KV dtype {dtype!r}") and "use --kv-cache-dtype" in line
