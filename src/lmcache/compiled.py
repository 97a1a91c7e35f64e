"""Import of the native module `lmcache._native`, which is missing where the package was installed without a C compiler."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any


def load_native() -> Any:
    """Return the native module; None where it was not built, or LMCACHE_NO_NATIVE is 1 (which tests the Python twins)."""
    return None if os.environ.get("LMCACHE_NO_NATIVE") == "1" else _import()


@functools.lru_cache(maxsize=1)
def _import() -> Any:
    try:
        return importlib.import_module("lmcache._native")
    except ImportError:
        return None
