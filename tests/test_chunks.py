"""What chunks are called: vectors that must never change, and what must change a name."""

from __future__ import annotations

import struct

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from lmcache.chunks import Layout, TokenChain, chunk_hash, chunk_root, shard_of_rank, space_fingerprint
from lmcache.chunks.hashing import encode_extra
from lmcache.errors import LayoutError

LAYOUT = Layout("org/model@abc", "bfloat16", 4, 2, 64, 16)
FINGERPRINT = bytes.fromhex("dc47ac3afcb937b8634cf5aec6126ff4")
ROOT = bytes.fromhex("dd87a8a97724d0a5daaca66929364dce")


def test_vectors():
    """Caches on disk and in other processes are found by these; a change of any is a change of format."""
    assert LAYOUT.fingerprint == FINGERPRINT
    assert space_fingerprint(LAYOUT, [2, 4]).hex() == "717e129d5fe60aa873fb67ad3cc447de"
    assert chunk_root(FINGERPRINT) == ROOT
    assert chunk_root(FINGERPRINT, "tenant", "lora", "id").hex() == "c0ecab95d1803842f5116cc274413063"
    assert chunk_hash(ROOT, range(16)).hex() == "936a305b9550d2fd277606706200b1df"
    assert chunk_hash(ROOT, range(5)).hex() == "4f99b899a8322952dab87eb696492765"
    assert chunk_hash(ROOT, range(16), encode_extra("img", 3)).hex() == "d53600b6e034b7b99c65445554291704"


def test_the_formula_spelled_out():
    fields = (FINGERPRINT, b"tenant", b"lora", b"id")
    material = b"".join(struct.pack("<I", len(one)) + one for one in fields)
    root = blake3(material, derive_key_context="lmcache chunk v1").digest(16)
    assert chunk_root(FINGERPRINT, "tenant", "lora", "id") == root
    extra = struct.pack("<I", 3) + b"img" + struct.pack("<q", 3)
    said = root + struct.pack("<I", 3) + struct.pack("<3I", 7, 8, 2**32 - 1) + struct.pack("<I", len(extra)) + extra
    assert chunk_hash(root, [7, 8, 2**32 - 1], encode_extra("img", 3)) == blake3(said).digest(16)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 9), st.lists(st.integers(0, 60), max_size=4))
def test_a_chain_grows_to_what_it_would_have_been_at_once(ids, size, stops):
    chain, parent, expected = TokenChain(ROOT, size), ROOT, b""
    for stop in sorted(stops):
        chain.extend(ids[:stop])
    assert chain.extend(ids) == len(ids) // size
    for at in range(0, len(ids) // size * size, size):
        parent = chunk_hash(parent, ids[at : at + size])
        expected += parent
    assert chain.hashes == expected


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "org/model@abd"},
        {"kv_dtype": "float16"},
        {"num_layers": 5},
        {"num_kv_heads": 4},
        {"head_size": 128},
        {"chunk_tokens": 32},
        {"kind": "mla"},
        {"kv_scales": "x"},
        {"config_digest": "y"},
        {"slot_order": 2},
        {"codec": 1},
    ],
)
def test_every_field_of_a_layout_is_in_its_fingerprint(change):
    assert msgspec.structs.replace(LAYOUT, **change).fingerprint != FINGERPRINT


def test_all_fields_are_tried_above():
    assert len(msgspec.structs.fields(Layout)) == 11


def test_equal_counts_of_shards_are_not_equal_splits():
    """Four head groups, or two stages of two: as many shards, as many bytes each, and other bytes."""
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=4)
    four, two_by_two = shard_of_rank(layout, 1, 4, 0, 4), shard_of_rank(layout, 1, 2, 0, 2, pp_rank=0, pp_size=2)
    assert (four.index, four.count) == (two_by_two.index, two_by_two.count)
    assert four.shard_bytes(layout) == two_by_two.shard_bytes(layout) and four != two_by_two
    names = {space_fingerprint(layout, stages) for stages in ([], [2, 4], [1, 4], [1, 2, 4], [3, 4])}
    assert len(names) == 5
    assert space_fingerprint(layout, [4]) == space_fingerprint(layout) == layout.fingerprint


@pytest.mark.parametrize("stages", [[2, 5], [2, 2, 4], [0, 4], [3, 2], [4, 2, 4]])
def test_stages_that_do_not_cover_the_layers_are_refused(stages):
    with pytest.raises(LayoutError, match="do not cover 4 layers"):
        space_fingerprint(LAYOUT, stages)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_a_tail_is_the_unfull_chunk_behind_the_full_ones(ids: list[int]):
    chain = TokenChain(ROOT, 8, lambda start, end: b"x" if start == 8 else b"")
    full = chain.extend(ids)
    rest = ids[full * 8 :]
    expected = chunk_hash(chain.parent(full), rest, b"x" if full == 1 else b"") if rest else b""
    assert chain.tail(ids) == expected
    assert len(chain) == full, "the tail is not part of the chain"
