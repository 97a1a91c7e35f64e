"""`lmcache`: runs a verb, and turns errors into one line and an exit code (2: a setting is wrong, 1: any other error)."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lmcache import __version__
from lmcache.cli import (
    bench,
    clear,
    codec,
    completion,
    coordinator,
    demo,
    describe,
    doctor,
    kvcache,
    ping,
    predict,
    proxy,
    replay,
    server,
    settings,
    size,
    status,
    tier,
    top,
    why,
)  # fmt: skip
from lmcache.config.given import nearest
from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import printable

_ERROR_CHARACTERS = 4000
"""The longest error that is printed, because an error may quote what a peer sent."""
_DESCRIPTION = "A KV-cache layer for LLM engines: prefill a prefix once, reuse its KV everywhere."
_EXAMPLES = """\
examples:
  lmcache server --l1-size-gb 20            start a cache of 20 GiB for the engines of this host
  vllm serve MODEL --kv-transfer-config '{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both"}'
                                            an engine that uses it
  lmcache ping                              check whether the server serves
  lmcache status                            show its contents, its engines and its hits on one screen

`lmcache VERB --help` explains each verb.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Report an error; argparse calls this for anything that it cannot parse."""
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong is not None:
            message = (
                message[: wrong.start()] + f"{wrong[1]}: {nearest(wrong[1], re.findall(r'[a-z][a-z-]*', wrong[2]))}"
            )
        self.exit(2, f"{self.prog}: error: {message} (try {self.prog} --help)\n")


def build_parser() -> Parser:
    """Build the command line's parser. Each verb sets `run`, a function from the parsed arguments to an exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("lmcache", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"lmcache {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    modules = (
        *(server, status, top, ping, describe, why, doctor, tier, predict, replay, size, codec),
        *(clear, settings, bench, demo, proxy, coordinator, completion, kvcache),
    )
    for module in modules:
        module.add_verb(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = build_parser()
        if not words:
            parser.print_help()
            return 0
        _check_verb(words[0], parser)
        arguments, unknown = parser.parse_known_args(words)
        if unknown:
            raise ConfigError(_unknown(arguments, unknown[0]))
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _fail(error, 2)
    except LMCacheError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _check_verb(word: str, parser: argparse.ArgumentParser) -> None:
    known = next(one.choices for one in parser._actions if one.dest == "verb")
    if known is not None and word not in known and not word.startswith("-"):
        raise ConfigError(f"{word}: no such verb: {nearest(word, known, 'lmcache --help lists the verbs')}")


def _unknown(arguments: argparse.Namespace, word: str) -> str:
    flag = word.split("=", 1)[0]
    if not flag.startswith("-"):
        return f"{word}: not expected after `lmcache {arguments.verb}` (try lmcache {arguments.verb} --help)"
    listed = f"lmcache {arguments.verb} --help lists them"
    return f"{flag}: no such flag of `lmcache {arguments.verb}`: {nearest(flag, arguments.flags, listed)}"


def _fail(error: LMCacheError, code: int) -> int:
    print("lmcache: error:", printable(" ".join(str(error).split()), _ERROR_CHARACTERS), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
