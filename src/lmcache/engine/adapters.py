"""The LoRA adapters that an engine has loaded, identified by their files."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from lmcache.engine.identity import Identity, Mark, marks_of, path_identity, unchanged
from lmcache.errors import IdentityUnknown, LayoutError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)


@dataclass(frozen=True)
class _Adapter:
    path: str
    variant: str
    marks: tuple[Mark, ...]
    content: Identity


class AdapterFiles:
    """The adapters of an engine, each under a number. The engine loads the adapter of a number once and keeps using it, whatever
    path later requests give with that number. The first request with a number has the adapter's files hashed; later requests only
    check whether the files have changed."""

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self._runtime, self._since = runtime, runtime.wall()
        """A time before any adapter was loaded, in seconds since the epoch."""
        self._known: dict[Hashable, _Adapter | None] = {}
        """The adapters by number; None where it is unknown which weights the engine has loaded under the number."""

    def content(self, number: Hashable, path: str, variant: str = "", name: str = "") -> str | None:
        """Return the content name of the adapter that is loaded under a number; None if it is unknown, or while the files are
        hashed. variant: how the engine reads the files. name: the adapter's name, for the log."""
        if number not in self._known:
            self._known[number] = _look_through(path, variant, self._since, self._runtime)
        adapter = self._known[number]
        if adapter is None:
            return None
        another = (path, variant) != (adapter.path, adapter.variant)
        if another or not unchanged(adapter.marks):
            self._known[number] = None
            logger.warning(
                "Requests with the LoRA adapter %r (number %s, first loaded from %s) are no longer cached: %s, and the engine "
                "does not say which weights it has loaded; load the new ones from another directory, under another number",
                *(name, number, adapter.path),
                f"a request wants it from {path}" if another else "its files have changed since",
            )
            return None
        try:
            return adapter.content.name + variant
        except IdentityUnknown:
            return None


def _look_through(path: str, variant: str, unchanged_since: float, runtime: Runtime) -> _Adapter | None:
    """Return the adapter in a directory, or None if this process cannot read the directory.

    Return None too if a file is newer than `unchanged_since`, a time before this engine loaded any adapter: the engine may have
    loaded the older file, and would use it until the adapter is loaded again.
    """
    try:
        marks = marks_of(Path(path)) if os.path.exists(path) else ()
        content = path_identity(
            path,
            "load the adapter from another directory",
            unchanged_since,
            "requests with this adapter are not cached",
            runtime,
        )
    except (LayoutError, OSError) as error:
        logger.info("Requests with the adapter %r are not cached: %s", path, error)
        return None
    if content is None:
        logger.warning(
            "Requests with the adapter %r are not cached: there is no such directory here; load it from one", path
        )
        return None
    return _Adapter(path, variant, marks, content)
