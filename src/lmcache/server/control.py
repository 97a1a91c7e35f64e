"""What the HTTP face sees of the server. The face asks; the server's own thread answers."""

from __future__ import annotations

from typing import Protocol


class Control(Protocol):
    """Thread-safe questions to a running server. Each answers within a second or raises TimeoutError."""

    def health(self) -> tuple[bool, str]:
        """(serving, why not)."""
        ...

    def status(self) -> dict[str, object]:
        """Configuration (secrets redacted), arena, index, sessions, engines, counters. JSON types only."""
        ...

    def clear(self) -> None:
        """Empty L1, leased chunks too; the log and the counters say of how many."""
        ...

    def counters(self) -> dict[str, float]:
        """Name -> value. Names in `_total` only count up, others are gauges; `name{reason="full"}` carries labels.

        `lmcache.server.metrics` lists the names with their help and adds the prefix.
        """
        ...
