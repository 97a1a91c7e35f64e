"""Shards in an InfiniStore server, shared by all servers that name it and the same prefix (docs/tiers/infinistore.md).

A shard is its frame in parts, under names that are used once, and a small *marker* under the shard's own name, which tells those
names and the frame's size. The parts are written first and the marker when all are complete. Readers begin with the marker, since
InfiniStore ends when a value is read or deleted before all of it is there. No part is ever overwritten, for the same reason.
InfiniStore also ends when a reader hangs up while it still has something to send. So parts are so small that it can send them at
once, and a connection that was given up stays open for a while.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from typing import NamedTuple

import xxhash

from lmcache.config.options import integer, number
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.tiers import frame
from lmcache.tiers.infinistore.wire import Connection, Connections
from lmcache.tiers.noted import Noted
from lmcache.tiers.tier import ABSENT, KEPT, OK, Shard, ShardKey, Tier, TierError, Usage
from lmcache.tiers.url import TierURL

PART_BYTES = 1 << 20
"""Readers that hung up during values of up to 2 MiB never ended the server in tests; from 4 MiB on they always did."""
MOST_BYTES = 512 << 20
"""Bytes of a frame at most."""
FULL, TOO_LARGE = "full", "too large"
"""Outcomes of a store: no room in the server's memory; larger than MOST_BYTES."""
_MARKER = struct.Struct("<8s16sQ")
_MAGIC = b"LMCmark1"
_SUM_BYTES = 8
_MOST_KEYS = 512

log = init_logger(__name__)


class Marker(NamedTuple):
    """once: the 16 bytes that make the names of the frame's parts unique. frame_bytes: header and payload."""

    once: bytes
    frame_bytes: int

    @property
    def packed(self) -> bytes:
        head = _MARKER.pack(_MAGIC, *self)
        return head + xxhash.xxh3_64_digest(head)

    @classmethod
    def unpack(cls, packed: bytes) -> Marker | None:
        """None: it is damaged."""
        if (
            len(packed) != _MARKER.size + _SUM_BYTES
            or xxhash.xxh3_64_digest(packed[:-_SUM_BYTES]) != packed[-_SUM_BYTES:]
        ):
            return None
        magic, once, frame_bytes = _MARKER.unpack(packed[:-_SUM_BYTES])
        return cls(once, frame_bytes) if magic == _MAGIC and 0 < frame_bytes <= MOST_BYTES else None


class InfiniStoreTier(Tier):
    """One server and prefix. A call uses one connection."""

    scheme = "infinistore"

    def __init__(
        self, connections: Connections, *, prefix: str = "lmcache", timeout_seconds: float = 5.0, secret: bytes = b""
    ) -> None:
        self._connections, self._prefix, self._timeout_seconds = connections, prefix, timeout_seconds
        self._secret, self._noted, self._is_open = secret, Noted(), False

    @classmethod
    def from_url(cls, url: TierURL) -> Tier:
        if not url.host or url.path.strip("/") or url.username or url.password:
            raise ConfigError(f"{url.redacted}: write infinistore://host:22345, with its service port")
        url.take("device", _no_rdma, None)
        url.take("max_gb", _no_cap, None)
        return cls(
            Connections(url.host, url.port or 22345, url.take("connections", integer(1, 64), 8)),
            prefix=url.take("prefix", _prefix, "lmcache"),
            timeout_seconds=url.take("timeout", number(0.05, 3600), 5.0),
            secret=url.take_frame_key(),
        )

    def open(self) -> None:
        if self._is_open:
            return
        with self._connections.lend(self._timeout_seconds) as connection:
            connection.exist([self._prefix.encode()])
        self._is_open = True

    def contains(self, keys: Sequence[ShardKey]) -> list[bool]:
        self._must_be_open()
        with self._connections.lend(self._timeout_seconds) as connection:
            return self._marked(connection, keys)

    def load(self, keys: Sequence[ShardKey], into: Sequence[memoryview]) -> list[str]:
        self._must_be_open()
        with self._connections.lend(self._timeout_seconds) as connection:
            outcomes = [self._read(connection, key, memory) for key, memory in zip(keys, into, strict=True)]
            gone = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome != OK]
            self._noted.drop(gone)
            self._delete(connection, [key for key, said in zip(keys, outcomes, strict=True) if said in frame.DAMAGE])
        return outcomes

    def store(self, shards: Sequence[Shard]) -> list[str]:
        self._must_be_open()
        with self._connections.lend(self._timeout_seconds) as connection:
            there = self._marked(connection, [shard.key for shard in shards])
            outcomes = [self._store(connection, *one) for one in zip(shards, there, strict=True)]
        self._noted.add(
            {
                shard.key: frame.HEADER_BYTES + shard.payload.nbytes
                for shard, outcome in zip(shards, outcomes, strict=True)
                if outcome in (OK, KEPT)
            }
        )
        return outcomes

    def remove(self, keys: Sequence[ShardKey]) -> None:
        self._must_be_open()
        with self._connections.lend(self._timeout_seconds) as connection:
            self._delete(connection, keys)
        self._noted.drop(keys)

    def clear(self) -> None:
        keys = self._noted.packed_keys()
        for start in range(0, len(keys), _MOST_KEYS):
            self.remove([ShardKey.unpack(one) for one in keys[start : start + _MOST_KEYS]])
        log.warning(
            "InfiniStore at %s cannot say what it has: %d shards that this server has stored or read were removed, those of"
            " other servers and earlier runs stay until it evicts them",
            self._connections.name,
            len(keys),
        )

    def usage(self) -> Usage:
        return self._noted.usage()

    def close(self) -> None:
        self._is_open = False
        self._connections.close()

    # ---- one shard

    def _store(self, connection: Connection, shard: Shard, is_there: bool) -> str:
        """Store a shard unless it is there in this size, and return the outcome."""
        size = frame.HEADER_BYTES + shard.payload.nbytes
        marker = self._marker(connection, shard.key) if is_there else None
        if marker is not None and marker.frame_bytes == size:
            return KEPT
        if size > MOST_BYTES:
            return TOO_LARGE
        if is_there:
            self._delete(connection, [shard.key])
        return self._write(connection, shard, size)

    def _read(self, connection: Connection, key: ShardKey, into: memoryview) -> str:
        """Read a shard and return the outcome."""
        size = connection.get(self._name(key))
        if size is None:
            return ABSENT
        marker = Marker.unpack(self._small(connection, size))
        if marker is None:
            return frame.NOT_A_FRAME
        wanted = frame.HEADER_BYTES + len(into)
        if marker.frame_bytes != wanted:
            return frame.OTHER_SIZE
        header, checksum = bytearray(frame.HEADER_BYTES), frame.Checksum(self._secret)
        for part, name in enumerate(self._part_names(key, marker)):
            start = part * PART_BYTES
            end = min(start + PART_BYTES, wanted)
            size = connection.get(name)
            if size is None:  # it was evicted, and others were not
                self._delete(connection, [key])
                return ABSENT
            if size != end - start:
                connection.skip(size)
                return frame.TRUNCATED if size < end - start else frame.OTHER_SIZE
            if not part:
                connection.read(memoryview(header))
            piece = into[max(0, start - frame.HEADER_BYTES) : end - frame.HEADER_BYTES]
            connection.read(piece)
            checksum.update(piece)
        return checksum.check(bytes(header), key)

    def _write(self, connection: Connection, shard: Shard, size: int) -> str:
        """Write a shard that is not there. What a failure leaves is never deleted, since a part may be incomplete."""
        marker = Marker(os.urandom(16), size)
        header = frame.make_header(shard.key, shard.parent, shard.payload, self._secret)
        for part, name in enumerate(self._part_names(shard.key, marker)):
            start = max(0, part * PART_BYTES - frame.HEADER_BYTES)
            piece = shard.payload[start : (part + 1) * PART_BYTES - frame.HEADER_BYTES]
            if not connection.put(name, *(() if part else (header,)), piece):
                return FULL
        return OK if connection.put(self._name(shard.key), marker.packed) else FULL

    def _marker(self, connection: Connection, key: ShardKey) -> Marker | None:
        """Return the marker of a shard; None if there is none, or if it is damaged."""
        size = connection.get(self._name(key))
        return None if size is None else Marker.unpack(self._small(connection, size))

    def _small(self, connection: Connection, size: int) -> bytes:
        if size > _MARKER.size + _SUM_BYTES:
            connection.skip(size)
            return b""
        packed = bytearray(size)
        connection.read(memoryview(packed))
        return bytes(packed)

    def _marked(self, connection: Connection, keys: Sequence[ShardKey]) -> list[bool]:
        found = list[bool]()
        for start in range(0, len(keys), _MOST_KEYS):
            found += connection.exist([self._name(key) for key in keys[start : start + _MOST_KEYS]])
        return found

    def _delete(self, connection: Connection, keys: Sequence[ShardKey]) -> None:
        """Delete markers, and the parts that they name."""
        for key, there in zip(keys, self._marked(connection, keys), strict=True):
            if there:
                marker = self._marker(connection, key)
                names = [self._name(key), *(self._part_names(key, marker) if marker is not None else ())]
                for start in range(0, len(names), _MOST_KEYS):
                    connection.delete(names[start : start + _MOST_KEYS])

    def _must_be_open(self) -> None:
        if not self._is_open:
            raise TierError("closed", f"InfiniStore at {self._connections.name}: the tier is not open")

    def _name(self, key: ShardKey) -> bytes:
        return f"{self._prefix}/{key.text}".encode()

    def _part_names(self, key: ShardKey, marker: Marker) -> list[bytes]:
        base = b"%b/%b" % (self._name(key), marker.once.hex().encode())
        return [b"%b.%x" % (base, part) for part in range(-(-marker.frame_bytes // PART_BYTES))]


def _no_rdma(device: str) -> None:
    raise ValueError(f"RDMA ({device}) is not supported with InfiniStore: leave it out, KV then travels over TCP")


def _no_cap(value: str) -> None:
    raise ValueError(
        "is not enforced by this store, which evicts by itself when its memory is full: leave it out, and start the server with"
        " the size that you want (--prealloc-size)"
    )


def _prefix(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text):
        raise ValueError("must be 1 to 64 letters, digits and _ . : -")
    return text
