"""Kill a tier's process at every operation that changes something, start again, and look what is there.

    python kill_points.py disk|dir FOLDER

A process of its own, since it forks for every point. The child tells what it begins and what was acknowledged through a
pipe; the parent opens the tier after each death and compares. Prints the points tried by kind of operation; 1 and the
points at which something was wrong otherwise.
"""

from __future__ import annotations

import collections
import functools
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from disk_files import filesystem_bytes
from filesystems import EndingFilesystem

from lmcache.testing.conformance import load_one, shard_key, shard_of
from lmcache.tiers import ABSENT, KEPT, OK, Shard, Tier
from lmcache.tiers.directory.tier import DirectoryTier
from lmcache.tiers.disk.segments import is_large
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.filesystem import Filesystem

CAP_BYTES = 2 << 20
SIZES = (1000, 2000, 70_000, 131_072, 400_001)
STEPS = {"disk": 14, "dir": 8}


def make(kind: str, folder: Path, filesystem: Filesystem) -> Tier:
    if kind == "dir":
        return DirectoryTier(folder, None, filesystem=filesystem, threads=1)
    return DiskTier(folder, CAP_BYTES, filesystem=filesystem)


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


@functools.cache
def shard(number: int) -> Shard:
    """The children have those that their parent has made already."""
    return shard_of(shard_key(number), size_of(number))


def work(tier: Tier, steps: int, say: Callable[[str], None]) -> None:
    """Stores in batches, loads, removals, a restart, a clear; the same ones every time."""
    dice, last = random.Random(4), 0
    tier.open()
    for step in range(steps):
        if step == steps // 2:
            tier.close()
            tier.open()
        if step == steps * 2 // 3:
            say("begin clear")
            tier.clear()
            say("cleared")
            continue
        numbers = list(range(last, last + dice.randint(1, 7)))
        last += len(numbers)
        say("begin " + " ".join(map(str, numbers)))
        outcomes = tier.store([shard(number) for number in numbers])
        assert set(outcomes) <= {OK, KEPT}, outcomes
        say("stored " + " ".join(map(str, numbers)))
        old = [dice.randrange(max(0, last - 12), last) for _ in range(2)]
        say("begin " + " ".join(map(str, old)))
        if step % 4 == 3:
            tier.remove([shard_key(number) for number in old])
            say("removed " + " ".join(map(str, old)))
        else:
            for number in old:
                if load_one(tier, shard_key(number), size_of(number))[0] == OK:
                    say(f"used {number}")
    say("begin end")
    tier.close()


def run(kind: str, folder: Path, at: int, torn: bool) -> list[str]:
    """One child's life: what it said."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)

        def say(line: str) -> None:
            os.write(write_end, line.encode() + b"\n")

        filesystem = EndingFilesystem(at, torn, say)
        work(make(kind, folder, filesystem), STEPS[kind], say)
        say("ended " + " ".join(filesystem.kinds))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as said:
        lines = said.read().splitlines()
    os.waitpid(child, 0)
    return lines


def wrongs(kind: str, folder: Path, lines: list[str]) -> list[str]:
    """What is wrong with what is there after a death."""
    recency: list[int] = []
    removed: set[int] = set()
    doubtful: set[int] = set()
    clearing = False
    for line in lines:
        word, *rest = line.split()
        if word == "begin":
            clearing = rest == ["clear"]
            doubtful = {int(one) for one in rest if one.isdigit()}
        elif word == "cleared":
            recency, removed, clearing = [], set(), False
        elif word in ("stored", "used", "removed"):
            numbers = sorted(map(int, rest), key=lambda number: not is_large(size_of(number)))  # large ones go first
            for number in numbers:
                if number in recency:
                    recency.remove(number)
                removed.discard(number)
                if word == "removed":
                    removed.add(number)
                else:
                    recency.append(number)
            if word != "used":
                doubtful = set()
    found = []
    if kind == "disk" and folder.exists() and filesystem_bytes(folder) > CAP_BYTES:
        found.append(f"{filesystem_bytes(folder)} bytes at the death")
    tier = make(kind, folder, Filesystem())
    tier.open()
    if kind == "disk" and not max(tier.usage().stored_bytes, filesystem_bytes(folder)) <= CAP_BYTES:
        found.append(f"{tier.usage().stored_bytes} or {filesystem_bytes(folder)} bytes after the start")
    there: dict[int, bool] = {}
    for number in sorted({*recency, *removed, *doubtful}):
        outcome, payload = load_one(tier, shard_key(number), size_of(number))
        there[number] = outcome == OK
        if outcome not in (OK, ABSENT):
            found.append(f"shard {number}: {outcome}")
        if outcome == OK and payload != shard(number).payload:
            found.append(f"shard {number}: wrong bytes")
    found += [f"shard {number} is back" for number in removed - doubtful if there[number]]
    sure = [number for number in recency if number not in doubtful]
    if clearing:
        pass
    elif kind == "dir":
        found += [f"shard {number} is lost" for number in sure if not there[number]]
    else:
        newest_gone = max((at for at, number in enumerate(sure) if not there[number]), default=0)
        found += [f"{number} is there, a later one is not" for number in sure[:newest_gone] if there[number]]
        kept, stored = (sum(map(size_of, some)) for some in ([n for n in sure if there[n]], sure))
        if kept < min(stored, CAP_BYTES // 3):
            found.append(f"only {kept} of {stored} acknowledged bytes are left")
    new = shard_of(shard_key(10_000), 5000)
    if tier.store([new]) != [OK] or load_one(tier, new.key, 5000)[0] != OK:
        found.append("it stores no more")
    tier.close()
    return found


def main(kind: str, root: Path) -> int:
    lines = run(kind, root / "whole", -1, False)
    kinds = lines[-1].removeprefix("ended ").split()
    assert lines[-1].startswith("ended "), lines[-3:]
    tried: collections.Counter[str] = collections.Counter()
    bad = 0
    for at, operation in enumerate(kinds):
        for torn in (False, True) if operation == "pwritev" else (False,):
            folder = root / "killed"
            lines = run(kind, folder, at, torn)
            if lines[-1].startswith("ended "):  # the tier's own thread has done fewer operations this time
                shutil.rmtree(folder)
                continue
            assert lines[-1].startswith("killed "), lines[-1]
            found = wrongs(kind, folder, lines)
            tried[lines[-1].removeprefix("killed ") + (" torn" if torn else "")] += 1
            if found:
                bad += 1
                print(
                    f"operation {at} ({operation}{', torn' if torn else ''}): {'; '.join(found[:4])}; said {lines[-2:]}"
                )
            shutil.rmtree(folder)
    print("tried " + ", ".join(f"{name} {count}" for name, count in sorted(tried.items())))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
