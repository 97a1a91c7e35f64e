"""What a shard takes in Redis: its parts, and what it counts against `max_gb`."""

from __future__ import annotations

from lmcache.tiers.tier import ShardKey

PART_BYTES = (4 << 20) - 64
"""Values of 8 MiB and more run at a third of the speed; a little less than 4 MiB leaves room for the server's own header."""
BOOKED_BYTES = 1024
"""What a shard counts beside its parts: its header, the names of its keys, its record and its place in the order of use."""
BOOKED_PART_BYTES = 256
"""What each part counts beside its bytes: its key."""


def booked_bytes(payload_bytes: int) -> int:
    """Return what a shard counts against `max_gb`. Its memory in the server is not more (tests measure it)."""
    full, rest = divmod(payload_bytes, PART_BYTES)
    parts = full * _allocated(PART_BYTES) + (_allocated(rest) if rest else 0)
    return BOOKED_BYTES + BOOKED_PART_BYTES * parts_of(payload_bytes) + parts


def _allocated(size: int) -> int:
    """Return what jemalloc allocates for a value of that size: a multiple of a quarter of the power of two below it."""
    size += 32
    step = max(16, 1 << (size - 1).bit_length() - 3)
    return -(-size // step) * step


def booking_of(key: ShardKey, payload_bytes: int) -> tuple[str, int, int]:
    """Return what the script is told of a shard: its name, its booked bytes, and how many parts it has."""
    return key.text, booked_bytes(payload_bytes), parts_of(payload_bytes)


def parts_of(payload_bytes: int) -> int:
    """Return the number of parts of a payload."""
    return -(-payload_bytes // PART_BYTES)
