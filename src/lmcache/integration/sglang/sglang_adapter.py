"""`LMCacheLayerwiseConnector`: for `LMCRadixCache` of SGLang up to 0.5.12, and in its in-process mode up to 0.5.19."""

from __future__ import annotations

from typing import Any

from lmcache.integration.sglang.model import engine_page_size
from lmcache.integration.sglang.older import LoadMetadata, OlderConnector, StoreMetadata, tokens_had
from lmcache.integration.sglang.settings import read_settings


class LMCacheLayerwiseConnector(OlderConnector):
    """SGLang finds the layers loaded: `start_load_kv` returns when all are, and so nothing is left for `load_kv_layerwise`.

    Args:
        sgl_config: SGLang's ModelConfig. k_pool, v_pool: a tensor [slot, head, dim] a layer. rank: tensor-parallel.
        config_file: the YAML file; without one LMCACHE_CONFIG_FILE names it.
    """

    def __init__(
        self,
        sgl_config: Any,
        tp_size: int,
        rank: int,
        k_pool: Any,
        v_pool: Any,
        tp_group: Any = None,
        config_file: str | None = None,
    ) -> None:
        super().__init__(
            *(read_settings(config_file), sgl_config, tp_size, rank, k_pool, v_pool, tp_group, engine_page_size())
        )

    def start_load_kv(self, load: LoadMetadata) -> int:
        """Fill the slots of what is found; tokens from `load.offset` on that are there now, 0 for none."""
        have = tokens_had(load.slot_mapping)
        found = self._find(load.token_ids, have)
        return self._fill(found, have, load) if found is not None else 0

    def load_kv_layerwise(self, layer_id: int) -> None:
        """Layer `layer_id` is needed now, and is there."""


__all__ = ["LMCacheLayerwiseConnector", "LoadMetadata", "StoreMetadata"]
