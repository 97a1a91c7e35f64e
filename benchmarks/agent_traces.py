"""Writes made-up traces of agents, in the form of Mooncake's, for `lmcache replay` and `benchmarks.policies`.

    python -m benchmarks.agent_traces FOLDER

Sessions begin at random and run side by side. All sessions of one kind of agent share its instructions. Each step appends what
the model has answered and what a tool has returned to the prompt before it, and follows after the answer and the tool's time:
most often within seconds, now and then, when a person is asked, after minutes. Some steps go back to an earlier one and go on
otherwise. No figure here comes from a measurement of real agents. A block has 256 tokens.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 256
TOKEN_SECONDS = 0.03


@dataclass(frozen=True)
class Shape:
    """What the agents of a trace are like. Times are in seconds, lengths in tokens; medians of log-normal distributions."""

    sessions: int
    between: float
    kinds: int
    steps: float
    answer: float
    result: float
    tool: float
    pauses: float
    """Share of the steps that wait for a person."""
    branches: float
    """Share of the steps that go back to an earlier one."""


SHAPES = {
    "coding": Shape(50, 20.0, 4, 25, 250, 1200, 4.0, 0.08, 0.02),
    "research": Shape(90, 12.0, 3, 10, 500, 3000, 8.0, 0.02, 0.05),
    "assistants": Shape(500, 5.0, 12, 5, 150, 400, 2.0, 0.35, 0.0),
    "parallel": Shape(150, 15.0, 2, 12, 300, 800, 3.0, 0.05, 0.15),
}


def requests(shape: Shape, seed: int) -> Iterator[tuple[float, int, list[int]]]:
    """Yield (time, tokens of the answer, ids of the full blocks) of all requests, in the order of time."""
    dice = random.Random(seed)
    ids: dict[tuple[int, int], int] = {}

    def spread(median: float, sigma: float = 0.8) -> float:
        return median * math.exp(dice.gauss(0, sigma))

    def blocks(parts: list[tuple[int, int]]) -> list[int]:
        """The ids of the full blocks of a prompt, which consists of (what, tokens)."""
        found, above, filled, content = list[int](), 0, 0, 0
        for what, tokens in parts:
            while tokens:
                taken = min(tokens, BLOCK - filled)
                filled, tokens = filled + taken, tokens - taken
                content = hash((content, what, taken, tokens))
                if filled == BLOCK:
                    above = ids.setdefault((above, content), len(ids) + 1)
                    found.append(above)
                    filled = content = 0
        return found

    parts_made = iter(range(1 << 40, 1 << 41))
    kinds = [[(one, int(spread(3000, 0.5)))] for one in range(shape.kinds)]
    coming: list[tuple[float, int, int, list[tuple[int, int]]]] = []
    begin = 0.0
    for session in range(shape.sessions):
        begin += dice.expovariate(1 / shape.between)
        first = [*dice.choice(kinds), (next(parts_made), int(spread(500)) + 1)]
        heapq.heappush(coming, (begin, session, max(1, int(spread(shape.steps, 0.7))), first))
    while coming:
        time, session, left, parts = heapq.heappop(coming)
        answer = int(spread(shape.answer)) + 1
        yield time, answer, blocks(parts)
        if left <= 1:
            continue
        wait = spread(90.0, 1.0) if dice.random() < shape.pauses else spread(shape.tool)
        if dice.random() < shape.branches and len(parts) > 6:
            parts = parts[: dice.randrange(3, len(parts))]
        more = [(next(parts_made), answer), (next(parts_made), int(spread(shape.result)) + 1)]
        again = time + 0.5 + TOKEN_SECONDS * answer + wait
        heapq.heappush(coming, (again, session, left - 1, [*parts, *more]))


def write(path: Path, shape: Shape, seed: int = 1) -> None:
    """Write a trace."""
    with path.open("w") as file:
        for time, answer, found in requests(shape, seed):
            if found:
                line = {"timestamp": round(1000 * time), "input_length": len(found) * BLOCK, "output_length": answer}
                file.write(json.dumps(line | {"hash_ids": found}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, shape in SHAPES.items():
        write(folder / f"agents-{name}.jsonl", shape)
        print(folder / f"agents-{name}.jsonl")


if __name__ == "__main__":
    main()
