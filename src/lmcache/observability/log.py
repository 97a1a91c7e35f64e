"""Logging: one logger for each module, with one format and one level for all.

`LMCACHE_LOG_LEVEL` and `LMCACHE_LOG_FORMAT` choose them in engines, `--log-level` and `--log-format` in the server. A line
has UTC times with milliseconds and, where the caller passes `extra={"request": name}`, the engine's id of the request.
No line contains a password of a URL, and no fault fills the disk: `Repeats` leaves lines out.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TextIO
from urllib.parse import unquote

if TYPE_CHECKING:
    _Stream = logging.StreamHandler[TextIO]
else:
    _Stream = logging.StreamHandler  # cannot be subscripted before Python 3.11
_ROOT = "lmcache"
MOST_LINES, WINDOW_SECONDS = 10, 10.0
"""So many warnings or errors of one place in the code are logged in so many seconds."""
_PASSWORD = re.compile(r"(://[^:/?#@\s]*):[^/?#\s]*@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:key|secret|token|password)(?<!_file)=)[^&\s]+", re.IGNORECASE)

_ENCODED = re.compile(r"([?&][^=&\s]*=)([^&\s]*%[^&\s]*)")
"""An option whose value may be a URL of its own (`directory=redis%3A%2F%2F...`)."""


def init_logger(name: str) -> logging.Logger:
    """Return the logger of a module. The first call sets up the handler of the `lmcache` tree (stderr, no propagation)."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = Stderr(sys.stderr)
        handler.addFilter(Repeats())
        root.addHandler(handler)
        root.propagate = False
        set_level(os.environ.get("LMCACHE_LOG_LEVEL", "INFO"))
        set_format(os.environ.get("LMCACHE_LOG_FORMAT", "text"))
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")


def set_level(level: str) -> None:
    """Set the level of all loggers of LMCache. An unknown name means INFO; the command line has checked names before."""
    value = logging.getLevelName(level.upper())
    logging.getLogger(_ROOT).setLevel(value if isinstance(value, int) else logging.INFO)


def set_format(name: str) -> None:
    """Log JSON, one object a line, if the name is `json`, else text; the command line has checked names before."""
    for handler in logging.getLogger(_ROOT).handlers:
        if isinstance(handler, Stderr):  # others are somebody else's
            handler.setFormatter(JsonLines() if name.lower() == "json" else TextLines())


def redacted(text: str) -> str:
    """Return the text with all parts of URLs that may be passwords replaced by `***`."""
    if "://" not in text and "=" not in text:
        return text
    return _ENCODED.sub(_without_encoded, _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text)))


def _without_encoded(option: re.Match[str]) -> str:
    value = unquote(unquote(option[2]))  # the settings quote some twice
    return option[1] + (option[2] if value == option[2] or redacted(value) == value else "***")


class Stderr(_Stream):
    """The handler that `init_logger` sets up."""


class Repeats(logging.Filter):
    """Leaves out warnings and errors of a place in the code that has just logged `MOST_LINES` of them. The next line of the place
    says how many were left out. Memory is bounded by the number of places."""

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}
        """File and line -> when the window began, and how many lines there were in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the line."""
        if record.levelno < logging.WARNING:
            return True
        place = record.pathname, record.lineno
        began, lines = self._places.get(place, (record.created, 0))
        if not 0 <= record.created - began < WINDOW_SECONDS:
            record.left_out = max(0, lines - MOST_LINES)
            began, lines = record.created, 0
        self._places[place] = began, lines + 1
        return lines < MOST_LINES


class TextLines(logging.Formatter):
    """Lines for people: `[2026-11-30 07:12:44.123Z] LMCache INFO: what happened [the request] (file.py:12)`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and after it the traceback if there is one."""
        request, message = str(getattr(record, "request", "")), _message(record)
        if request and request not in message:
            message += f" [{request}]"
        time = _time(record).replace("T", " ")
        line = f"[{time}] LMCache {record.levelname}: {message} ({record.filename}:{record.lineno})"
        trace = _traceback(record)
        return f"{line}\n{trace}" if trace else line


class JsonLines(logging.Formatter):
    """Lines for programs: objects with time, level, message, source, logger and, where there are such, request and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object in one line."""
        line = {"time": _time(record), "level": record.levelname, "message": _message(record)}
        line |= {"source": f"{record.filename}:{record.lineno}", "logger": record.name}
        if request := getattr(record, "request", ""):
            line["request"] = str(request)
        if trace := _traceback(record):
            line["exception"] = trace
        return json.dumps(line)  # ASCII only: stderr may have another encoding than UTF-8


def _time(record: logging.LogRecord) -> str:
    return (
        datetime.fromtimestamp(record.created, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.") + f"{record.msecs:03.0f}Z"
    )


def _message(record: logging.LogRecord) -> str:
    left_out = getattr(record, "left_out", 0)
    return redacted(record.getMessage()) + (f" ({left_out} more such lines were left out)" if left_out else "")


def _traceback(record: logging.LogRecord) -> str:
    parts = [_PLAIN.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] is not None else []
    if record.stack_info:
        parts.append(record.stack_info)
    return redacted("\n".join(parts))


_PLAIN = logging.Formatter()


def printable(text: str, most: int = 500) -> str:
    """Return a text that a peer sent, cut to `most` characters and fit for one line of a log or an error."""
    text = text[:most]
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


class Seldom:
    """Logs warnings about what peers send, which they can send at any rate: at most one line every `seconds`, so that no peer
    fills the disk. The next line says how many were left out."""

    def __init__(self, logger: logging.Logger, now: Callable[[], float], seconds: float = 10.0) -> None:
        self._logger, self._seconds, self._now = logger, seconds, now
        self._next = float("-inf")
        self._left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """Log the line as `logging.Logger.warning` does, or only count it."""
        now = self._now()
        if now < self._next:
            self._left_out += 1
            return
        if self._left_out:
            text += f" ({self._left_out} more such lines were left out)"
        self._next, self._left_out = now + self._seconds, 0
        self._logger.warning(text, *values, stacklevel=2)
