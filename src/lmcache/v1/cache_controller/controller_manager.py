"""The controller that the router of vLLM's production stack makes in its own process: it asks running servers over HTTP.

`LMCACHE_CONTROLLER_SERVERS` names the servers (http://HOST:8080,...; by default the one of this host), and
`LMCACHE_SERVER_API_TOKEN` or `LMCACHE_SERVER_API_TOKEN_FILE` has their token. The addresses that the router passes are not used:
nothing has to register, so nothing listens there.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import anyio.to_thread

from lmcache.config.load import load
from lmcache.config.options import http_urls
from lmcache.errors import LMCacheError
from lmcache.observability.log import init_logger
from lmcache.server.controller import Asked, Controller, There
from lmcache.v1.cache_controller.message import LookupMsg, LookupRetMsg, QueryInstMsg, QueryInstRetMsg
from lmcache.wire.http_client import DEFAULT_URL

logger = init_logger(__name__)


class LMCacheControllerManager:
    """urls, and all other arguments: as the router passes them; they have no effect."""

    def __init__(self, urls: Any = None, *unused: Any, **more: Any) -> None:
        servers = http_urls(os.environ.get("LMCACHE_CONTROLLER_SERVERS", "") or DEFAULT_URL)
        token = load({}).config.api_token
        self._controller = Controller([There(one, lambda: token) for one in servers])
        logger.info("LMCache: lookups of the router ask %s", ", ".join(servers))

    async def start_all(self) -> None:
        """Return at once: there is nothing to start."""

    async def handle_orchestration_message(self, message: Any) -> LookupRetMsg | QueryInstRetMsg:
        """Answer a question. What no server can answer is an empty answer, so that the router goes by its other rules.

        Raises:
            TypeError: another message.
        """
        if isinstance(message, LookupMsg):
            return await anyio.to_thread.run_sync(partial(self._lookup, message), abandon_on_cancel=True)
        if isinstance(message, QueryInstMsg):
            return await anyio.to_thread.run_sync(partial(self._query, message), abandon_on_cancel=True)
        raise TypeError(f"{type(message).__name__}: the controller answers LookupMsg and QueryInstMsg")

    def _lookup(self, message: LookupMsg) -> LookupRetMsg:
        try:
            info: Any = self._controller.lookup(Asked(tokens=list(message.tokens)))["layout_info"]
        except LMCacheError as error:
            logger.warning("LMCache: a lookup of the router has no answer: %s", error)
            info = {}
        return LookupRetMsg(message.event_id, {name: (where, tokens) for name, (where, tokens) in info.items()})

    def _query(self, message: QueryInstMsg) -> QueryInstRetMsg:
        try:
            return QueryInstRetMsg(
                message.event_id, str(self._controller.query_instance(Asked(ip=message.ip))["instance_id"])
            )
        except LMCacheError as error:
            logger.warning("LMCache: the router asks for an instance: %s", error)
            return QueryInstRetMsg(message.event_id)
