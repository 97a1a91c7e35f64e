"""Time to the first token on real vLLM (CPU): `python -m benchmarks.vllm_ttft --vllm-python PATH`.

Two engines stand side by side, one plain and one with LMCache (on request others with its in-process mode and with the peer).
Each round gives all the same new prompt, in turns; then asks again. So the cold runs are paired, and so are the kinds of hits:
    own      the plain engine's prefix cache
    ours     LMCache's, from a daemon, after the engine has forgotten its own
    inproc   the same from a server of the engine's own
Two processes of the very same engine differ by several percent for as long as they live, so the cold overhead is also
measured inside one engine, with LMCache taken out of its path and put back, prompt by prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.child import Child
from benchmarks.rows import Goal, Row
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import PROJECT, Side

PROMPT_TOKENS = 4096
VOCABULARY = 8192
PAUSE_SECONDS = 0.5
"""Between calls: OpenMP threads of the engine that was asked last spin for a while."""
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 8192, "max_num_seqs": 8}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",  # or vLLM reserves another core for a connector, fails on two, and uses both
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "2",
    "DO_NOT_TRACK": "1",
}


class Engine(Child):
    """`vllm_engine` in a process of its own."""

    def __init__(
        self, name: str, python: str, model: Path, directory: Path, transfer: dict[str, Any] | None, **more: Any
    ) -> None:
        """transfer: vLLM's `kv_transfer_config`. more: other settings of vLLM's."""
        settings = {**SETTINGS, "model": str(model), **more} | ({"kv_transfer_config": transfer} if transfer else {})
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LMCACHE_", "VLLM_"))}
        if name == "peer":
            inherited.pop("PYTHONPATH", None)
        command = [python, str(Path(__file__).with_name("vllm_engine.py")), json.dumps(settings)]
        super().__init__(name, command, directory / f"{name}.log", inherited | ENVIRONMENT, directory)

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """(seconds, tokens of the prompt that were not computed), after a pause."""
        time.sleep(PAUSE_SECONDS)
        answer = self.call("first_token", prompt=prompt)
        return answer["seconds"], answer["cached"]

    def forget(self) -> None:
        if not self.call("forget")["done"]:
            raise RuntimeError(f"the {self.name} engine does not let its prefix cache go")


def measure(engines: dict[str, Engine], rounds: int) -> list[Row]:
    """The rows of the report. The first round only warms up."""
    rng = random.Random()
    cold = {name: Row(f"cold-{name}", f"cold, {_title(name)}", "s", None) for name in engines}
    overhead = {
        name: Row(f"cold-overhead-{name}", f"cold, {_title(name)}: slower than another, plain engine by", "%", None)
        for name in engines
        if name != "plain"
    }
    own = Row("hit-own", "hit, vLLM's own prefix cache", "s", None)
    hit = {name: Row(f"hit-{name}", f"hit, {_title(name)}", "s", None) for name in overhead}
    ratio = {
        name: Row(f"hit-ratio-{name}", f"hit, {_title(name)}, over vLLM's own", "x", _ratio_goal(name))
        for name in overhead
    }
    for turn in range(-1, rounds):
        prompt = rng.choices(range(1, VOCABULARY), k=PROMPT_TOKENS)
        names = list(engines)
        rng.shuffle(names)
        times = {name: engines[name].first_token(prompt)[0] for name in names}
        rng.shuffle(names)
        again = {name: _hit(engines[name], prompt) for name in names}
        print(f"  round {turn}: cold {times}, hit {again}", file=sys.stderr)
        if turn < 0:
            continue
        own.add("ours", [again["plain"]])
        for name in engines:
            cold[name].add("ours", [times[name]])
        for name in overhead:
            overhead[name].add("ours", [100 * (times[name] / times["plain"] - 1)])
            hit[name].add("ours", [again[name]])
            ratio[name].add("ours", [again[name] / again["plain"]])
    rows = [*cold.values(), *overhead.values()]
    rows += [_overhead_in_one_engine(engines[name], rounds, rng) for name in ("ours", "inproc") if name in engines]
    return [*rows, own, *hit.values(), *ratio.values()]


def _overhead_in_one_engine(engine: Engine, rounds: int, rng: random.Random) -> Row:
    """Cold prompts with LMCache and without it, in turns; their ratio pair by pair."""
    suffix, what = ("", "LMCache") if engine.name == "ours" else (f"-{engine.name}", _title(engine.name))
    title = f"cold, {what} on over off, in one engine: slower by"
    row = Row(f"cold-overhead-one-engine{suffix}", title, "%", Goal(1.0, "less"))
    for turn in range(5 * rounds):
        seconds = {}
        for on in rng.sample((True, False), 2):
            engine.call("switch", on=on)
            seconds[on] = engine.first_token(rng.choices(range(1, VOCABULARY), k=PROMPT_TOKENS))[0]
            engine.forget()
        print(f"  pair {turn}: {seconds}", file=sys.stderr)
        row.add("ours", [100 * (seconds[True] / seconds[False] - 1)])
    engine.call("switch", on=True)
    return row


def _hit(engine: Engine, prompt: list[int]) -> float:
    """Seconds of the same prompt again; for an engine with a cache beside it, after it has forgotten its own."""
    if engine.name != "plain":
        engine.forget()
    seconds, cached = engine.first_token(prompt)
    if cached < 0.9 * PROMPT_TOKENS:
        raise RuntimeError(f"the {engine.name} engine computed {PROMPT_TOKENS - cached} tokens of a prompt it had seen")
    return seconds


def _title(name: str) -> str:
    names = {
        "plain": "plain vLLM",
        "ours": "with LMCache",
        "inproc": "LMCache in process",
        "whole": "LMCache in process, use_layerwise off",
        "peer": "with LMCache 0.5.6",
    }
    return names[name]


def _ratio_goal(name: str) -> Goal | None:
    return Goal(1.1, "less") if name in ("ours", "inproc") else None


@contextlib.contextmanager
def engines(options: argparse.Namespace, model: Path, directory: Path) -> Iterator[dict[str, Engine]]:
    """All engines and their servers, started one after the other (each start takes both cores)."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Engine] = {}

        def start(name: str, python: str, transfer: dict[str, Any] | None) -> None:
            engine = Engine(name, python, model, directory, transfer)
            stack.callback(engine.kill)
            engine.call("ready")
            started[name] = engine

        start("plain", options.vllm_python, None)
        if options.in_process:
            start("inproc", options.vllm_python, _in_process(layerwise=True))
        if options.whole_loads:
            start("whole", options.vllm_python, _in_process(layerwise=False))
        for name, python in (("ours", options.vllm_python), ("peer", options.peer_vllm_python)):
            if python:
                side = Side(name, sys.executable if name == "ours" else python)
                # The peer stops vLLM unless its chunk is a multiple of the CPU's 128-token blocks.
                server = stack.enter_context(side.serve(2, 256 if name == "ours" else 128))
                start(name, python, transfer_config(name, server.port))
                server.settle()
        yield started


def transfer_config(name: str, port: int) -> dict[str, Any]:
    extra: dict[str, Any] = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    if name == "peer":
        extra["lmcache.mp.mp_transfer_mode"] = "engine_driven"
    return {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def _in_process(layerwise: bool) -> dict[str, Any]:
    extra = {"lmcache.use_layerwise": layerwise}
    return {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both", "kv_connector_extra_config": extra}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when an engine failed."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="lmcache-ttft-") as name:
        directory = Path(name)
        model = options.model or write_model(options.vllm_python, directory / "model")
        try:
            with engines(options, model, directory) as started:
                rows = measure(started, options.rounds)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    facts = about([Side("ours", sys.executable)], argv, "benchmarks.vllm_ttft")
    facts["prompt"] = f"{PROMPT_TOKENS} tokens, float32, the demo's model"
    give_out(options, facts, rows, "vllm")
    return 0


def write_model(python: str, path: Path) -> Path:
    """The demo's small random-weight model."""
    subprocess.run([python, "-m", "demo.model", str(path)], check=True, cwd=PROJECT, capture_output=True)
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments("vllm_ttft", __doc__, vllm=True)
    parser.add_argument("--peer-vllm-python", metavar="PATH", help="Python with vLLM and LMCache 0.5.6")
    parser.add_argument("--in-process", action="store_true", help="a third engine, with LMCacheConnectorV1")
    parser.add_argument("--whole-loads", action="store_true", help="one more, with use_layerwise off")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a model directory; default: the demo's, made anew")
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=8, help="paired rounds after one to warm up. Default: 8"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
