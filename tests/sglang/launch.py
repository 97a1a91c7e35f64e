"""Start SGLang's server in a fork that has imported it: `python launch.py ARGUMENTS`, those of `sglang.launch_server`.

What its CPU build lacks for models with sliding windows comes from `cpu_kernels`.
SGLang spawns its scheduler and its detokenizer, each of which would import everything once more. Here they are forks as well.
"""

from __future__ import annotations

import multiprocessing.context
import runpy
import sys

import cpu_kernels
import spoiler

multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.get_context("fork")  # type: ignore[attr-defined]
cpu_kernels.install()
spoiler.install()
sys.argv[0] = "sglang.launch_server"
runpy.run_module("sglang.launch_server", run_name="__main__")
