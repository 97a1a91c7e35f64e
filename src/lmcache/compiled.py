"""The compiled part of the package, `lmcache._native`, which an installation without a C compiler lacks."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any


def load_native() -> Any:
    """The module; None where it was not built, or LMCACHE_NO_NATIVE is 1 (which is how the Python beside it is tested)."""
    return None if os.environ.get("LMCACHE_NO_NATIVE") == "1" else _import()


@functools.lru_cache(maxsize=1)
def _import() -> Any:
    try:
        return importlib.import_module("lmcache._native")
    except ImportError:
        return None
