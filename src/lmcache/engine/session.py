"""What the sessions of schedulers and of ranks share: a connection to the server, made once the weights are identified."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.chunks import Layout
from lmcache.engine.connection import Connection
from lmcache.errors import IdentityUnknown
from lmcache.runtime import Runtime

UNKNOWN = "identity not known yet"
"""Why lookups are misses and stores are dropped until the weights are identified: without a layout there is no connection."""
LayoutFor = Callable[[int], Layout]
"""Returns the model's layout for a chunk size in tokens; raises IdentityUnknown until the identity of the weights is known."""


class Session:
    """The base of both sessions. A subclass makes the connection when everything else of the session is ready for it."""

    _connection: Connection

    def __init__(self, layout_for: LayoutFor, runtime: Runtime) -> None:
        self.runtime, self._layout_for = runtime, layout_for

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def identified(self) -> bool:
        """Whether the weights are identified. Until then this session connects to no server, and waits for none."""
        try:
            self._layout_for(1)
        except IdentityUnknown:
            return False
        return True

    def wait_connected(self, timeout_seconds: float) -> bool:
        """Wait for the first connection."""
        return self._connection.wait_connected(timeout_seconds)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """At engine start: wait for the first connection, unless no server listens or none can serve this engine. The wait for a
        server that may still answer ends `seconds` after this session was made (None: ten, or thirty for an engine's own server).
        """
        if self.identified:
            self._connection.wait_for_server(seconds)
