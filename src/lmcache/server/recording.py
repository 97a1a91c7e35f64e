"""Recording: writes a trace of lookups and stores (`--record-trace`), which `lmcache replay` reads.

If the thread that writes cannot keep up, or the disk is full, events are dropped and counted, and nothing else happens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from lmcache import __version__
from lmcache.cache import Event, Heart
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger
from lmcache.server.aside import Aside, chunk_sizes
from lmcache.server.loop import Loop
from lmcache.sizing.trace import Cleared, Lookup, Lost, Opened, Record, Replied, Stored, header, line_of, runs_of

logger = init_logger(__name__)
_MOST_SPACES = 1024


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
        self._l1, self._path, self._half, self._model_of = l1, path, most_bytes // 2, model_of
        self._header = header(__version__, server, chunk_tokens, l1.total_bytes)
        self._chunk_tokens = chunk_tokens
        self._began = loop.runtime.wall() - loop.now()
        self._spaces: dict[int, Opened | None] = {}
        """What the trace has to tell of each space that has had events. The loop replaces the values."""
        self._told: dict[int, Opened | None] = {}
        """What the file has told of them."""
        self._unwritten = self._told_lost = 0
        """Events that could not be written; of all losses, those that the trace has told."""
        self.recorded = 0
        """Events that have been written."""
        self._failed = False
        try:
            self._file = self._open()
        except OSError as error:
            raise ConfigError(
                f"--record-trace {path}: {error.strerror}: pass a file that the server may write"
            ) from None
        self._aside = Aside(loop.runtime, "lmcache-record", self._write, self._flush, self._end)
        self.close = self._aside.close
        l1.events.listen(["stored"], self._heard)
        l1.events.listen(["answered", "replied"], self._heard, named=False)
        l1.events.listen(["cleared"], self._aside.put, named=False)
        loop.on_tick.append(self._note_spaces)
        logger.warning("Recording the hashes of all prompts in %s (no tokens); SECURITY.md says what they tell", path)

    @property
    def lost(self) -> int:
        """Events that are missing from the trace."""
        return self._aside.lost + self._unwritten

    # In the loop

    def _heard(self, event: Event) -> None:
        if event.space not in self._spaces:
            self._spaces[event.space] = None
            self._note_spaces()
        self._aside.put(event)

    def _note_spaces(self) -> None:
        """Note what the trace has to tell of spaces: the ranks of an engine register one after the other, and so do the groups of
        a model, whose sizes are counted together."""
        sizes = chunk_sizes(self._l1.spaces if self._spaces else ())
        for number, known in list(self._spaces.items()):
            if number in sizes:
                model = self._model_of(number) or (known.model if known is not None else "")
                self._spaces[number] = Opened(number, model, self._chunk_tokens, sizes[number])
            elif len(self._spaces) > _MOST_SPACES:
                del self._spaces[number]

    # In the thread

    def _write(self, now: float, event: Event) -> None:
        done = all(self._guarded(partial(self._append, one)) for one in _records_of(self._began + now, event))
        self.recorded += done
        self._unwritten += not done

    def _flush(self) -> None:
        lost = self.lost
        if lost > self._told_lost and self._guarded(lambda: self._append(Lost(lost - self._told_lost))):
            self._told_lost = lost
        if self._guarded(lambda: self._file.flush()):
            self._failed = False

    def _end(self) -> None:
        self._guarded(lambda: self._file.close())

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
        line = line_of(record)
        if isinstance(record, Lookup | Stored | Replied):
            opened = self._spaces.get(record.space)
            if opened is not None and self._told.get(record.space) != opened:
                line = line_of(opened) + line
                self._told[record.space] = opened
        if self._file.closed or self._file.tell() + len(line) > self._half:
            self._file.close()
            self._file = self._open()
            self._told.clear()
            self._append(record)
            return
        self._file.write(line.encode())

    def _open(self) -> IO[bytes]:
        """Begin a new file. The one before it becomes `path`.1."""
        if self._path.is_file():
            os.replace(self._path, f"{self._path}.1")
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = os.fdopen(descriptor, "wb")
        file.write(self._header.encode())
        return file


def _records_of(time: float, event: Event) -> Iterator[Record]:
    if event.kind == "cleared":
        yield Cleared(time)
    elif event.kind == "stored":
        for parent, hashes in runs_of(event.hashes, event.parents):
            yield Stored(time, event.space, parent, hashes)
    elif event.kind == "replied":
        yield Replied(time, event.space, event.hashes, event.tokens)
    else:
        yield Lookup(time, event.space, event.hashes, 0, event.found)
