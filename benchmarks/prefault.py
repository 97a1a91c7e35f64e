"""Seconds that touching an arena takes, per GiB, with small and with huge pages.

usage: python -m benchmarks.prefault --arena-dir DIR [--gib 2] [--rounds 3]

The file system of DIR decides whether there are huge pages: a tmpfs mounted with huge=advise gives both kinds. A virtual machine
gets its memory from its host at the first touch, which takes longer than all else, so the first round is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from lmcache.memory.arena import Arena


def touched(directory: Path, size_bytes: int, huge: str) -> tuple[Arena, float, float]:
    """Return an arena without a name, all of it touched, and the seconds and CPU seconds of touching it, without the pauses
    that a server makes on a busy machine."""
    arena = Arena(directory, size_bytes, huge=huge)
    arena.unlink()
    begin, worked = time.perf_counter(), time.thread_time()
    arena.back([0], arena.size_bytes)
    seconds, worked = time.perf_counter() - begin, time.thread_time() - worked
    arena._note_pages(seconds)
    return arena, seconds, worked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arena-dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    seconds_by_kind: dict[str, list[float]] = {}
    cpu_by_kind: dict[str, list[float]] = {}
    said: dict[str, str] = {}
    for _ in range(asked.rounds + 1):
        for huge in ("never", "auto"):
            arena, seconds, worked = touched(asked.arena_dir, int(asked.gib * 2**30), huge)
            seconds_by_kind.setdefault(huge, []).append(seconds / asked.gib)
            cpu_by_kind.setdefault(huge, []).append(worked / asked.gib)
            said[huge] = arena.pages
            arena.close()
    out = {
        huge: {
            "pages": said[huge],
            "first_seconds_per_gib": round(times[0], 3),
            "seconds_per_gib": round(statistics.median(times[1:]), 3),
            "cpu_seconds_per_gib": round(statistics.median(cpu_by_kind[huge][1:]), 3),
            "least_and_most": [round(min(times[1:]), 3), round(max(times[1:]), 3)],
        }
        for huge, times in seconds_by_kind.items()
    }
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
