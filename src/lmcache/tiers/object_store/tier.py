"""Shards in an object store, shared by all servers that name the same bucket and prefix: one object a shard.

An object is a frame: header, then payload (docs/tiers/s3.md). Lookups, loads and stores never list objects. Only the cap needs
a listing, which a sweep in the background makes; without `max_gb` there is none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, ClassVar

from lmcache.config.options import integer, number
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers import frame
from lmcache.tiers.object_store.accounting import Accounting, pack_uses, unpack_uses
from lmcache.tiers.object_store.client import Client
from lmcache.tiers.object_store.service import Place, Service
from lmcache.tiers.threads import all_ended, started_pool
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

RANGE_BYTES = 8 << 20
"""A large shard is read in such ranges in parallel, since one connection to S3 gives some 100 MB/s."""
FULL, TOO_LARGE, NOT_READY = "full", "too large", "not ready"
"""Outcomes of a store: no space; larger than the cap; the first listing of the store has not ended."""
OWN = "_lmcache/"
"""Prefix of the objects that are no shards."""
_JANITOR, _RECENCY, _USES = f"{OWN}janitor", f"{OWN}recency", f"{OWN}uses/"
_ROOM_PART = 64
"""Trimming deletes at least this part of the cap, so that it seldom runs."""
_FORGOTTEN_MS = 86_400_000
"""A server's object of uses that is older than this has been merged into `recency` and is deleted."""

log = init_logger(__name__)


class ObjectTier(Tier):
    """One bucket and prefix. At most `connections` requests are in flight at once, for all calls together."""

    service: ClassVar[Service]
    concurrency = 8
    codecs = True
    batch_bytes = 64 << 20

    def __init__(
        self,
        client: Client,
        *,
        max_bytes: int | None = None,
        timeout_seconds: float = 10.0,
        connections: int = 16,
        sweep_seconds: float = 600.0,
        secret: bytes = b"",
        runtime: Runtime = RUNTIME,
    ) -> None:
        self._client, self._max_bytes, self._secret = client, max_bytes, secret
        self._timeout_seconds, self._sweep_seconds = timeout_seconds, sweep_seconds
        self._connections, self._runtime, self._now = connections, runtime, runtime.now
        self._accounting = Accounting(notes_uses=max_bytes is not None, wall=runtime.wall)
        """Without a cap nothing is swept, and they tell `usage` only."""
        self._trimming = threading.Lock()
        self._identity = os.urandom(8).hex()
        self._pool: Executor | None = None
        self._sweeper: threading.Thread | None = None
        self._closing = runtime.event()
        self._swept = runtime.event()
        """Set after the first complete sweep, when the accounting is complete."""

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{2,62}", url.host) or url.port:
            raise ConfigError(
                f"{url.redacted}: write {cls.scheme}://bucket/prefix; ?endpoint=http://host:port for stores outside the cloud"
            )
        if url.username or url.password:
            raise ConfigError(f"{url.redacted}: credentials come from {cls.service.credentials}, not the URL")
        timeout_seconds = url.take("timeout", number(0.05, 3600), 10.0)
        place = Place(url.host, url.path.strip("/"), url.take("endpoint", cls.endpoint, ""), **cls.more_of_place(url))
        return cls(
            Client(place, cls.service, cls.make_store(place, timeout_seconds)),
            max_bytes=url.take_max_bytes(),
            timeout_seconds=timeout_seconds,
            connections=url.take("connections", integer(1, 256), 16),
            sweep_seconds=url.take("sweep", number(0.1, 1e6), 600.0),
            secret=url.take_frame_key(),
            runtime=url.runtime,
        )

    @staticmethod
    @abstractmethod
    def make_store(place: Place, timeout_seconds: float) -> Any:
        """Return obstore's store. Raises ConfigError where it cannot be made of these settings."""

    @staticmethod
    def endpoint(text: str) -> str:
        """Parse `?endpoint=`."""
        if not re.fullmatch(r"https?://[^/?#@\s]+/?", text):
            raise ValueError("must be http://host:port or https://host")
        return text.rstrip("/")

    @staticmethod
    def more_of_place(url: TierURL) -> dict[str, str]:
        """Take the options that only this service has."""
        return {}

    def open(self) -> None:
        if self._pool:
            return
        self._client.read_all(_JANITOR)  # raises when bucket, credentials or network do not work
        self._closing.clear()
        self._pool = started_pool(self._runtime, self._connections, f"lmcache-{self.scheme}")
        if self._max_bytes is not None:
            self._sweeper = self._runtime.start(self._sweep_again_and_again, f"lmcache-{self.scheme}-sweep")
            self._swept.wait(self._timeout_seconds)

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        found = [False] * len(keys)

        def ask(index: int) -> None:
            found[index] = self._client.size(keys[index].text) is not None

        self._side_by_side([(ask, (index,)) for index in range(len(keys))])
        return found

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        headers = [bytearray(frame.HEADER_BYTES) for _ in keys]
        sizes: list[int | None] = [None] * len(keys)
        outcomes = [ABSENT] * len(keys)
        sums = [frame.Checksum(self._secret) for _ in keys]
        summed = [0] * len(keys)
        """Payload bytes in each shard's checksum. A range is added as it arrives if it is next, otherwise by `done`."""

        def read(index: int, start: int) -> None:
            memory = into[index][start : start + RANGE_BYTES]
            sum_up = sums[index].update if summed[index] == start else None
            if start:
                size = self._client.read(keys[index].text, frame.HEADER_BYTES + start, [memory], sum_up)
            else:
                head = memoryview(headers[index])
                size = sizes[index] = self._client.read(keys[index].text, 0, [head, memory], sum_up)
            if sum_up:  # an encoded payload may end within the range or before it
                summed[index] += min(len(memory), max(0, (size or 0) - frame.HEADER_BYTES - start))

        def done(index: int, start: int) -> None:
            """Finish a range. Called in the caller's thread, in order, while the pool reads on."""
            size, memory = sizes[index], into[index]
            if size is None:
                return
            behind = min(start + RANGE_BYTES, len(memory), max(0, size - frame.HEADER_BYTES))
            if summed[index] < behind:
                sums[index].update(memory[start:behind])
                summed[index] = behind
            if start + RANGE_BYTES >= len(memory):
                header = bytes(headers[index])
                outcomes[index] = self._check(header, size, sums[index], keys[index], len(memory)) or frame.unfold(
                    header, memory, self.decoded
                )

        longest = max(map(len, into), default=0)
        work = [
            (read, (index, start))
            for start in range(0, max(1, longest), RANGE_BYTES)
            for index, memory in enumerate(into)
            if start < max(1, len(memory))
        ]
        self._side_by_side(work, done)
        self._accounting.use([key for key, outcome in zip(keys, outcomes, strict=True) if outcome == OK])
        absent = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome == ABSENT]
        self._accounting.drop(absent)
        self.remove([key for key, outcome in zip(keys, outcomes, strict=True) if outcome not in (OK, ABSENT)])
        return outcomes

    def _check(self, header: bytes, size: int, checksum: frame.Checksum, key: ShardKey, raw_bytes: int) -> str:
        """Check a frame by the object's `size`: memory that was not read into may hold the same shard from before."""
        wrong = frame.check_stored(header, size, key, raw_bytes, self._secret)
        return wrong or checksum.check(header, key, raw_bytes)

    def store(self, shards: Sequence[Shard]) -> list[str]:
        outcomes = [FULL] * len(shards)

        def write(index: int) -> None:
            shard = shards[index]
            size = frame.HEADER_BYTES + shard.payload.nbytes
            there = self._client.size(shard.key.text)
            if there is not None and shard.is_kept(there - frame.HEADER_BYTES):
                self._accounting.seen(shard.key, there)
                outcomes[index] = KEPT
                return
            outcomes[index] = self._admit(shard.key, size)
            if outcomes[index] != OK:
                return
            try:
                header = frame.make_header(shard.key, shard.parent, shard.payload, self._secret, shard.coding)
                self._client.write(shard.key.text, [header, shard.payload])
            except TierError as error:
                if error.reason != "full":
                    raise  # the object may have been written, so it stays booked until the next sweep
                self._accounting.drop([shard.key])
                outcomes[index] = FULL
            finally:
                self._accounting.end(shard.key)

        self._side_by_side([(write, (index,)) for index in range(len(shards))])
        kept = [shard.key for shard, outcome in zip(shards, outcomes, strict=True) if outcome in (OK, KEPT)]
        self._accounting.use(kept[::-1])  # in the order of the call, whichever write ended first
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        if keys:
            self._client.delete([key.text for key in keys])
            self._accounting.drop(keys)

    def clear(self) -> None:
        with self._accounting.census():
            batch: list[str] = []
            for listed in self._client.list():
                if self._closing.is_set():
                    raise TierError("closed", f"{self._client.text}: the tier was closed before all was removed")
                if _key_of(listed.path) or listed.path in (_RECENCY, _JANITOR) or listed.path.startswith(_USES):
                    batch.append(listed.path)
                if len(batch) == self.service.bulk:
                    self._client.delete(batch)
                    batch.clear()
            self._client.delete(batch)
            self._accounting.take_over({}, {}, 0)

    def usage(self) -> Usage:
        return Usage(
            self._accounting.stored_bytes + self._accounting.other_bytes, len(self._accounting), self._max_bytes
        )

    def close(self) -> None:
        self._closing.set()
        if self._sweeper:
            self._sweeper.join()
            self._sweeper = None
            with contextlib.suppress(TierError):
                self._write_uses()
                self._release_lease()
        if self._pool:
            self._pool.shutdown()
            self._pool = None
        self._swept.clear()

    # ---- the cap

    def _admit(self, key: ShardKey, size: int) -> str:
        """Book `size` bytes and return OK when there is space, evicting for it; else return why not."""
        if self._max_bytes is None:
            self._accounting.begin(key, size)
            return OK
        if size + self._accounting.other_bytes > self._max_bytes:
            return TOO_LARGE
        if not self._swept.is_set():
            return NOT_READY
        with self._trimming:
            for _ in range(2):  # a sweep may find what other servers have stored while shards are deleted
                if not self._trim(size, self._max_bytes // _ROOM_PART):
                    break
            if self._accounting.stored_bytes + self._accounting.other_bytes + size > self._max_bytes:
                return FULL
            self._accounting.begin(key, size)
        return OK

    def _trim(self, wanted_bytes: int, at_least: int) -> bool:
        """Delete the oldest shards, at most one request's worth, until so many bytes fit under the cap.

        Call with `_trimming` held. Return whether there was anything to delete.
        """
        assert self._max_bytes is not None
        above = self._accounting.stored_bytes + self._accounting.other_bytes + wanted_bytes - self._max_bytes
        going = self._accounting.oldest(max(above, at_least), self.service.bulk) if above > 0 else []
        self.remove(going)
        return bool(going)

    def _sweep_again_and_again(self) -> None:
        told = ""
        while not self._closing.is_set():
            try:
                self._sweep()
                told = ""
            except Exception as error:  # the thread must go on: without it nothing would be trimmed
                if str(error) != told:
                    unforeseen = not isinstance(error, TierError)
                    log.warning(
                        "Tier %s could not be trimmed, will try again: %s", self.scheme, error, exc_info=unforeseen
                    )
                told = str(error)
            self._closing.wait(self._sweep_seconds if self._swept.is_set() else min(5.0, self._sweep_seconds))

    def _sweep(self) -> None:
        """Write this server's uses and list all objects; as the janitor, also merge all uses and trim."""
        self._write_uses()
        is_janitor = self._be_janitor()
        with self._accounting.census():
            listed: dict[bytes, tuple[int, int]] = {}
            uses: dict[bytes, int] = {}
            others, other_bytes, recency_bytes = [_RECENCY], 0, 0
            for one in self._client.list():
                if self._closing.is_set():
                    return
                written = int(one.modified.timestamp() * 1000)
                if key := _key_of(one.path):
                    listed[key.packed] = written, one.size
                else:
                    other_bytes += one.size
                    recency_bytes += one.size if one.path == _RECENCY else 0
                if one.path.startswith(_USES) and (is_janitor or not self._swept.is_set()):
                    others.append(one.path)
                    if is_janitor and written < self._accounting.now_ms() - _FORGOTTEN_MS:
                        self._client.delete([one.path])
            for path in others:
                if read := self._client.read_all(path):
                    for packed, when in unpack_uses(read[0], self._accounting.now_ms()).items():
                        uses[packed] = max(when, uses.get(packed, 0))
            self._accounting.take_over(listed, uses, other_bytes)
        self._swept.set()
        if is_janitor:
            recency = pack_uses(self._accounting.uses())
            self._accounting.other_bytes += max(0, len(recency) - recency_bytes)
            above = True
            while above and not self._closing.is_set():
                with self._trimming:
                    above = self._trim(0, 0)
            self._client.write(_RECENCY, [recency])

    def _write_uses(self) -> None:
        """Write the uses of the last few sweeps, since the janitor may have missed the previous object."""
        if fresh := self._accounting.new_uses(self._accounting.now_ms() - int(4000 * self._sweep_seconds) - 1000):
            self._client.write(f"{_USES}{self._identity}", [pack_uses(fresh)])

    def _be_janitor(self) -> bool:
        """Take or renew the lease by a conditional write, which only one server can win. Return whether it is held."""
        read, now = self._client.read_all(_JANITOR), self._runtime.wall()
        if read:
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                lease = json.loads(read[0])
                if lease["holder"] != self._identity and now < float(lease["until"]) < now + 4 * self._sweep_seconds:
                    return False
        lease = {"holder": self._identity, "until": now + 3 * self._sweep_seconds}
        return self._client.write(_JANITOR, [json.dumps(lease).encode()], over=read[1] if read else {})

    def _release_lease(self) -> None:
        read = self._client.read_all(_JANITOR)
        if read and self._identity.encode() in read[0]:
            self._client.write(_JANITOR, [b"{}"], over=read[1])

    # ---- requests in parallel

    def _side_by_side(
        self, work: Sequence[tuple[Callable[..., None], tuple[int, ...]]], done: Callable[..., None] | None = None
    ) -> None:
        """Do all of `work` in the pool and wait for it. `done` is called in this thread, in order, with the same numbers.

        Raises:
            TierError: a request failed, or the time was over before all had begun.
        """
        if not self._pool:
            raise TierError("closed", f"{self._client.text}: the tier is not open")
        deadline = self._now() + self._timeout_seconds

        def run(call: Callable[..., None], *numbers: int) -> None:
            if self._now() > deadline:
                raise TierError("timeout", f"{self._client.text}: no connection was free in time; raise ?connections=")
            call(*numbers)

        trouble: TierError | None = None
        with all_ended() as parts:
            for call, numbers in work:
                parts.append(self._pool.submit(run, call, *numbers))
            for part, (_, numbers) in zip(parts, work, strict=True):
                try:
                    part.result()
                    if done and not trouble:
                        done(*numbers)
                except TierError as error:
                    trouble = trouble or error
        if trouble:
            raise trouble


def _key_of(path: str) -> ShardKey | None:
    """Return the shard that an object is named after, None for other objects."""
    found = re.fullmatch(r"([0-9a-f]{32})/([0-9a-f]{32})-([0-9a-f]{1,4})-([0-9a-f]{1,4})", path)
    if not found:
        return None
    return ShardKey(bytes.fromhex(found[1]), bytes.fromhex(found[2]), int(found[3], 16), int(found[4], 16))
