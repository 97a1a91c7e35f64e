"""The native module `lmcache._native`, under the name `native`. Its source is in `native/`, its interface in `_native.pyi`."""

from __future__ import annotations

try:
    from lmcache import _native as native
except ImportError as error:
    raise ImportError(
        f"LMCache's compiled module lmcache._native cannot be loaded ({error}). Install LMCache's wheel for this platform, or "
        "build it here, which needs a C compiler and Python's headers: "
        "pip install --force-reinstall --no-deps --no-binary lmcache lmcache (in a source tree: pip install -e .)"
    ) from error

__all__ = ["native"]
