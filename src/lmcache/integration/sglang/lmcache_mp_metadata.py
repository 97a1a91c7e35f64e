"""The two records that SGLang's unified radix cache keeps of a request. SGLang makes, reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class LMCacheExternalFlow:
    """One request on its way from the lookup to the published prefix.

    key: its tokens as a radix key. lookup: what `submit_lookup` returned. total_hit, local_hit_tokens: tokens that LMCache has,
    and that the tree has, as all ranks agreed. load: what `submit_load` returned. anchor_node, anchor_lock: hold the tree's part
    of the prefix. loaded_skip_tokens, released_skip_tokens: loaded slots that a prefix published meanwhile makes superfluous, and
    those of them that were freed. The Mamba fields stay empty for models that have no such state.
    """

    key: Any
    lookup: Any
    total_hit: int | None = None
    local_hit_tokens: int | None = None
    load: Any = None
    load_req: Any = None
    load_completed: bool = False
    cancelled: bool = False
    retire_requested: bool = False
    prefix_published: bool = False
    loaded_skip_tokens: int = 0
    released_skip_tokens: int = 0
    anchor_node: Any = None
    anchor_lock: Any = None
    mamba_value: Any = None
    request_mamba_value: Any = None
    allocated_request_mamba_for_load: bool = False
    free_mamba_after_load: bool = False


@dataclass
class LMCachePendingStore:
    """A store under way, and the node of the tree that is locked until it has ended."""

    operation: Any
    node_id: Any
    lock_params: Any
