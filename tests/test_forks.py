"""Where the states of recurrent layers are kept."""

from __future__ import annotations

import pytest

from lmcache.chunks import TokenChain
from lmcache.engine.forks import Forks


def boundaries(forks: Forks, tokens: list[int], size: int = 16) -> list[int]:
    chain = TokenChain(bytes(16), size)
    chain.extend(tokens)
    return forks.boundaries(chain, len(tokens))


def test_at_the_end_and_where_prompts_part() -> None:
    forks, shared = Forks(), list(range(100))
    first, second, third = (shared + [1000 + number] * 60 for number in range(3))
    assert boundaries(forks, first) == [144], "the last whole chunk, and the last token is left to be computed"
    assert boundaries(forks, first) == [144]
    assert boundaries(forks, second) == [96, 144]
    assert boundaries(forks, third) == [96, 144]
    assert boundaries(forks, third[:144]) == [128]
    assert boundaries(forks, [7] * 16) == boundaries(forks, [7]) == []
    assert boundaries(forks, [8] * 17) == [16]


def test_only_the_latest_prompts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache.engine.forks._REMEMBERED_CHUNKS", 40)
    forks = Forks()
    for number in range(3):
        boundaries(forks, [number] * 21, 1)
    assert boundaries(forks, [2] * 10 + [3], 1) == [10]
    assert boundaries(forks, [2] * 5 + [3] * 6, 1) == [5, 10]
    assert boundaries(forks, [0] * 5 + [3] * 6, 1) == [10]
