"""`python -m benchmarks.run`: every figure of the project beside the machine's limit and, with --peer-python, LMCache 0.5.6.

The table goes to standard output; --json FILE keeps every figure. A full run takes about ten minutes with the peer, and
8 GiB of memory; numbers mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.groups import GROUPS
from benchmarks.rows import Row, replace_figures, report
from benchmarks.sides import Plan, Side, sides_of
from lmcache import __version__


def main(argv: list[str] | None = None) -> int:
    """Run the chosen groups and print what came out; 1 when a group failed."""
    options = parse(argv)
    sides = sides_of(options.peer_python)
    plan = Plan(sides, options.quick, random.Random(7))
    rows: list[Row] = []
    failed: list[str] = []
    for name in options.only or GROUPS:
        began = time.perf_counter()
        print(f"{name} ... ", end="", file=sys.stderr, flush=True)
        try:
            rows += GROUPS[name](plan)
            print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
        except (RuntimeError, OSError) as error:
            failed.append(name)
            print(f"FAILED: {error}", file=sys.stderr)
    facts = about(sides, argv)
    if failed:
        facts["failed"] = ", ".join(failed)
    give_out(options, facts, rows, "run")
    return 1 if failed else 0


def arguments(
    name: str, description: str | None, *, vllm: bool = False, update: bool = True
) -> argparse.ArgumentParser:
    """The parser of the benchmark `benchmarks.NAME`, with what all of them take. vllm: it starts real engines. update: its table
    stands in benchmarks/README.md."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description, allow_abbrev=False)
    if vllm:
        named = os.environ.get("LMCACHE_TEST_VLLM_PYTHON")
        parser.add_argument(
            "--vllm-python", metavar="PATH", default=named, required=not named, help="Python with vLLM and us"
        )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure there")
    if update:
        parser.add_argument(
            "--update", metavar="FILE", type=Path, help="put the table into this page (benchmarks/README.md)"
        )
    return parser


def give_out(options: argparse.Namespace, facts: dict[str, object], rows: Sequence[Row], table: str = "") -> None:
    """Print the report, and write it where the options say. table: its place in benchmarks/README.md, if it has one."""
    if options.json:
        document = {**facts, "rows": [row.as_json() for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(report(facts, rows, as_markdown=False))
    if table and options.update:
        replace_figures(options.update, table, report(facts, rows, as_markdown=True))


def about(sides: Sequence[Side], argv: list[str] | None, module: str = "benchmarks.run") -> dict[str, object]:
    """Where, when and what: the head of the report."""
    words = [_short(word) for word in (sys.argv[1:] if argv is None else argv)]
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "version": __version__,
        "command": f"python -m {module} {shlex.join(words)}".strip(),
        "load": " ".join(f"{one:.2f}" for one in os.getloadavg()),
    }
    for side in sides:
        if side.name == "peer":
            facts["peer"] = f"LMCache {side.version()}, engine-driven over shared memory"
    return facts


def _short(word: str) -> str:
    """An absolute path's last two parts: where things lie on this machine is nobody's business."""
    return str(Path(*Path(word).parts[-2:])) if word.startswith("/") else word


def machine() -> str:
    """Processor, cores, memory, kernel and Python."""
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "CPU"
    )
    kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{cores} x {model}, {kib / 2**20:.0f} GiB, Linux {platform.release()}, Python {python}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments("run", __doc__)
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with LMCache 0.5.6")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(GROUPS), help=f"groups: {', '.join(GROUPS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: does it work, not how fast is it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
