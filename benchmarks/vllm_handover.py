"""What handing a prompt over costs on real vLLM (CPU): `python -m benchmarks.vllm_handover --vllm-python PATH`.

Two engines share a server. Each round gives a new prompt to the decode engine alone, which computes it, and another new one to
the prefill engine and, as soon as that has answered, to the decode engine. That is what a router does, without HTTP. The overhead
is the time of both calls over the time of computing the prompt where it is decoded. Both engines compute with the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import Side
from benchmarks.vllm_ttft import VOCABULARY, Engine, transfer_config, write_model

PROMPT_TOKENS = 4_160 + 77
"""16 chunks of 256 and a tail."""


def measure(prefill: Engine, decode: Engine, rounds: int) -> list[Row]:
    """The rows of the report. The first round only warms up."""
    rng = random.Random()
    alone = Row("handover-alone", "computed by the decode engine itself", "s", None)
    first = Row("handover-prefill", "handed over: the prefill engine's answer", "s", None)
    second = Row("handover-decode", "handed over: the decode engine's first token after that", "s", None)
    more = Row("handover-overhead", "handed over, slower than computed by itself by", "s", None)
    left = Row("handover-computed", "tokens that the decode engine has computed of a handed-over prompt", "", None)
    for turn in range(-1, rounds):
        prompts = [rng.choices(range(1, VOCABULARY), k=PROMPT_TOKENS) for _ in range(2)]
        times = [decode.first_token(prompts[0])[0], prefill.first_token(prompts[1])[0]]
        answer = decode.call("first_token", prompt=prompts[1])  # without a pause
        times.append(answer["seconds"])
        print(f"  round {turn}: {times}, {answer['cached']} tokens handed over", file=sys.stderr)
        for engine in (prefill, decode):
            engine.forget()
        if turn < 0:
            continue
        for row, value in zip((alone, first, second), times, strict=True):
            row.add("ours", [value])
        more.add("ours", [times[1] + times[2] - times[0]])
        left.add("ours", [PROMPT_TOKENS - answer["cached"]])
    return [alone, first, second, more, left]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when an engine failed."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="lmcache-handover-") as name, contextlib.ExitStack() as stack:
        directory, engines = Path(name), []
        model = options.model or write_model(options.vllm_python, directory / "model")
        server = stack.enter_context(Side("ours", sys.executable).serve(2, 256))
        try:
            for role in ("kv_producer", "kv_consumer"):
                transfer = {**transfer_config("ours", server.port), "kv_role": role}
                engines.append(Engine(role, options.vllm_python, model, directory, transfer))
                stack.callback(engines[-1].kill)
                engines[-1].call("ready")
            server.settle()
            rows = measure(engines[0], engines[1], options.rounds)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    facts = about([Side("ours", sys.executable)], argv, "benchmarks.vllm_handover")
    facts["prompt"] = f"{PROMPT_TOKENS} tokens, float32, the demo's model"
    give_out(options, facts, rows, "handover")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments("vllm_handover", __doc__, vllm=True)
    parser.add_argument("--model", metavar="DIR", type=Path, help="a model directory; default: the demo's, made anew")
    parser.add_argument("--rounds", metavar="N", type=int, default=8, help="rounds after one to warm up. Default: 8")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
