"""The structs of vLLM's KV events, as the installed release has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from vllm.distributed import kv_events
from vllm.v1.core import kv_cache_utils as utils

from lmcache.engine.known import L1, Told
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_PROBE = bytes(range(1, 33))
_MEDIUM_CPU = getattr(kv_events, "MEDIUM_CPU", "CPU")
_MEDIUM_STORAGE = getattr(kv_events, "MEDIUM_STORAGE", "STORAGE")


class Structs:
    """Makes events for the blocks of one of vLLM's groups. number: of the group."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, number: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._hash_tokens = _tokens_of_hash(kv_cache_config, vllm_config, block_tokens)
        spec = kv_cache_config.kv_cache_groups[number].kv_cache_spec
        self._of_group = {"group_idx": number, **_described(spec)}
        self._stored = set(kv_events.BlockStored.__struct_fields__)
        self._removed = set(kv_events.BlockRemoved.__struct_fields__)
        # vLLM reads an environment variable for each hash, which takes 50 us until it has cached its environment.
        convert = utils.maybe_convert_block_hash
        self._published: Callable[[Any], Any] = _last_64_bits if convert(_PROBE) == _last_64_bits(_PROBE) else convert

    def blocks(self, request: Any) -> Any:
        hashes = request.block_hashes
        if self._hash_tokens == self._block_tokens:
            return hashes
        return utils.BlockHashListWithBlockSize(hashes, self._hash_tokens, self._block_tokens)

    def about(self, request: Any) -> Any:
        lora, items = getattr(request, "lora_request", None), getattr(request, "mm_features", None) or []
        return SimpleNamespace(
            lora_id=lora.adapter_id if lora is not None else None,
            lora_name=lora.name if lora is not None else None,
            session_id=getattr(request, "session_id", None),
            lora_request=lora,
            mm_features=[replace(item, data=None) for item in items],
            cache_salt=request.cache_salt,
            prompt_embeds=None,  # requests with these are not cached
        )

    def event(self, told: Told) -> Any:
        blocks = [self._published(one) for one in told.blocks]
        medium = _MEDIUM_CPU if told.medium == L1 else _MEDIUM_STORAGE
        if told.prompt is None:
            return self._made(
                kv_events.BlockRemoved,
                self._removed,
                block_hashes=blocks,
                medium=medium,
                group_idx=self._of_group["group_idx"],
            )
        about = told.prompt.about
        return self._made(
            kv_events.BlockStored,
            self._stored,
            block_hashes=blocks,
            parent_block_hash=None if told.parent is None else self._published(told.parent),
            token_ids=told.tokens,
            block_size=self._block_tokens,
            lora_id=about.lora_id,
            lora_name=about.lora_name,
            medium=medium,
            extra_keys=self._extra_keys(about, told.first, len(blocks)),
            session_id=about.session_id,
            **self._of_group,
        )

    @staticmethod
    def _made(struct: Any, known: set[str], **fields: Any) -> Any:
        return struct(**{name: value for name, value in fields.items() if name in known})

    def _extra_keys(self, about: Any, first: int, count: int) -> Any:
        """Return what vLLM adds to the tokens of each block, as its own events do."""
        if about.lora_request is None and not about.mm_features and not about.cache_salt:
            return [None] * count
        size, keys = self._block_tokens, list[Any]()
        for start in range(first * size, (first + count) * size, size):
            keys.append(utils.generate_block_hash_extra_keys(about, start, start + size, 0)[0])
        untag = getattr(utils, "to_event_extra_keys", None)  # before vLLM 0.32 they had no tags
        return untag(keys) if untag is not None else keys


def _last_64_bits(block_hash: Any) -> int:
    """Return a block hash as vLLM publishes it, unless it is told to publish all bytes."""
    return int.from_bytes(block_hash[-8:], "big")


def _tokens_of_hash(kv_cache_config: Any, vllm_config: Any, block_tokens: int) -> int:
    """Return of how many tokens each of a request's block hashes is. Releases without the function have one size of blocks."""
    resolve = getattr(utils, "resolve_kv_cache_block_sizes", None)
    return int(resolve(kv_cache_config, vllm_config)[1]) if resolve is not None else block_tokens


def _described(spec: Any) -> dict[str, Any]:
    """Return what events say of a group's kind of KV."""
    from vllm.v1 import kv_cache_interface as interface

    kind = getattr(interface, "get_kv_cache_spec_kind", None)
    window = getattr(interface, "get_kv_cache_spec_sliding_window", None)
    if kind is None or window is None:
        return {}
    return {"kv_cache_spec_kind": kind(spec).value, "kv_cache_spec_sliding_window": window(spec)}
