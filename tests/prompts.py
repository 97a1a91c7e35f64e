"""Prompts as token ids, and what it means for two answers to be the same."""

from __future__ import annotations

import random
from typing import Any

VOCABULARY = 8000
TOLERANCE = 1e-3


def tokens(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, VOCABULARY) for _ in range(count)]


def mixed() -> list[list[int]]:
    """Shared prefixes that end inside blocks (of 64 or 128) and chunks of 16, whole blocks, and prompts shorter than a block."""
    stem = tokens(600, 1)
    return [
        stem + tokens(90, 2),
        stem + tokens(17, 3),
        stem[:417] + tokens(60, 4),
        stem[:128] + tokens(128, 5),
        tokens(512, 6),
        tokens(31, 7),
        tokens(31, 7)[:24] + tokens(7, 8),
        tokens(16, 9),
        tokens(5, 10),
    ]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Greedy tokens are equal, and so are their log probabilities, within float32's noise."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one["tokens"] == other["tokens"], f"prompt {number}: {one['tokens']} instead of {other['tokens']}"
        worst = max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))
        assert worst < TOLERANCE, f"prompt {number}: log probabilities differ by {worst}"


def differs(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    try:
        assert_same(found, expected)
    except AssertionError:
        return True
    return False
