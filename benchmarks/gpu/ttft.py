"""Time to the first token on a GPU: cold, GPU prefix hit, hit through each cache; `python -m benchmarks.gpu.ttft`.

vLLM alone stands beside each of the other engines in turn, on the same GPU (each takes `--memory-part` of it). A round gives
both the same new prompt, in turns, so that cold runs are paired; asks both again (GPU prefix hit); makes the other forget and
overwrite its blocks with another prompt of the same end, forget again, and asks a third time: that is the hit. A hit counts
when its first token's logprobs are no further from the cold run's than those of GPU prefix hits are in some round.

`--cold-only` leaves out all but the cold runs: 200 pairs of short prompts take a minute at each length. Every time is a median
with its quartiles. A difference is within noise if it is less than twice its standard error.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterable
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
    made.add_argument("--cold-only", action="store_true", help="only pairs of cold runs: no hits")
    made.add_argument("--graphs", action="store_true", help="with torch.compile and CUDA graphs; default: eager")
    made.add_argument(
        "--pause",
        metavar="S",
        type=float,
        default=0.05,
        help="between a short prompt and the measured one. Default: 0.05",
    )
    options = made.parse_args(argv)
    rate = options.pcie or measured_pcie()
    samples: list[Sample] = []
    failed = False
    shared = {"gpu_memory_utilization": options.memory_part, "enforce_eager": not options.graphs}
    with hosts(options, **shared) as started, started.engine("alone") as alone:
        for name in options.engines:
            try:
                with started.engine(name) as other:
                    samples += rounds(alone, other, options, started.settings["vocabulary"])
            except RuntimeError as error:
                failed = True
                print(f"{TITLES[name]}: {error}", file=sys.stderr)
            keep(options.json, rate, samples=samples)
    print(f"{machine()}, {gpu_name()}, PCIe to the device {rate:.1f} GB/s\n")
    print(align(table(samples, rate, lambda tokens: prompt_bytes(options, tokens))))
    print("\n".join(["", *hits_compared(samples)]))
    return int(failed)


def rounds(alone: Engine, other: Engine, options: Any, vocabulary: int) -> list[Sample]:
    """One sample a round and length. The first round of a length only warms up."""
    rng, samples = random.Random(other.name), []  # the engine beside has not seen the prompts of another
    for length in options.lengths:
        for turn in range(-1, options.rounds):
            prompt = rng.choices(range(1, vocabulary), k=length)
            pair = rng.sample([alone, other], 2)
            cold = {engine.name: engine.first_token(prompt, options.pause) for engine in pair}
            sample = {"tokens": length, "cold_alone": cold[alone.name]["seconds"], "cold": cold[other.name]["seconds"]}
            if not options.cold_only:
                begin = rng.choices(range(1, vocabulary), k=max(length // 2, length - END_TOKENS))
                sample |= warm(pair, other, prompt, begin, cold[other.name]["logprobs"])
            print(json.dumps({"engine": other.name, "turn": turn} | sample), file=sys.stderr, flush=True)
            if turn >= 0:
                samples.append({"engine": other.name, "turn": turn} | sample)
    return samples


def warm(pair: list[Engine], other: Engine, prompt: list[int], begin: list[int], far: Any) -> Sample:
    """GPU prefix hits and the hit. begin: of the prompt that overwrites the blocks. far: logprobs of the cold run."""
    spent = other.call("cpu_seconds")
    time.sleep(0.2 + len(prompt) / 65536)  # stores of every cache end
    prefix = {engine.name: engine.first_token(prompt) for engine in pair}
    other.forget()
    overwritten = other.first_token(begin + prompt[len(begin) :])
    other.forget()
    hit = other.first_token(prompt)
    (alone,) = (engine for engine in pair if engine is not other)
    mine = other.name
    return {
        "prefix_alone": prefix[alone.name]["seconds"],
        "prefix": prefix[mine]["seconds"],
        "hit": hit["seconds"],
        "hit_tokens": hit["cached"],
        "copy_cpu_seconds": other.call("cpu_seconds") - spent,
        "difference_prefix": difference(far, prefix[mine]["logprobs"]),
        "difference_hit": difference(far, hit["logprobs"]),
        "difference_other": difference(far, overwritten["logprobs"]),
    }


COLD = ["engine", "tokens", "cold alone, ms", "cold, ms", "slower by, %", "mean, % +-", ""]
WARM = [
    "prefix hit, ms",
    "hit, ms",
    "p90",
    "floor, ms",
    "x floor",
    "logprobs: prefix",
    "hit",
    "other prompt",
    "true hits",
]


def table(samples: list[Sample], rate: float, size: Any) -> list[list[str]]:
    """A row for each engine and length. slower by: of the pairs of cold runs. floor: the GPU prefix hit + the prompt's bytes at
    PCIe's rate."""
    warm = any("hit" in one for one in samples)
    rows = [COLD + (WARM if warm else [])]
    for name, tokens in dict.fromkeys((one["engine"], one["tokens"]) for one in samples):
        these = [one for one in samples if (one["engine"], one["tokens"]) == (name, tokens)]
        over = [100 * (one["cold"] / one["cold_alone"] - 1) for one in these]
        mean, error = statistics.mean(over), standard_error(over)
        row = [TITLES[name], str(tokens), *(spread(1e3 * one[key] for one in these) for key in ("cold_alone", "cold"))]
        row += [spread(over, "+.2f"), f"{mean:+.2f} +- {error:.2f}", "within noise" if abs(mean) < 2 * error else ""]
        rows.append(row + (hit_cells(these, size(tokens) / rate / 1e9) if warm else []))
    return rows


def hit_cells(these: list[Sample], transfer: float) -> list[str]:
    """The cells of `WARM`. transfer: seconds of the prompt's bytes at PCIe's rate."""
    floor = statistics.median(one["prefix"] for one in these) + transfer
    hits = sorted(one["hit"] for one in these)
    worst = max(one["difference_prefix"] for one in these)
    true = sum(one["hit_tokens"] > 0.9 * one["tokens"] and one["difference_hit"] <= worst for one in these)
    return [
        spread(1e3 * one["prefix"] for one in these),
        spread(1e3 * hit for hit in hits),
        f"{1e3 * hits[int(0.9 * len(hits))]:.1f}",
        f"{1e3 * floor:.1f}",
        f"{statistics.median(hits) / floor:.2f}",
        f"{worst:.3f}",
        f"{max(one['difference_hit'] for one in these):.3f}",
        f"{min(one['difference_other'] for one in these):.3f}",
        f"{true} of {len(these)}",
    ]


def hits_compared(samples: list[Sample]) -> list[str]:
    """By how much hits of the first engine that has any are slower than those of each other one, +- the standard error."""
    lines = []
    names = [*dict.fromkeys(one["engine"] for one in samples if one.get("hit_tokens"))]
    for tokens in dict.fromkeys(one["tokens"] for one in samples):
        hits = {
            name: [1e3 * one["hit"] for one in samples if (one["engine"], one["tokens"]) == (name, tokens)]
            for name in names
        }
        for other in names[1:]:
            far = statistics.median(hits[names[0]]) - statistics.median(hits[other])
            # In medians a normal distribution has 1.25 times the error that it has in means.
            error = 1.25 * (standard_error(hits[names[0]]) ** 2 + standard_error(hits[other]) ** 2) ** 0.5
            noise = ", within noise" if abs(far) < 2 * error else ""
            lines.append(
                f"{tokens} tokens: hit of {TITLES[names[0]]} - of {TITLES[other]}: {far:+.2f} +- {error:.2f} ms{noise}"
            )
    return lines


def spread(values: Iterable[float], form: str = ".1f") -> str:
    """The median, and the quartiles in brackets."""
    these = sorted(values)
    low, middle, high = statistics.quantiles(these, n=4, method="inclusive") if len(these) > 1 else these * 3
    return f"{middle:{form}} ({low:{form}}, {high:{form}})"


def standard_error(values: list[float]) -> float:
    """Of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


if __name__ == "__main__":
    sys.exit(main())
