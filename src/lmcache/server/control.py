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

    def fetches(self) -> list[dict[str, object]]:
        """Lookups that ended last of those that were looked for in the tiers, the latest first. JSON types only."""
        ...

    def degraded(self) -> list[str]:
        """Tiers that do not serve now, and why; the server is healthy without them."""
        ...

    def refused(self) -> list[str]:
        """Engines that the server turned away lately, and what to type; for others it is healthy."""
        ...

    def clear(self, tiers: str = "") -> dict[str, object]:
        """Empty L1, leased chunks too, and these tiers (`all`, or names with commas); what was dropped, for the answer.

        Raises:
            ConfigError: no such tier.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Name -> value. Names in `_total` only count up, others are gauges; `name{reason="full"}` carries labels.

        `lmcache.server.metrics` lists the names with their help and adds the prefix.
        """
        ...
