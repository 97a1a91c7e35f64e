"""What happens to chunks in L1: one stream of events, followed by any number of listeners.

Each event is counted. Its hashes are taken from the index only where a listener has asked for events of its kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lmcache.observability.log import init_logger

logger = init_logger(__name__)
KINDS = (
    "hit", "missed", "stored", "evicted", "cleared", "incomplete", "reserved", "committed", "dropped", "refused", "expired",
)  # fmt: skip


class Event(NamedTuple):
    """Something that has happened to `chunks` chunks of a space.

    hit, missed    a lookup found them, or did not.
    stored         they are complete: all their shards are there. evicted, cleared: they were complete and are gone. So
                   stored - evicted - cleared are in the index.
    reserved       a rank (or tier) got extents for its shards of them. committed, dropped: it has filled them, or did not.
    incomplete     they were evicted before all ranks had stored their shards, though some had.
    refused        they got no extents.
    expired        a claim on them has passed its deadline. Those of a reservation are dropped with that.
    """

    kind: str
    space: int
    chunks: int
    reason: str = ""
    process: int = 0
    """Whose act it is: who looked up, reserved or committed; for evicted, whose reservation needed the room. 0: the server."""
    tier: str = ""
    """The tier on whose behalf the server acts; "" where an engine does."""
    request: str = ""
    """The engine's id of the request, where it has said one."""
    shard: int = -1
    """Of a reservation; -1 where an event is about all shards."""
    hashes: bytes = b""
    """16 bytes a chunk."""
    parents: bytes = b""
    """For stored: the hashes of the chunks before them, 16 bytes each, zeros where there is none."""
    wanted_by: int = -1
    """For evicted and incomplete: the space that needed the room."""
    last_used: tuple[float | None, ...] = ()
    """For evicted: when each chunk was last used; None where that was before anybody listened."""


Listener = Callable[[Event], None]
By = tuple[int, str, str]
"""Whose act it is: process, tier and request, as in `Event`."""
NOBODY: By = 0, "", ""


class Events:
    """The stream. A listener runs in the middle of what it hears of: it may take note, and calls no verb of L1."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        """Chunks by kind, and by `kind:reason`; `failed_effects`, also by kind: what listeners failed to take note of."""
        self.heard: dict[str, list[Listener]] = {}
        """The listeners, by kind."""
        self.named: set[str] = set()
        """Kinds whose events have to name their chunks."""

    def listen(self, kinds: Iterable[str], listener: Listener, named: bool = True) -> None:
        """Call the listener for each event of these kinds, from now on. named: it needs `hashes` and the fields after them,
        which are empty otherwise, unless another listener needs them."""
        for kind in kinds:
            self.heard.setdefault(kind, []).append(listener)
            if named:
                self.named.add(kind)

    def emit(
        self,
        kind: str,
        space: int,
        chunks: int,
        reason: str,
        by: By,
        detail: Callable[[Event], Event],
        shard: int = -1,
    ) -> None:
        """Count it, and call those who listen; `detail` adds what some of them have asked for.

        A listener that fails is counted, and fails nobody else.
        """
        if not chunks:
            return
        self.counters[kind] += chunks
        if reason:
            self.counters[f"{kind}:{reason}"] += chunks
        listeners = self.heard.get(kind)
        if not listeners:
            return
        event = Event(kind, space, chunks, reason, *by, shard)
        if kind in self.named:
            event = detail(event)
        for listener in listeners:
            try:
                listener(event)
            except Exception:  # a fault of ours
                self.failed(kind)

    def failed(self, kind: str) -> None:
        """Count, and the first time log, the exception at hand: a `kind` of chunks could not be noted."""
        if not self.counters[f"failed_effects_{kind}"]:
            logger.exception("A %s of chunks could not be noted; this is counted from now on, and L1 serves on", kind)
        self.counters[f"failed_effects_{kind}"] += 1
        self.counters["failed_effects"] += 1
