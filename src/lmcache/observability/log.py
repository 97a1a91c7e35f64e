"""Logging: one logger for each module, with one format and one level (`LMCACHE_LOG_LEVEL` or `--log-level`) for all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

_FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d)"
_ROOT = "lmcache"


def init_logger(name: str) -> logging.Logger:
    """Return the logger of a module. The first call sets up the handler of the `lmcache` tree (stderr, no propagation)."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
        set_level(os.environ.get("LMCACHE_LOG_LEVEL", "INFO"))
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")


def set_level(level: str) -> None:
    """Set the level of all loggers of LMCache. An unknown name means INFO; the command line has checked names before."""
    value = logging.getLevelName(level.upper())
    logging.getLogger(_ROOT).setLevel(value if isinstance(value, int) else logging.INFO)


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
