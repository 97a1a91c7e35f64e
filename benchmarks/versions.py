"""`python -m benchmarks.versions CHECKOUT`: another checkout of this project beside this one, in short alternating turns.

The native part of both must be built in place (`setup.py build_ext --inplace`). Each has a server and two engine-side
processes of its own for the complete run. In a round each makes one burst of every call, and the ratios are those of
neighbouring bursts, so a machine that becomes slower for a while does not change them. With `.` as CHECKOUT and different
`--flags` and `--other-flags` it shows what an option of the server costs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path
from statistics import median, quantiles

from benchmarks.rows import number
from benchmarks.scenarios import SHAPES
from benchmarks.sides import PROJECT, Server, Side, Worker
from lmcache.bench.samples import align

SHAPE = SHAPES["small"]
HEAD = ["what", "unit", "other", "this", "ratio", "quartiles"]


class Version:
    """The processes of one checkout: `asker` looks up what it has kept, `copier` stores and retrieves."""

    def __init__(self, checkout: Path, flags: str, stack: contextlib.ExitStack) -> None:
        path = os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH", "")]))
        side = Side("ours", sys.executable, path, checkout=checkout)
        self.server: Server = stack.enter_context(side.serve(2, flags=shlex.split(flags)))
        self.asker: Worker = stack.enter_context(side.session(self.server, SHAPE))
        self.copier: Worker = stack.enter_context(side.session(self.server, SHAPE))
        for chunks in (1, 512):
            self.asker.call("keep", chunks=chunks)
        self.server.settle()

    def burst(self) -> dict[str, float]:
        """Make some calls of each kind; return the median microseconds of each kind, and the server's CPU time of a cycle."""
        times = {"empty call": self.asker.call("empty_calls", count=200)}
        for chunks, known, count in ((1, True, 200), (512, True, 50), (512, False, 4)):
            name = f"lookup, {chunks} chunks, {'hashes known' if known else 'from a list of ids'}"
            times[name] = self.asker.call("lookups", chunks=chunks, count=count, known=known)
        # Above, the server is still busy with the release of the lookup before; an engine's lookups mostly come by themselves.
        single = [self.asker.call("lookups", chunks=1, count=1, known=True)[0] for _ in range(20)]
        times["lookup, 1 chunk, hashes known, one at a time"] = single
        times["store, small, 1 chunk"] = self.copier.call("stores", chunks=1, count=20)["seconds"]
        times["retrieve, small, 1 chunk"] = self.copier.call("retrieves", chunks=1, count=20)["seconds"]
        medians = {name: median(samples) for name, samples in times.items()}
        cycles = self.asker.call("lookups_for", seconds=0.05)
        medians["lookup from a list and release, 1 chunk"] = cycles["seconds"] / cycles["lookups"]
        return {name: 1e6 * seconds for name, seconds in medians.items()}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    other: list[dict[str, float]] = []
    this: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        pair = [
            (other, Version(options.checkout, options.other_flags, stack)),
            (this, Version(PROJECT, options.flags, stack)),
        ]
        for turn in range(options.rounds + 1):
            for samples, version in pair[:: -1 if turn % 2 else 1]:
                samples.append(version.burst())
    rows = [HEAD]
    for name in other[0]:  # the first round warms up
        ratios = [new[name] / old[name] for old, new in zip(other[1:], this[1:], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        medians = [number(median(one[name] for one in samples[1:])) for samples in (other, this)]
        rows.append([name, "us", *medians, f"{middle:.3f}", f"{low:.3f} .. {high:.3f}"])
    print(align(rows))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.versions", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkout", type=lambda path: Path(path).resolve(), help="folder of the other checkout")
    parser.add_argument("--flags", default="", help="more flags of this checkout's server")
    parser.add_argument("--other-flags", default="", help="more flags of the other checkout's server")
    parser.add_argument("--rounds", type=int, default=100, help="turns of each side (default: 100)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
