"""Shards in a Mooncake Store, shared by all servers that name the same master and prefix: one value a shard.

A value is a frame: header, then payload (docs/tiers/mooncake.md). Values pass through the memory that this process shares with
its client process (`process`). Only this process copies between it and the arena, and it checks the copy: whatever the store
does late or wrongly, an extent has what was checked.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lmcache.config.options import GIB, integer, number, word
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.tiers import frame
from lmcache.tiers.mooncake.process import LANE_BYTES, Joining, Lane, StoreProcess
from lmcache.tiers.mooncake.words import MOST_KEYS
from lmcache.tiers.noted import Noted
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

FULL, TOO_LARGE, BUSY = "full", "too large", "busy"
"""Outcomes of a store: the pool has no room; the frame is larger than a lane; another client writes this value now."""
LOST, EXPIRED = "owner lost", "lease expired"
"""Outcomes of a load: who lends the value's memory does not answer; the value might have been overwritten during the load."""
_NO_ROOM, _BAD_ARGUMENT, _NOT_READY, _ABSENT, _EXISTS, _LEASED, _EXPIRED = -200, -600, -703, -704, -705, -706, -707
_TRANSFER_FAILED, _RPC_FAILED, _RPC_LATE = -800, -900, -901
_PIECE_BYTES = 512 << 10
"""Copied at once, so that the checksum reads it from the processor's cache."""
_ALIGNED_BYTES = 4096
_READS = 4
"""A value that somebody removes while it is read looks damaged, since its memory gets the next value. So it is read again."""

log = init_logger(__name__)


class MooncakeTier(Tier):
    """One store and prefix. At most `workers` calls move values at once."""

    scheme = "mooncake"

    def __init__(self, joining: Joining, *, prefix: str = "lmcache", replicas: int = 1, secret: bytes = b"") -> None:
        self._joining, self._prefix, self._replicas, self._secret = joining, prefix, replicas, secret
        self._process: StoreProcess | None = None
        self._is_open, self._starting = False, threading.Lock()
        self._noted = Noted()
        self._missing_replicas = ""

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        if not url.host or url.path.strip("/") or url.username or url.password:
            raise ConfigError(f"{url.redacted}: write mooncake://master:50051, with the address of mooncake_master")
        url.take("max_gb", _no_cap, None)
        kind = _StoreTier if url.scheme == _StoreTier.scheme else cls
        tier = kind(
            Joining(
                host=url.host,
                port=url.port or 50051,
                hostname=url.take("hostname", _host, ""),
                metadata=url.take("metadata", _metadata, "P2PHANDSHAKE"),
                segment_bytes=int(url.take("segment_gb", number(0.016, 1e6), 0.0) * GIB),
                protocol=url.take("protocol", word("tcp", "rdma"), "tcp"),
                devices=url.take("device", _devices, ""),
                timeout_seconds=url.take("timeout", number(0.1, 600), 2.0),
                workers=url.take("workers", integer(1, 32), 4),
            ),
            prefix=url.take("prefix", _prefix, "lmcache"),
            replicas=url.take("replicas", integer(1, 64), 1),
            secret=url.take_frame_key(),
        )
        if importlib.util.find_spec("mooncake") is None:
            raise ConfigError(f"{url.redacted}: mooncake is not installed; pip install 'lmcache[mooncake]'")
        return tier

    def open(self) -> None:
        self._is_open = True
        try:
            self._client()
        except TierError:
            self._is_open = False
            raise

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        return [self._is_there(answer) for answer in self._each("exist", keys)]

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        outcomes = [ABSENT] * len(keys)
        left = list(range(len(keys)))
        for _ in range(_READS):
            self._read(keys, into, left, outcomes)
            left = [index for index in left if outcomes[index] in frame.DAMAGE]
        if LOST in outcomes and not {OK, ABSENT} & set(outcomes):
            raise self._trouble("unreachable", "the owners of the values' memory do not answer")
        self._noted.drop(
            [key for key, outcome in zip(keys, outcomes, strict=True) if outcome not in (OK, LOST, EXPIRED)]
        )
        self.remove([key for key, outcome in zip(keys, outcomes, strict=True) if outcome in frame.DAMAGE])
        return outcomes

    def store(self, shards: Sequence[Shard]) -> list[str]:
        outcomes = [TOO_LARGE] * len(shards)
        sizes = [frame.HEADER_BYTES + shard.payload.nbytes for shard in shards]
        stored = self._each("stored", [shard.key for shard in shards])
        for index, (size, answer) in enumerate(zip(sizes, stored, strict=True)):
            if answer == size:
                outcomes[index] = KEPT
            elif answer < 0 and answer not in (_ABSENT, _NOT_READY):
                raise self._refused(answer)
        for verb, replaces in (("put", False), ("replace", True)):
            left = [i for i, answer in enumerate(stored) if outcomes[i] != KEPT and (answer >= 0) == replaces]
            self._write(verb, shards, sizes, left, outcomes)
        self._noted.add(
            {shard.key: size for shard, size, said in zip(shards, sizes, outcomes, strict=True) if said in (OK, KEPT)}
        )
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        for answer in self._each("remove", keys):
            if answer < 0 and answer not in (_ABSENT, _NOT_READY):
                raise self._refused(answer)
        self._noted.drop(keys)

    def clear(self) -> None:
        client = self._client()
        with client.lane(self._joining.timeout_seconds, moving=False) as lane:
            (answer,) = client.ask(lane, "remove_matching", [f"^{re.escape(self._prefix)}/"], seconds=600.0)
        if answer < 0:
            raise self._refused(answer)
        self._noted.clear()

    def degraded(self) -> str:
        return self._missing_replicas

    def usage(self) -> Usage:
        return self._noted.usage()

    def close(self) -> None:
        self._is_open = False
        with self._starting:
            client, self._process = self._process, None
        if client is not None:
            client.leave()

    # ---- the client process

    def _client(self) -> StoreProcess:
        """Return the client process. One that has died or was ended is replaced, by one call at a time; others fail at once."""
        if not self._is_open:
            raise TierError("closed", f"Mooncake at {self._joining.master}: the tier is not open")
        client = self._process
        if client is not None and client.alive:
            return client
        if not self._starting.acquire(blocking=False):
            raise self._trouble("no client", "its client process is being started")
        try:
            if not self._is_open:  # since a moment
                raise self._trouble("closed", "the tier is not open")
            if self._process is not None and not self._process.alive:
                log.warning("Mooncake at %s: its client process has ended and is replaced", self._joining.master)
                self._process = None
            if self._process is None:
                if self._joining.protocol != "tcp":
                    log.warning("Mooncake at %s: protocol=rdma was never tested with LMCache", self._joining.master)
                self._process = StoreProcess(self._joining)
                log.info(
                    "Mooncake at %s was joined by client process %d, which listens on %s and asks nobody for credentials",
                    self._joining.master,
                    self._process.pid,
                    ", ".join(self._process.listens) or "no address",
                )
            return self._process
        finally:
            self._starting.release()

    def _each(self, verb: str, keys: Sequence[ShardKey]) -> list[int]:
        """Ask one question about each key."""
        client, answers = self._client(), list[int]()
        for start in range(0, len(keys), MOST_KEYS):
            with client.lane(self._joining.timeout_seconds, moving=False) as lane:
                names = [self._name(key) for key in keys[start : start + MOST_KEYS]]
                answers += client.ask(lane, verb, names)
        return answers

    # ---- values

    def _read(self, keys: Sequence[ShardKey], into: Sequence[memoryview], left: list[int], outcomes: list[str]) -> None:
        """Read those of the shards that `left` names."""
        if not left:
            return
        client, sizes = self._client(), [frame.HEADER_BYTES + len(into[index]) for index in left]
        for places, at in _batches(sizes):
            with client.lane(self._joining.timeout_seconds, moving=True) as lane:
                names = [self._name(keys[left[place]]) for place in places]
                answers = client.ask(lane, "get", names, at, [sizes[place] for place in places])
                for place, offset, answer in zip(places, at, answers, strict=True):
                    index = left[place]
                    outcomes[index] = self._receive(lane, offset, answer, keys[index], into[index])

    def _receive(self, lane: Lane, offset: int, answer: int, key: ShardKey, into: memoryview) -> str:
        """Copy a frame's payload out of the lane, check it there where it was copied to, and return the outcome."""
        if answer < 0:
            if answer == _BAD_ARGUMENT:  # the value is larger than what was asked for
                return frame.OTHER_SIZE
            outcome = {_ABSENT: ABSENT, _NOT_READY: ABSENT, _TRANSFER_FAILED: LOST, _EXPIRED: EXPIRED}.get(answer)
            if outcome is None:
                raise self._refused(answer)
            return outcome
        header = bytes(lane.memory[offset : offset + frame.HEADER_BYTES])
        wrong = frame.check_stored(header, answer, key, len(into), self._secret)
        if wrong:
            return wrong
        checksum = frame.Checksum(self._secret)
        _copy(lane.memory[offset + frame.HEADER_BYTES :][: len(into)], into, checksum, into)
        return checksum.check(header, key)

    def _write(
        self, verb: str, shards: Sequence[Shard], sizes: list[int], left: list[int], outcomes: list[str]
    ) -> None:
        """Write those of the shards that `left` names."""
        if not left:
            return
        client = self._client()
        for places, at in _batches([sizes[index] for index in left]):
            which = [left[place] for place in places]
            with client.lane(self._joining.timeout_seconds, moving=True) as lane:
                for index, offset in zip(which, at, strict=True):
                    shard, checksum = shards[index], frame.Checksum(self._secret)
                    start = offset + frame.HEADER_BYTES
                    lane_part = lane.memory[start : start + shard.payload.nbytes]
                    _copy(shard.payload, lane_part, checksum, shard.payload)
                    lane.memory[offset:start] = checksum.header(shard.key, shard.parent)
                names = [self._name(shards[index].key) for index in which]
                answers = client.ask(lane, verb, names, at, [sizes[index] for index in which], self._replicas)
                for index, answer in zip(which, answers, strict=True):
                    outcomes[index] = self._written(answer)
                written = [name for name, answer in zip(names, answers, strict=True) if not answer]
                if self._replicas > 1 and written:
                    self._count_replicas(client.ask(lane, "replicas", written[:1])[0])

    def _written(self, answer: int) -> str:
        outcomes = {
            0: OK,
            _NO_ROOM: FULL,
            _NOT_READY: BUSY,
            _EXISTS: BUSY,
            _LEASED: BUSY,
            _TRANSFER_FAILED: LOST,
        }
        if answer not in outcomes:
            raise self._refused(answer)
        return outcomes[answer]

    def _count_replicas(self, made: int) -> None:
        """Note whether the store makes as many replicas as it is asked for. It makes fewer without an error."""
        was, wanted = self._missing_replicas, self._replicas
        self._missing_replicas = f"the store makes {made} replicas of {wanted}" if made < wanted else ""
        if self._missing_replicas and not was:
            log.warning(
                "Mooncake at %s: %d replicas were asked for and %d made: so many clients must lend memory (segment_gb)",
                self._joining.master,
                wanted,
                made,
            )

    # ---- what is known

    def _is_there(self, answer: int) -> bool:
        if answer < 0:
            raise self._refused(answer)
        return answer == 1

    def _name(self, key: ShardKey) -> str:
        return f"{self._prefix}/{key.text}"

    def _refused(self, code: int) -> TierError:
        if code in (_RPC_FAILED, _RPC_LATE):
            reason = "timeout" if code == _RPC_LATE else "unreachable"
            return self._trouble(reason, f"its master does not answer (its error {code})")
        return self._trouble("refused", f"its error {code}")

    def _trouble(self, reason: str, text: str) -> TierError:
        return TierError(reason, f"Mooncake at {self._joining.master}: {text}")


class _StoreTier(MooncakeTier):
    scheme = "mooncakestore"


def _batches(sizes: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Divide values among calls: yield (places in `sizes`, offsets in a lane). Values larger than a lane are left out."""
    places: list[int] = []
    offsets: list[int] = []
    end = 0
    for place, size in enumerate(sizes):
        if size > LANE_BYTES:
            continue
        if end + size > LANE_BYTES or len(places) == MOST_KEYS:
            yield places, offsets
            places, offsets, end = [], [], 0
        places.append(place)
        offsets.append(end)
        end += -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
    if places:
        yield places, offsets


def _copy(source: memoryview, target: memoryview, checksum: frame.Checksum, summed: memoryview) -> None:
    """Copy bytes, and add them to the checksum. Other threads run meanwhile, as they do not with slices of a memoryview.

    summed: the one of both that is an extent. The other one is a lane, into which the store may write late.
    """
    read, written = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
    for start in range(0, len(written), _PIECE_BYTES):
        end = start + _PIECE_BYTES
        np.copyto(written[start:end], read[start:end])
        checksum.update(summed[start:end])


def _matching(pattern: str, text: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(text)
        return value

    return parse


def _no_cap(value: str) -> None:
    raise ValueError(
        "is not enforced by this store, which evicts by itself when the memory that its clients lend is full: leave it out, and"
        " bound what each client lends (segment_gb)"
    )


_prefix = _matching(r"[A-Za-z0-9_.:-]{1,64}", "must be 1 to 64 letters, digits and _ . : -")
_host = _matching(r"[A-Za-z0-9_.:\[\]-]{0,255}", "must be a host name or an address of this machine")
_devices = _matching(r"[A-Za-z0-9_.,:-]{0,255}", "must be the names of RDMA devices, with commas between them")
_metadata = _matching(
    r"P2PHANDSHAKE|(https?|etcd|redis)://[^\s@]+|[A-Za-z0-9_.:-]+",
    "must be P2PHANDSHAKE, or the URL of a metadata server",
)
