"""In-process mode: the implementation that vLLM's `LMCacheConnectorV1` forwards its calls to.

The scheduler starts a server for the engine (`lmcache.engine.embedded`), and the ranks find it. `LMCacheConnectorV1` has an older
contract than the connector's: some calls are not forwarded, or only a part of them is. The methods for those calls are set on the
calling object itself, so that both modes run the same two sides.

A load is part of the step that needs it. vLLM cannot hear that such a load has failed if the model has several kinds of KV, so
there the request waits, unscheduled, as with a daemon.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole

from lmcache.engine.settings import ServerSettings
from lmcache.integration.vllm.connector import Connector
from lmcache.integration.vllm.own_server import engine_settings, offloading_size_gb, start_fitting_server
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_NOT_FORWARDED = (
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "bind_gpu_block_pool",
    "get_handshake_metadata",
    "set_xfer_handshake_metadata_pp_aware",
    "handle_preemptions",
    "get_transfer_results",
    "build_connector_worker_meta",
    "update_connector_output",
    "take_events",
    "reset_cache",
    "shutdown",
)


class LMCacheConnectorV1Impl(Connector):
    """One role of the connector: the scheduler's or a rank's.

    Raises:
        ConfigError: a setting is wrong. After any other fault the engine runs on without a cache, and the log says why.
    """

    _in_process = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, parent_connector: Any) -> None:
        found = engine_settings(vllm_config)
        self._vllm_config, self._role, self._parent = vllm_config, role, parent_connector
        self._kv_cache_config = getattr(parent_connector, "_kv_cache_config", None)
        self._notify_parent = parent_connector.update_connector_output
        for name in _NOT_FORWARDED:
            setattr(parent_connector, name, getattr(self, name))
        for warning in found.warnings if role == KVConnectorRole.SCHEDULER else ():
            logger.warning("%s", warning)
        model_id = str(vllm_config.kv_transfer_config.get_from_extra_config("lmcache.mp.model_id", ""))
        deadline = found.config.blocking_timeout_secs
        self._describe(ServerSettings("", found.config, deadline, model_id=model_id))

    @property
    def _connector_metadata(self) -> Any:
        return getattr(self._parent, "_connector_metadata", None)

    def _start(self) -> None:
        """Start the server and, if it has started, make the scheduler's side."""
        # In releases that use this class for --kv-offloading-backend lmcache, vLLM gives each rank its part of the size.
        assert self._kv is not None
        size_gb = offloading_size_gb(self._vllm_config)
        self._server = start_fitting_server(self._instance, self._settings.config, self._kv, size_gb)
        if self._server is not None:
            self._serve()

    # Worker

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        self._begin()

    def get_kv_events(self) -> list[Any]:
        return []

    # Scheduler

    def update_connector_output(self, connector_output: Any) -> None:
        self._notify_parent(connector_output)
        super().update_connector_output(connector_output)
