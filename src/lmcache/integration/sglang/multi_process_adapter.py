"""`LMCacheMPConnector`: for `LMCRadixCache` of SGLang 0.5.13 to 0.5.19, which looks up first and loads when it has the slots."""

from __future__ import annotations

from typing import Any

from lmcache.engine.settings import ServerSettings
from lmcache.integration.sglang.older import LoadMetadata, OlderConnector, StoreMetadata, tokens_had
from lmcache.integration.sglang.settings import daemon_address


class LMCacheMPConnector(OlderConnector):
    """host, port: of the daemon. pools: as `OlderConnector` has them."""

    def __init__(self, *, page_size: int, host: str, port: int, **pools: Any) -> None:
        settings = ServerSettings(daemon_address(host, port))
        super().__init__(settings, page_size=page_size, **pools)

    def lookup_kv(self, token_ids: Any, request_id: str) -> int:
        """Tokens of the prompt, from its start on, that can be loaded; they stay until `release_pending` or `end_session`."""
        self.release_pending(request_id)
        found = self._find(token_ids, 0, request_id)
        return found.hit_tokens if found is not None else 0

    def retrieve_kv(self, load: LoadMetadata) -> int:
        """Fill the slots of what was found; tokens from `load.offset` on that are there now, 0 for none."""
        found = self._rank.requests.open.get(load.request_id) if self._rank is not None else None
        if found is None:
            return 0
        found.hit_tokens = min(found.hit_tokens, len(load.slot_mapping))
        return self._fill(found, tokens_had(load.slot_mapping), load)

    def release_pending(self, request_id: str) -> None:
        """What was found for the request will not be loaded."""
        if self._rank is not None:
            self._rank.requests.finish(request_id)

    def end_session(self, request_id: str) -> None:
        """The request has ended."""
        self.release_pending(request_id)


__all__ = ["LMCacheMPConnector", "LoadMetadata", "StoreMetadata"]
