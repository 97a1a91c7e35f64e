"""docs/quickstart/vllm.md, with real vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vllm_processes import KV_BYTES, PYTHON, START_SECONDS, environment

from pages import NEEDS_ENGINE, Shell, commands, found_in_l1, stored


def test_the_quick_start_reaches_a_hit(
    folder: Path, model: Path, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    flags = f"--dtype float32 --enforce-eager --kv-cache-memory-bytes {KV_BYTES} --max-model-len 8192"
    shell = Shell(tmp_path, folders, **environment(), ENGINE_PYTHON=PYTHON, ENGINE_FLAGS=flags, MODEL=str(model))
    parts = []
    for block in commands("quickstart/vllm.md", NEEDS_ENGINE["vllm"]):
        parts += [stored(), "restart_engine"] if "after a restart" in block.title else []
        parts.append(block.text)
    assert "restart_engine" in parts and len(parts) == 6
    said = shell.run(parts, 3 * START_SECONDS)
    assert said.count('"text_completion"') == 2, said[-3000:]
    assert found_in_l1(said) >= 256, said[-3000:]
    assert "Connected to the LMCache server at" in said and "Retrieved " in said
