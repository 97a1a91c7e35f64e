"""Recording: writes a trace of lookups and stores (`--record-trace`), which `lmcache replay` reads.

The loop only queues events, as they are. A thread formats and writes them four times a second. If it cannot keep up, or the disk
is full, events are dropped and counted, and nothing else happens.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from lmcache import __version__
from lmcache.cache import Event, Heart
from lmcache.chunks import HASH_BYTES
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server.loop import Loop
from lmcache.sizing.trace import Cleared, Lookup, Lost, Opened, Record, Stored, header, line_of, runs_of

logger = init_logger(__name__)
QUEUE_BYTES = 16 << 20
_EVENT_BYTES = 256
"""Of a queued event without its hashes, roughly."""
_STEP_SECONDS = 0.25
_MOST_SPACES = 1024
_END_SECONDS = 5.0
"""The end of the server waits so long for the rest of the trace."""


class Recording:
    """The trace of one server, in `path` and, before it, `path`.1. Both together take at most `most_bytes`.

    model_of: returns the name of the model of a space, "" if unknown. server: the server's id.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(
        self,
        loop: Loop,
        l1: Heart,
        path: Path,
        most_bytes: int,
        chunk_tokens: int,
        server: str,
        model_of: Callable[[int], str],
    ) -> None:
        self._loop, self._l1, self._path, self._half, self._model_of = loop, l1, path, most_bytes // 2, model_of
        self._header = header(__version__, server, chunk_tokens, l1.total_bytes)
        self._chunk_tokens = chunk_tokens
        self._began = loop.runtime.wall() - loop.now()
        self._queue: deque[tuple[float, Event | Opened]] = deque()
        self._queued_bytes = self._taken_bytes = 0
        """Counted by the loop, and by the thread: the difference waits in the queue."""
        self._opened: dict[int, Opened | None] = {}
        """The loop's: what it has queued last of each space."""
        self._lost_here = self._lost_there = self._told = 0
        """Events that the loop has dropped; that the thread could not write; of both, what the trace has told."""
        self.recorded = 0
        """Events that have been written."""
        self._failed = False
        self._known: dict[int, Opened] = {}
        """The thread's: spaces of which the file has to tell at its beginning."""
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError(
                f"--record-trace {path}: {error.strerror}: pass a file that the server may write"
            ) from None
        self._stop = loop.runtime.event()
        self._thread = loop.runtime.start(self._run, "lmcache-record")
        l1.events.listen(["hit", "missed", "stored"], self._heard)
        l1.events.listen(["cleared"], self._heard, named=False)
        loop.on_tick.append(self._note_sizes)
        logger.warning("Recording the hashes of all prompts in %s (no tokens); SECURITY.md says what they tell", path)

    @property
    def lost(self) -> int:
        """Events that are missing from the trace."""
        return self._lost_here + self._lost_there

    # In the loop

    def _heard(self, event: Event) -> None:
        if event.kind == "missed" and event.chunks * HASH_BYTES != len(event.prompt):
            return  # its lookup has had the event `hit`
        if event.kind == "stored" and event.tier:
            return  # a lookup follows, which finds what the tier has delivered
        size = _size_of(event)
        if self._queued_bytes - self._taken_bytes + size > QUEUE_BYTES:
            self._lost_here += 1
            return
        if event.space not in self._opened:
            self._opened[event.space] = None
            self._note_sizes()
        self._queued_bytes += size
        self._queue.append((self._loop.now(), event))

    def _note_sizes(self) -> None:
        """Queue what has changed of the spaces that have had events: the ranks of an engine register one after the other, and so
        do the groups of a model, whose sizes are counted together."""
        sizes: Counter[int] = Counter()
        for space in self._l1.spaces if self._opened else ():
            sizes[(space.main or space).number] += space.chunk_bytes
        for number, known in list(self._opened.items()):
            if number not in sizes:
                del self._opened[number]
                continue
            model = self._model_of(number) or (known.model if known is not None else "")
            opened = Opened(number, model, self._chunk_tokens, sizes[number])
            if known != opened:
                self._opened[number] = opened
                self._queue.append((0.0, opened))

    # In the thread

    def _run(self) -> None:
        while not self._stop.wait(_STEP_SECONDS):
            self._write()
        self._write()
        self._guarded(lambda: self._file.close())

    def _write(self) -> None:
        """Write what is queued now."""
        for _ in range(len(self._queue)):
            now, event = self._queue.popleft()
            if isinstance(event, Opened):
                self._known[event.space] = event
                if len(self._known) > _MOST_SPACES:
                    del self._known[next(iter(self._known))]
                self._guarded(partial(self._append, event))
                continue
            self._taken_bytes += _size_of(event)
            done = all(self._guarded(partial(self._append, one)) for one in _records_of(self._began + now, event))
            self.recorded += done
            self._lost_there += not done
        lost = self.lost
        if lost > self._told and self._guarded(partial(self._append, Lost(lost - self._told))):
            self._told = lost
        self._failed = not self._guarded(lambda: self._file.flush())

    def _guarded(self, write: Callable[[], object]) -> bool:
        """Return whether it was written. The first failure of several is logged."""
        try:
            write()
            return True
        except Exception as error:  # the disk is full, or a bug: recording must not harm the server
            if not self._failed:
                logger.warning("%s cannot be written (%s): events are missing until it can be", self._path, error)
            self._failed = True
            return False

    def _append(self, record: Record) -> None:
        line = line_of(record).encode()
        if self._file.closed or self._file.tell() + len(line) > self._half:
            self._file.close()
            self._file = self._open()
            for opened in self._known.values():
                self._file.write(line_of(opened).encode())
        self._file.write(line)

    def _open(self) -> IO[bytes]:
        """Begin a new file. The one before it becomes `path`.1."""
        if self._path.is_file():
            os.replace(self._path, f"{self._path}.1")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "wb")
        file.write(self._header.encode())
        return file

    def close(self) -> None:
        """Write the rest, and end the thread."""
        self._stop.set()
        self._thread.join(_END_SECONDS)


def _size_of(event: Event) -> int:
    return _EVENT_BYTES + len(event.prompt) + len(event.hashes) + len(event.parents)


def _records_of(time: float, event: Event) -> Iterator[Record]:
    if event.kind == "cleared":
        yield Cleared(time)
    elif event.kind == "stored":
        for parent, hashes in runs_of(event.hashes, event.parents):
            yield Stored(time, event.space, parent, hashes)
    else:
        yield Lookup(time, event.space, event.prompt, 0, event.chunks if event.kind == "hit" else 0)
