"""A KV pool as SGLang has it, with NumPy arrays for tensors, and connectors over it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from lmcache.integration.sglang.unified_lmcache_mp_connector import UnifiedLMCacheMPConnector
from servers import PATIENCE

LAYERS, HEADS, DIMS, VOCABULARY = 3, 4, 8, 1000
STREAM = object()


class Tensor:
    """What the connector asks a torch tensor."""

    def __init__(self, array: np.ndarray, dtype: str = "float32") -> None:
        self.array, self.shape, self.dtype, self.device = array, array.shape, f"torch.{dtype}", "cpu"

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def element_size(self) -> int:
        return int(self.array.itemsize)


class MHATokenToKVPool:
    """K and V are halves of one allocation a layer, as in SGLang 0.5.23."""

    kv_cache_layout = "nhd"
    dtype = "torch.float32"
    start_layer = 0
    layer_transfer_counter: Any = None

    def __init__(self, slots: int, heads: int = HEADS) -> None:
        self.layers = [np.zeros((2, slots, heads, DIMS), np.float32) for _ in range(LAYERS)]
        self.k_buffer = [Tensor(layer[0]) for layer in self.layers]
        self.v_buffer = [Tensor(layer[1]) for layer in self.layers]

    def fill(self, slots: np.ndarray, tokens: list[int], first_head: int = 0) -> None:
        """What a forward pass would: numbers that depend on the whole prefix, the layer, the head and the dim."""
        prefix = np.cumsum(np.asarray(tokens, np.float64) * np.arange(1, len(tokens) + 1)) % 997
        for number, layer in enumerate(self.layers):
            heads, dims = layer.shape[2:]
            inner = (np.arange(first_head, first_head + heads)[:, None] * dims + np.arange(dims)) / 64
            for side in (0, 1):
                layer[side, slots] = prefix[:, None, None] + inner + 10 * number + 5 * side

    def register_layer_transfer_counter(self, counter: Any) -> None:
        self.layer_transfer_counter = counter

    def get_layer(self, number: int) -> np.ndarray:
        """[K, V][slot][head][dim], as a forward gets it."""
        if self.layer_transfer_counter is not None:
            self.layer_transfer_counter.wait_until(number - self.start_layer)
        return self.layers[number]

    def read(self, slots: np.ndarray) -> np.ndarray:
        return np.stack([layer[:, slots] for layer in self.layers])


class MLATokenToKVPool:
    dtype = "torch.float32"
    start_layer = 0

    def __init__(self, slots: int) -> None:
        self.kv_buffer = [Tensor(np.zeros((slots, 1, DIMS), np.float32)) for _ in range(LAYERS)]


@dataclass
class ModelConfig:
    """What the connector asks SGLang's."""

    model_path: str
    hf_config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "torch.float32"
    quantization: str | None = None
    vocab_size: int = VOCABULARY
    num_hidden_layers: int = LAYERS

    def get_total_num_kv_heads(self) -> int:
        return HEADS


class SGLang:
    """One rank of an engine: its pool, its connector, and how the radix cache goes about a request."""

    def __init__(
        self,
        config_file: str,
        model_path: str,
        page_size: int,
        pool: Any = None,
        tp: tuple[int, int] = (1, 0),
        **more: Any,
    ) -> None:
        self.page_size = page_size
        self.tp_size, self.tp_rank = tp
        self.heads = HEADS // self.tp_size
        self.pool = pool or MHATokenToKVPool(64 * 64, self.heads)
        self.connector = UnifiedLMCacheMPConnector(
            **{
                "config_file": config_file,
                "model_config": ModelConfig(model_path),
                "tp_size": self.tp_size,
                "tp_rank": self.tp_rank,
                "tp_group": None,
                "pp_size": 1,
                "pp_rank": 0,
                "pp_group": None,
                "page_size": page_size,
                "token_to_kv_pool_allocator": SimpleNamespace(get_kvcache=lambda: self.pool),
                "req_to_token_pool": None,
                "tree_components": (SimpleNamespace(name="FULL"),),
                "mamba_component": None,
                "sliding_window_size": None,
                **more,
            }
        )

    def slots(self, tokens: int, seed: int) -> np.ndarray:
        """Slots of whole pages, wherever they are free."""
        pages = (
            np.random.default_rng(seed).permutation(64 * 64 // self.page_size - 1)[: -(-tokens // self.page_size)] + 1
        )
        return (pages[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)[:tokens].astype(np.int64)

    def compute_and_store(self, request: str, tokens: list[int], seed: int = 0, salt: str = "", done: int = 0) -> Any:
        """Compute the tokens from `done` on, hand over what is not stored yet, and wait for the copy."""
        length = len(tokens) // self.page_size * self.page_size
        slots = self.slots(len(tokens), seed)
        self.pool.fill(slots, tokens, self.tp_rank * self.heads)
        start = self.connector.get_store_start(request, length)
        operation = self.connector.submit_store(
            *(request, tokens[:length], self.connector.device_indices_by_group(slots[start:length])),
            device_indices_start=start,
            cache_salt=salt,
        )
        if operation is not None:
            operation.future.result(timeout=PATIENCE)
            assert self.connector.ready_prefix_count([operation]) == 1
            self.connector.complete_store(operation)
        return operation

    def load(
        self, request: str, tokens: list[int], have: int = 0, seed: int = 1, salt: str = ""
    ) -> tuple[int, np.ndarray]:
        """(tokens that were found, their slots from `have` on), filled, as the radix cache does it."""
        connector = self.connector
        lookup = connector.submit_lookup(request, tokens, local_hit_tokens=have, cache_salt=salt)
        found = connector.poll_lookup(lookup)
        assert found is not None and found % self.page_size == 0
        if found <= have:
            connector.free_lookup_locks(request, start=0, end=found)
            return found, np.zeros(0, np.int64)
        slots = self.slots(found - have, seed)
        load = connector.submit_load(
            lookup,
            connector.device_indices_by_group(slots),
            local_hit_tokens=have,
            owned_device_indices=slots,
            producer_stream=STREAM,
        )
        if not connector.prepare_load_on_stream(load, STREAM):
            connector.free_lookup_locks(request, start=lookup.lock_start, end=found)
            return have, np.zeros(0, np.int64)
        load.future.result(timeout=PATIENCE)
        assert connector.ready_prefix_count([load]) == 1
        assert connector.complete_load(load) and load.result
        return found, slots

    def expected(self, tokens: list[int]) -> np.ndarray:
        """What `fill` writes for them."""
        scratch = MHATokenToKVPool(len(tokens), self.heads)
        scratch.fill(np.arange(len(tokens)), tokens, self.tp_rank * self.heads)
        return scratch.read(np.arange(len(tokens)))
