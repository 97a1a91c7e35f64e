"""Refused connections: each one is counted, and each peer is logged once for each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lmcache.cache.reasons import Reason as Explained
from lmcache.observability.log import Seldom, init_logger

logger = init_logger(__name__)

Reason = Literal[
    "no proof",
    "no key",
    "wrong key",
    "unwanted key",
    "other user",
    "version",
    "too many",
    "small L1",
    "l1 codec",
    "no descriptor",
    "no hello",
]
EXPLAINED: dict[Reason, Explained] = {
    "no proof": Explained(
        "an engine that cannot read the cookie file of a server without a key, or whose proof is not for this connection",
        "mount `--socket-dir` at the same path and run both as one user, or give both a key file",
    ),
    "no key": Explained(
        "an engine or another server without a key file, at a server that has one",
        "set `LMCACHE_AUTH_KEY_FILE`, of a server `--auth-key-file`, to a copy of the server's file",
    ),
    "wrong key": Explained(
        "an engine or another server with another key file than the server's",
        "set `LMCACHE_AUTH_KEY_FILE`, of a server `--auth-key-file`, to a copy of the server's file",
    ),
    "unwanted key": Explained(
        "an engine with a key file, at a server without one",
        "start the server with the same file, or unset the variable",
    ),
    "other user": Explained(
        "a process of another user at the Unix socket",
        "run the engine as the server's user, or let its user in (`--allow-uid`)",
    ),
    "version": Explained("an engine of another protocol version", "install the same release on both sides"),
    "too many": Explained(
        "a connection beyond the bounds of SECURITY.md", "end engines or scripts that open connections again and again"
    ),
    "small L1": Explained(
        "an engine whose single chunk is larger than L1", "raise `--l1-size-gb`, or lower `--chunk-size`"
    ),
    "l1 codec": Explained(
        "an engine whose KV has another precision than the server's `--l1-codec` takes",
        "change `lossy_kv` of the engine, or start the server with `--l1-codec auto`",
    ),
    "no descriptor": Explained(
        "a connection, because the server has no file descriptor left", "raise the limit of open files (`ulimit -n`)"
    ),
    "no hello": Explained(
        "a peer that sent no valid first message in 10 s, or too much before it",
        "find out what connects to this port; engines do not do that",
    ),
}
"""Reason -> what was refused, and what to do. SECURITY.md has the same table."""
MAX_PEERS = 64
"""How many refused peers are remembered, for /status and to log each once."""
_FORGOTTEN_AFTER_SECONDS = 600.0
"""A peer is logged again if it was last refused so long ago. A refused engine normally tries again every few seconds."""
_LATELY_SECONDS = 60.0


@dataclass(slots=True)
class _Peer:
    who: str
    reason: str
    remedy: str
    times: int
    last: float


class Refused:
    """Refused peers. `counts` holds every reason from the start, so that the rate of the first refusal can be computed."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(get_args(Reason), 0))
        self._now = now
        self._peers: dict[tuple[str, str], _Peer] = {}
        """(peer, reason) -> record; the latest refusal comes last."""
        self._more = Seldom(logger, now)

    def note(self, who: str, reason: Reason, remedy: str) -> None:
        """Count and log a refused connection. `remedy`: why it was refused, and what the user should do.

        A peer that is not authenticated may give a new name each time. So beyond `MAX_PEERS` the oldest peer is forgotten, and at
        most one line every few seconds is logged.
        """
        now = self._now()
        self.counts[reason] += 1
        peer = self._peers.pop((who, reason), None)
        if peer is not None and now - peer.last < _FORGOTTEN_AFTER_SECONDS:
            peer.times, peer.last = peer.times + 1, now
            self._peers[who, reason] = peer
            return
        self._peers = {key: one for key, one in self._peers.items() if now - one.last < _FORGOTTEN_AFTER_SECONDS}
        warn: Callable[..., None] = logger.warning
        if len(self._peers) >= MAX_PEERS:
            del self._peers[next(iter(self._peers))]
            warn = self._more.warning
        self._peers[who, reason] = _Peer(who, reason, remedy, 1, now)
        warn("Refused an engine: %s: %s", who, remedy)

    def lately(self) -> list[str]:
        """Return, for /healthcheck, the peers refused within the last minute and the remedies. Engines retry more often."""
        now = self._now()
        return [f"{one.who}: {one.remedy}" for one in self._peers.values() if now - one.last < _LATELY_SECONDS]

    def status(self) -> list[dict[str, object]]:
        """Return the refused peers for /status, the latest first."""
        now = self._now()
        return [
            {
                "who": one.who,
                "reason": one.reason,
                "remedy": one.remedy,
                "times": one.times,
                "seconds_ago": round(now - one.last, 1),
            }
            for one in sorted(self._peers.values(), key=lambda one: -one.last)
        ]
