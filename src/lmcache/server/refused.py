"""Refused connections: each one is counted, and each peer is logged once for each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

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
    "no descriptor",
    "no hello",
]
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
