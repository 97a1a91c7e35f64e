"""In-process mode with vLLM's hybrid KV cache manager, for models with several kinds of KV.

vLLM's own class of this name does not declare that it supports that manager, and vLLM takes the declaration from the class alone.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base, lmcache_connector

_SupportsHMA: Any = getattr(base, "SupportsHMA", object)


class LMCacheConnectorV1(lmcache_connector.LMCacheConnectorV1, _SupportsHMA):  # type: ignore[misc]
    """vLLM's `LMCacheConnectorV1`, for `kv_connector_module_path`. `vllm_v1_adapter` answers its calls, these included."""

    @property
    def requires_kv_delivery(self) -> bool:
        """False: KV that is not stored only causes a later miss."""
        return False

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._lmcache_engine.request_finished_all_groups(request, block_ids)  # type: ignore[no-any-return]


__all__ = ["LMCacheConnectorV1"]
