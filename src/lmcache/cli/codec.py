"""`lmcache codec check`: what a lossy codec does to the answers of a model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.cli.verbs import Verbs, add
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.bench.quality import Subject

_DEFAULT = ("none", "pack12", "int8")
_CODECS = (*_DEFAULT, "k8v4")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_TEXT = """
Measure what a codec does to the answers of a model. For each prompt the model computes exact KV, the codec encodes and
decodes it, and the model answers from it and from the exact KV. The model runs here, in Transformers, without a server.

KL           of the exact distribution of the next token from the codec's, in nats, the mean over the answer's tokens
next token   how often the most probable next token is the same
answer       how often all tokens of the greedy answer are the same
Brackets are intervals of 95 %: KL by resampling the prompts, shares by Wilson's formula.

FILE of --prompts has one prompt a line. A name that ends in .jsonl: each line is a JSON string, or an object with
`prompt`, or with `messages` for the model's chat template. --texts cuts files into passages instead.

examples:
  lmcache codec check --model ./Qwen3-0.6B --prompts prompts.jsonl
  lmcache codec check --model ./SmolLM2-135M --texts docs/*.md --kv-dtype bfloat16
  lmcache codec check --model ./Qwen3-0.6B --prompts prompts.txt --codec int8 --tokens 64 --json
"""


def add_verb(verbs: Verbs) -> None:
    """Add `codec` to the command line."""
    parser = add(verbs, "codec", run, "what a lossy codec does to a model's answers", _TEXT)
    parser.add_argument("action", choices=("check",), help="What to do.")
    parser.add_argument("--model", required=True, help="Folder or name of a model, for Transformers.")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="Prompts, one a line.")
    parser.add_argument("--texts", type=Path, nargs="+", metavar="FILE", help="Texts that passages are cut from.")
    parser.add_argument(
        "--codec", action="append", choices=_CODECS, help="May be repeated. Default: none, pack12 and int8."
    )
    parser.add_argument("--samples", type=int, default=100, metavar="N", help="The most prompts. Default: 100.")
    parser.add_argument(
        "--context", type=int, default=0, metavar="TOKENS", help="Length of a passage (300), or the most of a prompt."
    )
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="Tokens of an answer. Default: 16.")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="Of the computation. Default: the model's own."
    )
    parser.add_argument("--kv-dtype", choices=_DTYPES[1:], default="", help="Of the engine's KV. Default: as --dtype.")
    parser.add_argument("--device", default="", help="As PyTorch names it. Default: cuda if there is one, else cpu.")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="Begin no prompt after so long.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    if (arguments.prompts is None) == (arguments.texts is None):
        raise ConfigError(
            "pass --prompts FILE or --texts FILE ...: your own prompts say what a codec does to your answers"
        )
    for name, least in (("samples", 1), ("tokens", 1), ("context", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} {getattr(arguments, name)}: must be at least {least}")
    given = _lines(arguments.prompts) if arguments.prompts is not None else [_text(path) for path in arguments.texts]
    try:
        from lmcache.bench.quality import opened
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'lmcache[transformers]'") from error
    subject = opened(arguments.model, arguments.dtype, arguments.kv_dtype, arguments.device)
    prompts = _prompts(subject, given, arguments)

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {len(prompts)} prompts", end="", file=sys.stderr, flush=True)

    rows = subject.measure(prompts, arguments.codec or _DEFAULT, arguments.tokens, progress, arguments.seconds)
    print(file=sys.stderr) if sys.stderr.isatty() else None
    found = {
        "model": arguments.model,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "kv_dtype": str(subject.kv_dtype).removeprefix("torch."),
        "prompt_tokens": round(sum(map(len, prompts)) / len(prompts)),
        "answer_tokens": arguments.tokens,
        "codecs": [one.told() for one in rows],
    }
    print(json.dumps(found, indent=2)) if arguments.json else _print(found)
    return 0


def _prompts(subject: Subject, given: list[Any], arguments: argparse.Namespace) -> list[list[int]]:
    """Return the prompts as token ids. Passages of texts do not overlap, and are taken from all over the texts."""
    if arguments.prompts is not None:
        encoded = [
            subject.chat(one) if isinstance(one, list) else subject.encode(one) for one in given[: arguments.samples]
        ]
        return [one[-arguments.context :] for one in encoded]
    size = arguments.context or 300
    tokens = [token for text in given for token in subject.encode(text)]
    count = min(arguments.samples, len(tokens) // size)
    if not count:
        raise ConfigError(f"--texts: {len(tokens)} tokens are fewer than one passage of {size}; see --context")
    step = len(tokens) // count
    return [tokens[number * step :][:size] for number in range(count)]


def _lines(path: Path) -> list[Any]:
    """Return the prompts of a file: strings, or lists of messages."""
    found = []
    for number, line in enumerate(
        _text(path).split("\n"), 1
    ):  # others that `splitlines` knows may stand in JSON strings
        if not line.strip():
            continue
        one: Any = line
        if path.suffix == ".jsonl":
            try:
                one = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: is not JSON ({error})") from None
            if isinstance(one, dict):
                one = one.get("prompt", one.get("messages"))
            if not isinstance(one, str | list):
                raise ConfigError(f"{path}:{number}: must be a string, or an object with `prompt` or `messages`")
        found.append(one)
    if not found:
        raise ConfigError(f"--prompts {path}: there is no prompt in it")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _print(found: dict[str, Any]) -> None:
    print(f"{found['model']}, KV in {found['kv_dtype']}: {found['codecs'][0]['prompts']} prompts of about "
          f"{found['prompt_tokens']} tokens, answers of {found['answer_tokens']}\n")  # fmt: skip
    rows: list[list[str]] = [["codec", "KV", "ratio", "KL", "95 %", "worst", "next token", "95 %", "answer", "95 %"]]
    for one in found["codecs"]:
        low, high = one["kl_interval"]
        rows.append(
            [
                one["codec"],
                "exact" if one["bit_exact"] else "rounded",
                f"{one['ratio']:.2f}",
                f"{one['kl']:.5f}",
                f"[{low:.5f}, {high:.5f}]",
                f"{one['kl_worst']:.5f}",
                *_share(one["next_token_same"], one["next_token_same_interval"]),
                *_share(one["answer_same"], one["answer_same_interval"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _share(share: float, interval: tuple[float, float]) -> tuple[str, str]:
    return f"{share:.2f}", f"[{interval[0]:.2f}, {interval[1]:.2f}]"
