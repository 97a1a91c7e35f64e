"""A tier behind a running server, ours and LMCache 0.5.6's, in turns: what an engine waits for, and CPU time of the server.

The peer's tiers work only inside its server, so here ours is timed in the same place: real servers with one tier each, one
engine-side process each, L1 emptied between storing and loading. `tiers` and `tiers_remote` call `served`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import Row
from benchmarks.scenarios import SHAPES, Shape
from benchmarks.sides import Server, Side, Worker

MIB, GB = 1 << 20, 1e9
ROUND_BYTES = 256 * MIB
PAUSE_SECONDS, RARE_PAUSE_SECONDS, SHORT_PAUSE_SECONDS = 0.002, 0.02, 0.0002
"""Between an engine's questions while a load is under way: where its time counts; where the server's CPU time does, since each
question costs some; for a single small chunk."""
QUIET_SECONDS = 0.1
"""A folder that holds enough, and that nothing was written to for so long, holds everything."""
STORED_SECONDS = 60.0

Ended = Callable[[int, int], float | None]


@dataclasses.dataclass(frozen=True)
class Tier:
    """One side's tier.

    flags: the server's. ended(chunks, chunk_bytes): `time.time()` when it had the last of so many chunks; None while it lacks
    some. Read from the store itself, which costs the server nothing. wipe: empty it. pause_seconds: between calls of `ended`.
    """

    flags: tuple[str, ...]
    ended: Ended
    wipe: Callable[[Server], None]
    pause_seconds: float = 0.05


def ours_of(url: str, ended: Ended, pause_seconds: float = 0.05) -> Tier:
    """`--worth always`, since an engine without a model has no pace of computing that a load could be compared with."""
    flags = ("--l2", url, "--worth", "always")
    return Tier(flags, ended, lambda server: server.post("/clear-cache?tiers=all"), pause_seconds)


def last_written(folder: Path) -> Ended:
    """For tiers in files, whatever their names: when the last one was written to or given its name, in the kernel's ticks."""

    def ended(chunks: int, chunk_bytes: int) -> float | None:
        try:
            files = [file.stat() for file in folder.rglob("*") if file.is_file()]
        except FileNotFoundError:  # one was given its name meanwhile
            return None
        newest = max((file.st_ctime for file in files), default=0.0)
        enough = sum(file.st_blocks * 512 for file in files) >= chunks * chunk_bytes
        return newest if enough and time.time() - newest > QUIET_SECONDS else None

    return ended


class Turns:
    """One side: its server with the tier, and its engine."""

    def __init__(self, side: Side, tier: Tier, stack: contextlib.ExitStack, shape: Shape, l1_gb: float = 2) -> None:
        self._name, self._tier, self._shape = side.name, tier, shape
        self._server: Server = stack.enter_context(side.serve(l1_gb, shape.chunk_tokens, tier.flags))
        self._worker: Worker = stack.enter_context(side.session(self._server, shape))
        self._server.settle()

    def store(self, chunks: int) -> tuple[float, float, float]:
        """Seconds until L1 has a new prompt, and until the tier has it, from the store's begin; CPU seconds of the server."""
        self._worker.call("draw", chunks=chunks)
        cpu, began = self._server.cpu_seconds(), time.time()
        into_l1 = float(self._worker.call("put"))
        while (ended := self._tier.ended(chunks, self._shape.chunk_bytes)) is None:
            if time.time() - began > STORED_SECONDS:
                raise RuntimeError(f"{self._name}: the tier has not got {chunks} chunks in {STORED_SECONDS:.0f} s")
            time.sleep(self._tier.pause_seconds)
        return into_l1, ended - began, self._server.cpu_seconds() - cpu

    def load(self, pause_seconds: float) -> tuple[float, float]:
        """Seconds from the lookup until L1 has all that `store` has stored; CPU seconds of the server."""
        self._server.drop_l1()
        cpu = self._server.cpu_seconds()
        seconds = float(self._worker.call("fetch", pause_seconds=pause_seconds))
        return seconds, self._server.cpu_seconds() - cpu

    def wipe(self) -> None:
        self._server.drop_l1()
        self._tier.wipe(self._server)


def served(what: str, tiers: dict[str, Tier], sides: tuple[Side, ...], quick: bool) -> list[Row]:
    """Rows of one kind of tier, chunks of 32 MiB and of 0.5 MiB. tiers: by the side's name.

    Half of the rounds are of servers that were started in the other order: who starts first gets the memory that others have
    left in small pieces, and direct I/O into that may be half as fast.
    """
    return [row for name in ("big", "small") for row in _of_shape(what, tiers, sides, SHAPES[name], quick)]


def _of_shape(what: str, tiers: dict[str, Tier], sides: tuple[Side, ...], shape: Shape, quick: bool) -> list[Row]:
    size, chunks = f"{shape.chunk_bytes / MIB:g} MiB", ROUND_BYTES // shape.chunk_bytes
    store = Row("", f"{what}, served: store chunks of {size}, until the tier has them", "GB/s", None)
    into_l1 = Row("", f"{what}, served: the same, until L1 has them", "GB/s", None)
    load = Row("", f"{what}, served: load chunks of {size}, until L1 has them", "GB/s", None)
    cpu_store, cpu_load = (
        Row("", f"{what}, served: the server's CPU seconds a GB, {call}, {size}", "s/GB", None)
        for call in ("store", "load")
    )
    one = Row("", f"{what}, served: load one chunk of {size}", "ms", None)
    rounds = 1 if quick else 3
    spent = {side.name: [0.0, 0.0] for side in sides}
    starts = [sides, sides[::-1]]
    for starting in starts:
        with contextlib.ExitStack() as stack:
            turns = {side.name: Turns(side, tiers[side.name], stack, shape) for side in starting}
            for number in range(rounds + 1):
                for name in list(turns) if number % 2 else reversed(turns):
                    l1_seconds, store_seconds, store_cpu = turns[name].store(chunks)
                    load_seconds, _ = turns[name].load(PAUSE_SECONDS)
                    _, load_cpu = turns[name].load(RARE_PAUSE_SECONDS)
                    turns[name].wipe()
                    if not number:
                        continue  # to warm up
                    for row, seconds in ((store, store_seconds), (into_l1, l1_seconds), (load, load_seconds)):
                        row.add(name, [ROUND_BYTES / seconds / GB])
                    spent[name][0] += store_cpu
                    spent[name][1] += load_cpu
            for _ in range(rounds):
                for name, turn in turns.items():
                    turn.store(1)
                    one.add(name, [turn.load(SHORT_PAUSE_SECONDS)[0] * 1e3 for _ in range(4 if quick else 20)])
                    turn.wipe()
    gigabytes = len(starts) * rounds * ROUND_BYTES / GB  # of all rounds: the kernel counts in 10 ms
    for name, both in spent.items():
        for row, cpu in zip((cpu_store, cpu_load), both, strict=True):
            row.add(name, [cpu / gigabytes])
    return [store, into_l1, load, cpu_store, cpu_load, one]
