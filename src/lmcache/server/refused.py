"""Who was turned away, and why: every connection is counted, and each peer told of in the log once for each reason."""

from __future__ import annotations

import time
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
"""Of whom /status tells, and each of whom the log names at once."""
_FORGOTTEN_AFTER_SECONDS = 600.0
"""An engine that goes on being refused tries every few seconds. One that comes back after so long is told of anew."""
_LATELY_SECONDS = 60.0


@dataclass(slots=True)
class _Peer:
    who: str
    reason: str
    remedy: str
    times: int
    last: float


class Refused:
    """`counts` has every reason from the start, so that a rate can be taken of the first refusal."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(get_args(Reason), 0))
        self._now = now
        self._peers: dict[tuple[str, str], _Peer] = {}
        """The one that was refused last comes last."""
        self._more = Seldom(logger, now=now)

    def note(self, who: str, reason: Reason, remedy: str) -> None:
        """Count a connection that was refused. `remedy`: why, and what is to be typed where.

        What an unproven peer says of itself may be always new. So the peer that was refused longest ago makes room, and then the
        log has a line every few seconds.
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
        warn("Turned an engine away: %s: %s", who, remedy)

    def lately(self) -> list[str]:
        """For /healthcheck: who was refused within the last minute, and the remedy. Engines try more often than that."""
        now = self._now()
        return [f"{one.who}: {one.remedy}" for one in self._peers.values() if now - one.last < _LATELY_SECONDS]

    def told(self) -> list[dict[str, object]]:
        """For /status: the latest first."""
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
