"""Which adapters (LoRA) an engine has loaded, by the files that they were in."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from lmcache.engine.identity import Identity, Mark, marks_of, path_identity, unchanged
from lmcache.engine.runtime import RUNTIME
from lmcache.errors import IdentityUnknown, LayoutError
from lmcache.observability.log import init_logger

logger = init_logger(__name__)


@dataclass(frozen=True)
class _Adapter:
    path: str
    variant: str
    marks: tuple[Mark, ...]
    content: Identity


class AdapterFiles:
    """The adapters that an engine has been given, each under a number. The engine loads a number once, and answers with what it
    has loaded, whatever path comes with the number later. Each is looked through at its first sight; later requests only find
    out whether its files are still the same."""

    def __init__(self) -> None:
        self._since = RUNTIME.wall()
        """Before any adapter was loaded."""
        self._known: dict[Hashable, _Adapter | None] = {}
        """The adapters by their number; the value is None where it is not known what has been loaded under it."""

    def content(self, number: Hashable, path: str, variant: str = "", name: str = "") -> str | None:
        """The name of what is loaded under a number; None when that is not known, or while the files are hashed. variant: how the
        engine reads them. name: the adapter's, for the log."""
        if number not in self._known:
            self._known[number] = _look_through(path, variant, self._since)
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


def _look_through(path: str, variant: str, unchanged_since: float) -> _Adapter | None:
    """The adapter in a directory, None if it is not here to be looked at.

    It is also None where a file is newer than `unchanged_since`, a time before this engine has loaded any adapter: it may have
    loaded the older files, and answers with them until the adapter is loaded again.
    """
    try:
        marks = marks_of(Path(path)) if os.path.exists(path) else ()
        content = path_identity(
            path,
            "load the adapter from another directory",
            unchanged_since,
            "requests with this adapter are not cached",
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
