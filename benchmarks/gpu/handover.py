"""A prompt handed over from one GPU to another: `python -m benchmarks.gpu.handover`; needs two GPUs.

A prefill engine runs on the first GPU and a decode engine on the second one, beside vLLM alone. In each round the same new
prompt is computed by vLLM alone (*local*), and given to the prefill engine and, with the parameters that this has answered, to
the decode engine, as a router does without HTTP (*handed over*: both first tokens). The overhead is the difference. The first
token's logprobs of the decode engine are compared with those of vLLM alone, and with another prompt's of the same end.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.model import difference
from benchmarks.gpu.sides import TITLES, Engine, Hosts, gpu_name, hosts, keep, parser
from benchmarks.gpu.ttft import END_TOKENS, spread, standard_error
from benchmarks.run import machine
from benchmarks.sides import Side
from lmcache.bench.samples import align

Sample = dict[str, Any]
SENT = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What routers send with the prompt to the prefill engine."""


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if an engine failed or a prompt was not handed over."""
    made = parser("handover", __doc__)
    made.add_argument("--lengths", metavar="N", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    made.add_argument("--engines", metavar="NAME", nargs="+", choices=["ours", "nixl"], default=["ours"])
    made.add_argument(
        "--gpus", metavar="N", nargs=2, default=["0", "1"], help="of the prefill engine and of the others"
    )
    made.add_argument("--memory-part", metavar="F", type=float, default=0.42)
    made.add_argument("--graphs", action="store_true", help="with torch.compile and CUDA graphs; default: eager")
    options = made.parse_args(argv)
    if options.model is None:
        made.error(
            "--model is needed (python -m benchmarks.gpu.model): engines share no KV of weights that each draws anew"
        )
    samples: list[Sample] = []
    failed = False
    settings = {"gpu_memory_utilization": options.memory_part, "enforce_eager": not options.graphs}
    with hosts(options, **settings) as started, started.engine("alone", gpus=options.gpus[1]) as alone:
        for name in options.engines:
            try:
                with pair(started, name, options) as (prefill, decode):
                    for length in options.lengths:
                        for turn in range(-1, options.rounds):
                            sample = one_round(alone, prefill, decode, length, started.settings["vocabulary"])
                            print(json.dumps(sample | {"turn": turn}), file=sys.stderr, flush=True)
                            samples += [sample] if turn >= 0 else []
                        keep(options.json, 0, samples=samples)
            except RuntimeError as error:
                failed = True
                print(f"{TITLES[name]}: {error}", file=sys.stderr)
    print(f"{machine()}, 2 x {gpu_name()}: computed on one GPU, answered on the other\n")
    print(align(table(samples)))
    return int(failed or any(one["computed"] > 16 for one in samples))


@contextlib.contextmanager
def pair(started: Hosts, name: str, options: Any) -> Iterator[tuple[Engine, Engine]]:
    """The prefill and the decode engine of one kind."""
    with contextlib.ExitStack() as stack:
        server = None
        if name == "ours":
            side = Side("ours", options.python, "", "gpu")
            server = stack.enter_context(side.serve(options.cache_gb, started.chunk_tokens))
        prefill = stack.enter_context(started.engine(name, server, options.gpus[0], "kv_producer"))
        decode = stack.enter_context(started.engine(name, server, options.gpus[1], "kv_consumer"))
        yield prefill, decode


def one_round(alone: Engine, prefill: Engine, decode: Engine, length: int, vocabulary: int) -> Sample:
    """Both ways once, in random order."""
    rng = random.Random()
    prompt, begin = (rng.choices(range(1, vocabulary), k=length) for _ in range(2))
    local: dict[str, Any] = {}
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    for which in rng.sample(["local", "handed over"], 2):
        if which == "local":
            local = alone.first_token(prompt)
            continue
        decode.call("ready")
        (first,) = prefill.call("first_tokens", prompts=[prompt], transfer=SENT)
        (second,) = decode.call("answers", prompts=[prompt], transfer=first["transfer"])
    end = min(END_TOKENS, length // 2)
    other = alone.first_token(begin[:-end] + prompt[-end:])
    for engine in (alone, prefill, decode):
        engine.forget()
    return {
        "engine": decode.name,
        "tokens": length,
        "local": local["seconds"],
        "prefill": first["seconds"],
        "decode": second["seconds"],
        "overhead": first["seconds"] + second["seconds"] - local["seconds"],
        "computed": length - second["cached"],
        "difference": difference(local["logprobs"], second["logprobs"]),
        "difference_prefill": difference(local["logprobs"], first["logprobs"]),
        "difference_other": difference(local["logprobs"], other["logprobs"]),
    }


HEAD = [
    *("engine", "tokens", "local, ms", "prefill's answer, ms", "then the decode engine's, ms", "overhead, ms"),
    *("mean +-", "computed again", "logprobs: prefill", "decode", "other prompt"),
]


def table(samples: list[Sample]) -> list[list[str]]:
    """A row for each engine and length: medians with quartiles, and the worst differences (of other prompts the least)."""
    rows = [HEAD]
    for name, tokens in dict.fromkeys((one["engine"], one["tokens"]) for one in samples):
        these = [one for one in samples if (one["engine"], one["tokens"]) == (name, tokens)]
        over = [1e3 * one["overhead"] for one in these]
        rows.append(
            [
                TITLES[name],
                str(tokens),
                *(spread(1e3 * one[key] for one in these) for key in ("local", "prefill", "decode", "overhead")),
                f"{statistics.mean(over):+.1f} +- {standard_error(over):.1f}",
                str(max(one["computed"] for one in these)),
                f"{max(one['difference_prefill'] for one in these):.3f}",
                f"{max(one['difference'] for one in these):.3f}",
                f"{min(one['difference_other'] for one in these):.3f}",
            ]
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
