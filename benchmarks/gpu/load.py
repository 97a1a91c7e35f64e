"""Hits under load on a GPU: many prompts at once, and running decodes beside long prompts; `python -m benchmarks.gpu.load`.

CUDA graphs are on. One engine after the other, since each needs most of the GPU.
    at once   16 prompts of 8,192 tokens sent together: seconds until the last first token, cold, as GPU prefix hits, and as
              hits, after the engine has forgotten its own and other prompts of the same ends have overwritten its blocks
    beside    milliseconds between the tokens of 16 running decodes: alone, and beside prompts of 32,768 tokens that come one
              by one: cold, GPU prefix hits, hits
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.model import difference
from benchmarks.gpu.sides import TITLES, Engine, gpu_name, hosts, keep, measured_pcie, parser, prompt_bytes
from benchmarks.gpu.ttft import END_TOKENS
from benchmarks.run import machine
from lmcache.bench.samples import align, quantile

Sample = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when an engine failed."""
    made = parser("load", __doc__)
    made.add_argument("--engines", metavar="NAME", nargs="+", choices=[*TITLES], default=["alone", "ours", "native"])
    made.add_argument("--prompts", metavar="N", type=int, default=16)
    made.add_argument("--tokens", metavar="N", type=int, default=8192)
    made.add_argument("--long", metavar="N", type=int, default=32768)
    made.add_argument("--memory-part", metavar="F", type=float, default=0.75)
    made.add_argument("--pcie", metavar="GB/S", type=float, help="for the floor; default: measured, with a GPU")
    made.set_defaults(rounds=3)
    options = made.parse_args(argv)
    rate = options.pcie or measured_pcie()
    found: dict[str, Sample] = {}
    failed = False
    with hosts(options, gpu_memory_utilization=options.memory_part) as started:
        for name in options.engines:
            try:
                with started.engine(name) as engine:
                    draw, found[name] = Draw(started.settings["vocabulary"]), {"at_once": [], "beside": {}}
                    for _ in range(options.rounds + 1):
                        found[name]["at_once"].append(at_once(engine, draw, options))
                        told(options.json, found, rate)
                    for kind, gaps in beside(engine, draw, options):
                        found[name]["beside"][kind] = gaps
                        told(options.json, found, rate)
            except RuntimeError as error:
                failed = True
                print(f"{TITLES[name]}: {error}", file=sys.stderr)
    size = prompt_bytes(options, options.prompts * options.tokens)
    print(
        f"{machine()}, {gpu_name()}, PCIe to the device {rate:.1f} GB/s: {size / rate / 1e9:.3f} s for {size / 1e9:.2f} GB\n"
    )
    print(align(table_at_once(found)) + "\n")
    print(align(table_beside(found)))
    return int(failed)


def told(path: Path | None, found: dict[str, Sample], rate: float) -> None:
    """Say that something came, and keep it."""
    print({name: {kind: len(of) for kind, of in one.items()} for name, one in found.items()}, file=sys.stderr)
    keep(path, rate, **found)


class Draw:
    """Random prompts, the same for every engine."""

    def __init__(self, vocabulary: int) -> None:
        self._rng, self._ids = random.Random(3), range(1, vocabulary)

    def __call__(self, count: int) -> list[int]:
        return self._rng.choices(self._ids, k=count)


def at_once(engine: Engine, draw: Draw, options: Any) -> Sample:
    """One round; the first of an engine warms up."""
    prompts = [draw(options.tokens) for _ in range(options.prompts)]
    others = [draw(options.tokens - END_TOKENS) + one[-END_TOKENS:] for one in prompts]
    cold = engine.call("first_tokens", prompts=prompts)
    time.sleep(2)  # stores of every cache end
    runs = {"prefix": engine.call("first_tokens", prompts=prompts)}
    engine.forget()
    runs["other"] = engine.call("first_tokens", prompts=others)
    engine.forget()
    if engine.name != "alone":
        runs["hit"] = engine.call("first_tokens", prompts=prompts)
    sample: Sample = {"cold": last(cold)}
    for name, run in runs.items():
        sample[name] = last(run)
        sample[f"difference_{name}"] = [
            difference(one["logprobs"], again["logprobs"]) for one, again in zip(cold, run, strict=True)
        ]
    sample["hit_tokens"] = [one["cached"] for one in runs.get("hit", [])]
    engine.forget()
    return sample


def last(answers: list[Sample]) -> float:
    return max(one["seconds"] for one in answers)


def beside(engine: Engine, draw: Draw, options: Any) -> Iterator[tuple[str, list[float]]]:
    """(what ran beside the decodes, gaps in ms), one kind after the other."""
    prompts = [draw(options.long) for _ in range(6)]
    yield "nothing", engine.call("beside", prompts=[], decodes=16, seconds=3)
    yield "cold", engine.call("beside", prompts=prompts, decodes=16, seconds=0)
    time.sleep(2)  # stores of every cache end
    yield "prefix", engine.call("beside", prompts=prompts, decodes=16, seconds=0)
    engine.forget()
    if engine.name != "alone":
        yield "hit", engine.call("beside", prompts=prompts, decodes=16, seconds=0)


def table_at_once(found: dict[str, Sample]) -> list[list[str]]:
    """Medians of the rounds behind the first, the worst logprob difference of all of theirs, and hits that were none."""
    rows = [
        [
            "prompts at once",
            "cold, s",
            "prefix hit, s",
            "hit, s",
            "best",
            "logprobs: prefix",
            "hit",
            "other prompts",
            "true",
        ]
    ]
    for name, one in found.items():
        rounds = one["at_once"][1:]

        def shown(key: str, how: Any = statistics.median, rounds: list[Sample] = rounds) -> str:
            return f"{how(sample[key] for sample in rounds):.3f}" if key in rounds[0] else ""

        def far(key: str, rounds: list[Sample] = rounds, how: Any = max) -> str:
            found = [value for sample in rounds for value in sample.get(f"difference_{key}", [])]
            return f"{how(found):.3f}" if found else ""

        worst = max(value for sample in rounds for value in sample["difference_prefix"])
        hits = [value <= worst for sample in rounds for value in sample.get("difference_hit", [])]
        cells = [TITLES[name], shown("cold"), shown("prefix"), shown("hit"), shown("hit", min)]
        cells += [far("prefix"), far("hit"), far("other", how=min), f"{sum(hits)} of {len(hits)}" if hits else ""]
        rows.append(cells)
    return rows


def table_beside(found: dict[str, Sample]) -> list[list[str]]:
    """p50 / p99 / max of the gaps."""
    kinds = ["nothing", "cold", "prefix", "hit"]
    rows = [["ms between tokens of 16 decodes, p50 / p99 / max, beside", *kinds]]
    for name, one in found.items():
        cells = [
            " / ".join(f"{quantile(gaps, part):.1f}" for part in (0.5, 0.99, 1.0)) if gaps else ""
            for gaps in (one["beside"].get(kind, []) for kind in kinds)
        ]
        rows.append([TITLES[name], *cells])
    return rows


if __name__ == "__main__":
    sys.exit(main())
