"""The interface of the native module, whose C source is in `native/`.

Addresses are of memory that the caller keeps alive while the call runs.
"""

from collections.abc import Sequence

from lmcache.memory.order import Policy

layouts: dict[str, list[tuple[str, int]]]
"""The fields of the C structs that Python fills in, by the struct's name ("plane", "ring", "copy"): (name, count of int64)."""

def copy(
    scatter: int,
    isa: int,
    planes: int,
    plane_count: int,
    sources: int,
    item_bytes: int,
    block_tokens: int,
    base: int,
    blocks: int,
    runs: int,
    run_count: int,
    claimed: int,
    /,
) -> bool:
    """Copy paged tokens into extents (scatter=0) or extents into paged memory (1), without the GIL.

    planes: address of rows of the layout "plane", [plane_count][sources]. base, blocks, runs: as in `CpuCopier.gather`, as
    addresses; runs is [run_count][sources]. The caller has checked all bounds. claimed: address of an int64, 0 at first, by which
    several threads share the work of one copy. isa: a value of `copy_isas()`, or -1 for the fastest. Return False if a value
    could not be rounded, because it is not finite or is the largest float32; what was written is then of no use.

    Raises:
        MemoryError: there is none for a buffer of some 32 KiB.
    """

def runs_fit(
    blocks: int,
    block_count: int,
    runs: int,
    run_count: int,
    chunk_tokens: int,
    block_tokens: int,
    num_blocks: int,
    farthest_extent: int,
    /,
) -> bool:
    """Return whether all runs stay within the block table, the tokens of an extent and offsets up to `farthest_extent`, and all
    blocks from the first to the last that they touch exist in the paged KV. blocks (int32) and runs (int64 [runs, 4]) are
    addresses."""

def copy_isas() -> dict[str, int]:
    """Return the instruction sets of this CPU as {name: number}, the fastest last."""

def exchange(fd: int, request: bytes, hold_us: int, timeout_us: int, /) -> bytes:
    """Send all of `request` on the socket and return the bytes that arrive first, at most 64 KiB; b"" when the other side has
    hung up. The GIL is kept for `hold_us` microseconds. Raises TimeoutError after `timeout_us`, OSError for other errors."""

def post(fd: int, request: bytes, hold_us: int, timeout_us: int, /) -> bytes:
    """Send all of `request` as `exchange` does, and return what had arrived before, at most 64 KiB; b"" if nothing had."""

def launch_copy(ring: int, ring_bytes: int, copy: int, copy_bytes: int, /) -> int:
    """Hand all pieces of a copy to the device's driver. ring, copy: addresses of structs with the layouts "ring" and "copy". The
    calling thread's device must be the ring's. Returns the driver's error, 0 for none; the pieces before it are in flight."""

def read_frames(fd: int, frames: bytes, piece_bytes: int, /) -> bytes:
    """Read frames and their checksums, without the GIL.

    frames: for each, int64 offset, int64 payload bytes (4096 or more) and uint64 target address. At most `piece_bytes` of
    payload, complete blocks of 4096, are read at once. The result has for each frame int64 0, -1 where the file ends too early,
    or errno; the 128 bytes of its header; and the big-endian XXH3-128 of the payload and the header's first 112 bytes.
    """

def pack12(raw: int, raw_bytes: int, stream: int, room: int, plain: int, /) -> int:
    """Pack bfloat16 values (`native/pack12.c` has the format), without the GIL.

    raw, stream: addresses. Return the bytes of the stream, or 0 if `room` may not suffice; at most `room` bytes are written.
    plain: 1 for the code without AVX2, which tests compare.
    """

def unpack12(stream: int, stream_bytes: int, raw: int, raw_bytes: int, scratch: int, plain: int, /) -> bool:
    """Unpack a stream of `pack12`, without the GIL. Return whether it is a stream of `raw_bytes` bytes; if not, nothing is
    written to `raw`. scratch: the address of `stream_bytes` of memory, needed if the stream begins where `raw` does; else 0. The
    two may not overlap in any other way."""

def to_int8(raw: int, raw_bytes: int, row: int, kind: int, stream: int, room: int, plain: int, /) -> int:
    """Round rows of `row` values to 8 bits each (`native/int8.c` has the format), without the GIL.

    raw, stream: addresses. row: 8 to 4096. kind: of the values, 0 for bfloat16, 1 for float16, 2 for float32. Return the bytes of
    the stream; 0 if `room` does not suffice, there is no whole number of rows, or a value is not finite or the largest float32.
    At most `room` bytes are written. plain: as in `pack12`.
    """

def from_int8(stream: int, stream_bytes: int, raw: int, raw_bytes: int, plain: int, /) -> bool:
    """Restore the values of a stream of `to_int8`, without the GIL. Return whether it is a stream of `raw_bytes` bytes; if not,
    nothing is written to `raw`. The stream may begin where `raw` does. The two may not overlap in any other way."""

class Table:
    """The index of one space. `lmcache.cache.table` explains the terms.

    shards: of a chunk, 1 to 65535. policy: decides the order of eviction; None for the LRU that is built in, habits for the
    learned policy, which learns and goes by them.
    """

    def __init__(self, shards: int, policy: Policy | Habits | None = None, /) -> None: ...
    def match(self, hashes: bytes, /) -> bytes:
        """Return the ids of the leading hashes (16 bytes each) whose records are attached and complete."""
    def get(self, key: bytes, /) -> int:
        """Return the id of the attached record with this hash, complete or not, or -1."""
    def insert(self, key: bytes, parent: int, /) -> int:
        """Insert an attached record and return its id. ValueError if the hash is attached, or the parent (-1: none) is not."""
    def detach(self, record: int, /) -> bytes:
        """Detach the record and all its descendants; return their ids, descendants first. ValueError if it is detached."""
    def free(self, record: int, /) -> None:
        """Free a record that is detached, unpinned and not being filled; ValueError otherwise."""
    def touch(self, ids: bytes, /) -> None:
        """Note the use of these records, the last one first, so that ids[0] is the most recent. Detached ones are skipped."""
    def touch_path(self, record: int, /) -> None:
        """Note the use of the record and all its ancestors, deepest first, so that the root is the most recent one."""
    def asked(self, now: float, hashes: bytes, /) -> None:
        """Note that a prompt of these chunks (16 bytes each) has been asked for, whether or not the table has them. Some policies
        learn from that, when `settle` is called or at the latest when it matters. LRU does not."""
    def answered(self, now: float, key: bytes, tokens: int, /) -> None:
        """Note how many tokens the prompt that ends with this chunk has been answered with. As for `asked`."""
    def settle(self) -> None:
        """Do some of what the policy has put off because nobody waits for it: a call learns from at most 2,048 chunks or from one
        prompt, so call it once for each `asked`. Whether and when this is called changes no result."""
    def follows_lru(self) -> bool:
        """Return whether records are evicted as by LRU now: by LRU itself, or since the learned policy finds less than that."""
    def victim(self) -> int:
        """Return the evictable record that the policy chooses, or -1. ValueError if the record is not evictable."""
    def evictable(self, record: int, /) -> bool:
        """Return whether the record is attached and has no pins, no shards being filled and no children."""
    def pin(self, ids: bytes, /) -> None:
        """Add one reader to each record."""
    def unpin(self, ids: bytes, /) -> bytes:
        """Remove one reader from each record; ValueError if one has none. Returns the ids that the caller may free now."""
    def begin_fill(self, record: int, shard: int, sector: int, /) -> None:
        """Change a shard from empty to filling, into the extent at `sector`. ValueError in any other state or if detached."""
    def end_fill(self, record: int, shard: int, ok: bool, /) -> int:
        """Change a shard from filling to done or, if not `ok`, to empty; the caller then frees its extent.

        Returns COMPLETED if the record is attached and has become complete, RELEASED if it is detached and may be
        freed now, else 0.
        """
    def state(self, record: int, shard: int, /) -> int:
        """Return EMPTY, FILLING or DONE."""
    def extent(self, record: int, shard: int, /) -> int:
        """Return the sector of the shard's extent, or -1 if the shard is empty."""
    def extents(self, ids: bytes, /) -> bytes:
        """Return the sectors of the records' extents, [record][shard]; NO_EXTENT for an empty shard."""
    def in_sectors(self, first_sector: int, end_sector: int, /) -> bytes:
        """Return the ids, ascending, of attached records with an extent in first_sector <= sector < end_sector."""
    def numbered(self, first: int, count: int, /) -> tuple[bytes, int]:
        """Return the ids, ascending, of attached records with first <= id < first + count, and the id with which to go on; 0
        behind the last record."""
    def survey(self, bounds: bytes, /) -> bytes:
        """Return, for each range of sectors, what emptying the range would evict, as a pair of u32.

        `bounds` holds ascending sectors: ranges [0] <= sector < [1], [2] <= sector < [3], and so on. The first number of a pair
        counts the extents of attached records in the range. The second is the place, counted from 1, in the order of eviction of
        the record that is evicted last; NO_EXTENT if a record in the range, or a descendant of one, is pinned or being filled.
        ValueError if the policy does not order all attached records.
        """
    def key(self, record: int, /) -> bytes: ...
    def parent(self, record: int, /) -> int:
        """Return the parent's id; -1 for a first chunk and for every detached record."""
    def children(self, record: int, /) -> int: ...
    def only_child(self, record: int, /) -> int:
        """Return the id of the record's child if it has exactly one, else -1."""
    def pins(self, record: int, /) -> int:
        """Return the number of readers."""
    def filling(self, record: int, /) -> int:
        """Return how many shards are being filled."""
    def complete(self, record: int, /) -> bool:
        """Return whether all shards are done."""
    def attached(self, record: int, /) -> bool:
        """Return whether the record is in the index."""
    def __len__(self) -> int:
        """Return the number of attached records."""
    def memory_bytes(self) -> int:
        """Return the memory of the table and its policy."""

class Habits:
    """What a server has learned about when chunks are used again: `native/habits.c` explains it.

    The tables of several spaces may share them. Only one thread may use them and these tables.
    """

    def saved(self) -> bytes:
        """Return what `restore` takes, in the byte order of this machine."""
    def restore(self, saved: bytes, /) -> None:
        """Go on from what was saved. ValueError for anything else. No table may use these habits yet."""
    def worths(self) -> bytes:
        """Return the worth of a chunk as float32, [kind][age]."""
    def prompts(self) -> int:
        """Return how many prompts have been learned from."""

class Sample:
    """A sample of the chunks that lookups use, and what LRU would find with other sizes of memory. `native/sample.c` explains it.

    most: chunks in the sample. sizes: bytes of the memories, ascending, at most 16 of them. Hashes have 16 bytes each.
    Only one thread may use a sample.
    """

    def __init__(self, most: int, sizes: Sequence[float], /) -> None: ...
    def looked_up(self, hashes: bytes, found: int, chunk_bytes: float, /) -> None:
        """Count a lookup of a prompt's chunks, of which the server has the first `found`."""
    def stored(self, hashes: bytes, chunk_bytes: float, /) -> None:
        """Note that the chunks have become complete."""
    def clear(self) -> None:
        """Note that the memory is empty. The counts go on."""
    def counts(self) -> tuple[list[float], list[float], list[list[float]]]:
        """Return (whole, seen, hit).

        whole: [chunks asked for, those of them that the server had, those that were new (estimated), rate of sampling,
        chunks in the sample]. The sample has disjoint parts, chosen by hash. seen: chunks asked for, by part. hit: for each part,
        the chunks that each size would have found. A sampled chunk counts 1 / rate in these.
        """
    def memory_bytes(self) -> int: ...
