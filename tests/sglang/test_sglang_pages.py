"""docs/quickstart/sglang.md, with real SGLang."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sglang_processes import POOL_TOKENS, PYTHON, START_SECONDS, environment

from pages import NEEDS_ENGINE, Shell, commands, found_in_l1


def test_the_quick_start_reaches_a_hit(model: Path, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    flags = (
        "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
        "--disable-cuda-graph --skip-server-warmup --dtype float32 --context-length 4000 --host 127.0.0.1 "
        f"--max-total-tokens {POOL_TOKENS}"
    )
    shell = Shell(tmp_path, folders, **environment(), ENGINE_PYTHON=PYTHON, ENGINE_FLAGS=flags, MODEL=str(model))
    said = shell.run([one.text for one in commands("quickstart/sglang.md", NEEDS_ENGINE["sglang"])], 2 * START_SECONDS)
    assert found_in_l1(said) == 768, said[-3000:]
