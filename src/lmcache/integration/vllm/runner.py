"""The model runner of this process, which vLLM gives to no connector."""

from __future__ import annotations

from typing import Any

from lmcache.engine.wrapped import call_before, class_at

_RUNNERS = ("vllm.v1.worker.gpu_model_runner.GPUModelRunner",)
"""The classes whose instances have the model; the CPU's inherits from it."""
_runner: list[Any] = []
"""The model runner of this process, once it has been given its KV cache."""


def watch_runner() -> None:
    """Note the model runner of this process when it is given its KV cache, which is after connectors are made."""
    for path in _RUNNERS:
        if (owner := class_at(path)) is not None:
            call_before(owner, ("initialize_kv_cache",), _note)


def noted_runner() -> Any:
    """Return the model runner that was given its KV cache last; None if none was."""
    return _runner[0] if _runner else None


def _note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _runner[:] = args[:1]
