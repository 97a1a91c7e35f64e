"""Time to the first token on a GPU: cold, GPU prefix hit, hit through each cache; `python -m benchmarks.gpu.ttft`.

vLLM alone stands beside each of the other engines in turn, on the same GPU (each takes `--memory-part` of it). A round gives
both the same new prompt, in turns, so that cold runs are paired; asks both again (GPU prefix hit); makes the other forget and
overwrite its blocks with another prompt of the same end, forget again, and asks a third time: that is the hit. A hit counts
when its first token's logprobs are no further from the cold run's than those of GPU prefix hits are in some round.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.gpu.model import difference
from benchmarks.gpu.sides import TITLES, Engine, gpu_name, hosts, keep, measured_pcie, parser, prompt_bytes
from benchmarks.run import machine
from lmcache.bench.samples import align

END_TOKENS = 512
"""What a prompt has in common with the one that overwrites its blocks."""
Sample = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when an engine failed or a hit was none."""
    made = parser("ttft", __doc__)
    made.add_argument("--lengths", metavar="N", type=int, nargs="+", default=[2048, 8192, 32768])
    made.add_argument(
        "--engines", metavar="NAME", nargs="+", choices=[*TITLES], default=["ours", "in-process", "native"]
    )
    made.add_argument("--memory-part", metavar="F", type=float, default=0.42)
    made.add_argument("--pcie", metavar="GB/S", type=float, help="for the floor; default: measured, with a GPU")
    options = made.parse_args(argv)
    rate = options.pcie or measured_pcie()
    samples: list[Sample] = []
    failed = False
    eager = {"gpu_memory_utilization": options.memory_part, "enforce_eager": True}
    with hosts(options, **eager) as started, started.engine("alone") as alone:
        for name in options.engines:
            try:
                with started.engine(name) as other:
                    samples += rounds(alone, other, options.lengths, options.rounds, started.settings["vocabulary"])
            except RuntimeError as error:
                failed = True
                print(f"{TITLES[name]}: {error}", file=sys.stderr)
            keep(options.json, rate, samples=samples)
    print(f"{machine()}, {gpu_name()}, PCIe to the device {rate:.1f} GB/s\n")
    print(align(table(samples, rate, lambda tokens: prompt_bytes(options, tokens))))
    return int(failed)


def rounds(alone: Engine, other: Engine, lengths: list[int], count: int, vocabulary: int) -> list[Sample]:
    """One sample a round and length. The first round of a length only warms up."""
    rng, samples = random.Random(other.name), []  # the engine beside has not seen the prompts of another
    for length in lengths:
        for turn in range(-1, count):
            prompt = rng.choices(range(1, vocabulary), k=length)
            sample = one_round(alone, other, prompt, rng.choices(range(1, vocabulary), k=length - END_TOKENS), rng)
            print(json.dumps({"engine": other.name, "turn": turn} | sample), file=sys.stderr, flush=True)
            if turn >= 0:
                samples.append({"engine": other.name, "turn": turn} | sample)
    return samples


def one_round(alone: Engine, other: Engine, prompt: list[int], begin: list[int], rng: random.Random) -> Sample:
    pair = rng.sample([alone, other], 2)
    cold = {engine.name: engine.first_token(prompt) for engine in pair}
    spent = other.call("cpu_seconds")
    time.sleep(0.2 + len(prompt) / 65536)  # stores of every cache end
    prefix = {engine.name: engine.first_token(prompt) for engine in pair}
    other.forget()
    overwritten = other.first_token(begin + prompt[-END_TOKENS:])
    other.forget()
    hit = other.first_token(prompt)
    mine, far = other.name, cold[other.name]["logprobs"]
    return {
        "tokens": len(prompt),
        "cold_alone": cold[alone.name]["seconds"],
        "cold": cold[mine]["seconds"],
        "prefix_alone": prefix[alone.name]["seconds"],
        "prefix": prefix[mine]["seconds"],
        "hit": hit["seconds"],
        "hit_tokens": hit["cached"],
        "copy_cpu_seconds": other.call("cpu_seconds") - spent,
        "difference_prefix": difference(far, prefix[mine]["logprobs"]),
        "difference_hit": difference(far, hit["logprobs"]),
        "difference_other": difference(far, overwritten["logprobs"]),
    }


HEAD = [
    "engine",
    "tokens",
    "cold alone, s",
    "cold, s",
    "slower by, %",
    "+-",
    "prefix hit, s",
    "hit, s",
    "p90",
    "floor, s",
]
HEAD += ["x floor", "logprobs: prefix", "hit", "other prompt", "true hits"]


def table(samples: list[Sample], rate: float, size: Any) -> list[list[str]]:
    """A row for each engine and length. floor: its GPU prefix hit + the prompt's bytes at PCIe's rate. +-: the standard error
    of the mean of the pairs' overheads."""
    rows = [HEAD]
    for name, tokens in dict.fromkeys((one["engine"], one["tokens"]) for one in samples):
        these = [one for one in samples if (one["engine"], one["tokens"]) == (name, tokens)]

        def middle(key: str, these: list[Sample] = these) -> float:
            return statistics.median(one[key] for one in these)

        over = [100 * (one["cold"] / one["cold_alone"] - 1) for one in these]
        error = statistics.stdev(over) / len(over) ** 0.5 if len(over) > 1 else 0.0
        floor = middle("prefix") + size(tokens) / rate / 1e9
        hits = sorted(one["hit"] for one in these)
        worst = max(one["difference_prefix"] for one in these)
        true = sum(one["hit_tokens"] > 0.9 * tokens and one["difference_hit"] <= worst for one in these)
        rows.append(
            [
                TITLES[name],
                str(tokens),
                f"{middle('cold_alone'):.4f}",
                f"{middle('cold'):.4f}",
                f"{statistics.median(over):+.2f}",
                f"{error:.2f}",
                f"{middle('prefix'):.4f}",
                f"{middle('hit'):.4f}",
                f"{hits[int(0.9 * len(hits))]:.4f}",
                f"{floor:.4f}",
                f"{middle('hit') / floor:.2f}",
                f"{worst:.3f}",
                f"{max(one['difference_hit'] for one in these):.3f}",
                f"{min(one['difference_other'] for one in these):.3f}",
                f"{true} of {len(these)}",
            ]
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
