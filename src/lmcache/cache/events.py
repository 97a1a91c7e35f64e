"""Events report what happens to chunks in L1 and in the tiers: one stream, with any number of listeners.

Every event is counted. Its hashes are read from the index only if a listener has asked for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from lmcache.observability.log import init_logger

if TYPE_CHECKING:
    from lmcache.cache.waits import FetchRecord

logger = init_logger(__name__)
KINDS = (
    "hit", "missed", "stored", "evicted", "cleared", "incomplete", "reserved", "committed", "dropped", "refused", "expired",
)  # fmt: skip
TIER_KINDS = "loaded", "load_failed", "written", "write_failed"
"""Kinds of events of tiers; `KINDS` are those of L1."""
REQUEST_KINDS = "waits", "answered", "fetched", "replied"
"""Kinds of events of requests."""
LET_GO = "let go"
"""Reason of `evicted`: the chunk came from a tier whose chunks are not kept, and was used. Otherwise the reason is `room`."""


class Event(NamedTuple):
    """One event, which concerns `chunks` chunks of a space.

    hit, missed    A lookup found the chunks, or did not find them.
    stored         The chunks have become complete. evicted, cleared: complete chunks were removed from the index.
                   The index holds stored - evicted - cleared complete chunks.
    reserved       A rank or a tier got extents for its shards. committed, dropped: it filled the extents, or did not.
    incomplete     The chunks were evicted when only some ranks had stored or begun their shards.
    refused        The chunks got no extents.
    expired        A claim on the chunks has passed its deadline. The chunks of a reservation are dropped then.
    loaded         A tier has delivered a shard of each chunk, for which the server had reserved extents. load_failed: it has not.
    written        A tier has stored a shard of each chunk; reason `kept`: it had the shard already. write_failed: it has not.
    waits          A lookup was told to wait for a tier or another engine; `found` chunks are in L1.
    answered       A lookup of these chunks has its answer, for the first time: `found` of them can be used. Reason `later`: it
                   did not wait, and is told after events that came after it.
    replied        The engine has answered a prompt whose last chunk is this one with `tokens` tokens. Engines tell it when asked.
    fetched        A fetch (`cache.waits.FetchRecord`) has ended; the reason is its outcome.
    """

    kind: str
    space: int
    chunks: int
    reason: str = ""
    """For missed: why the first one was not found; the chunks after it were not looked for."""
    process: int = 0
    """The process that looked up, reserved or committed; for evicted, the one whose reservation needed memory. 0: the server."""
    tier: str = ""
    """The tier for which the server acts; "" if an engine acts."""
    request: str = ""
    """The engine's id of the request; "" if the engine gave none."""
    shard: int = -1
    """The shard of a reservation, a load or a write; -1 if the event concerns all shards."""
    hashes: bytes = b""
    """The chunk hashes, 16 bytes each."""
    parents: bytes = b""
    """For stored: the hashes of the preceding chunks, 16 bytes each, zeros for a first chunk."""
    wanted_by: int = -1
    """For evicted and incomplete: the space that needed memory."""
    last_used: tuple[float | None, ...] = ()
    """For evicted and incomplete: when each chunk was last used; None if that was before somebody listened with `timed`."""
    found: int = 0
    """For waits and answered: so many leading chunks are in L1."""
    have: int = 0
    """For answered: the engine has so many leading chunks itself."""
    tokens: int = 0
    """For answered: tokens of the prompt; 0 if the engine did not say. For replied: of the answer."""
    text: bytes = b""
    """For answered: names the first chunk's tokens, whatever the model; b"" if the engine did not say."""
    fetch: FetchRecord | None = None
    """For fetched."""
    tenant: bytes = b""
    """For answered: whose prompt it is; b"" if the engine did not say."""


Listener = Callable[[Event], None]
By = tuple[int, str, str]
"""Who acts: process, tier and request, as in `Event`."""
NOBODY: By = 0, "", ""


class Events:
    """The stream of events. Listeners run while L1 is in the middle of an operation, so they must not call L1."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        """Chunks by kind and by `kind:reason`; `failed_effects` and `failed_effects_KIND` count the failures of listeners."""
        self.heard: dict[str, list[Listener]] = {}
        """The listeners of each kind."""
        self.named: set[str] = set()
        """Kinds whose events must carry hashes."""
        self._namers: dict[str, list[Listener]] = {}
        """The listeners that need these, by kind."""
        self.timed = False
        """Whether a listener needs `last_used`, so that the time of each use must be noted."""

    def listen(self, kinds: Iterable[str], listener: Listener, named: bool = True, timed: bool = False) -> None:
        """Call the listener for each event of these kinds from now on. named: the listener needs `hashes`, `parents`
        and `wanted_by`, which are empty if no listener of the kind needs them. timed: the listener needs `last_used`, too."""
        self.timed |= timed
        for kind in kinds:
            self.heard.setdefault(kind, []).append(listener)
            if named:
                self._namers.setdefault(kind, []).append(listener)
                self.named.add(kind)

    def ignore(self, listener: Listener) -> None:
        """Call the listener no more. What only it needed is not read any more, except times of use."""
        for listeners in (*self.heard.values(), *self._namers.values()):
            while listener in listeners:
                listeners.remove(listener)
        self.named = {kind for kind, listeners in self._namers.items() if listeners}

    def emit(
        self, kind: str, space: int, chunks: int, reason: str, by: By, detail: Callable[[Event], Event], shard: int = -1
    ) -> None:
        """Count an event and call its listeners; `detail` adds the hashes and the fields after them, if a listener needs those.

        An exception in a listener is counted. It affects neither the other listeners nor the caller.
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
        self.tell(detail(event) if kind in self.named else event)

    def tell(self, event: Event) -> None:
        """Call the listeners of an event that is complete, without counting it. Exceptions as for `emit`."""
        for listener in self.heard.get(event.kind, ()):
            try:
                listener(event)
            except Exception:  # a bug in the listener
                self.failed(event.kind)

    def failed(self, kind: str) -> None:
        """Count the current exception, which an effect of the event `kind` has raised; log it the first time."""
        if not self.counters[f"failed_effects_{kind}"]:
            logger.exception("Processing an L1 event `%s` failed; L1 goes on, and only counts more failures", kind)
        self.counters[f"failed_effects_{kind}"] += 1
        self.counters["failed_effects"] += 1
