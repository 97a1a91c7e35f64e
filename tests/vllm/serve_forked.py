"""`vllm serve` in a fork that has imported it: `python serve_forked.py serve ARGUMENTS`. Its processes are forks as well.

vLLM-CPU spawns them, and each would import everything once more. With data parallelism these are five, and the first one has
two minutes for it, which are not enough on a busy machine.
"""

from __future__ import annotations

import multiprocessing.context
import os
import sys

os.dup2(2, 1)  # nobody reads its stdout, and vLLM would wait for that
multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")  # type: ignore[attr-defined]
sys.argv[0] = "vllm"

from vllm.entrypoints.cli.main import main  # noqa: E402 - it is imported by what forked this

if __name__ == "__main__":
    main()
