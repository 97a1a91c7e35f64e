"""`lmcache replay`: what another size of L1, or another policy, would have found in recorded requests."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.cli.verbs import Verbs, add
from lmcache.errors import ConfigError
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME

if TYPE_CHECKING:
    from lmcache.sizing.readers import Trace
    from lmcache.sizing.replay import Capacity, Simulation

_TEXT = """
Replay recorded lookups through the cache's own index and eviction policy, and print which share of the prompts each
size of memory would have found. It needs no server, no model and no GPU. FILE is what `lmcache server --record-trace` has
written, a trace with `hash_ids` (Mooncake), LMCache's lookup_hashes_*.jsonl, or CSV with `seconds,hash hash ...`. Several
files are read one after the other.

examples:
  lmcache replay trace.jsonl --l1-size-gb 20,40,80
  lmcache replay conversation.jsonl --capacity-blocks 1000,5000,10000 --json
  lmcache replay today.jsonl --against yesterday.jsonl --l1-size-gb 20,40,80
  lmcache replay conversation.jsonl --l1-size-gb 100,200 --bytes-per-token 147456 --plot curve.png
"""
_STEP_SECONDS = 1.0
"""Between two lines of progress."""
_STEP_REQUESTS = 512
"""The clock is read once for so many records."""


def add_verb(verbs: Verbs) -> None:
    """Add `replay` to the command line."""
    parser = add(verbs, "replay", run, "what another size of L1 would have found in recorded requests", _TEXT)
    parser.add_argument("files", metavar="FILE", nargs="+", help="Traces, in the order of time.")
    parser.add_argument(
        "--eviction-policy",
        metavar="NAMES",
        default="default",
        help="Policies, separated by commas. Default: the server's.",
    )
    parser.add_argument("--capacity-blocks", metavar="N,N", default="", help="Sizes of L1, in blocks (chunks).")
    parser.add_argument("--l1-size-gb", metavar="GB,GB", default="", help="Sizes of L1, in GiB.")
    parser.add_argument(
        "--bytes-per-token", metavar="N", default="0",
        help="Memory of a token, for --l1-size-gb; `lmcache size` computes it. A trace of `--record-trace` tells it.",
    )  # fmt: skip
    parser.add_argument(
        "--block-tokens", metavar="N", default="0",
        help="Tokens of a block, where the trace does not tell (Mooncake's, CSV). Default: 512.",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="FILE|POLICY", default="",
        help="Replay another trace, or the same one with another policy, with the same sizes, and print the differences.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--plot", metavar="FILE", default="", help="Also draw the hit ratio by size (PNG, SVG or PDF).")


def run(arguments: argparse.Namespace) -> int:
    """Replay, and print the table."""
    from lmcache.sizing.replay import POLICIES, Capacity, is_policy, policy_named

    capacities = [Capacity(blocks=one) for one in _whole("--capacity-blocks", arguments.capacity_blocks)]
    per_token = _whole("--bytes-per-token", arguments.bytes_per_token, least=0)[0]
    capacities += [Capacity(0, one, per_token) for one in _sizes(arguments.l1_size_gb)]
    if arguments.capacity_blocks and arguments.l1_size_gb:
        raise ConfigError("--capacity-blocks and --l1-size-gb: pass one of the two")
    if not capacities:
        raise ConfigError("--capacity-blocks or --l1-size-gb: pass the sizes to try, such as --l1-size-gb 20,40,80")
    if arguments.plot:
        _check_plot(arguments.plot)
    policies = list(dict.fromkeys(policy_named(one.strip()) for one in arguments.eviction_policy.split(",")))
    other_trace = arguments.against and not is_policy(arguments.against)
    if arguments.against and not other_trace:
        if len(policies) > 1:
            raise ConfigError(f"--against {arguments.against}: compares with one policy: pass one --eviction-policy")
        policies.append(policy_named(arguments.against))
    if other_trace and not Path(arguments.against).is_file():
        raise ConfigError(
            f"--against {arguments.against}: is neither a file nor a policy: pass another trace, or one of {', '.join(POLICIES)}"
        )
    per_block = _whole("--block-tokens", arguments.block_tokens, least=0)[0]
    gc.freeze()  # nothing here makes cycles, and the collector would look through all records again and again
    gc.disable()
    summary, simulations = _replayed(arguments.files, per_block, policies, capacities)
    results = [one.result() for one in simulations]
    told: dict[str, Any] = {"trace": summary, "results": results}
    if other_trace:
        told["against_trace"], others = _replayed([arguments.against], per_block, policies, capacities)
        told["against"] = [one.result() for one in others]
    elif arguments.against:
        told |= {"results": results[: len(capacities)], "against": results[len(capacities) :]}
    if arguments.plot:
        _plot(arguments.plot, simulations)
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    _print(told["trace"], told["results"])
    if arguments.against:
        _print_against(arguments.against, told)
    return 0


def _replayed(
    files: Sequence[str], per_block: int, policies: Sequence[str], capacities: Sequence[Capacity]
) -> tuple[dict[str, Any], list[Simulation]]:
    """Replay these files with each policy and size. Return what the trace tells, and the simulations."""
    from lmcache.sizing.readers import Trace
    from lmcache.sizing.replay import Simulation, replay

    trace = Trace([Path(one) for one in files], per_block)
    simulations = [Simulation(policy, capacity) for policy in policies for capacity in capacities]
    progress = _Progress(trace)
    summary = replay(trace, simulations, progress.step)
    if not summary.requests:
        raise ConfigError(f"{files[0]}: no request in it: record for longer, or pass another file")
    progress.end(summary.requests, len(simulations))
    return summary.as_json(), simulations


def _print_against(name: str, told: dict[str, Any]) -> None:
    """Print the other results, each with the difference to the first ones in percentage points."""
    print(f"\nagainst {printable(name)}")
    if "against_trace" in told:
        _print(told["against_trace"], told["against"])
        print()
    for one, other in zip(told["results"], told["against"], strict=True):
        more = 100 * (one["token_hit_ratio"] - other["token_hit_ratio"])
        size = f"{one['capacity_blocks']:,} blocks" if "capacity_blocks" in one else f"{one['l1_size_gb']:g} GiB"
        rivals = one["policy"] if one["policy"] == other["policy"] else f"{one['policy']} and {other['policy']}"
        print(
            f"{rivals}, {size}: {one['token_hit_ratio']:.2%} of the tokens found, and {other['token_hit_ratio']:.2%}: "
            f"{more:+.2f} points"
        )


def _whole(flag: str, text: str, least: int = 1) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [least - 1]
    if any(not least <= one < 2**32 for one in found):
        raise ConfigError(f"{flag} {text}: must be whole numbers of at least {least}, separated by commas")
    return found


def _sizes(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [0.0]
    if any(not 0.0001 <= one <= 16384 for one in found):
        raise ConfigError(f"--l1-size-gb {text}: must be sizes in GiB from 0.0001 to 16384, separated by commas")
    return found


class _Progress:
    """Tells on stderr how far the replay has come."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._records = trace, 0
        self._began = self._told = RUNTIME.now()

    def step(self, requests: int) -> None:
        self._records += 1
        if self._records % _STEP_REQUESTS:
            return
        now = RUNTIME.now()
        if now >= self._told + _STEP_SECONDS:
            self._told, (done, total) = now, self._trace.progress
            print(f"{requests:,} requests, {done / max(1, total):.0%} of the trace", file=sys.stderr)

    def end(self, requests: int, simulations: int) -> None:
        seconds = max(1e-9, RUNTIME.now() - self._began)
        rate = requests * simulations / seconds * 60
        print(f"{requests:,} requests in {seconds:.1f} s: {rate:,.0f} a minute for each size", file=sys.stderr)


def _print(trace: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    print(f"{trace['requests']:,} requests in {trace['seconds']:,.0f} s")
    if "recorded_block_hit_ratio" in trace:
        print(f"the recorded server itself found {trace['recorded_block_hit_ratio']:.2%} of the blocks")
    if trace["lost_events"]:
        print(f"{trace['lost_events']:,} events are missing from the trace, so the figures are approximate")
    name = "capacity_blocks" if "capacity_blocks" in results[0] else "l1_size_gb"
    rows = [["policy", "blocks" if name == "capacity_blocks" else "L1 GiB", "tokens found", "blocks found", "evicted"]]
    for one in results:
        size = one.get("capacity_blocks", one.get("l1_size_gb"))
        ratios = (f"{one[ratio]:.2%}" for ratio in ("token_hit_ratio", "block_hit_ratio"))
        rows.append([one["policy"], f"{size:,}", *ratios, f"{one['evicted_blocks']:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))


def _check_plot(path: str) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"--plot {path}: needs matplotlib: pip install 'lmcache[plot]'") from None


def _plot(path: str, simulations: Sequence[Simulation]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for policy in dict.fromkeys(one.policy for one in simulations):
        points = [
            (one.capacity.blocks or one.capacity.gib, one.result()["token_hit_ratio"])
            for one in simulations
            if one.policy == policy
        ]
        sizes, ratios = zip(*sorted(points), strict=True)
        axes.plot(sizes, ratios, marker="o", label=policy)
    axes.set(xscale="log", xlabel="L1, blocks" if simulations[0].capacity.blocks else "L1, GiB", ylabel="tokens found")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path}: {error}: pass a file that can be written, ending in .png, .svg or .pdf"
        ) from None
