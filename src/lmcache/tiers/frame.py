"""The frame: the format of every stored shard in every tier, by which damage becomes a miss and never wrong KV.

It is a header of 128 bytes, then the payload (the extent's bytes in canonical order, as they are or encoded by a codec). All
integers are little-endian:

    offset  size  field
         0     8  magic, "LMCframe"
         8     2  version, 1
        10     2  flags: bit 0, the checksum is keyed
        12     4  bytes of this header, 128
        16    16  space: fingerprint of the layout and the parallel split
        32    16  chunk: the chunk's hash
        48     2  shard: index of the shard in its chunk
        50     2  shards: number of shards of the chunk
        52     2  codec: 0 for none, else a number of `coding`
        54     2  zero
        56     8  payload bytes
        64    16  parent: hash of the previous chunk, zeros before the first
        80     8  bytes after decoding, zero without a codec
        88    16  xxh3-128 of the bytes after decoding, zeros without a codec
       104     8  zero
       112    16  checksum of the payload followed by header bytes 0..112: xxh3-128 (big-endian, as its digest is usually
                  written), or with flag bit 0 the first 16 bytes of keyed BLAKE3

The checksum covers the payload first, so that a store can compute it piece by piece during its reads and writes (`Checksum`)
without knowing the header.

xxh3 detects damage but not forgery; a tier that other users may write to needs a key. The `xxhash` library computes xxh3 at 13
to 36 GB/s a core, where BLAKE3 reaches 3 to 5, and releases the interpreter lock.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import xxhash
from blake3 import blake3

from lmcache.tiers.coding import AS_IT_IS, NAMES, RAW, Coding, decode
from lmcache.tiers.tier import OK, ShardKey

HEADER_BYTES = 128
VERSION = 1
KEY_BYTES = 32
_MAGIC = b"LMCframe"
_KEYED = 1
_HEAD = struct.Struct("<8sHHI16s16sHHHHQ16sQ16s8x")
_CHECKED_BYTES = _HEAD.size
_DIGEST_BYTES = 16

NOT_A_FRAME = "not a frame"
OTHER_VERSION = "other version"
OTHER_SHARD = "other shard"
OTHER_SIZE = "other size"
CHECKSUM = "checksum"
TRUNCATED = "truncated"
NEWER_CODEC = "written by a newer version"
"""The frame names a codec that this version does not have."""
UNDECODABLE = "undecodable"
"""The checksum is right, but decoding does not yield the bytes that were encoded."""
DAMAGE = (NOT_A_FRAME, OTHER_VERSION, OTHER_SHARD, OTHER_SIZE, CHECKSUM, TRUNCATED, NEWER_CODEC, UNDECODABLE)
"""All names of damage. A damaged shard is a miss, is counted under its name of damage, and is removed."""


class Checksum:
    """The checksum of one frame, computed piece by piece while the payload is read or written. `secret`: 32 bytes or b""."""

    def __init__(self, secret: bytes = b"") -> None:
        self._secret = secret
        self._sum = blake3(key=secret) if secret else xxhash.xxh3_128()
        self._payload_bytes = 0

    def update(self, piece: bytes | memoryview) -> None:
        """Add the next piece of the payload. The interpreter lock is released meanwhile."""
        self._sum.update(piece)
        self._payload_bytes += memoryview(piece).nbytes

    def header(self, key: ShardKey, parent: bytes, coding: Coding = AS_IT_IS) -> bytes:
        """Return the 128-byte header of a frame with the payload so far. Ends the checksum."""
        flags = _KEYED if self._secret else 0
        numbers = _MAGIC, VERSION, flags, HEADER_BYTES
        head = _HEAD.pack(
            *numbers, *key, coding.codec, 0, self._payload_bytes, parent, coding.raw_bytes, coding.raw_digest
        )
        return head + self._digest(head)

    def check(self, header: bytes | memoryview, key: ShardKey, raw_bytes: int | None = None) -> str:
        """Return OK when header and payload so far are a complete frame of this shard, else the name of the damage. Ends it.

        raw_bytes: the size of the shard, which is more than the payload if that is encoded; None: a codec is damage.
        """
        wrong = check_header(header, key, self._payload_bytes if raw_bytes is None else raw_bytes, self._secret)
        if not wrong and payload_bytes(header) != self._payload_bytes:
            wrong = TRUNCATED
        if wrong:
            return wrong
        same = self._digest(bytes(header[:_CHECKED_BYTES])) == bytes(header[_CHECKED_BYTES:HEADER_BYTES])
        return OK if same else CHECKSUM

    def _digest(self, head: bytes) -> bytes:
        self._sum.update(head)
        return self._sum.digest(_DIGEST_BYTES) if isinstance(self._sum, blake3) else self._sum.digest()


def make_header(
    key: ShardKey, parent: bytes, payload: bytes | memoryview, secret: bytes = b"", coding: Coding = AS_IT_IS
) -> bytes:
    """Return the 128-byte header of `payload`. `secret`: 32 bytes for a keyed checksum, or b""."""
    checksum = Checksum(secret)
    checksum.update(payload)
    return checksum.header(key, parent, coding)


def check_header(header: bytes | memoryview, key: ShardKey, raw_bytes: int, secret: bytes = b"") -> str:
    """Return OK when this is the header of a frame of this shard, which has so many bytes before it is encoded, else why not.

    Ignores the checksum. After OK, `payload_bytes` is at most `raw_bytes`.
    """
    if len(header) < HEADER_BYTES:
        return TRUNCATED
    magic, version, flags, size, *name, codec, zero, stored, _, decoded, _ = _HEAD.unpack_from(header)
    if magic != _MAGIC:
        return NOT_A_FRAME
    if version != VERSION or size != HEADER_BYTES or flags != (_KEYED if secret else 0) or zero:
        return OTHER_VERSION
    if tuple(name) != tuple(key):
        return OTHER_SHARD
    if codec == RAW:
        return OK if stored == raw_bytes else OTHER_SIZE
    if codec not in NAMES:
        return NEWER_CODEC
    return OK if decoded == raw_bytes and 0 < stored < raw_bytes else OTHER_SIZE


def payload_bytes(header: bytes | memoryview) -> int:
    """Return the bytes of the payload that a header names. The header may be damaged: check it first."""
    stored: int = _HEAD.unpack_from(header)[10]
    return stored


def check_stored(
    header: bytes | memoryview, stored_bytes: int, key: ShardKey, raw_bytes: int, secret: bytes = b""
) -> str:
    """Check a header as `check_header`, for a frame of which the store holds `stored_bytes` including the header."""
    if stored_bytes < HEADER_BYTES:
        return TRUNCATED
    wrong = check_header(header, key, raw_bytes, secret)
    if wrong or stored_bytes == HEADER_BYTES + payload_bytes(header):
        return wrong
    return TRUNCATED if stored_bytes < HEADER_BYTES + payload_bytes(header) else OTHER_SIZE


def check(
    header: bytes | memoryview,
    payload: bytes | memoryview,
    key: ShardKey,
    secret: bytes = b"",
    raw_bytes: int | None = None,
) -> str:
    """Return OK when header and payload are a complete frame of this shard, else the name of the damage. raw_bytes: as in
    `Checksum.check`."""
    wrong = check_header(header, key, memoryview(payload).nbytes if raw_bytes is None else raw_bytes, secret)
    if wrong:
        return wrong
    checksum = Checksum(secret)
    checksum.update(payload)
    return checksum.check(header, key, raw_bytes)


def unpack(
    stored: bytes | memoryview,
    key: ShardKey,
    into: memoryview,
    secret: bytes = b"",
    decoded: Callable[[int, int], None] | None = None,
) -> str:
    """Copy the payload of a stored frame into a buffer of the shard's size, decode it there, and return OK; or name the damage.

    decoded: as in `TierBase`.
    """
    header, payload = memoryview(stored)[:HEADER_BYTES], memoryview(stored)[HEADER_BYTES:]
    into = into.cast("B")
    outcome = check_stored(header, memoryview(stored).nbytes, key, into.nbytes, secret) or check(
        header, payload, key, secret, into.nbytes
    )
    if outcome == OK:
        into[: payload.nbytes] = payload
        outcome = unfold(header, into, decoded)
    return outcome


def unfold(header: bytes | memoryview, into: memoryview, decoded: Callable[[int, int], None] | None = None) -> str:
    """Decode the payload that lies at the beginning of `into`, a buffer of the shard's size; header and payload were checked.

    Return OK, also if there is no codec and nothing to do, or else the name of the damage. decoded: as in `TierBase`.
    """
    codec, _, stored, _, raw_bytes, digest = _HEAD.unpack_from(header)[8:]
    if codec == RAW:
        return OK
    if not decode(Coding(codec, raw_bytes, digest), stored, into.cast("B")):
        return UNDECODABLE
    if decoded is not None:
        decoded(raw_bytes, stored)
    return OK


def check_digest(header: bytes, stored_bytes: int, digest: bytes, key: ShardKey, raw_bytes: int) -> str:
    """Check a frame as `check`, by an unkeyed 16-byte digest of payload and header that native code has computed.

    stored_bytes: of the payload.
    """
    wrong = check_header(header, key, raw_bytes)
    if not wrong and payload_bytes(header) != stored_bytes:
        wrong = OTHER_SIZE
    if wrong:
        return wrong
    return OK if digest == header[_CHECKED_BYTES:] else CHECKSUM
