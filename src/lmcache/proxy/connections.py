"""The proxy's connections: one on which no request comes is closed, since idle ones would keep all others out."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 10.0
"""A connection that has no request for so long is closed, after twice this time at most. The head of a request counts as one."""


class Connection(H11Protocol):
    """One connection of a client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, unless there are far more than can be answered."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) > 2 * self.limit_concurrency:
            transport.close()
        self._look_after(None)

    def _look_after(self, last: object) -> None:
        self.loop.call_later(REQUEST_SECONDS, self._close_if_idle, last)

    def _close_if_idle(self, last: object) -> None:
        """Close the connection if the request `last` was its latest one when this was looked at last, and still is, and has been
        answered."""
        if self.transport.is_closing():
            return
        if self.cycle is last and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self._look_after(self.cycle)
