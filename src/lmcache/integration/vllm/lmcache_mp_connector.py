"""`LMCacheMPConnector`: vLLM's KV connector for an LMCache server.

If a request is alone or its load is short, the load is part of the request's first step, whose forward waits for it. Otherwise
the request waits, unscheduled, while the ranks copy, so that no other request is held up.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import base
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from lmcache.config.engine import ignored_by_daemons_engines
from lmcache.integration.vllm.connector import Connector
from lmcache.integration.vllm.own_server import offloading_size_gb, server_for_offloading
from lmcache.integration.vllm.settings import read_settings
from lmcache.observability.log import init_logger

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    _HIT_SOURCE: Any = CacheHitSource.HOST
except ImportError:  # before vLLM 0.30
    _HIT_SOURCE = None
logger = init_logger(__name__)
_SupportsHMA: Any = getattr(base, "SupportsHMA", object)


class LMCacheMPConnector(Connector, KVConnectorBase_V1, _SupportsHMA):  # type: ignore[misc]
    """Loads prompts' KV from, and stores it in, the LMCache server at `lmcache.mp.host`:`lmcache.mp.port`."""

    if _HIT_SOURCE is not None:
        _cache_hit_source = _HIT_SOURCE

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._kv_caches: dict[str, Any] | None = None
        """The registered KV tensors, until the scheduler has sent the server's address."""
        for line in ignored_by_daemons_engines(os.environ) if role == KVConnectorRole.SCHEDULER else ():
            logger.warning("%s", line)
        self._describe(read_settings(vllm_config.kv_transfer_config))

    def _start(self) -> None:
        if offloading_size_gb(self._vllm_config):
            assert self._kv is not None
            self._server, self._address = server_for_offloading(
                *(self._instance, self._vllm_config, self._settings, self._kv)
            )
            if not self._address:
                return
        self._serve(self._address)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: KV that is not stored only causes a later miss."""
        return False

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if offloading_size_gb(self._vllm_config):
            self._kv_caches = kv_caches
        else:
            super().register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Start the loads now: vLLM calls `start_load_kv` after the forward, which may take seconds."""
        super().bind_connector_metadata(connector_metadata)
        plan = self._plan()
        if self._kv_caches is not None and plan.address:
            kv_caches, self._kv_caches = self._kv_caches, None
            self._attach(kv_caches, plan.address)
        self._begin()

    def get_kv_connector_stats(self) -> Any:
        if self._worker is None or not self._worker.reports_stats:
            return None
        stats = self.build_kv_connector_stats(self._worker.take_stats())
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        from lmcache.integration.vllm.stats import LMCacheStats

        return LMCacheStats(data=data) if data is not None else LMCacheStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        from lmcache.integration.vllm.stats import LMCachePromMetrics

        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


__all__ = ["LMCacheMPConnector"]
