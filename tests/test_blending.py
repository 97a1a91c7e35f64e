"""Which tokens are passages, and which are computed again. What a model makes of it is in tests/transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.chunks import TokenChain, chunk_root
from lmcache.chunks.passages import Passage, between, cut
from lmcache.engine.blending import MOST_PASSAGES, Blend, Blending
from lmcache.errors import ConfigError

FINGERPRINT = bytes.fromhex("dc47ac3afcb937b8634cf5aec6126ff4")


def test_the_root_of_passages_is_another_one() -> None:
    """A vector that must never change, and no passage with the name of a prompt, whatever its fields are."""
    assert chunk_root(FINGERPRINT, passage="donor").hex() == "16800c385154ef4d166867a60d33a1b6"
    roots = {chunk_root(FINGERPRINT, *fields) for fields in ((), ("donor",), ("", "donor"), ("", "", "donor"))}
    roots |= {chunk_root(FINGERPRINT, salt, passage=how) for salt in ("", "a") for how in ("donor", "alone")}
    assert len(roots) == 8
    chains = [TokenChain(chunk_root(FINGERPRINT, passage=how), 4) for how in ("", "donor")]
    for chain in chains:
        chain.extend(range(8))
    assert chains[0].hashes[:16] != chains[1].hashes[:16] and chains[0].hashes[16:] != chains[1].hashes[16:]


def test_texts_between_separators() -> None:
    assert between([1, 9, 8, 2, 3, 9, 8], [9, 8]) == [Passage(0, 1), Passage(3, 5), Passage(7, 7)]
    assert between([9, 9, 8, 9], [9, 8]) == [Passage(0, 1), Passage(3, 4)]
    assert between([1, 2], [9]) == [Passage(0, 2)] == between([1, 2], [])


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=6), st.lists(st.integers(4, 5), min_size=1)
)
def test_every_text_is_found(texts: list[list[int]], separator: list[int]) -> None:
    joined = [token for text in texts for token in (*separator, *text)][len(separator) :]
    assert [joined[part.start : part.end] for part in between(joined, separator)] == texts


def test_boundaries_of_the_client() -> None:
    assert cut(10, [2, 7]) == [Passage(0, 2), Passage(2, 7), Passage(7, 10)]
    for wrong in ([7, 2], [2, 11], [-1]):
        with pytest.raises(ValueError, match="must ascend from 0"):
            cut(10, wrong)


def test_passages_of_a_prompt() -> None:
    blending = Blending(separator=(9,), min_tokens=3)
    prompt = [1, 9, 1, 2, 3, 9, 1, 2, 9, 4, 5, 6, 7, 9, 1]
    assert blending.passages(prompt) == ([Passage(2, 5), Passage(9, 13)], 14)
    assert blending.passages([1, 2, 3]) == ([], 3) and blending.passages(prompt[:7]) == ([Passage(2, 5)], 6)
    # The last token is always of the question.
    assert blending.passages(prompt[:6]) == ([Passage(2, 5)], 5) and blending.passages([1, 9]) == ([], 1)
    assert blending.passages(prompt, [0, 5, 15]) == ([Passage(0, 5)], 14)
    assert blending.passages(prompt, [0, 5, 14]) == ([Passage(0, 5), Passage(5, 14)], 14)
    assert len(blending.passages([9, 1, 2, 3] * 1000)[0]) == MOST_PASSAGES


@given(st.lists(st.integers(0, 300), max_size=100), st.integers(1, 200))
def test_all_passages_have_room(lengths: list[int], min_tokens: int) -> None:
    blending, ends = Blending(min_tokens=min_tokens), [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    passages, _ = blending.passages(range(ends[-1] + 1), ends)
    assert sum(-(-part.tokens // 64) * 64 for part in passages) <= blending.room(ends[-1] + 1, 64)


@pytest.mark.parametrize(
    "wrong", [{"min_tokens": 0}, {"recompute_ratio": 1.1}, {"links": -1}, {"run": 0}, {"choose": "x"}]
)
def test_mistakes(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Blending(**wrong)  # type: ignore[arg-type]


def test_what_is_computed() -> None:
    blending = Blending(links=2, run=2, recompute_ratio=0.25)
    blend = Blend(4, 200, (Passage(6, 16), Passage(18, 28)), blending)
    assert blend.exact == 6 and blend.tokens == 20
    assert blend.gaps == [Passage(4, 6), Passage(16, 18), Passage(28, 200)]
    assert blend.links.tolist() == [6, 7, 18, 19]
    assert blend.first().tolist() == [4, 5, 6, 7, 16, 17, 18, 19, *range(28, 200)]
    scores = np.zeros(200, dtype=np.float32)
    scores[[10, 26]], scores[40] = 1, 9  # that of a token which is not blended counts for nothing
    assert blend.chosen(scores).tolist() == [10, 11, 26, 27]
    # Links and short gaps behind the first chosen token are computed again, the long gap is not.
    assert blend.then(blend.chosen(scores)).tolist() == [10, 11, 16, 17, 18, 19, 26, 27]
    assert not len(blend.then(np.zeros(0, dtype=np.int64)))


@given(
    st.integers(1, 9),
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_the_share_is_bounded_and_chosen_tokens_are_blended(
    run: int, ratio: float, parts: list[tuple[int, int]]
) -> None:
    passages, at = [], 3
    for tokens, gap in parts:
        passages.append(Passage(at, at + tokens))
        at += tokens + gap
    blend = Blend(3, at, tuple(passages), Blending(run=run, recompute_ratio=ratio))
    chosen = blend.chosen(np.random.default_rng(run).random(at, dtype=np.float32)).tolist()
    assert len(chosen) <= ratio * blend.tokens and chosen == sorted(set(chosen))
    assert all(any(part.start <= token < part.end for part in passages) for token in chosen)
    if ratio == 1:
        assert len(chosen) == blend.tokens
