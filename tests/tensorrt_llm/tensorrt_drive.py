"""Engines of `tensorrt_executor.py` that do what they are told on stdin, as `commands.serve` says.

`python tensorrt_drive.py [old]`, where there is torch. Commands: the functions `do_*`.
"""

from __future__ import annotations

import gc
import importlib
import math
import random
import sys
from types import SimpleNamespace
from typing import Any

import tensorrt_executor as double
from commands import PATIENCE, serve, set_deadline

from lmcache.engine import connection, identity

PRESETS = {
    "lmcache": ("lmcache.integration.tensorrt_llm.tensorrt_adapter", "LMCache"),
    "lmcache-mp": ("lmcache.integration.tensorrt_llm.tensorrt_mp_adapter", "LMCacheMP"),
}
"""As TensorRT-LLM's connectors/registry.py has them."""
identity.process_started = lambda: (
    math.inf
)  # its engines are younger than their weights, though this process may not be
engines: dict[str, double.Executor] = {}
numbers = iter(range(1, 1 << 30))


def do_engine(
    name: str,
    model: str,
    preset: str = "lmcache-mp",
    url: str = "",
    ranks: int = 1,
    args: dict[str, Any] | None = None,
    connected: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """connected: there is a server, and it is waited for with patience, so that a busy machine makes no miss of a hit."""
    connection.START_SECONDS = PATIENCE if connected else 0.0
    module, prefix = PRESETS[preset]
    settings: dict[str, Any] = {
        "model": model,
        "tensor_parallel_size": ranks,
        "dtype": "float32",
        "attn_backend": "TRTLLM",
        "kv_connector_config": SimpleNamespace(connector=preset, server_url=url or None),
        "kv_cache_config": SimpleNamespace(dtype="auto", tokens_per_block=more.get("block_tokens", 8)),
    }
    settings |= args or {}
    llm_args = SimpleNamespace(**settings)
    engines[name] = double.Executor(importlib.import_module(module), prefix, llm_args, **more)
    set_deadline(PATIENCE)  # where it is not refused
    return {}


def do_deadline(name: str, seconds: float) -> dict[str, Any]:
    """Of all calls to servers from now on."""
    assert set_deadline(seconds)
    return {}


def do_drop(name: str) -> dict[str, Any]:
    """The engine is closed, as `del llm` does it; all of them for "*"."""
    for one in list(engines) if name == "*" else [name]:
        del engines[one]
    gc.collect()
    return {}


def prompt(tokens: int, seed: int, shared: int = 0) -> list[int]:
    """The first `shared` tokens are the same for all seeds."""
    first, rest = random.Random(1), random.Random(1000 + seed)
    return [first.randrange(1000) for _ in range(shared)] + [rest.randrange(1000) for _ in range(tokens - shared)]


def do_ask(name: str, prompts: list[list[int]], new: int = 4, **attributes: Any) -> list[dict[str, Any]]:
    """All prompts at once."""
    engine = engines[name]
    requests = [double.Request(next(numbers), prompt(*one), new, **attributes) for one in prompts]
    engine.run(*requests)
    return [_describe(request) for request in requests]


def do_abort(name: str, prompts: list[list[int]], steps: int, again: bool = False) -> dict[str, Any]:
    """Begin them and cancel them after so many steps (again: take their blocks away, and let them begin anew)."""
    engine = engines[name]
    requests = [engine.add(double.Request(next(numbers), prompt(*one), 4)) for one in prompts]
    for _ in range(steps):
        engine.step()
    for request in requests:
        if again:
            engine.pause(request)
        else:
            engine.terminate(request)
    while any(request.state not in ("done", "failed") for request in requests):
        engine.step()
    return {"right": all(request.right for request in requests), "free": len(engine.free)}


def do_break(name: str, what: str) -> dict[str, Any]:
    """From now on one of our own methods goes wrong, as a bug would."""
    engine = engines[name]
    half = engine.scheduler._meeting.side if what in ("match", "plan_step", "allocated") else engine.workers[-1]._side

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    setattr(half, what, broken)
    return {}


def do_miss_arena(name: str) -> dict[str, Any]:
    """The last rank loses its arena between the promise and the load."""
    session = engines[name].workers[-1]._side.session
    load = session.load

    def lose(job_id: str, job: Any) -> None:
        load(job_id, job.__class__(**{**job.__dict__, "epoch": b"another"}))

    session.load = lose
    return {}


def do_ready(name: str) -> dict[str, Any]:
    """Turn the loop once; whether the scheduler and every rank are connected, and the ranks have told so."""
    engine = engines[name]
    engine._get_finished()
    halves = [engine.scheduler._meeting.side, *(worker._side for worker in engine.workers)]
    connected = all(half is not None and half.session.connected for half in halves)
    return {"ready": connected and halves[0].watch.all_have(halves[0].session.epoch)}


def _describe(request: double.Request) -> dict[str, Any]:
    return {
        "right": request.right,
        "state": request.state,
        "matched": request.matched,
        "local": request.local,
        "answer": request.tokens[request.prompt :],
    }


if __name__ == "__main__":
    double.install(old="old" in sys.argv[1:])
    serve(globals())
