"""`lmcache bench`: measure what a server gives an engine on this host, or a real engine. The work is in `lmcache.bench`."""

from __future__ import annotations

import argparse
import json
import os

from lmcache.cli.verbs import Verbs, add, add_token, add_url, token_of
from lmcache.errors import ConfigError
from lmcache.observability.log import printable
from lmcache.wire.http_client import DEFAULT_URL

_TEXT = """
server (the default): measure what a server gives an engine on this host. It leaves a few chunks behind, in tiers too.

engine: send prompts to a real engine with an OpenAI-compatible API (vLLM, SGLang), as applications do: unique ones and the same
again, shared beginnings, conversations, documents, agents with tools. It prints the time to the first token with and without
hits, where hits came from (with --lmcache-url), memory before and after, and what it could not find out. The engine
computes and caches these prompts, so run it where nobody else is served.

examples:
  lmcache bench
  lmcache bench --model big --threads 2 --json
  lmcache bench engine --url http://localhost:8000 --lmcache-url http://localhost:8080
  lmcache bench engine --url https://llm.example.org --engine-key-file key --ca-file ca.pem
  lmcache bench engine --workloads chat,rag --tokens 8000 --concurrency 16 --requests 200 --json
"""
_ENGINE_URL = "http://localhost:8000"


def add_verb(verbs: Verbs) -> None:
    """Add `bench` to the command line."""
    parser = add(verbs, "bench", run, "measure the cache on this machine, or a real engine", _TEXT)
    parser.add_argument("what", nargs="?", choices=("server", "engine"), default="server", help="What to measure.")
    add_url(parser)
    add_token(parser)
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    group = parser.add_argument_group("lmcache bench server")
    group.add_argument(
        "--model",
        default="",
        help="Size of the KV: small, mid or big. Default: small. For engine: the name of the model.",
    )
    group.add_argument("--threads", type=int, default=1, help="Copy threads of the engine. Default: 1.")
    group.add_argument("--rounds", type=int, default=20, help="Samples of each copy. Default: 20.")
    group = parser.add_argument_group("lmcache bench engine", f"--url is the engine's. Default: {_ENGINE_URL}.")
    group.add_argument("--engine-url", default="", metavar="URL", help="The same as --url.")
    group.add_argument(
        "--lmcache-url", default="", metavar="URL", help="The LMCache server's HTTP endpoint, for hits by source."
    )
    group.add_argument(
        "--engine-key-file",
        default="",
        metavar="FILE",
        help="File (0600) with the engine's API key. Default: the key in OPENAI_API_KEY, if there is one.",
    )
    group.add_argument(
        "--ca-file",
        default="",
        metavar="FILE",
        help="Certificates (PEM) of the authorities that may have signed an https:// engine's. Default: the system's.",
    )
    group.add_argument(
        "--workloads",
        default="all",
        metavar="NAMES",
        help="Of unique,repeat,prefix,chat,rag,agents. Default: all.",
    )
    group.add_argument("--requests", type=int, default=24, help="Requests of each workload. Default: 24.")
    group.add_argument("--tokens", type=int, default=2000, help="Tokens of a prompt. Default: 2000.")
    group.add_argument("--output-tokens", type=int, default=16, help="Tokens of an answer. Default: 16.")
    group.add_argument("--concurrency", type=int, default=4, help="The most conversations at a time. Default: 4.")
    group.add_argument(
        "--rate",
        type=float,
        default=0.0,
        help="Conversations that begin in a second, at random times. Default: when one ends.",
    )
    group.add_argument(
        "--vocabulary", type=int, default=512, help="Prompts use so many token ids from 40 on. Default: 512."
    )
    group.add_argument("--seed", type=int, default=-1, help="Of the prompts. Default: another one each time.")
    group.add_argument(
        "--timeout", type=float, default=600.0, help="Seconds for which the engine may be silent. Default: 600."
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark. The exit code is 1 if a request to the engine failed."""
    token = token_of(arguments)
    if arguments.what == "engine":
        return _engine(arguments, token)
    arguments.model = arguments.model or "small"
    if arguments.model not in ("small", "mid", "big"):
        raise ConfigError(f"--model {arguments.model}: must be small, mid or big")
    from lmcache.bench.main import report

    print(report(arguments, token))
    return 0


def _engine(arguments: argparse.Namespace, token: str) -> int:
    from lmcache.bench import serving
    from lmcache.bench.checklist import lines
    from lmcache.bench.reaching import context_of, key_of
    from lmcache.bench.workloads import WORKLOADS, Shape
    from lmcache.config.given import nearest
    from lmcache.proxy.upstream import parse_engines

    url = arguments.engine_url or (_ENGINE_URL if arguments.url == DEFAULT_URL else arguments.url)
    (engine, *more), key = parse_engines("--url", url, context_of(arguments.ca_file)), key_of(arguments.engine_key_file)
    if more:
        raise ConfigError(f"--url {url}: name one engine")
    known = {one.name: one for one in WORKLOADS}
    names = list(known) if arguments.workloads == "all" else arguments.workloads.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(f"--workloads {name}: {nearest(name, list(known), 'there is ' + ', '.join(known))}")
    numbers = arguments.requests, arguments.tokens, arguments.output_tokens
    serving.checked(*numbers, arguments.concurrency, arguments.rate, arguments.vocabulary)
    seed = arguments.seed if arguments.seed >= 0 else int.from_bytes(os.urandom(4), "big")
    plan = serving.Plan(
        engine,
        arguments.model,
        [known[name] for name in names],
        Shape(arguments.tokens, arguments.vocabulary, seed),
        arguments.requests,
        arguments.concurrency,
        arguments.rate,
        arguments.output_tokens,
        arguments.timeout,
        arguments.lmcache_url,
        token,
        key,
    )
    found = serving.run(plan)
    text = json.dumps(found, indent=1) if arguments.json else "\n".join(lines(found))
    print(text if arguments.json else "\n".join(printable(line, 4000) for line in text.splitlines()))
    return 1 if any(one["failures"] for one in found["workloads"]) else 0
