"""The coder of one tier: it encodes what the tier stores, if that makes the tier faster, and measures whether it does.

It stands between the threads that call a blocking tier and the tier itself (`blocking`); nothing of it runs in the server's loop.
"""

from __future__ import annotations

import os
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache.observability.log import init_logger
from lmcache.tiers.coding import (
    AS_IT_IS,
    INT8,
    PACKABLE,
    SCRATCH,
    Coding,
    aligned,
    coding_of,
    coding_of_rounded,
    decode,
    encode,
    encode_rounded,
    rounds,
)
from lmcache.tiers.tier import OK, Shard, ShardKey, Tier

OPTIONS = ("auto", "none", "pack12", "int8")
"""Values of the option `codec`. auto: encode where that makes the tier faster. int8: round the KV of engines that accept it."""
NAIVE, LOSSY = "naive", ("cachegen", "kivi", "fp8")
"""Names of the public LMCache's codecs: its one for none, and those that change KV, which `int8` serves."""
_LEAST_SAVING = 20
"""A payload that does not become smaller by 1/20 is stored as it is."""
_SAMPLE_BYTES = 256 << 10
"""So many bytes of one shard are encoded and decoded for each call that stores, to measure ratio and rates."""
_SAMPLES = 9
_ENOUGH_BYTES = 4 << 20
"""A tier's rate counts once so many bytes were moved."""
_WINDOW_SECONDS = 4.0
"""Older measurements lose half their weight whenever the tier has been busy for so many seconds more."""
_WORTH_BEGINNING = 1.05
"""Encoding begins if it makes the tier so many times as fast, and ends when it makes it slower."""
_SETTLED_SECONDS = 10.0
"""A decision stands for at least so long."""
_CORES_EACH = 4
"""Of so many cores, one may be busy with decoding at a time."""
log = init_logger(__name__)


@dataclass
class _Rate:
    """The rate of a tier's loads or stores: bytes moved, and the seconds in which at least one call ran. decoded_bytes: what the
    loads have decoded in these seconds. All of them fade."""

    moved_bytes: float = 0.0
    busy_seconds: float = 0.0
    decoded_bytes: float = 0.0
    _running: int = 0
    _since: float = 0.0

    def began(self, now: float) -> None:
        if not self._running:
            self._since = now
        self._running += 1

    def ended(self, now: float, moved_bytes: int) -> None:
        self._running -= 1
        self.moved_bytes += moved_bytes
        self.busy_seconds += now - self._since
        self._since = now
        if self.busy_seconds > 2 * _WINDOW_SECONDS:
            self.moved_bytes, self.busy_seconds = self.moved_bytes / 2, self.busy_seconds / 2
            self.decoded_bytes /= 2

    def bytes_per_second(self, decode_rate: float) -> float | None:
        """Return the rate of the store itself, without the time of decoding; None if too little was moved."""
        if self.moved_bytes < _ENOUGH_BYTES or self.busy_seconds <= 0:
            return None
        return self.moved_bytes / max(self.busy_seconds / 4, self.busy_seconds - self.decoded_bytes / decode_rate)


@dataclass(frozen=True)
class _Sample:
    """What a part of a payload has shown: raw bytes for each stored one, and raw bytes encoded and decoded in a second."""

    ratio: float
    encode_rate: float
    decode_rate: float


class Coder:
    """Encodes for one tier, whose option `codec` says how. name: the tier's, for the log. now: a clock of seconds."""

    def __init__(self, tier: Tier, name: str, now: Callable[[], float]) -> None:
        self._tier, self._name, self._now = tier, name, now
        self.option = tier.codec
        self.encodes = self.option in ("pack12", "int8")
        """Whether exact KV in bfloat16 is encoded now."""
        self.rounds = self.option == "int8"
        """Whether KV is rounded, if its layout says so."""
        self.why = {"auto": "the tier's speed is not known yet"}.get(self.option, f"codec={self.option}")
        self.raw_bytes = self.stored_bytes = 0
        """Of all payloads that were stored encoded: before and after."""
        self.rounded_bytes = 0
        """Of those that were rounded: before."""
        self._lock = threading.Lock()
        """Protects all numbers."""
        self._loads, self._stores = _Rate(), _Rate()
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)
        self._decided_at: float | None = None
        """When it was decided last to begin or to end encoding."""
        self._lanes = max(1, min(tier.concurrency, (os.cpu_count() or 1) // _CORES_EACH))
        if self.option == "auto":
            tier.decoded = self._decoded

    def status(self) -> dict[str, object]:
        """Return what /status says. JSON types only."""
        with self._lock:
            return {
                "option": self.option,
                "used": "int8" if self.rounds else "pack12" if self.encodes else "none",
                "why": self.why,
                "raw_bytes": self.raw_bytes,
                "stored_bytes": self.stored_bytes,
                "rounded_bytes": self.rounded_bytes,
                "ratio": round(self.raw_bytes / self.stored_bytes, 3) if self.stored_bytes else None,
            }

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        """Load as the tier does, and measure its rate."""
        if self.option != "auto":
            return self._tier.load(keys, into)
        moved_bytes = 0
        with self._lock:
            self._loads.began(self._now())
        try:
            outcomes = self._tier.load(keys, into)
            moved_bytes = sum(one.nbytes for one, outcome in zip(into, outcomes, strict=False) if outcome == OK)
        finally:
            with self._lock:
                self._loads.ended(self._now(), moved_bytes)
        return outcomes

    def store(self, shards: Sequence[Shard]) -> list[str]:
        """Store as the tier does, encoded if the option says so or it makes the tier faster."""
        if self.option == "none":
            return self._tier.store(shards)
        packable = [at for at, one in enumerate(shards) if one.kv_dtype in PACKABLE or self._may_round(one)]
        if packable and self.option == "auto":
            self._decide(shards[packable[0]].payload)
        if not packable or not self.encodes:
            return self._store(shards)
        with SCRATCH.taken(sum(aligned(shards[at].payload.nbytes) for at in packable)) as memory:
            coded, end = list(shards), 0
            for at in packable:
                size, coding = self._encode(shards[at], memory[end : end + shards[at].payload.nbytes])
                if size:
                    coded[at] = shards[at]._replace(payload=memory[end : end + size].toreadonly(), coding=coding)
                    end += aligned(size)
            return self._store(coded)

    def _may_round(self, shard: Shard) -> bool:
        """Return whether to round this shard: its layout is one of rounded KV, and the tier's user has asked for it, too."""
        return self.rounds and rounds(shard.kv_dtype, shard.rounded_row)

    def _encode(self, shard: Shard, into: memoryview) -> tuple[int, Coding]:
        """Encode a shard. Return the bytes of `into` that it takes, and its coding; 0 bytes if it is stored as it is."""
        payload = shard.payload.cast("B")
        room = into[: payload.nbytes - payload.nbytes // _LEAST_SAVING]
        if self._may_round(shard):
            size = encode_rounded(payload, shard.kv_dtype, shard.rounded_row, room)
            if size:
                return size, coding_of_rounded(room[:size], payload.nbytes)
        size = encode(payload, room) if shard.kv_dtype in PACKABLE else 0
        return size, coding_of(payload) if size else AS_IT_IS

    def _store(self, shards: Sequence[Shard]) -> list[str]:
        moved_bytes, first = 0, False
        with self._lock:
            self._stores.began(self._now())
        try:
            outcomes = self._tier.store(shards)
            stored = [one for one, outcome in zip(shards, outcomes, strict=False) if outcome == OK]
            moved_bytes = sum(one.payload.nbytes for one in stored)
        finally:
            with self._lock:
                self._stores.ended(self._now(), moved_bytes)
        with self._lock:
            for one in stored:
                if one.coding.raw_bytes:
                    self.raw_bytes += one.coding.raw_bytes
                    self.stored_bytes += one.payload.nbytes
                if one.coding.codec == INT8:
                    first = first or not self.rounded_bytes
                    self.rounded_bytes += one.coding.raw_bytes
        if first:
            log.info(
                "Tier %s: KV of engines with lossy_kv=int8 is stored rounded by int8 from now on; all other KV stays exact",
                self._name,
            )
        return outcomes

    def _decoded(self, raw_bytes: int, stored_bytes: int) -> None:
        """Note that the tier has decoded a payload: fewer bytes were moved than the load will say."""
        with self._lock:
            self._loads.moved_bytes -= raw_bytes - stored_bytes
            self._loads.decoded_bytes += raw_bytes

    # ---- whether to encode

    def _decide(self, payload: memoryview) -> None:
        """Compare the tier's rate with that of encoding or decoding, and begin or end encoding accordingly.

        Loads count, since requests wait for them; before there are any, stores do.
        """
        sample = self._measured(payload.cast("B")[:_SAMPLE_BYTES])
        with self._lock:
            if sample is not None:
                self._samples.append(sample)
            if not self._samples:
                return
            ratio = statistics.median(one.ratio for one in self._samples)
            decode_rate = self._lanes * statistics.median(one.decode_rate for one in self._samples)
            rate, coder, does = self._loads.bytes_per_second(decode_rate), decode_rate, "loads"
            if rate is None:
                coder = self._lanes * statistics.median(one.encode_rate for one in self._samples)
                rate, does = self._stores.bytes_per_second(decode_rate), "stores"
            if rate is None:
                return
            gain = 1 / (1 / ratio + rate / coder)
            encodes, now = gain > (1.0 if self.encodes else _WORTH_BEGINNING), self._now()
            if self._decided_at is not None and (encodes == self.encodes or now - self._decided_at < _SETTLED_SECONDS):
                return
            self.encodes, self._decided_at = encodes, now
            self.why = f"it {does} {rate / 1e9:.3g} GB/s, pack12 would make that {gain:.3g} times as fast"
        log.info(
            "Tier %s: KV in bfloat16 is stored %s from now on: %s",
            *(self._name, "with pack12" if encodes else "as it is", self.why),
        )

    def _measured(self, payload: memoryview) -> _Sample | None:
        """Encode and decode a part of a payload. None if it is too small to measure anything."""
        if payload.nbytes < _SAMPLE_BYTES // 16:
            return None
        with SCRATCH.taken(payload.nbytes) as memory:
            whole, began = memory[: payload.nbytes], self._now()
            size = encode(payload, whole)
            coding, encoded = coding_of(payload), self._now()
            if not size:
                return _Sample(1.0, float("inf"), float("inf"))
            decode(coding, size, whole)
            ended = self._now()
        rates = (payload.nbytes / max(seconds, 1e-9) for seconds in (encoded - began, ended - encoded))
        return _Sample(payload.nbytes / size, *rates)
