"""The interface through which the HTTP endpoint queries the server, whose main thread answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lmcache.server.controller import Controller
    from lmcache.server.operating import Operating


class Control(Protocol):
    """Queries to a running server. Each is thread-safe, and returns within a second or raises TimeoutError."""

    operating: Operating
    """The verbs of operators: pins, prefetches, lookups, lists and deletions."""
    controller: Controller
    """The same for this server and its fellows, as scripts of the public project ask."""

    def health(self) -> tuple[bool, str]:
        """Return whether the server serves, and if not the reason."""
        ...

    def status(self) -> dict[str, object]:
        """Return configuration (secrets redacted), arena, index, sessions, engines and counters. JSON types only."""
        ...

    def fetches(self) -> list[dict[str, object]]:
        """Return records of the fetches from tiers that ended last, the latest first. JSON types only."""
        ...

    def history(self) -> tuple[list[str], list[tuple[float, ...]]]:
        """Return the names of columns, and samples of the last hour, one every ten seconds, the oldest first."""
        ...

    def requests(
        self, request: str = "", misses: bool = False, since: float = 0.0, before: int = 0, limit: int = 100
    ) -> dict[str, object]:
        """Return records of the latest requests, `next` (the number before which to go on, 0 at the end) and the totals in
        tokens. JSON types only.

        request: the beginning of an id. misses: only those with missing tokens. since: seconds since the epoch.

        Raises:
            ConfigError: the server keeps no records.
        """
        ...

    def degraded(self) -> list[str]:
        """Return the tiers that do not serve now, each with the reason. The server is healthy without them."""
        ...

    def refused(self) -> list[str]:
        """Return the engines that the server refused lately, each with the remedy. The server is healthy for all others."""
        ...

    def clear(self, tiers: str = "") -> dict[str, object]:
        """Empty L1, including leased and pinned chunks, and these tiers (`all`, or names separated by commas). Returns what was
        removed.

        Raises:
            ConfigError: there is no tier of such a name.
        """
        ...

    def tiers(self) -> dict[str, object]:
        """Return `tiers`, nearest first, and `leaving`, those that are being removed. JSON types only."""
        ...

    def add_tier(self, url: str, before: str = "") -> dict[str, object]:
        """Open a tier and attach it as the next nearer one to `before`, or as the farthest. Takes up to 20 s.

        Raises:
            ConfigError: the URL or a name is wrong, or the tier cannot be opened. Then nothing has changed.
        """
        ...

    def remove_tier(self, name: str, drain_seconds: float | None = None) -> dict[str, object]:
        """Remove a tier. Takes up to 20 s; `state` is then `leaving` if the tier is still being written to or closed.

        Raises:
            ConfigError: there is no tier of this name.
        """
        ...

    def pause_tier(self, name: str, paused: bool) -> dict[str, object]:
        """Pause a tier, or let it go on. `under_way` counts its calls that have not returned.

        Raises:
            ConfigError: there is no tier of this name.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Return name -> value. Names that end in `_total` are counters, others are gauges; `name{reason="full"}` has a label.

        `lmcache.server.metrics` lists the names with their help and adds the prefix.
        """
        ...
