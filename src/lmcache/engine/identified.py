"""Whether the weights of an engine are identified. Until then the engine has no layout and connects to no server: every lookup
is a miss, and every store is dropped, for the reason `UNKNOWN`."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.chunks import Layout
from lmcache.errors import IdentityUnknown

UNKNOWN = "identity not known yet"
LayoutFor = Callable[[int], Layout]
"""Returns the model's layout for a chunk size in tokens; raises IdentityUnknown until the identity of the weights is known."""


def is_identified(layout_for: LayoutFor) -> bool:
    """Whether it is known which weights are served."""
    try:
        layout_for(1)
    except IdentityUnknown:
        return False
    return True
