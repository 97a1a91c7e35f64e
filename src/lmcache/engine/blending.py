"""Blending: KV of a passage of a prompt is used behind other tokens than those that it was computed behind.

The KV of a passage depends on what stood before it, so blended KV is an approximation. Some tokens are computed again, over the
blended KV of the others, to come nearer to the exact one. This module decides which; it knows no engine, and no position but
tokens of the prompt. What is exact: all tokens before the first blended one.

- *gaps* have no KV yet: separators, texts that were not found, and what stands between. They are always computed.
- *links* are the first tokens of each passage, which attend most to what stands before it.
- *chosen* are runs of tokens with the highest scores: those that the question attends to, or those whose keys deviate most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lmcache.chunks.passages import Passage, between, cut
from lmcache.errors import ConfigError

DONOR = "donor"
"""How the KV of a passage was computed: exactly, within another prompt."""
SEPARATOR = " # # "
"""The text between passages, if no setting names another one."""
QUESTION_TOKENS = 256
"""So many last tokens of the question say which tokens matter to it."""
MOST_PASSAGES = 64
"""Passages of one prompt that are looked up: each costs a round trip. Further ones are computed."""
SHORT_GAP_TOKENS = 64
"""Gaps of at most so many tokens are computed once more together with the chosen ones, over KV that is better then."""
Tokens = npt.NDArray[np.int64]
"""Numbers of tokens in the prompt, ascending."""


@dataclass(frozen=True)
class Blending:
    """What is blended, and how much of it is computed again. The first three names are those of the public project's settings.

    separator: token ids of the text between passages. min_tokens: shorter passages are computed. recompute_ratio: the share of
    the blended tokens that is chosen by score. links: how many tokens at the start of each passage are computed again. choose:
    `query` scores tokens by the attention that the text behind the last passage pays to them, `deviation` by how far their keys
    at `check_layer` are from the blended ones, `none` chooses no tokens. run: tokens are chosen in runs of so many.

    Raises:
        ConfigError: a value is out of range.
    """

    separator: tuple[int, ...] = ()
    min_tokens: int = 256
    recompute_ratio: float = 0.13
    check_layer: int = 1
    links: int = 4
    choose: Literal["query", "deviation", "none"] = "query"
    run: int = 4

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "min_tokens": (1, 1 << 20),
            "recompute_ratio": (0, 1),
            "check_layer": (0, 1 << 10),
            "links": (0, 1 << 10),
            "run": (1, 1 << 10),
        }
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"blending: {name} is {getattr(self, name)}; it must be from {least:g} to {most:g}")
        if self.choose not in ("query", "deviation", "none"):
            raise ConfigError(f"blending: choose is {self.choose!r}; it must be query, deviation or none")

    def passages(self, token_ids: Sequence[int], boundaries: Sequence[int] | None = None) -> tuple[list[Passage], int]:
        """Return the passages of a prompt that may be blended, and the token at which the text behind the last one begins.

        The text before the first separator is the beginning of the prompt, and the one behind the last is its question: neither
        is a passage. The last token is always of the question, since the answer begins with its logits; a passage that it is in
        is computed. boundaries: in place of separators, where passages begin, and last where the question does.

        Raises:
            ValueError: as `cut`.
        """
        parts = between(token_ids, self.separator) if boundaries is None else cut(len(token_ids), boundaries)
        if len(parts) < 2:
            return [], len(token_ids)
        end = min(parts[-1].start, len(token_ids) - 1)
        long_enough = [part for part in parts[1:-1] if part.tokens >= self.min_tokens and part.end <= end]
        return long_enough[:MOST_PASSAGES], end

    def room(self, tokens: int, block_tokens: int) -> int:
        """Return the tokens of room that the passages of a prompt of `tokens` tokens may take if each begins a new block."""
        return tokens + (block_tokens - 1) * min(MOST_PASSAGES, tokens // self.min_tokens)


def blending_of(given: Mapping[str, Any], separator: Sequence[int]) -> Blending:
    """Return how to blend by these settings: name -> value, as `load_blending` finds them. separator: its token ids.

    Raises:
        ConfigError: a value is out of range.
    """
    settings = {"min_tokens": given.get("blend_min_tokens"), "recompute_ratio": given.get("blend_recompute_ratios")}
    if (layer := given.get("blend_check_layers")) is not None:
        settings |= {"check_layer": layer, "choose": "deviation"}
    return Blending(tuple(separator), **{name: value for name, value in settings.items() if value is not None})


@dataclass(frozen=True)
class Blend:
    """What is done for one prompt. have: so many leading tokens have exact KV already. end: where the question begins. blended:
    the tokens with KV from passages, behind those and in order; at least one."""

    have: int
    end: int
    blended: tuple[Passage, ...]
    settings: Blending

    @property
    def exact(self) -> int:
        """So many leading tokens have exact KV at the end. What is computed behind them has not."""
        return self.blended[0].start

    @property
    def tokens(self) -> int:
        """Return how many tokens have blended KV, with those that are computed again."""
        return sum(part.tokens for part in self.blended)

    @property
    def gaps(self) -> list[Passage]:
        """Return the parts of the prompt before the question that have no KV yet."""
        ends, starts = [self.have, *(part.end for part in self.blended)], [part.start for part in self.blended]
        gaps = [Passage(*both) for both in zip(ends, [*starts, self.end], strict=True)]
        return [gap for gap in gaps if gap.tokens]

    @property
    def links(self) -> Tokens:
        return _joined([Passage(one.start, min(one.end, one.start + self.settings.links)) for one in self.blended])

    def first(self) -> Tokens:
        """Return the tokens that are computed before any are chosen by score: gaps and links."""
        return np.union1d(_joined(self.gaps), self.links)

    def then(self, chosen: Tokens) -> Tokens:
        """Return the tokens that are computed once some are chosen: these, links and short gaps, from the first chosen one on."""
        if not len(chosen):
            return chosen
        short = _joined([gap for gap in self.gaps if gap.tokens <= SHORT_GAP_TOKENS])
        again = np.union1d(self.links, short)
        return np.union1d(chosen, again[again > chosen[0]])

    def chosen(self, scores: npt.NDArray[np.float32]) -> Tokens:
        """Return the blended tokens with the highest scores, in runs. scores: of each token before the question."""
        run, runs, worth = self.settings.run, list[Passage](), list[float]()
        for part in self.blended:
            for start in range(part.start, part.end, run):
                one = Passage(start, min(part.end, start + run))
                runs.append(one)
                worth.append(float(scores[one.start : one.end].mean()))
        left, taken = int(self.settings.recompute_ratio * self.tokens), list[Passage]()
        for number in np.argsort(-np.nan_to_num(np.asarray(worth)), kind="stable"):
            if runs[number].tokens > left:
                break
            left -= runs[number].tokens
            taken.append(runs[number])
        return _joined(sorted(taken))


def consecutive(tokens: Tokens) -> list[Passage]:
    """Return the runs of consecutive tokens among these."""
    ends = np.flatnonzero(np.diff(tokens) != 1) + 1
    return [Passage(int(run[0]), int(run[-1]) + 1) for run in np.split(tokens, ends) if len(run)]


def _joined(parts: Sequence[Passage]) -> Tokens:
    ranges: list[Any] = [np.arange(part.start, part.end, dtype=np.int64) for part in parts]
    return np.concatenate(ranges) if ranges else np.zeros(0, dtype=np.int64)
