"""Hand-overs whose prefill side is killed or stopped at every chunk, with real processes: what the decode side loads is right bit
for bit, it is never told of an error, no wait hangs, and nothing is left leased, promised, reserved or connected.

CI runs `KILLS` of them. `KILLS=1000 python -m pytest tests/test_handover_kills.py` runs a thousand.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zygotes
from engine_process import Engine
from lmcache.engine import Hit, Loading
from servers import PATIENCE, Process, Server, eventually
from test_engine import prompt
from test_requests import CHUNK, Bed

Servers, Engines = Callable[..., Server], Callable[..., Engine]
KILLS = int(os.environ.get("KILLS", "30"))
TOKENS = 6 * CHUNK + 9
"""Six chunks and a tail."""
SCRIPT = Path(__file__).parent / "scripts" / "prefill_process.py"
MODULES = ("engine_process", "lmcache.engine", "lmcache.engine.worker")
PLACES = "before", "midway", "after", "running"
HOWS = "kill", "stop and kill", "stop and go on"


class Prefill(Process):
    """The prefill side. It is forked, since an interpreter takes long to start."""

    def __init__(self, server: Server, name: str, ids: list[int], halt: tuple[int, str], pace: float) -> None:
        told = {"address": server.address, "instance": name, "ids": ids, "chunk": CHUNK, "halt": halt}
        folder = str(SCRIPT.parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
        start = functools.partial(zygotes.start, MODULES)
        command = [sys.executable, str(SCRIPT), json.dumps(told | {"tokens_per_second": pace})]
        super().__init__(command, start, env=environment, cwd=folder)

    def until(self, **what: Any) -> None:
        self.line_with(json.dumps(what))

    def freeze(self) -> None:
        """SIGSTOP, and wait until it stands still; its zygote is its parent."""
        self.signal(19)
        status = Path(f"/proc/{self.pid}/task")
        eventually(lambda: all(_state(one) in "TtZ" for one in status.iterdir()))

    def go_on(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()

    def close(self) -> None:
        self.kill()
        for stream in (self.child.stdin, self.child.stdout):
            assert stream is not None
            stream.close()


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def cases(seed: int) -> list[tuple[str, int, str]]:
    """How, at which chunk, and where: all of them once before any of them twice."""
    dice, found = random.Random(seed), list[tuple[str, int, str]]()
    every = list(itertools.product(HOWS, range(-(-TOKENS // CHUNK)), PLACES))
    while len(found) < KILLS:
        dice.shuffle(every)
        found += every
    return found[:KILLS]


def at_rest(server: Server, processes: int) -> None:
    def rests() -> bool:
        found = server.counters()
        held = [found[name] for name in ("leases", "promised_chunks", "reservations", "fetches_open")]
        return not any(held) and found["engine_processes"] == processes

    eventually(rests)


@pytest.mark.timeout(max(300, 5 * KILLS))
def test_a_prefill_side_that_is_killed_or_stopped_at_any_chunk(server: Servers, engine: Engines) -> None:
    one = server(l1=2, chunk=CHUNK)  # so small that extents are used again all the time
    decode = Bed(engine(one, instance="decode"), name="decode", stores=False)
    others = engine(one, instance="others")
    processes = int(one.counters()["engine_processes"])
    loaded = Counter[int]()
    for number, (how, at, place) in enumerate(cases(7)):
        ids = prompt(10_000 + number, TOKENS)
        # Who waits for a killed one would do so for hours. A stopped one cannot be told from a slow one but by its pace.
        pace = 1.0 if how == "kill" else 1e5
        decode.requests.prefill.tokens_per_second = pace
        prefill = Prefill(one, f"prefill {number}", ids, (at, place), pace)
        try:
            prefill.until(computed=0)
            request = decode.open(f"r{number}", tail_leaves=1)
            first = decode.requests.find(request, ids)
            if place != "running":
                prefill.until(halted=at)
            elif at:
                prefill.until(computed=at)
            if how == "kill":
                prefill.kill()
            else:
                prefill.freeze()
            loaded[_decoded(decode, request, ids, first)] += 1
            if how != "kill":
                _use_memory(others, number)
            if how == "stop and go on":
                prefill.thaw()
                if place != "running":
                    prefill.go_on()
                prefill.until(done=True)
                _check_memory(others, number)
                again = decode.open(f"again {number}", tail_leaves=1)
                _decoded(decode, again, ids, decode.requests.find(again, ids))
        finally:
            prefill.close()
        at_rest(one, processes)
    assert one.healthy() and not one.complaints()
    print(f"{KILLS} hand-overs; tokens loaded: {dict(sorted(loaded.items()))}")
    assert len(loaded) > 3, "hand-overs ended in the middle"


def _decoded(bed: Bed, request: Any, ids: list[int], found: Any) -> int:
    """What a decode engine does: wait, load what was found, and compute the rest. Tokens loaded."""

    def answer() -> Any:
        nonlocal found
        if isinstance(found, Loading):
            bed.now += 0.05
            found = bed.requests.find(request, ids)
        return None if isinstance(found, Loading) else (found,)

    (hit,) = eventually(answer, PATIENCE)
    end = min(request.found_tokens, len(ids) - 1) if isinstance(hit, Hit) else 0
    bed.engine.poison()
    if end:
        copy = bed.copies.load(bed.requests.load(request, 0, end), bed.engine.table(len(ids)))
        assert bed.copies.settle([copy], PATIENCE) and copy.ok
    assert bed.engine.right(ids, 0, end), "WRONG BYTES"
    bed.requests.finish(request.id)
    bed.requests.open.pop(request.id, None)
    return end


def _use_memory(engine: Engine, number: int) -> None:
    """Store so much that all memory that may be used again is."""
    for seed in range(4):
        engine.store(prompt(50_000 + 4 * number + seed, 2560))


def _check_memory(engine: Engine, number: int) -> None:
    """A late write into memory that was used again would show here."""
    assert engine.load(prompt(50_000 + 4 * number + 3, 2560)) > 0
