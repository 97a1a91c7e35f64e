"""Every KV dtype of vLLM through us, on a GPU: `python -m benchmarks.gpu.dtypes --model DIR`.

A small model (`python -m demo.model DIR`) answers prompts in an engine for each dtype, all on one server: computed, from vLLM's
own prefix cache, and through us. Hits of both kinds have the same tokens, so the same KV must give the very same answers. Then a
fresh engine, which has computed nothing, loads the same KV: vLLM resets scales in its first forward. A prompt that ends
alike and begins otherwise says how much KV matters.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.model import difference
from benchmarks.gpu.sides import END_SECONDS, Engine, Hosts, hosts, parser, transfer_config
from benchmarks.sides import Server, Side

DTYPES = "auto", "fp8", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head", "int4_per_token_head"
CHUNK = 16
"""Tokens, as many as vLLM's blocks have."""
LENGTHS = 1025, 389
CONNECT_SECONDS = 120
Answers = list[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a hit through us is answered otherwise than one in vLLM's own cache, or if nothing was served."""
    made = parser("dtypes", __doc__)
    made.add_argument("--dtypes", metavar="NAMES", default=",".join(DTYPES), help="Default: %(default)s")
    options = made.parse_args(argv)
    if options.model is None:
        made.error("--model DIR is needed (python -m demo.model DIR)")
    served, wrong = 0, 0
    small = {"max_model_len": 2048, "dtype": "bfloat16", "enforce_eager": True, "gpu_memory_utilization": 0.3}
    with hosts(options, **small) as started, tempfile.TemporaryDirectory(prefix="lmcache-gpu-bench-") as folder:
        server = Server(Side("ours", options.python, device="gpu"), options.cache_gb, CHUNK, Path(folder))
        try:
            for dtype in options.dtypes.split(","):
                try:
                    result = checked(started, server, dtype)
                except RuntimeError as error:
                    result = f"vLLM does not run: {str(error).strip().splitlines()[-1][:200]}"
                print(f"{dtype}: {result}", flush=True)
                served, wrong = served + result.startswith("served"), wrong + result.startswith("WRONG")
        finally:
            server.stop()
    return int(wrong > 0 or not served)


def checked(started: Hosts, server: Server, dtype: str) -> str:
    """Return one line: whether this dtype is served, refused or wrong, and why."""
    draw = random.Random(dtype)
    prompts = [draw.choices(range(1, started.settings["vocabulary"]), k=length) for length in LENGTHS]
    others = [draw.choices(range(1, started.settings["vocabulary"]), k=len(one) - 200) + one[-200:] for one in prompts]
    with_engine = _Started(started, server, dtype, "first")
    try:
        if with_engine.refusal:
            return f"refused: {with_engine.refusal}"
        cold, own = with_engine.ask(prompts), with_engine.ask(prompts)
        with_engine.engine.forget()
        ours = with_engine.ask(prompts)
        other = with_engine.ask(others)
    finally:
        with_engine.stop()
    fresh = _Started(started, server, dtype, "fresh")
    try:
        first = fresh.ask(prompts)
    finally:
        fresh.stop()
    hits = [[one["cached"] for one in some] for some in (cold, own, ours, first)]
    worst = [max(differences(some, own)) for some in (ours, first, cold, other)]
    text = (
        f"tokens from caches: cold {hits[0]}, vLLM's own {hits[1]}, ours {hits[2]}, ours in a fresh engine {hits[3]}; largest "
        f"difference of log probabilities from vLLM's own hit: ours {worst[0]:.4f}, fresh {worst[1]:.4f}, cold "
        f"{worst[2]:.4f}, another prompt {worst[3]:.4f}"
    )
    same = all(
        one["answer"] == two["answer"] == three["answer"] for one, two, three in zip(own, ours, first, strict=True)
    )
    right = same and hits[0] == [0, 0] and hits[1] == hits[2] == hits[3] and max(worst[:2]) <= 1e-3 < worst[3]
    return ("served; " if right else "WRONG; ") + text


def differences(some: Answers, others: Answers) -> list[float]:
    return [difference(one["logprobs"], other["logprobs"]) for one, other in zip(some, others, strict=True)]


class _Started:
    """An engine with this KV dtype that has connected, or was refused, and has not computed anything."""

    def __init__(self, started: Hosts, server: Server, dtype: str, name: str) -> None:
        settings = started.settings | {"kv_cache_dtype": dtype, "kv_transfer_config": transfer_config(server.port)}
        log = started.directory / f"{dtype}-{name}.log"
        self.engine = Engine("ours", Side("ours", started.python), settings, log, {})
        try:
            self.refusal = self._connected(log)
        except BaseException:
            self.stop()
            raise

    def ask(self, prompts: list[list[int]]) -> Answers:
        """One after the other, so that steps are alike."""
        return [self.engine.call("answers", prompts=[prompt], tokens=8)[0] for prompt in prompts]

    def stop(self) -> None:
        self.engine.stop(END_SECONDS)

    def _connected(self, log: Path) -> str:
        """Return why nothing is served, "" once both sides have connected."""
        limit = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < limit and self.engine.runs():
            text = log.read_text()
            if refused := re.search(r"LMCache serves nothing for this engine: (.*)", text):
                return refused[1]
            if text.count("Connected to the LMCache server") >= 2:
                return ""
            time.sleep(0.2)
        lines = [line for line in log.read_text().splitlines() if "Error" in line] or ["it did not connect"]
        raise RuntimeError(lines[-1])


if __name__ == "__main__":
    sys.exit(main())
