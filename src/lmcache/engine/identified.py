"""While it is not known which weights an engine serves, it has no layout and says hello to no server: every lookup is a miss, and
every store is dropped, for the reason `UNKNOWN`."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.chunks import Layout
from lmcache.errors import IdentityUnknown

UNKNOWN = "identity not known yet"
LayoutFor = Callable[[int], Layout]
"""The model's layout for a chunk size in tokens. Raises IdentityUnknown, for any size, until the weights' identity is known."""


def is_identified(layout_for: LayoutFor) -> bool:
    """Whether it is known which weights are served."""
    try:
        layout_for(1)
    except IdentityUnknown:
        return False
    return True
