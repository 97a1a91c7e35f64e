"""What a trace holds, and the lines of our own format, which `lmcache server --record-trace` writes.

A file consists of JSON objects, one a line. Times are seconds since the epoch. Hashes are the first 8 bytes of each chunk
hash, as hexadecimal text, joined. A trace holds no token, and whoever wants to know a prompt from it has to guess it completely.

    {"lmcache_trace": 1, "version": V, "server": ID, "chunk_tokens": N, "l1_bytes": N}    the first line of each file
    {"space": S, "model": M, "chunk_bytes": N}          before the first event of a space, and again when a size has changed
    {"t": T, "lookup": S, "found": N, "hashes": H}      a request asked for these chunks; the server had the first N
    {"t": T, "stored": S, "parent": H, "hashes": H}     consecutive chunks are complete now; "parent": "" at a prompt's start
    {"t": T, "replied": S, "last": H, "tokens": N}      the prompt that ends with this chunk was answered with N tokens
    {"t": T, "cleared": true}                           L1 was cleared
    {"t": T, "lost": N}                                 so many events before this line are missing
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from lmcache.chunks import HASH_BYTES

FORMAT = 1
KEPT_BYTES = 8
"""Bytes of each hash in our own format. Among 10^8 chunks, two are equal in these with a probability of 0.03 %."""


class Opened(NamedTuple):
    """A space from here on. chunk_bytes: memory of a chunk, 0 if unknown."""

    space: int
    model: str
    chunk_tokens: int
    chunk_bytes: int


class Lookup(NamedTuple):
    """A request asks for the chunks of a prompt, in order.

    hashes: 16 bytes each. tokens: of the prompt. found: how many chunks the recorded server had; -1 if the trace does not tell
    what was stored when, and then all chunks count as stored at once. answer: tokens of the answer; 0 if the trace does not tell.
    """

    time: float
    space: int
    hashes: bytes
    tokens: int
    found: int = -1
    answer: int = 0


class Stored(NamedTuple):
    """Consecutive chunks have become complete. parent: the hash before the first one; b"" for the first chunk of a prompt."""

    time: float
    space: int
    parent: bytes
    hashes: bytes


class Replied(NamedTuple):
    """A prompt, whose last chunk is `last`, has been answered with so many tokens."""

    time: float
    space: int
    last: bytes
    tokens: int


class Cleared(NamedTuple):
    """L1 was cleared."""

    time: float


class Lost(NamedTuple):
    """So many events are missing here."""

    events: int


Record = Opened | Lookup | Stored | Replied | Cleared | Lost


def shortened(hashes: bytes) -> str:
    """Return the kept bytes of these chunk hashes, in hexadecimal."""
    return array("Q", hashes)[::2].tobytes().hex()


def restored(text: str) -> bytes:
    """Return 16 bytes for each of the shortened hashes.

    Raises:
        ValueError: the text is not hexadecimal, or its length is not a multiple of 8 bytes.
    """
    kept = bytes.fromhex(text)
    if len(kept) % KEPT_BYTES:
        raise ValueError(f"{len(kept)} bytes of hashes; each takes {KEPT_BYTES}")
    whole = array("Q", bytes(2 * len(kept)))
    whole[::2] = array("Q", kept)
    return whole.tobytes()


def header(version: str, server: str, chunk_tokens: int, l1_bytes: int) -> str:
    return _line(lmcache_trace=FORMAT, version=version, server=server, chunk_tokens=chunk_tokens, l1_bytes=l1_bytes)


def line_of(record: Record) -> str:
    """Return the line, or the lines, of a record."""
    if isinstance(record, Lookup):
        hashes = shortened(record.hashes)
        return _line(t=round(record.time, 6), lookup=record.space, found=record.found, hashes=hashes)
    if isinstance(record, Stored):
        parent = shortened(record.parent)
        return _line(t=round(record.time, 6), stored=record.space, parent=parent, hashes=shortened(record.hashes))
    if isinstance(record, Replied):
        last = shortened(record.last)
        return _line(t=round(record.time, 6), replied=record.space, last=last, tokens=record.tokens)
    if isinstance(record, Opened):
        return _line(space=record.space, model=record.model, chunk_bytes=record.chunk_bytes)
    if isinstance(record, Cleared):
        return _line(t=round(record.time, 6), cleared=True)
    return _line(lost=record.events)


def _line(**fields: object) -> str:
    return json.dumps(fields, separators=(",", ":")) + "\n"


def runs_of(hashes: bytes, parents: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (parent, hashes) for each run of consecutive chunks among these. `parents`: 16 bytes each, zeros for none."""
    first, total = 0, len(hashes)
    for end in range(HASH_BYTES, total + 1, HASH_BYTES):
        if end == total or parents[end : end + HASH_BYTES] != hashes[end - HASH_BYTES : end]:
            parent = parents[first : first + HASH_BYTES]
            yield (parent if any(parent) else b""), hashes[first:end]
            first = end
