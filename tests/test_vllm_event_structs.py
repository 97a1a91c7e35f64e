"""KV events as releases of vLLM encode them: arrays with few fields before June 2026, maps with many after it."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest

from lmcache.chunks import TokenChain, chunk_root, split_hashes
from lmcache.engine.known import L1, TIERS, Known, Prompt

BLOCK, CHUNK = 4, 8
TOKENS = list(range(16))
HASHES = [bytes(24) + (1000 + at).to_bytes(8, "big") for at in range(4)]


class _Old(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    pass


class OldStored(_Old, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class OldRemoved(_Old, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None


class _New(msgspec.Struct, omit_defaults=True, tag=True):
    pass


class NewStored(_New, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    session_id: str | None = None


class NewRemoved(_New, tag="BlockRemoved"):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


@dataclass
class Item:
    """An image of a request, as vLLM holds it."""

    data: Any
    identifier: str


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


def structs(monkeypatch: pytest.MonkeyPatch, new: bool) -> Any:
    """`Structs` with a vLLM of that age."""

    def keys(request: Any, start: int, end: int, first_item: int) -> tuple[Any, int]:
        names = [("mm", item.identifier, -start) for item in request.mm_features]
        return (tuple([("cache_salt", request.cache_salt)] * (not start) + names) or None), 0

    def untagged(keys: Any) -> Any:
        return [None if one is None else tuple(key[1:] if key[0] == "mm" else key[1] for key in one) for one in keys]

    events = {"BlockStored": NewStored, "BlockRemoved": NewRemoved, "MEDIUM_CPU": "CPU", "MEDIUM_STORAGE": "STORAGE"}
    utils = {
        "maybe_convert_block_hash": lambda block: int.from_bytes(block, "big") & ((1 << 64) - 1),
        "generate_block_hash_extra_keys": keys,
        "to_event_extra_keys": untagged,
        "resolve_kv_cache_block_sizes": lambda kv_cache, config: (BLOCK, BLOCK),
    }
    interface = {
        "get_kv_cache_spec_kind": lambda spec: SimpleNamespace(value="full_attention"),
        "get_kv_cache_spec_sliding_window": lambda spec: None,
    }
    if not new:
        events = {"BlockStored": OldStored, "BlockRemoved": OldRemoved}
        del utils["resolve_kv_cache_block_sizes"], utils["to_event_extra_keys"]
        interface = {}
    made = {
        "vllm.distributed.kv_events": events,
        "vllm.v1.core.kv_cache_utils": utils,
        "vllm.v1.kv_cache_interface": interface,
    }
    for name, content in made.items():
        parent, _, last = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, module(name, **content))
        for above in ("vllm", "vllm.v1", parent):
            monkeypatch.setitem(sys.modules, above, sys.modules.get(above) or module(above))
        setattr(sys.modules[parent], last, sys.modules[name])
    monkeypatch.delitem(sys.modules, "lmcache.integration.vllm.kv_event_structs", raising=False)
    found = importlib.import_module("lmcache.integration.vllm.kv_event_structs")
    monkeypatch.delitem(sys.modules, "lmcache.integration.vllm.kv_event_structs")
    groups = SimpleNamespace(kv_cache_groups=[None, SimpleNamespace(kv_cache_spec=object())])
    return found.Structs(SimpleNamespace(), groups, 1, BLOCK)


def told(made: Any, **request: Any) -> list[Any]:
    """A prompt of two chunks is stored, and its second chunk in a tier too; then the second one is evicted. As bytes decode."""
    of_vllm = SimpleNamespace(block_hashes=HASHES, **{"cache_salt": None, "mm_features": [], **request})
    chain = TokenChain(chunk_root(b"f" * 16), CHUNK)
    chain.extend(TOKENS)
    known, (first, second) = Known(BLOCK), split_hashes(chain.hashes)
    known.note("r", Prompt(chain, TOKENS, made.blocks(of_vllm), made.about(of_vllm)))
    known.has(first, L1)
    known.has(first, TIERS)
    known.has(second, TIERS)
    known.has(second, L1)
    known.gone(second, L1)
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(made.event(one))) for one in known.told]


def test_maps_have_all_that_vllms_own_events_have(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = 1000, 1001, 1002, 1003
    common = {"type": "BlockStored", "block_size": 4, "lora_id": None, "lora_name": None}
    common |= {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    none = {"extra_keys": [None, None]}
    assert told(structs(monkeypatch, new=True)) == [
        {**common, "block_hashes": [a, b], "parent_block_hash": None, "token_ids": TOKENS[:8], "medium": "CPU", **none},
        {**common, "block_hashes": [a, b, c, d], "parent_block_hash": None, "token_ids": TOKENS, "medium": "STORAGE",
         "extra_keys": [None] * 4},
        {**common, "block_hashes": [c, d], "parent_block_hash": b, "token_ids": TOKENS[8:], "medium": "CPU", **none},
        {"type": "BlockRemoved", "block_hashes": [c, d], "medium": "CPU", "group_idx": 1},
    ]  # fmt: skip


def test_arrays_have_the_fields_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = 1000, 1001, 1002, 1003
    assert told(structs(monkeypatch, new=False)) == [
        ["BlockStored", [a, b], None, TOKENS[:8], 4, None, "CPU", None],
        ["BlockStored", [a, b, c, d], None, TOKENS, 4, None, "STORAGE", None],
        ["BlockStored", [c, d], b, TOKENS[8:], 4, None, "CPU", None],
        ["BlockRemoved", [c, d], "CPU"],
    ]


def test_hashes_are_published_in_full_if_vllm_does_that(monkeypatch: pytest.MonkeyPatch) -> None:
    made = structs(monkeypatch, new=True)
    monkeypatch.setattr(sys.modules["vllm.v1.core.kv_cache_utils"], "maybe_convert_block_hash", lambda block: block)
    full = type(made)(
        SimpleNamespace(), SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=None)]), 0, BLOCK
    )
    assert told(full)[2]["block_hashes"] == HASHES[2:] and told(full)[2]["parent_block_hash"] == HASHES[1]


def test_adapters_salts_and_images_are_told_and_images_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made = structs(monkeypatch, new=True)
    lora, image = SimpleNamespace(adapter_id=7, name="style"), Item(bytearray(1 << 20), "image-1")
    request = {"lora_request": lora, "mm_features": [image], "cache_salt": "salt", "session_id": "s-1"}
    first, *_ = told(made, **request)
    assert (first["lora_id"], first["lora_name"], first["session_id"]) == (7, "style", "s-1")
    assert first["extra_keys"] == [["salt", ["image-1", 0]], [["image-1", -4]]]
    (kept,) = made.about(SimpleNamespace(**request)).mm_features
    assert kept.data is None and image.data is not None
