"""Work aside: events of L1 that a thread handles, a batch four times a second, so that the loop only has to queue them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial

from lmcache.cache import Event
from lmcache.cache.allocator import Space
from lmcache.observability.log import init_logger
from lmcache.runtime import Runtime

logger = init_logger(__name__)
QUEUE_BYTES = 16 << 20
"""Bytes of hashes that may wait. What comes then is lost, and counted."""
_EVENT_BYTES = 256
"""Of a queued event without its hashes, roughly."""
_STEP_SECONDS = 0.25
_END_SECONDS = 5.0
"""The end of the server waits so long for what is queued."""


class Aside:
    """A queue and its thread.

    name: of the thread. handle: takes one event with its time. after: called after each batch. close: called last. An event whose
    handling raises is lost.
    """

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        handle: Callable[[float, Event], None],
        after: Callable[[], None],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._runtime, self._now, self._handle, self._after, self._close = runtime, runtime.now, handle, after, close
        self._queue: deque[tuple[float, int, Event]] = deque()
        self._queued_bytes = self._taken_bytes = 0
        """Counted by the loop, and by the thread: the difference waits."""
        self.lost = 0
        """Events that found the queue full, or could not be handled."""
        self._failed = False
        self._stop = runtime.event()
        self._thread = runtime.start(self._run, name)

    def put(self, event: Event) -> None:
        """Queue an event."""
        if event.kind == "stored" and event.tier:
            return  # a lookup follows, which finds what the tier has delivered
        size = _EVENT_BYTES + len(event.hashes) + len(event.parents)
        if self._queued_bytes - self._taken_bytes + size > QUEUE_BYTES:
            self.lost += 1
            return
        self._queued_bytes += size
        self._queue.append((self._now(), size, event))

    def _run(self) -> None:
        while not self._stop.wait(_STEP_SECONDS):
            self._batch()
        self._batch()
        self._close()

    def _batch(self) -> None:
        for _ in range(len(self._queue)):
            now, size, event = self._queue.popleft()
            self._taken_bytes += size
            self._guarded(partial(self._handle, now, event))
            self._runtime.sleep(0.0)  # lets the loop have Python's lock, which it would else wait for up to 5 ms
        self._guarded(self._after)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # a bug, which must not end the thread: the queue would stay full
            if not self._failed:
                logger.exception("Events of L1 could not be handled; the server goes on, and only counts more of them")
            self._failed, self.lost = True, self.lost + 1

    def close(self) -> None:
        """Handle what is queued, and end the thread."""
        self._stop.set()
        self._thread.join(_END_SECONDS)


def chunk_sizes(spaces: Iterable[Space]) -> Counter[int]:
    """Return the bytes of a chunk in each space. For the main space of a model with several groups, those of all groups."""
    sizes: Counter[int] = Counter()
    for space in spaces:
        sizes[(space.main or space).number] += space.chunk_bytes
    return sizes
