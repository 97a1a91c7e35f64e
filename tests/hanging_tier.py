"""`hanging:///path/of/a/fifo?calls=load+store`: a tier of a third party on a mount whose server has gone away.

The calls that its URL names say so and do not return before somebody has opened the FIFO for writing and closed it again.
`stalled=SECONDS` is how long a call may take until the server takes the tier for stalled, `at_once=N` how many may run at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lmcache.server import tier_runner
from lmcache.tiers import ABSENT, OK, Shard, ShardKey, Tier, TierURL, Usage


class HangingTier(Tier):
    scheme = "hanging"
    concurrency = 2

    def __init__(self, fifo: Path, calls: list[str]) -> None:
        self._fifo, self._calls = fifo, calls

    @classmethod
    def from_url(cls, url: TierURL) -> HangingTier:
        if seconds := url.take("stalled", float, 0.0):
            tier_runner._STALLED_SECONDS = seconds
        one = cls(Path(url.path), url.take("calls", str, "").split("+"))
        one.concurrency = url.take("at_once", int, cls.concurrency)
        return one

    def _call(self, name: str) -> None:
        if name in self._calls:
            print(f"{name} hangs", file=sys.stderr, flush=True)
            self._fifo.read_bytes()

    def open(self) -> None:
        self._call("open")

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._call("contains")
        return [True] * len(keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        self._call("load")
        return [ABSENT] * len(keys)

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._call("store")
        return [OK] * len(shards)

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._call("remove")

    def clear(self) -> None:
        self._call("clear")

    def usage(self) -> Usage:
        return Usage(0, 0, None)

    def close(self) -> None:
        self._call("close")
