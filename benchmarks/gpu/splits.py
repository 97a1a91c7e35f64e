"""KV that one parallel split has stored, read by another: `python -m benchmarks.gpu.splits`; needs the larger split's GPUs.

Two engines of one server serve the same checkpoint, one on `--writer` GPUs and one on `--reader`. In each round the writer
computes a prompt, and the reader hits it (*other split*). Then the reader computes a prompt, forgets it, and hits that (*equal
split*). Both hits' first logprobs are compared with those of the engine that computed, and with another prompt's of the same end.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

from benchmarks.gpu.model import difference
from benchmarks.gpu.sides import Engine, gpu_name, hosts, keep, parser
from benchmarks.gpu.ttft import END_TOKENS
from benchmarks.run import machine
from benchmarks.sides import Side
from lmcache.bench.samples import align

Sample = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if a hit was none."""
    made = parser("splits", __doc__)
    made.add_argument("--writer", metavar="N", type=int, default=2, help="tensor parallel size. Default: 2")
    made.add_argument("--reader", metavar="N", type=int, default=1, help="tensor parallel size. Default: 1")
    made.add_argument("--lengths", metavar="N", type=int, nargs="+", default=[2048, 8192, 30720])
    made.add_argument("--memory-part", metavar="F", type=float, default=0.3)
    options = made.parse_args(argv)
    if options.model is None:
        made.error("--model is needed: random weights are drawn by each rank, so that splits would be different models")
    samples: list[Sample] = []
    settings = {
        "gpu_memory_utilization": options.memory_part,
        "enforce_eager": True,
        "disable_custom_all_reduce": True,
        "max_model_len": 32768,
    }
    with (
        hosts(options, **settings) as started,
        Side("ours", options.python, "", "gpu").serve(options.cache_gb, started.chunk_tokens) as server,
        started.engine("ours", server, tensor_parallel_size=options.writer) as writer,
        started.engine("ours", server, tensor_parallel_size=options.reader) as reader,
    ):
        for length in options.lengths:
            for turn in range(-1, options.rounds):
                sample = one_round(writer, reader, length, started.settings["vocabulary"], turn)
                print(json.dumps(sample), file=sys.stderr, flush=True)
                samples += [sample] if turn >= 0 else []
            keep(options.json, 0, samples=samples)
    print(f"{machine()}, {gpu_name()}: written with tensor parallel {options.writer}, read with {options.reader}\n")
    print(align(table(samples)))
    return int(any(one["cached"] < 0.9 * one["tokens"] for one in samples))


def one_round(writer: Engine, reader: Engine, length: int, vocabulary: int, turn: int) -> Sample:
    rng = random.Random(f"{length} {turn}")
    theirs, own, begin = (rng.choices(range(1, vocabulary), k=length) for _ in range(3))
    computed = writer.first_token(theirs)
    time.sleep(0.2 + length / 65536)  # the store ends
    other = reader.first_token(theirs)
    reader.forget()
    cold = reader.first_token(own)
    time.sleep(0.2 + length / 65536)
    reader.forget()
    overwritten = reader.first_token(begin[: length - END_TOKENS] + own[-END_TOKENS:])
    reader.forget()
    equal = reader.first_token(own)
    return {
        "tokens": length,
        "cold": cold["seconds"],
        "other_split": other["seconds"],
        "equal_split": equal["seconds"],
        "cached": min(other["cached"], equal["cached"]),
        "difference_other_split": difference(computed["logprobs"], other["logprobs"]),
        "difference_equal_split": difference(cold["logprobs"], equal["logprobs"]),
        "difference_other_prompt": difference(cold["logprobs"], overwritten["logprobs"]),
    }


def table(samples: list[Sample]) -> list[list[str]]:
    """A row for each length: medians, the ratio of each round's hits, and the worst differences (of other prompts the least)."""
    rows = [
        [
            "tokens",
            "cold, s",
            "equal split, s",
            "other split, s",
            "ratio",
            "logprobs: equal",
            "other split",
            "other prompt",
        ]
    ]
    for tokens in dict.fromkeys(one["tokens"] for one in samples):
        these = [one for one in samples if one["tokens"] == tokens]
        middle = {key: statistics.median(one[key] for one in these) for key in ("cold", "equal_split", "other_split")}
        ratio = statistics.median(one["other_split"] / one["equal_split"] for one in these)
        rows.append(
            [
                str(tokens),
                *(f"{value:.4f}" for value in middle.values()),
                f"{ratio:.2f}",
                f"{max(one['difference_equal_split'] for one in these):.3f}",
                f"{max(one['difference_other_split'] for one in these):.3f}",
                f"{min(one['difference_other_prompt'] for one in these):.3f}",
            ]
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
