"""One logger per module, one format, one level for all: `LMCACHE_LOG_LEVEL` or `--log-level`."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "[%(asctime)s] LMCache %(levelname)s: %(message)s (%(filename)s:%(lineno)d)"
_ROOT = "lmcache"


def init_logger(name: str) -> logging.Logger:
    """The logger of a module; the first call sets up the handler of the `lmcache` tree (stderr, no propagation)."""
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
        set_level(os.environ.get("LMCACHE_LOG_LEVEL", "INFO"))
    return logging.getLogger(name if name == _ROOT or name.startswith(_ROOT + ".") else f"{_ROOT}.{name}")


def set_level(level: str) -> None:
    """Set the level of the whole `lmcache` tree; an unknown name means INFO (the command line checks names earlier)."""
    value = logging.getLevelName(level.upper())
    logging.getLogger(_ROOT).setLevel(value if isinstance(value, int) else logging.INFO)
