"""What the learned policy of eviction finds and costs, beside LRU and the optimum, on recorded or made-up traces.

    python -m benchmarks.policies conversation.jsonl [--blocks 1000,5000,10000] [--block-tokens 256] [--json FILE]
    python -m benchmarks.policies --lookup

Without --blocks the sizes are 1, 2, 5, 10, 20 and 50 % of the different blocks of the trace. The table in C is the server's own,
with its policies; a prompt finds its leading blocks that are there, and stores the others. `lmcache replay` does the same through
all of the server's index, and finds the same. The optimum evicts what is used again last, and need not keep what a prompt brings.

--lookup: what the policies do while an engine waits for a hit of 512 chunks, and what the learned one does after that.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lmcache.cache.table import Habits, Table
from lmcache.sizing.readers import Trace
from lmcache.sizing.replay import FIRST_TOKEN_SECONDS, TOKEN_SECONDS
from lmcache.sizing.trace import Lookup

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NEVER = 1 << 60


class Found(NamedTuple):
    """tokens: share of the tokens that were found. microseconds: CPU time for each block, the loop in Python included."""

    tokens: float
    microseconds: float


def replayed(prompts: Sequence[Lookup], room: int, policy: Habits | None, block: int) -> Found:
    """Replay the prompts in a table of so many blocks."""
    table, found, asked, held = Table(1, policy), 0, 0, 0
    answers: list[tuple[float, bytes, int]] = []
    began = time.process_time()
    for one in prompts:
        while answers and answers[0][0] <= one.time:
            table.answered(*heapq.heappop(answers))
        if one.answer:
            ends = one.time + FIRST_TOKEN_SECONDS + TOKEN_SECONDS * one.answer
            heapq.heappush(answers, (ends, one.hashes[-16:], one.answer))
        ids = table.match(one.hashes)
        table.asked(one.time, one.hashes)
        table.touch(ids)
        asked, found = asked + one.tokens, found + min(block * len(ids) // 4, one.tokens)
        table.pin(ids)
        pinned, parent = [ids], int.from_bytes(ids[-4:], "little") if ids else -1
        for at in range(4 * len(ids), len(one.hashes), 16):
            if held >= room:
                victim = table.victim()
                if victim < 0:
                    break
                table.detach(victim)
                table.free(victim)
                held -= 1
            parent, held = table.insert(one.hashes[at : at + 16], parent), held + 1
            table.begin_fill(parent, 0, 0)
            table.end_fill(parent, 0, True)
            pinned.append(parent.to_bytes(4, "little"))
            table.pin(pinned[-1])
        path = b"".join(pinned)
        table.unpin(path)
        table.touch(path)
    blocks = sum(len(one.hashes) // 16 for one in prompts)
    return Found(found / asked, 1e6 * (time.process_time() - began) / blocks)


def optimum(prompts: Sequence[Lookup], room: int, block: int) -> float:
    """Return the share of the tokens that the best policy would find, which knows what comes."""
    paths = [[one.hashes[at : at + 16] for at in range(0, len(one.hashes), 16)] for one in prompts]
    following: list[list[int]] = []
    next_use: dict[bytes, int] = {}
    for number in reversed(range(len(paths))):
        following.append([next_use.get(key, NEVER) for key in paths[number]])
        next_use.update(dict.fromkeys(paths[number], number))
    following.reverse()
    kept: dict[bytes, int] = {}
    """Block -> its next use."""
    last: list[tuple[int, int, bytes]] = []
    found = 0
    for number, path in enumerate(paths):
        hit = next((at for at, key in enumerate(path) if key not in kept), len(path))
        found += min(block * hit, prompts[number].tokens)
        for depth, key in enumerate(path):
            kept[key] = following[number][depth]
            heapq.heappush(last, (-kept[key], -depth, key))
        while len(kept) > room:
            use, _, key = heapq.heappop(last)
            if kept.get(key) == -use:
                del kept[key]
    return found / sum(one.tokens for one in prompts)


def compared(path: Path, sizes: Sequence[int], block_tokens: int) -> list[dict[str, float]]:
    trace = Trace([path], block_tokens)
    prompts = [one for one in trace if isinstance(one, Lookup)]
    different = len({one.hashes[at : at + 16] for one in prompts for at in range(0, len(one.hashes), 16)})
    rows = []
    for room in sizes or [max(1, int(share * different)) for share in SHARES]:
        lru, learned = (replayed(prompts, room, policy, trace.block_tokens) for policy in (None, Habits()))
        best = optimum(prompts, room, trace.block_tokens)
        gap = best - lru.tokens
        row = {"blocks": room, "LRU": lru.tokens, "learned": learned.tokens, "optimum": best}
        row |= {"of_the_gap": (learned.tokens - lru.tokens) / gap if gap > 0.005 else float("nan")}
        row |= {"LRU_us": lru.microseconds, "learned_us": learned.microseconds}
        rows.append(row)
        share = f"{row['of_the_gap']:6.1%}" if gap > 0.005 else "     -"
        print(
            f"{path.name} {room:>7,} blocks: LRU {lru.tokens:6.2%}, learned {learned.tokens:6.2%}, optimum {best:6.2%}; "
            f"{share} of the gap; {lru.microseconds:.2f} and {learned.microseconds:.2f} us a block",
            flush=True,
        )
    shares = [row["of_the_gap"] for row in rows if row["of_the_gap"] == row["of_the_gap"]]
    worst = min(row["learned"] - row["LRU"] for row in rows)
    print(
        f"{path.name}: {statistics.mean(shares):.1%} of the gap on average, worst {100 * worst:+.2f} points", flush=True
    )
    return rows


def lookups(chunks: int = 512, prompts: int = 400, rounds: int = 15) -> None:
    """Measure hits of prompts that are there completely, in turns."""
    names = [os.urandom(16 * chunks) for _ in range(prompts)]
    tables = {"LRU": Table(1), "learned": Table(1, Habits())}
    for table in tables.values():
        for name in names:
            parent = -1
            for at in range(0, len(name), 16):
                parent = table.insert(name[at : at + 16], parent)
                table.begin_fill(parent, 0, 0)
                table.end_fill(parent, 0, True)
    waits: dict[str, list[float]] = {"LRU": [], "learned": [], "afterwards": []}
    for turn in range(rounds):
        for label, table in tables.items():
            for number, name in enumerate(names):
                began = time.perf_counter()
                ids = table.match(name)
                table.asked(float(turn * prompts + number), name)
                table.touch(ids)
                found = time.perf_counter()
                table.settle()
                if turn:
                    waits[label].append(1e6 * (found - began))
                    if label == "learned":
                        waits["afterwards"].append(1e6 * (time.perf_counter() - found))
    for label, times in waits.items():
        times.sort()
        print(f"{label:>10}: {statistics.median(times):6.1f} us, p99 {times[len(times) * 99 // 100]:6.1f} us")
    print(f"learned / LRU: {statistics.median(waits['learned']) / statistics.median(waits['LRU']):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="*")
    parser.add_argument("--blocks", default="")
    parser.add_argument("--block-tokens", type=int, default=0, help="As for `lmcache replay`.")
    parser.add_argument("--json", type=Path, help="Also write the rows to this file.")
    parser.add_argument("--lookup", action="store_true")
    arguments = parser.parse_args()
    sizes = [int(one) for one in arguments.blocks.split(",") if one]
    rows = {str(path): compared(path, sizes, arguments.block_tokens) for path in arguments.traces}
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    if arguments.lookup:
        lookups()


if __name__ == "__main__":
    main()
