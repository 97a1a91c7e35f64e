"""`lmcache demo` where vLLM is installed: in vLLM's interpreter, with the sources that are tested."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vllm_processes import PYTHON, environment

import lmcache


def test_the_demo_shows_hits_and_the_same_answers(model: Path) -> None:
    command = [
        PYTHON,
        "-m",
        "lmcache.cli.main",
        "demo",
        "--model",
        str(model),
        "--tokens",
        "1024",
        "--l1-size-gb",
        "0.5",
    ]
    flags = "--dtype float32 --enforce-eager --kv-cache-memory-bytes 268435456 --max-model-len 2048"
    inside = environment(PYTHONPATH=str(Path(lmcache.__file__).parents[1]))
    done = subprocess.run(
        [*command, "--vllm", flags], capture_output=True, text=True, env=inside, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The answers are the same in all rounds." in done.stdout and "after a restart of the engine" in done.stdout
