"""`disk:///a,/b`: several devices as one tier. Each has a complete disk tier of its own, and each chunk belongs to one of them.

A call is divided by chunk and runs on all devices at once. A device that fails takes its own chunks along, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers.threads import all_ended, started_pool
from lmcache.tiers.tier import Region, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

_CALLS = 8
"""Calls of the server that may run at once, each of which needs a thread for each device."""
log = init_logger(__name__)


class StripedTier(Tier):
    """Tiers that divide the shards among them. `parts`: one a device, in an order that must not change."""

    scheme = "disk"

    def __init__(self, parts: Sequence[tuple[Path, Tier]], runtime: Runtime = RUNTIME) -> None:
        self._parts = [part for _, part in parts]
        self._folders = [folder for folder, _ in parts]
        self._runtime = runtime
        self._pool: Executor | None = None
        self._trouble: dict[int, str] = {}
        """Maps the number of a device to the error of its last call."""

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        raise NotImplementedError("DiskTier.from_url makes it")

    def open(self) -> None:
        if self._pool:
            return
        pool = started_pool(self._runtime, len(self._parts) * _CALLS, "lmcache-stripe")
        opened: list[Tier] = []
        try:
            for part in self._parts:
                part.dropped = self._tell if self.dropped else None
                part.open()
                opened.append(part)
            devices = [os.stat(folder).st_dev for folder in self._folders]
        except BaseException:
            for part in opened:
                part.close()
            pool.shutdown()
            raise
        for number, device in enumerate(devices):
            if device in devices[:number]:
                other = self._folders[devices.index(device)]
                log.warning(
                    "disk://: %s and %s are on one file system: two folders of one device are no faster than one",
                    other,
                    self._folders[number],
                )
        self._pool = pool

    def attach(self, region: Region) -> None:
        for part in self._parts:
            part.attach(region)

    def known(self, keys: Sequence[ShardKey]) -> list[bool] | None:
        found = [False] * len(keys)
        for number, places in self._divided(keys):
            said = self._parts[number].known([keys[place] for place in places])
            for place, is_there in zip(places, said or (), strict=False):
                found[place] = is_there
        return found

    def degraded(self) -> str:
        return "; ".join(text for _, text in sorted(self._trouble.copy().items()))

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return self.known(keys) or []

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        return self._by_device(
            keys, lambda part, places: part.load([keys[place] for place in places], [into[place] for place in places])
        )

    def store(self, shards: Sequence[Shard]) -> list[str]:
        keys = [shard.key for shard in shards]
        return self._by_device(keys, lambda part, places: part.store([shards[place] for place in places]))

    def remove(self, keys: Sequence[ShardKey]) -> None:
        for number, places in self._divided(keys):
            self._parts[number].remove([keys[place] for place in places])

    def clear(self) -> None:
        failed: list[TierError] = []
        for part in self._parts:
            try:
                part.clear()
            except TierError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def usage(self) -> Usage:
        of_parts = [part.usage() for part in self._parts]
        most = [one.max_bytes for one in of_parts]
        return Usage(
            sum(one.stored_bytes for one in of_parts),
            sum(one.shards for one in of_parts),
            None if None in most else sum(one or 0 for one in most),
        )

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool:
            for part in self._parts:
                part.close()
            pool.shutdown()

    def _tell(self, keys: list[ShardKey]) -> None:
        if self.dropped is not None:
            self.dropped(keys)

    def _divided(self, keys: Sequence[ShardKey]) -> list[tuple[int, list[int]]]:
        """Return (number of the device, places in `keys`) of each device that has any of them."""
        places: list[list[int]] = [[] for _ in self._parts]
        count = len(places)
        for place, key in enumerate(keys):
            places[key.chunk[-1] % count].append(place)
        return [(number, some) for number, some in enumerate(places) if some]

    def _by_device(self, keys: Sequence[ShardKey], call: Callable[[Tier, list[int]], list[str]]) -> list[str]:
        """Call each device with its keys, side by side. Raises TierError when all of them have failed."""
        if not (pool := self._pool):
            raise TierError("closed", "disk://: it is not open")
        outcomes = [""] * len(keys)
        calls: list[tuple[int, list[int], Future[list[str]]]] = []
        with all_ended() as parts:
            for number, places in self._divided(keys):
                parts.append(pool.submit(call, self._parts[number], places))
                calls.append((number, places, parts[-1]))
            wait(parts)
        failed: list[TierError] = []
        for number, places, one in calls:
            try:
                said = one.result()
                self._trouble.pop(number, None)
            except TierError as error:
                failed.append(error)
                self._trouble[number] = str(error)
                said = [error.reason] * len(places)
            for place, outcome in zip(places, said, strict=True):
                outcomes[place] = outcome
        if failed and len(failed) == len(calls):
            raise failed[0]
        return outcomes
