"""What replays and the live estimate cost, and how near the truth the estimate is.

    python benchmarks/sizing.py [--trace conversation.jsonl] [--json]

The trace is Mooncake's conversation trace (FAST'25); without it, only costs with made-up prompts are measured. A minute.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmcache.cache import Event, Heart
from lmcache.runtime import RUNTIME
from lmcache.server.aside import Aside
from lmcache.sizing.curve import FACTORS, Curve
from lmcache.sizing.readers import Trace
from lmcache.sizing.replay import Capacity, Simulation, replay
from lmcache.sizing.trace import Lookup

PROMPT_CHUNKS = 512
KNOWN = {1000: 0.0454, 5000: 0.1140, 10000: 0.2157, 20000: 0.2935}
"""Token hit ratios of LRU on the conversation trace, by blocks, of another simulator."""
SIZES = (5000, 20000)
SALTS = 6


def least(call: Callable[[], object], count: int) -> float:
    """The least time of a call, in microseconds: other programs may run beside it."""
    samples = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begin) * 1e6)
    return round(min(samples), 2)


def lookups() -> dict[str, Any]:
    """A lookup of 512 chunks in a full index of 10^5: without a listener, and with the one that estimates or records."""
    dice, found = random.Random(1), dict[str, Any]()
    for listens in (False, True):
        heart = Heart(200 * PROMPT_CHUNKS * 4096)
        heart.join(1, "bench")
        space = heart.open_space(1, b"f" * 16, 1, 0, 4096)
        keys = [dice.randbytes(16 * PROMPT_CHUNKS) for _ in range(200)]
        for one in keys:
            heart.commit(0.0, 1, heart.reserve(0.0, 1, space, 0, b"", True, one).reservation, True)
        if listens:
            aside = Aside(RUNTIME, "bench", lambda now, event: None, lambda: None)
            heart.events.listen(["hit", "missed", "stored"], aside.put)

        def look_up(heart: Heart = heart, space: int = space, keys: list[bytes] = keys) -> None:
            heart.release(1, heart.lookup(0.0, 1, space, dice.choice(keys)).lease)

        found["with listener" if listens else "without"] = least(look_up, 3000)
        if listens:
            aside.close()
    return found


def sampling() -> dict[str, Any]:
    """CPU time of the sample for each chunk, at several rates, and its memory."""
    dice, found = random.Random(2), dict[str, Any]()
    for l1 in (1_000, 10_000, 100_000, 1_000_000):
        curve, keys = Curve(l1, True), [dice.randbytes(16 * PROMPT_CHUNKS) for _ in range(400)]
        begin = time.process_time()
        for _ in range(5):
            for one in keys:
                curve.looked_up(one, PROMPT_CHUNKS, 1)
        spent = (time.process_time() - begin) / (5 * len(keys) * PROMPT_CHUNKS)
        estimate = curve.estimate()
        assert estimate is not None
        took = least(lambda curve=curve: curve.estimate(), 200)  # type: ignore[misc]
        found[f"L1 of {l1:,} chunks"] = {
            "rate": round(estimate.rate, 4),
            "ns_a_chunk": round(spent * 1e9),
            "estimate_us": took,
            "memory_bytes": curve.memory_bytes(),
        }
    return found


def truth(path: Path) -> dict[str, Any]:
    """Replays of the trace, their speed, and the estimate beside them."""
    records = list(Trace([path]))
    prompts = [one.hashes for one in records if isinstance(one, Lookup)]
    ratios, founds, found = dict[int, float](), dict[int, list[int]](), dict[str, Any]()
    for blocks in sorted({int(l1 * factor) for l1 in SIZES for factor in FACTORS} | {*KNOWN}):
        one, begin = Simulation("LRU", Capacity(blocks)), time.process_time()
        found_of: list[int] = []
        if blocks in SIZES:
            one.heart.events.listen(["hit", "missed"], lambda event, found_of=found_of: _note(found_of, event))  # type: ignore[misc]
        replay(records, [one], lambda requests: None)
        spent = time.process_time() - begin
        result: Any = SimpleNamespace(**one.result())
        ratios[blocks], founds[blocks] = result.block_hit_ratio, found_of
        if blocks in KNOWN:
            rate = round(result.requests / spent * 60)
            row = {"token_hit_ratio": result.token_hit_ratio, "known": KNOWN[blocks], "requests_a_cpu_minute": rate}
            found[f"{blocks} blocks"] = row
    for l1 in SIZES:
        for by_found in (True, False):
            worst, outside = 0.0, 0
            for salt in range(SALTS):
                curve = Curve(l1 * 4096, by_found)
                for hashes, count in zip(prompts, founds[l1], strict=True):
                    salted = _salted(hashes, salt)
                    curve.looked_up(salted, count, 4096)
                    curve.stored(salted, 4096)
                estimate = curve.estimate()
                assert estimate is not None
                for factor, point in zip(FACTORS, estimate.sizes, strict=True):
                    true = ratios[int(l1 * factor)]
                    worst = max(worst, abs(point.ratio - true))
                    outside += not point.low - 1e-6 <= true <= point.high + 1e-6
            name = f"estimate from {l1} blocks, " + ("no tiers" if by_found else "tiers")
            row = {"worst_error": round(worst, 4), "outside_the_interval": f"{outside} of {SALTS * len(FACTORS)}"}
            found[name] = row
    return found


def _note(found: list[int], event: Event) -> None:
    if event.kind == "hit" or len(event.hashes) == len(event.prompt):
        found.append(event.chunks if event.kind == "hit" else 0)


def _salted(hashes: bytes, salt: int) -> bytes:
    """Other hashes for the same blocks, whose ids are small numbers."""
    return b"".join(hashes[at : at + 8] + bytes([salt + 1]) * 8 for at in range(0, len(hashes), 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"lookup of 512 chunks, us": lookups(), "sampling": sampling()}
    if arguments.trace is not None and arguments.trace.exists():
        found["trace"] = truth(arguments.trace)
    else:
        print("no trace: pass --trace conversation.jsonl for the comparison with the truth", file=sys.stderr)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        print(title)
        for name, row in rows.items():
            print(f"  {name:<40} {row}")


if __name__ == "__main__":
    main()
