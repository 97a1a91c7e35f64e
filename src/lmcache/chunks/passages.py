"""Passages: the texts of a prompt between separators, which may stand anywhere in other prompts.

A passage has a chain of its own, from a root of its own (`chunk_root(..., passage=...)`), so its chunks are ordinary chunks that
no prompt can hit. The name of a passage depends on its tokens and not on its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Passage(NamedTuple):
    """Tokens [start, end) of a prompt."""

    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


def between(token_ids: Sequence[int], separator: Sequence[int]) -> list[Passage]:
    """Return the texts between separators, in order, with what stands before the first one and behind the last one. Each may be
    empty. The separators themselves belong to no passage. An empty separator separates nothing."""
    found, start, width = [], 0, len(separator)
    wanted, at = list(separator), -1
    while width:
        try:
            at = token_ids.index(wanted[0], max(at + 1, start))
        except ValueError:
            break
        if list(token_ids[at : at + width]) == wanted:
            found.append(Passage(start, at))
            start, at = at + width, at + width - 1
    return [*found, Passage(start, len(token_ids))]


def cut(tokens: int, boundaries: Sequence[int]) -> list[Passage]:
    """Return the parts of a prompt of so many tokens that begin at 0 and at each of these boundaries.

    Raises:
        ValueError: the boundaries do not ascend, or lie outside of the prompt.
    """
    ends = [0, *boundaries, tokens]
    if any(first > second for first, second in pairwise(ends)):
        raise ValueError(f"boundaries {list(boundaries)[:20]} must ascend from 0 to the prompt's {tokens} tokens")
    return [Passage(*both) for both in pairwise(ends)]
