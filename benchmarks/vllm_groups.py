"""What several kinds of KV cost a hit, on real vLLM (CPU): `python -m benchmarks.vllm_groups --vllm-python PATH`.

The same weights stand in two engines. In one every layer has full attention; in the other five layers of six have a sliding
window that is longer than the prompt. So both have the same bytes to load, the first in one group and the second in several.
Each round asks both for the same new prompt, and again after they have forgotten it, so the hits are paired. What vLLM's own
prefix cache takes for the same is measured beside it, since a forward of several groups has more to prepare, too.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import Goal, Row
from benchmarks.run import about, arguments, give_out
from benchmarks.sides import PROJECT, Side
from benchmarks.vllm_ttft import PROMPT_TOKENS, VOCABULARY, Engine, transfer_config

LAYERS = 12
WINDOW = 8000
"""Tokens; longer than the prompt, and shorter than the context, or vLLM would take the layer for one of full attention."""
KINDS = {
    "full": ["full_attention"] * LAYERS,
    "windows": (["sliding_attention"] * 5 + ["full_attention"]) * (LAYERS // 6),
}
MODEL = f"""
import sys
from transformers import AutoModelForCausalLM, Gemma3TextConfig
config = Gemma3TextConfig(vocab_size={VOCABULARY}, hidden_size=512, intermediate_size=1024, num_hidden_layers={LAYERS},
    num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=8192, sliding_window={WINDOW},
    layer_types=sys.argv[2].split(","))
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
"""


def measure(engines: dict[str, Engine], rounds: int) -> list[Row]:
    """The rows of the report. The first round only warms up."""
    rng = random.Random()
    own = {name: Row(f"own-{name}", f"hit, vLLM's own prefix cache, {name}", "s", None) for name in engines}
    hit = {name: Row(f"hit-{name}", f"hit, LMCache, {name}", "s", None) for name in engines}
    ratios = [Row("own-ratio", "vLLM's own hit, windows over full", "x", None)]
    ratios.append(Row("hit-ratio", "LMCache's hit, windows over full", "x", Goal(1.2, "less")))
    for turn in range(-1, rounds):
        # vLLM always computes the last token, and windows can be gone on from only where chunks end: all compute one token.
        prompt = rng.choices(range(1, VOCABULARY), k=PROMPT_TOKENS + 1)
        names, times = list(engines), {}
        rng.shuffle(names)
        for name in names:
            engines[name].first_token(prompt)
            times[own[name]] = _hit(engines[name], prompt)
            engines[name].forget()
            times[hit[name]] = _hit(engines[name], prompt)
        print(f"  round {turn}: { {row.name: round(seconds, 4) for row, seconds in times.items()} }", file=sys.stderr)
        if turn >= 0:
            for row, seconds in times.items():
                row.add("ours", [seconds])
            for row, kind in zip(ratios, (own, hit), strict=True):
                row.add("ours", [times[kind["windows"]] / times[kind["full"]]])
    return [*own.values(), *hit.values(), *ratios]


def _hit(engine: Engine, prompt: list[int]) -> float:
    seconds, cached = engine.first_token(prompt)
    if cached != PROMPT_TOKENS:
        raise RuntimeError(f"the {engine.name} engine had {cached} of {PROMPT_TOKENS} tokens of a prompt it had seen")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options = parse(argv)
    with tempfile.TemporaryDirectory(prefix="lmcache-groups-") as name, contextlib.ExitStack() as stack:
        directory, engines = Path(name), {}
        server = stack.enter_context(Side("ours", sys.executable).serve(2, 256))
        for kind, layers in KINDS.items():
            model = directory / kind
            subprocess.run([options.vllm_python, "-c", MODEL, str(model), ",".join(layers)], check=True, cwd=PROJECT)
            more = {"skip_tokenizer_init": True, "disable_hybrid_kv_cache_manager": False}
            engine = Engine(kind, options.vllm_python, model, directory, transfer_config("ours", server.port), **more)
            stack.callback(engine.kill)
            engine.call("ready")
            engines[kind] = engine
        server.settle()
        rows = measure(engines, options.rounds)
    facts = about([Side("ours", sys.executable)], argv, "benchmarks.vllm_groups")
    facts["prompt"] = f"{PROMPT_TOKENS + 1} tokens, float32, {LAYERS} layers of Gemma 3"
    give_out(options, facts, rows)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments("vllm_groups", __doc__, vllm=True, update=False)
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=8, help="paired rounds after one to warm up. Default: 8"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
