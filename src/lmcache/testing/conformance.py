"""The conformance suite tests what every tier must do (docs/tiers/your-own.md describes how to write a tier):

    from lmcache.testing.conformance import ConformanceSuite

    class TestMine(ConformanceSuite):
        def url(self, place):                                    # a separate store for each `place`
            return f"mine://localhost/{place.name}"

        def stored_frame(self, place, tier, key): ...            # both or none: without them the tests of damage are skipped
        def replace_frame(self, place, tier, key, frame): ...

pytest collects the class. This module does not import pytest, and `lmcache` does not depend on it. `place` is an empty folder of
the test (`tmp_path`), or a path in it, and identifies a store; a tier that stores nothing on this machine uses its name. Class
attributes state which guarantees a tier does not give.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import xxhash

from lmcache.chunks.hashing import chunk_hash, chunk_root
from lmcache.config.options import GIB
from lmcache.runtime import RUNTIME
from lmcache.tiers import frame
from lmcache.tiers.blocking import submitter
from lmcache.tiers.operation import Clear, Close, Contains, Load, Open, Operation, Remove, Store
from lmcache.tiers.registry import make_tier
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierBase, TierError

SIZES = (
    1, 2, 63, 64, 127, 128, 129, 2048, 4095, 4096, 4097, 65535, 65536, 65537, 70001, 1 << 20, (1 << 20) + 1, 9_000_001,
)  # fmt: skip
MIB = 1 << 20
_HANGS_SECONDS = 600.0
"""A test fails if one of its calls takes longer."""
_A_THIRD = -3
_DAMAGED = (
    (0, frame.NOT_A_FRAME),
    (8, frame.OTHER_VERSION),
    (20, frame.OTHER_SHARD),
    (52, frame.NEWER_CODEC),
    (54, frame.OTHER_VERSION),
    (57, frame.OTHER_SIZE),
    (70, frame.CHECKSUM),
    (90, frame.CHECKSUM),
    (120, frame.CHECKSUM),
    (128, frame.CHECKSUM),
    (_A_THIRD, frame.CHECKSUM),
    (-1, frame.CHECKSUM),
)
"""A byte of a frame, from its end if negative (`_A_THIRD`: a third of the payload before it), and the name of its damage."""
_OPERATIONS = {one.method: one for one in (Open, Contains, Load, Store, Remove, Clear, Close)}


def shard_key(number: int, space: int = 1, shard: int = 0, shards: int = 1) -> ShardKey:
    """Return the key with this number."""
    return ShardKey(space.to_bytes(16, "little"), number.to_bytes(16, "little"), shard, shards)


def payload_of(key: ShardKey, size: int, kv_dtype: str = "") -> bytes:
    """Return the correct content of this shard at this size. Its period is a prime (with bfloat16, twice one), which matches no
    alignment or block size."""
    period, seed = 65_521, key.packed + size.to_bytes(8, "little")
    block = random.Random(seed).randbytes(min(size, period))
    if kv_dtype == "bfloat16":
        numbers = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(32_749, dtype=np.float32)
        period, block = 2 * 32_749, (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return (block * (size // period + 1))[:size]


def shard_of(key: ShardKey, size: int, kv_dtype: str = "") -> Shard:
    return Shard(key, key.chunk[::-1], memoryview(payload_of(key, size, kv_dtype)), kv_dtype)


def load_one(tier: Tier, key: ShardKey, size: int) -> tuple[str, bytes]:
    """Load one shard; return the outcome and the content of the buffer."""
    buffer = bytearray(size)
    (outcome,) = tier.load([key], [memoryview(buffer)])
    return outcome, bytes(buffer)


def corrupted(stored: bytes, other: bytes, dice: random.Random) -> bytes:
    """Return `stored` with random damage, as storage, a crash or a bug could cause; never unchanged. `other`: another frame."""
    while True:
        made = bytearray(stored)
        kind = dice.randrange(9)
        at = dice.randrange(len(made))
        size = dice.randint(1, max(1, len(made) - at))
        if kind == 0:  # flip bits
            for _ in range(dice.randint(1, 4)):
                made[dice.randrange(len(made))] ^= 1 << dice.randrange(8)
        elif kind == 1:  # change a byte of the header
            made[dice.randrange(frame.HEADER_BYTES)] = dice.randrange(256)
        elif kind == 2:  # zero a range
            made[at : at + size] = bytes(len(made[at : at + size]))
        elif kind == 3:  # replace a range by random bytes
            made[at : at + min(size, 512)] = dice.randbytes(len(made[at : at + min(size, 512)]))
        elif kind == 4:  # truncate
            del made[at:]
        elif kind == 5:  # join parts of both frames at a random place
            made = made[:at] + other[at:] if dice.random() < 0.5 else bytearray(other[:at]) + made[at:]
        elif kind == 6:  # rotate
            made = made[at:] + made[:at]
        elif kind == 7:  # change the version, with a valid checksum
            made[8] += dice.randint(1, 9)
            made[112:128] = xxhash.xxh3_128_digest(bytes(made[128:] + made[:112]))
        else:  # replace it by the other frame
            made = bytearray(other)
        if made != stored:
            return bytes(made)


class DrivenTier:
    """Drives a tier of either kind as the server does. It has the methods of a `Tier`, each of which submits an operation and
    waits for its end. All other attributes are those of the tier."""

    def __init__(self, tier: TierBase) -> None:
        self._tier = tier
        self._submitter = submitter(tier, tier.scheme, lambda name, threads: RUNTIME.pool(threads, name), RUNTIME.now)

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, _OPERATIONS[name]) if name in _OPERATIONS else getattr(self._tier, name)

    def _call(self, operation: Callable[..., Operation[Any]], *arguments: Any) -> Any:
        future = Future[Any]()

        def ended(result: Any, error: Exception | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._submitter.submit(operation(RUNTIME.now() + _HANGS_SECONDS, ended, *arguments))
        return future.result(_HANGS_SECONDS)


class ConformanceSuite:
    """The tests of a tier. Derive a class named Test... from it, and override `url` or `make`."""

    largest_bytes = 64 * MIB
    """Size of the largest shard that is tested."""
    small_cap_bytes = 24 * MIB
    """The cap of the tests that need one."""
    hard_cap = True
    """`usage` never exceeds the cap after any call."""
    least_recent_goes = True
    """The tier evicts in the order of use, also after a restart."""
    corruptions = 2000
    """How many random corruptions are tested."""
    kv_dtype = ""
    """The dtype of all payloads. `EncodedSuite` sets it."""

    # ---- to be overridden

    def url(self, place: Path) -> str:
        """Return the URL of the store identified by `place`, without max_gb and key_file."""
        raise NotImplementedError("override url or make")

    def make(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> TierBase:
        """Create a tier for the store identified by `place`, without opening it. Equal places mean the same store."""
        url = self.url(place)
        options = [f"max_gb={max_bytes / GIB!r}"] if max_bytes else []
        options += [f"key_file={key_file}"] if key_file else []
        return make_tier(url + ("&" if "?" in url else "?") + "&".join(options) if options else url).tier

    def stored_frame(self, place: Path, tier: Tier, key: ShardKey) -> bytes:
        """Return the stored frame of a shard: header and payload."""
        raise SkipTest("this tier's tests cannot read what is stored")

    def replace_frame(self, place: Path, tier: Tier, key: ShardKey, stored: bytes) -> None:
        """Replace the stored frame of a shard without using the tier. `stored` may be shorter than before."""
        raise SkipTest("this tier's tests cannot change what is stored")

    def bytes_in_store(self, place: Path, tier: Tier) -> int:
        """Return the bytes that the store takes, measured without using the tier; 0 if that is not possible."""
        return 0

    def payload_of(self, key: ShardKey, size: int) -> bytes:
        return payload_of(key, size, self.kv_dtype)

    def shard_of(self, key: ShardKey, size: int) -> Shard:
        return shard_of(key, size, self.kv_dtype)

    # ---- the tests

    def test_any_size_comes_back(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((*SIZES, self.largest_bytes)):
                key = shard_key(number)
                assert tier.store([self.shard_of(key, size)]) == [OK], size
                assert load_one(tier, key, size) == (OK, self.payload_of(key, size)), size

    def test_a_batch_is_answered_in_order(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            keys = [shard_key(number) for number in range(60)]
            sizes = [SIZES[number % (len(SIZES) - 1)] for number in range(60)]
            stored = [number for number in range(60) if number % 3]
            assert tier.store([self.shard_of(keys[number], sizes[number]) for number in stored]) == [OK] * len(stored)
            order = random.Random(3).sample(range(60), 60)
            buffers = [bytearray(sizes[number]) for number in order]
            outcomes = tier.load([keys[number] for number in order], [memoryview(one) for one in buffers])
            assert outcomes == [OK if number % 3 else ABSENT for number in order]
            for number, buffer in zip(order, buffers, strict=True):
                if number % 3:
                    assert buffer == self.payload_of(keys[number], sizes[number])
            assert tier.contains([keys[number] for number in order]) == [bool(number % 3) for number in order]

    def test_nothing_asked_nothing_answered(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            assert tier.load([], []) == [] and tier.store([]) == [] and tier.contains([]) == []
            tier.remove([])
            tier.remove([shard_key(1)])
            assert load_one(tier, shard_key(1), 100)[0] == ABSENT

    def test_memory_may_lie_anywhere(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((300, 70000, 5 * MIB + 3)):
                key = shard_key(number)
                memory = bytearray(77) + self.payload_of(key, size) + b"end"
                assert tier.store([Shard(key, bytes(16), memoryview(memory)[77:-3], self.kv_dtype)]) == [OK]
                memory[77:-3] = bytes(size)
                assert tier.load([key], [memoryview(memory)[77:-3]]) == [OK]
                assert memory == bytearray(77) + self.payload_of(key, size) + b"end"

    def test_what_is_there_is_kept(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for size in (2000, 200_000):
                shard = self.shard_of(shard_key(size), size)
                assert tier.store([shard]) == [OK]
                assert tier.store([shard]) in ([KEPT], [OK])
                assert tier.store([shard, shard])[0] in (KEPT, OK)
                assert load_one(tier, shard.key, size) == (OK, self.payload_of(shard.key, size))
            assert tier.usage().shards == 2

    def test_another_size_replaces(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            key = shard_key(1)
            for size in (100_000, 100, 5000, MIB):
                assert tier.store([self.shard_of(key, size)]) == [OK], size
                assert load_one(tier, key, size) == (OK, self.payload_of(key, size)), size

    def test_a_buffer_of_another_size_is_a_miss_and_the_shard_goes(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, (size, asked) in enumerate(((1000, 999), (1000, 1001), (200_000, 100_000), (100, 3 * MIB))):
                key = shard_key(number)
                tier.store([self.shard_of(key, size)])
                assert load_one(tier, key, asked)[0] in frame.DAMAGE
                assert load_one(tier, key, size)[0] == ABSENT

    def test_keys_are_apart_in_every_part(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            first = ShardKey(bytes(16), bytes(16), 0, 1)
            keys = [first, first._replace(shard=1, shards=2), first._replace(shards=2), first._replace(shards=258)]
            keys += [first._replace(space=bytes(at) + b"\1" + bytes(15 - at)) for at in range(16)]
            keys += [first._replace(chunk=bytes(at) + b"\1" + bytes(15 - at)) for at in range(16)]
            keys += [
                first._replace(chunk=chunk_hash(chunk_root(bytes(16), salt), range(256))) for salt in ("", "one", "two")
            ]
            assert tier.store([self.shard_of(key, 500) for key in keys]) == [OK] * len(keys)
            for key in keys:
                assert load_one(tier, key, 500) == (OK, self.payload_of(key, 500))
            tier.remove([first])
            assert tier.contains(keys) == [False] + [True] * (len(keys) - 1)

    def test_known_says_what_contains_says(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            keys = [shard_key(number) for number in range(4)]
            tier.store([self.shard_of(key, 3000) for key in keys[:2]])
            assert tier.contains(keys) == [True, True, False, False]
            assert tier.known(keys) in (None, [True, True, False, False])

    def test_remove_and_clear(self, tmp_path: Path) -> None:
        here, there = tmp_path / "here", tmp_path / "there"
        with self.opened(here) as tier, self.opened(there) as other:
            keys = [shard_key(number) for number in range(8)]
            shards = [self.shard_of(key, 3000 if number % 2 else 100_000) for number, key in enumerate(keys)]
            tier.store(shards)
            other.store(shards)
            tier.remove(keys[:4])
            assert tier.contains(keys) == [False] * 4 + [True] * 4
            assert tier.usage().shards == 4
            tier.clear()
            assert tier.contains(keys) == [False] * 8
            assert tier.usage().shards == 0
            assert tier.store(shards) == [OK] * 8
            assert other.contains(keys) == [True] * 8

    def test_closed_and_opened_again(self, tmp_path: Path) -> None:
        tier = self.driven(tmp_path)
        assert tier.usage().shards >= 0, "usage() must work on a tier that is not open"
        self.refuses(tier)
        for _ in range(2):
            tier.open()
            tier.open()
            assert tier.store([self.shard_of(shard_key(1), 5000)]) in ([OK], [KEPT])
            tier.close()
            tier.close()
            assert tier.usage().shards >= 0, "usage() must work on a tier that is not open"
            self.refuses(tier)

    def test_a_restart_finds_all_again(self, tmp_path: Path) -> None:
        sizes = {shard_key(number): size for number, size in enumerate(SIZES)}
        with self.opened(tmp_path) as tier:
            tier.store([self.shard_of(key, size) for key, size in sizes.items()])
            used = tier.usage()
        with self.opened(tmp_path) as tier:
            assert tier.contains(list(sizes)) == [True] * len(sizes)
            for key, size in sizes.items():
                assert load_one(tier, key, size) == (OK, self.payload_of(key, size)), size
            if self.hard_cap:
                assert tier.usage().shards == used.shards

    def test_least_recently_used_goes_first_also_after_a_restart(self, tmp_path: Path) -> None:
        if not self.least_recent_goes:
            raise SkipTest("this tier evicts in another order")
        size, cap = MIB, self.small_cap_bytes
        first = [shard_key(number) for number in range(8)]
        with self.opened(tmp_path, cap) as tier:
            for key in first:
                assert tier.store([self.shard_of(key, size)]) == [OK]
            for key in (first[0], first[3]):
                assert load_one(tier, key, size)[0] == OK
        with self.opened(tmp_path, cap) as tier:
            assert load_one(tier, first[5], size)[0] == OK
            expected = [first[1], first[2], first[4], first[6], first[7], first[0], first[3], first[5]]
            number, gone = 100, [key for key in first if not tier.contains([key])[0]]
            while len(gone) < len(first) and number < 200:
                assert tier.store([self.shard_of(shard_key(number), size)]) == [OK]
                number += 1
                gone += [key for key in expected if key not in gone and not tier.contains([key])[0]]
            assert gone == expected

    def test_the_cap_is_hard(self, tmp_path: Path) -> None:
        dice, cap = random.Random(5), self.small_cap_bytes
        with self.opened(tmp_path, cap) as tier:
            stored = 0
            for number in range(75):
                shards = [
                    self.shard_of(shard_key(number * 100 + one), dice.choice((10, 2048, 5000, 65536, 300_000, 2 * MIB)))
                    for one in range(dice.randint(1, 6))
                ]
                outcomes = tier.store(shards)
                assert outcomes == [OK] * len(shards)
                stored += sum(shard.payload.nbytes for shard in shards)
                usage = tier.usage()
                assert usage.max_bytes == cap
                if self.hard_cap:
                    assert usage.stored_bytes <= cap
                    assert number % 5 or self.bytes_in_store(tmp_path, tier) <= cap
                last = shards[-1]
                assert load_one(tier, last.key, last.payload.nbytes)[0] == OK
            assert stored > 3 * cap
            assert not self.hard_cap or tier.usage().stored_bytes > cap // 2

    def test_what_can_never_fit_is_said_and_costs_nothing(self, tmp_path: Path) -> None:
        with self.opened(tmp_path, self.small_cap_bytes) as tier:
            keys = [shard_key(number) for number in range(3)]
            tier.store([self.shard_of(key, 10_000) for key in keys])
            (outcome,) = tier.store([Shard(shard_key(9), bytes(16), memoryview(bytes(self.small_cap_bytes + 1)))])
            assert outcome not in (OK, KEPT)
            assert tier.contains([*keys, shard_key(9)]) == [True, True, True, False]

    def test_callers_side_by_side(self, tmp_path: Path) -> None:
        wrong: list[str] = []
        sizes = (700, 5000, 80_000, 400_000)

        def work(tier: Tier, seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(60):
                keys = [shard_key(dice.randrange(40)) for _ in range(dice.randint(1, 5))]
                of = [sizes[key.chunk[0] % len(sizes)] for key in keys]
                action = dice.random()
                if action < 0.45:
                    said = tier.store([self.shard_of(key, size) for key, size in zip(keys, of, strict=True)])
                    wrong.extend(one for one in said if one not in (OK, KEPT))
                elif action < 0.95:
                    buffers = [bytearray(size) for size in of]
                    for key, buffer, one in zip(
                        keys, buffers, tier.load(keys, [memoryview(one) for one in buffers]), strict=True
                    ):
                        if one not in (OK, ABSENT):
                            wrong.append(one)
                        elif one == OK and buffer != self.payload_of(key, len(buffer)):
                            wrong.append("wrong bytes")
                else:
                    tier.remove(keys)

        with self.opened(tmp_path, self.small_cap_bytes) as tier:
            threads = [threading.Thread(target=work, args=(tier, seed)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            assert not self.hard_cap or tier.usage().stored_bytes <= self.small_cap_bytes

    def test_damage_is_a_miss_with_its_name_and_goes(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((2048, 100_000, 9 * MIB + 5)):
                for place, expected in _DAMAGED if size < MIB else _DAMAGED[-4:]:  # a large one's header is no other
                    key, place = shard_key(1000 * number + abs(place)), -size // 3 if place == _A_THIRD else place
                    tier.store([self.shard_of(key, size)])
                    stored = bytearray(self.stored_frame(tmp_path, tier, key))
                    assert len(stored) == frame.HEADER_BYTES + size or self.kv_dtype
                    stored[place] ^= 0x40
                    self.replace_frame(tmp_path, tier, key, bytes(stored))
                    # Within the bytes that the shard has before it is encoded, another number of stored ones is possible.
                    shorter = [frame.TRUNCATED] if self.kv_dtype and expected == frame.OTHER_SIZE else []
                    self.misses(tier, key, size, (expected, *shorter))

    def test_cut_off_frames_are_misses(self, tmp_path: Path) -> None:
        """A truncated frame is a miss even if the buffer holds the missing bytes from an earlier load."""
        with self.opened(tmp_path) as tier:
            head = frame.HEADER_BYTES
            for number, size in enumerate((2048, 100_000)):
                for left in (0, 1, 100, head, head + 1, -head, -1):
                    key = shard_key((number + 1) * MIB + left)
                    tier.store([self.shard_of(key, size)])
                    self.replace_frame(tmp_path, tier, key, self.stored_frame(tmp_path, tier, key)[:left])
                    self.misses(tier, key, size, (*frame.DAMAGE, ABSENT), self.payload_of(key, size))

    def test_frames_in_each_others_place_are_misses(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((2048, 100_000)):
                one, two = shard_key(2 * number), shard_key(2 * number + 1)
                tier.store([self.shard_of(one, size), self.shard_of(two, size)])
                stored = [self.stored_frame(tmp_path, tier, key) for key in (one, two)]
                self.replace_frame(tmp_path, tier, one, stored[1])
                self.replace_frame(tmp_path, tier, two, stored[0])
                for key in (one, two):
                    self.misses(tier, key, size, (frame.OTHER_SHARD,))

    def test_no_random_corruption_is_served(self, tmp_path: Path) -> None:
        dice, done = random.Random(11), 0
        with self.opened(tmp_path) as tier:
            while done < self.corruptions:
                keys = [shard_key(done + number) for number in range(min(100, self.corruptions - done))]
                size = dice.choice((64, 1500, 4096, 70_000))
                shards = [self.shard_of(key, size) for key in keys]
                assert tier.store(shards) == [OK] * len(keys)
                stored = [self.stored_frame(tmp_path, tier, key) for key in keys]
                for number, key in enumerate(keys):
                    self.replace_frame(tmp_path, tier, key, corrupted(stored[number], stored[number - 1], dice))
                buffers = [bytearray(size) for _ in keys]
                outcomes = tier.load(keys, [memoryview(buffer) for buffer in buffers])
                assert OK not in outcomes
                assert tier.contains(keys) == [False] * len(keys)
                done += len(keys)

    def test_keyed_frames(self, tmp_path: Path) -> None:
        place = tmp_path / "store"
        files = [tmp_path / "one.key", tmp_path / "two.key"]
        for number, path in enumerate(files):
            path.touch(0o600)
            path.write_bytes(bytes([number + 1]) * frame.KEY_BYTES)
        sizes = {shard_key(1): 1000, shard_key(2): 300_000}
        for written, read in ((files[0], files[1]), (files[0], None), (None, files[0])):
            with self.opened(place, key_file=written) as tier:
                for key, size in sizes.items():
                    assert tier.store([self.shard_of(key, size)]) == [OK]
                    assert load_one(tier, key, size) == (OK, self.payload_of(key, size))
            with self.opened(place, key_file=read) as tier:
                for key, size in sizes.items():
                    self.misses(tier, key, size, (frame.CHECKSUM, frame.OTHER_VERSION))

    # ---- helpers of the tests

    def driven(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Tier:
        """Return the tier that `make` creates, driven as by the server."""
        driven: Any = DrivenTier(self.make(place, max_bytes, key_file))
        return driven  # type: ignore[no-any-return]

    @contextmanager
    def opened(self, place: Path, max_bytes: int | None = None, key_file: Path | None = None) -> Iterator[Tier]:
        """Open a tier, and close it at the end."""
        tier = self.driven(place, max_bytes, key_file)
        tier.open()
        try:
            yield tier
        finally:
            tier.close()

    def misses(self, tier: Tier, key: ShardKey, size: int, names: Sequence[str], held: bytes = b"") -> None:
        """Check that the load has one of these outcomes, and that the shard is then absent and can be stored again.

        `held`: content of the buffer before the load; zeros by default.
        """
        (outcome,) = tier.load([key], [memoryview(bytearray(held or size))])
        assert outcome in names, (size, outcome)
        assert tier.contains([key]) == [False]
        assert load_one(tier, key, size)[0] == ABSENT
        assert tier.store([self.shard_of(key, size)]) == [OK]
        assert load_one(tier, key, size) == (OK, self.payload_of(key, size))
        tier.remove([key])

    def refuses(self, tier: Tier) -> None:
        """Check that a tier that is not open raises TierError."""
        try:
            tier.load([shard_key(1)], [memoryview(bytearray(8))])
        except TierError:
            return
        raise AssertionError("a tier that is not open answered a load")


class EncodedSuite(ConformanceSuite):
    """The tests of a tier that stores encoded payloads (`codecs` of its class). `url` returns a URL with `codec=pack12`."""

    kv_dtype = "bfloat16"

    def test_encoded_shards_take_less(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((4096, 100_001, 3 * MIB)):
                key = shard_key(number)
                assert tier.store([self.shard_of(key, size)]) == [OK]
                assert len(self.stored_frame(tmp_path, tier, key)) < frame.HEADER_BYTES + 0.77 * size
                assert load_one(tier, key, size) == (OK, self.payload_of(key, size))
                assert tier.store([self.shard_of(key, size)._replace(kv_dtype="")]) == [
                    OK
                ]  # as it is, in place of the other
                assert len(self.stored_frame(tmp_path, tier, key)) == frame.HEADER_BYTES + size
                assert load_one(tier, key, size) == (OK, self.payload_of(key, size))

    def test_a_shard_is_kept_if_it_is_there_without_a_codec(self, tmp_path: Path) -> None:
        with self.opened(tmp_path) as tier:
            for number, size in enumerate((4096, 100_001, 9 * MIB)):
                shard = self.shard_of(shard_key(number), size)
                assert tier.store([shard._replace(kv_dtype="")]) == [OK]
                assert tier.store([shard]) == [KEPT]
                assert load_one(tier, shard.key, size) == (OK, bytes(shard.payload))
