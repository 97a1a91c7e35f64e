"""When a tier's KV is encoded: by the option, by the dtype, and by what the tier and the codec were measured to do."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from memory_tier import MemoryTier

from lmcache.testing.conformance import load_one, payload_of, shard_key, shard_of
from lmcache.tiers import OK, Shard, ShardKey, TierError, frame
from lmcache.tiers.coder import Coder, _Sample

SIZE = 2 << 20


class Link(MemoryTier):
    """A tier behind a link of a given rate. Its clock is advanced by the bytes that pass through it."""

    codecs = True
    concurrency = 1

    def __init__(self, place: Path, bytes_per_second: float, codec: str = "auto") -> None:
        super().__init__(place, None, None)
        self.codec, self.bytes_per_second, self.time = codec, bytes_per_second, 0.0
        self.open()

    def now(self) -> float:
        return self.time

    def load_one(self, key: ShardKey, buffer: memoryview) -> str:
        stored = self.frames[key.packed]
        self.time += len(stored) / self.bytes_per_second
        return frame.unpack(stored, key, buffer, b"", self.decoded)

    def store_one(self, shard: Shard) -> str:
        self.time += shard.payload.nbytes / self.bytes_per_second
        header = frame.make_header(shard.key, shard.parent, shard.payload, b"", shard.coding)
        self.frames[shard.key.packed] = header + shard.payload
        return OK

    def payload_bytes(self, key: ShardKey) -> int:
        return len(self.frames[key.packed]) - frame.HEADER_BYTES


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if encoding and decoding ran at 4 GB/s on every machine."""
    monkeypatch.setattr(Coder, "_measured", lambda self, payload: _Sample(1.3, 4e9, 4e9))
    monkeypatch.setattr("lmcache.tiers.coder.os.cpu_count", lambda: 4)


def store(coder: Coder, numbers: range, kv_dtype: str = "bfloat16") -> list[ShardKey]:
    keys = [shard_key(number) for number in numbers]
    for key in keys:
        assert coder.store([shard_of(key, SIZE, kv_dtype)]) == [OK]
    return keys


def encoded(tier: Link, keys: Sequence[ShardKey]) -> list[bool]:
    return [tier.payload_bytes(key) < 0.8 * SIZE for key in keys]


@pytest.mark.usefixtures("measured")
def test_a_slow_tier_encodes_once_its_speed_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tier = Link(tmp_path, 100e6)
    coder = Coder(tier, "slow", tier.now)
    assert coder.status()["used"] == "none" and coder.status()["ratio"] is None
    keys = store(coder, range(6))
    assert encoded(tier, keys) == [False, False, True, True, True, True]
    status: Any = coder.status()
    assert status["used"] == "pack12" and status["option"] == "auto" and status["ratio"] > 1.3
    assert status["raw_bytes"] == 4 * SIZE and status["stored_bytes"] == sum(map(tier.payload_bytes, keys[2:]))
    said = [one.message for one in caplog.records]
    assert (
        len(said) == 1 and "Tier slow: KV in bfloat16 is stored with pack12 from now on: it stores 0.1 GB/s" in said[0]
    )
    for key in keys:
        assert load_one(coder, key, SIZE) == (OK, payload_of(key, SIZE, "bfloat16"))  # type: ignore[arg-type]


@pytest.mark.usefixtures("measured")
def test_a_fast_tier_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tier = Link(tmp_path, 5e9)
    coder = Coder(tier, "fast", tier.now)
    assert not any(encoded(tier, store(coder, range(8))))
    assert coder.status()["used"] == "none" and coder.status()["stored_bytes"] == 0
    assert [one.message.split(":")[1] for one in caplog.records] == [" KV in bfloat16 is stored as it is from now on"]


@pytest.mark.usefixtures("measured")
def test_loads_count_more_than_stores(tmp_path: Path) -> None:
    """A device that writes slowly and reads fast would make requests wait for the decoder."""
    tier = Link(tmp_path, 100e6)
    coder = Coder(tier, "device", tier.now)
    keys = store(coder, range(6))
    assert coder.encodes
    tier.bytes_per_second = 5e9
    for key in [*keys, *keys]:
        assert load_one(coder, key, SIZE)[0] == OK  # type: ignore[arg-type]
    tier.bytes_per_second = 100e6
    assert encoded(tier, store(coder, range(10, 13))) == [True] * 3, "a decision stands for ten seconds"
    tier.time += 10
    assert encoded(tier, store(coder, range(20, 23))) == [False] * 3
    tier.time += 10
    for _ in range(80):
        load_one(coder, keys[0], SIZE)  # type: ignore[arg-type]
    assert encoded(tier, store(coder, range(30, 33))) == [True] * 3


@pytest.mark.usefixtures("measured")
def test_the_rate_of_the_link_is_not_that_of_decoding(tmp_path: Path) -> None:
    """A tier that encodes must measure the same rate of its store as one that does not, or it would never stop."""
    rates = []
    for codec in ("none", "pack12"):
        tier = Link(tmp_path / codec, 200e6, codec)
        coder = Coder(tier, "link", tier.now)
        keys = store(coder, range(4))
        coder.option, tier.decoded = "auto", coder._decoded
        for key in keys:
            load_one(coder, key, SIZE)  # type: ignore[arg-type]
        rates.append(coder._loads.bytes_per_second(float("inf")))
    assert (
        None not in rates
        and rates[0] == pytest.approx(rates[1], rel=0.01)
        and rates[0] == pytest.approx(200e6, rel=0.01)
    )


@pytest.mark.parametrize("codec", ["none", "auto", "pack12"])
@pytest.mark.parametrize("kv_dtype", ["", "float16", "float32", "fp8_e4m3", "int8"])
def test_other_dtypes_are_stored_as_they_are(tmp_path: Path, codec: str, kv_dtype: str) -> None:
    tier = Link(tmp_path, 1e6, codec)
    coder = Coder(tier, "link", tier.now)
    payload = payload_of(shard_key(1), SIZE, "bfloat16")
    for _ in range(5):
        assert coder.store([Shard(shard_key(1), bytes(16), memoryview(payload), kv_dtype)]) == [OK]
    assert tier.payload_bytes(shard_key(1)) == SIZE


def test_the_option_none_encodes_nothing_and_pack12_everything(tmp_path: Path) -> None:
    for codec, rate in (("none", 1e6), ("pack12", 1e12)):
        tier = Link(tmp_path / codec, rate, codec)
        coder = Coder(tier, "link", tier.now)
        assert encoded(tier, store(coder, range(4))) == [codec == "pack12"] * 4
        assert coder.status()["why"] == f"codec={codec}"


def test_a_batch_is_stored_together_in_its_order(tmp_path: Path) -> None:
    """What cannot be made smaller lies among what can, at sizes of all kinds."""
    tier = Link(tmp_path, 1e12, "pack12")
    coder = Coder(tier, "link", tier.now)
    kinds = [(size, dtype) for size in (1, 127, 4096, 100_001) for dtype in ("bfloat16", "", "float16")]
    shards = [shard_of(shard_key(number), size, dtype) for number, (size, dtype) in enumerate(kinds)]
    shards.append(Shard(shard_key(99), bytes(16), memoryview(payload_of(shard_key(99), 8192)), "bfloat16"))  # noise
    calls: list[Sequence[Shard]] = []
    inner = tier.store
    tier.store = lambda some: (calls.append([one._replace(payload=memoryview(bytes(0))) for one in some]), inner(some))[
        1
    ]  # type: ignore[method-assign]
    assert coder.store(shards) == [OK] * len(shards)
    assert [one.key for one in calls[0]] == [one.key for one in shards] and len(calls) == 1
    assert {one.key for one in calls[0] if one.coding.codec} == {shard_key(6), shard_key(9)}
    for shard in shards:
        buffer = bytearray(shard.payload.nbytes)
        assert coder.load([shard.key], [memoryview(buffer)]) == [OK] and buffer == shard.payload


def test_the_error_of_a_tier_passes_and_nothing_is_counted(tmp_path: Path) -> None:
    tier = Link(tmp_path, 1e6, "pack12")
    coder = Coder(tier, "link", tier.now)

    def fail(shards: Sequence[Shard]) -> list[str]:
        raise TierError("io", "broken")

    tier.store = fail  # type: ignore[method-assign]
    with pytest.raises(TierError, match="broken"):
        coder.store([shard_of(shard_key(1), SIZE, "bfloat16")])
    assert coder.status()["stored_bytes"] == 0


def test_what_a_real_sample_says(tmp_path: Path) -> None:
    coder = Coder(Link(tmp_path, 1e9), "link", time.perf_counter)
    sample = coder._measured(memoryview(payload_of(shard_key(1), 1 << 18, "bfloat16")))
    assert sample is not None and 1.3 < sample.ratio < 1.33 and 0 < sample.encode_rate < 1e12
    noise = coder._measured(memoryview(payload_of(shard_key(1), 1 << 18)))
    assert noise is not None and noise.ratio == 1.0
    assert coder._measured(memoryview(bytes(100))) is None
