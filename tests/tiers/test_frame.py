"""The frame against its page: a reader written from docs/tiers/frame.md alone must agree."""

from __future__ import annotations

import random
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash
from blake3 import blake3

from lmcache.testing.conformance import corrupted, payload_of, shard_key, shard_of
from lmcache.tiers import OK, ShardKey, frame
from lmcache.tiers.disk.shard_index import RECORD
from lmcache.tiers.disk.tier import DiskTier

SECTOR = Path(__file__).resolve().parents[2] / "docs/tiers/frame.md"
KEY = ShardKey(bytes(range(16)), bytes(range(16, 32)), 1, 2)


def test_the_pages_vector() -> None:
    found = re.search(r"`hello`:\n\n((?:    .*\n)+)", SECTOR.read_text())
    assert found
    header = bytes.fromhex(re.sub(r"\s", "", found[1]))
    assert header == frame.make_header(KEY, bytes(range(32, 48)), b"hello")
    assert frame.check(header, b"hello", KEY) == OK


@pytest.mark.parametrize("secret", [b"", bytes(range(32))], ids=["plain", "keyed"])
def test_a_checksum_in_pieces_is_the_same(secret: bytes) -> None:
    payload = payload_of(KEY, 100_000)
    pieces = frame.Checksum(secret)
    for at in range(0, len(payload), 33_333):
        pieces.update(payload[at : at + 33_333])
    header = pieces.header(KEY, bytes(16))
    assert header == frame.make_header(KEY, bytes(16), payload, secret)
    head = header[:112]
    digest = blake3(payload + head, key=secret).digest(16) if secret else xxhash.xxh3_128_digest(payload + head)
    assert header[112:] == digest
    assert frame.check(header, payload, KEY, bytes(32)) in (frame.OTHER_VERSION, frame.CHECKSUM)


@pytest.mark.parametrize("secret", [b"", bytes(range(32))])
def test_a_whole_frame_is_unpacked_and_nothing_of_another_is(secret: bytes) -> None:
    payload = payload_of(KEY, 3000)
    stored = frame.make_header(KEY, bytes(16), payload, secret) + payload
    for made, size, outcome in (
        (stored, 3000, OK),
        (stored, 2999, frame.OTHER_SIZE),
        (stored + b"!", 3000, frame.OTHER_SIZE),
        (stored[:-1], 3000, frame.TRUNCATED),
        (stored[:127], 3000, frame.TRUNCATED),
        (b"", 3000, frame.TRUNCATED),
        (stored[:-1] + b"!", 3000, frame.CHECKSUM),
    ):
        into = bytearray(b"x" * size)
        assert frame.unpack(made, KEY, memoryview(into), secret) == outcome
        assert into == (payload if outcome == OK else b"x" * size)
    assert frame.unpack(stored, shard_key(2), memoryview(bytearray(3000)), secret) == frame.OTHER_SHARD


@pytest.mark.parametrize("secret", [b"", bytes(range(32))], ids=["plain", "keyed"])
def test_no_random_corruption_is_unpacked(secret: bytes) -> None:
    """The many, since each takes microseconds here; the suites of the tiers try some hundreds on each store."""
    dice, key = random.Random(12), shard_key(1)
    for size in (64, 200, 1500):
        into = memoryview(bytearray(size))
        stored, other = (
            frame.make_header(one, bytes(16), payload_of(one, size), secret) + payload_of(one, size)
            for one in (key, shard_key(2))
        )
        assert frame.unpack(stored, key, into, secret) == OK
        outcomes = Counter(frame.unpack(corrupted(stored, other, dice), key, into, secret) for _ in range(20_000))
        assert outcomes.keys() <= set(frame.DAMAGE) and into == payload_of(key, size), "nothing was copied either"
        assert len(outcomes) >= 6


def test_a_reader_written_from_the_page_reads_a_disk_tier(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "tier", 32 << 20)
    tier.open()
    sizes = {number: (1000, 65_535, 65_536, 300_001)[number % 4] for number in range(12)}
    for number, size in sizes.items():
        tier.store([shard_of(shard_key(number), size)])
    tier.remove([shard_key(5)])
    content = (tmp_path / "tier" / "index").read_bytes()
    tier.close()  # rewrites it
    for index in (content, (tmp_path / "tier" / "index").read_bytes()):
        assert read_disk(tmp_path / "tier", index) == {
            shard_key(number).packed: payload_of(shard_key(number), size)
            for number, size in sizes.items()
            if number != 5
        }


def read_disk(folder: Path, index: bytes) -> dict[bytes, bytes]:
    assert index[:8] == b"LMCindex" and struct.unpack_from("<HHI", index, 8) == (1, 0, 64)
    assert struct.unpack_from("<Q", index, 56)[0] == xxhash.xxh3_64_intdigest(index[:56])
    there: dict[int, tuple[bytes, int]] = {}
    at, number = 64, 1
    while index[at : at + 4] == b"LMCe":
        kind, records, entry = struct.unpack_from("<B3xI4xQ", index, at + 4)
        body = index[at + 32 :][: records * (64 if kind == 1 else 8)]
        if entry != number or struct.unpack_from("<Q", index, at + 24)[0] != xxhash.xxh3_64_intdigest(
            index[at:][:24] + body
        ):
            break
        if kind == 1:
            for record in np.frombuffer(body, RECORD):
                key = record["key"].tobytes()
                assert record["tag"] == xxhash.xxh3_64_intdigest(key) >> 4
                there[int(record["place"])] = (key, int(record["payload"]))
        for place in struct.unpack(f"<{records}Q", body) if kind == 2 else ():
            del there[place]
        at, number = at + 32 + len(body), number + 1
    found = {}
    for place, (key, size) in there.items():
        offset = (place & 0xFFFFFFFF) * 64
        large = size >= 65_536
        data = (folder / f"{place >> 32:08x}.{'large' if large else 'packed'}").read_bytes()
        header_at, payload_at = (offset + -(-size // 4096) * 4096, offset) if large else (offset, offset + 128)
        header, payload = data[header_at:][:128], data[payload_at:][:size]
        assert header[:8] == b"LMCframe" and header[16:52] == key
        assert header[112:] == xxhash.xxh3_128_digest(payload + header[:112])
        found[key] = payload
    return found
