"""Prompts as applications send them: each workload is a number of conversations, and each of these a few prompts, one
after the other.

Everything follows from a seed, and nothing is kept: a conversation makes its next prompt when it is asked for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

FIRST_TOKEN = 40
"""Ids below are often special tokens."""
_TURNS, _DOCUMENTS, _DOCUMENTS_OF_PROMPT = 4, 12, 3


class Shape(NamedTuple):
    """tokens: of a prompt, of the last one in a conversation. vocabulary: number of ids that prompts use."""

    tokens: int
    vocabulary: int
    seed: int


Conversation = Callable[[Sequence[int]], "list[int] | None"]
"""Takes the answer to the prompt before (none for the first one), and returns the next prompt; None at the end."""


def _words(shape: Shape, count: int, *names: object) -> list[int]:
    """Return so many tokens, which follow from the names."""
    dice = random.Random(f"{shape.seed} {names}")
    return [FIRST_TOKEN + dice.randrange(shape.vocabulary) for _ in range(max(1, count))]


def _of(prompts: Iterator[list[int]]) -> Conversation:
    return lambda answer: next(prompts, None)


def _unique(shape: Shape, number: int) -> Conversation:
    return _of(iter([_words(shape, shape.tokens, "unique", number)]))


def _repeat(shape: Shape, number: int) -> Conversation:
    """The same prompts as those of `unique`, once more."""
    return _unique(shape, number)


def _prefix(shape: Shape, number: int) -> Conversation:
    shared = _words(shape, shape.tokens * 4 // 5, "prefix")
    return _of(iter([shared + _words(shape, shape.tokens - len(shared), "prefix", number)]))


def _rag(shape: Shape, number: int) -> Conversation:
    """A system prompt, a few of the same documents in any order, and a question."""
    part = shape.tokens // (_DOCUMENTS_OF_PROMPT + 1)
    chosen = random.Random(f"{shape.seed} rag {number}").sample(range(_DOCUMENTS), _DOCUMENTS_OF_PROMPT)
    prompt = _words(shape, part // 2, "rag")
    for document in chosen:
        prompt += _words(shape, part, "rag document", document)
    return _of(iter([prompt + _words(shape, shape.tokens - len(prompt), "rag question", number)]))


def _growing(shape: Shape, number: int, name: str, shared_share: float) -> Conversation:
    """Turns of a conversation: what all begin with, then in turn something new and the answer to it."""
    prompt = _words(shape, int(shape.tokens * shared_share), name)
    step, turn = max(1, (shape.tokens - len(prompt)) // _TURNS), 0

    def following(answer: Sequence[int]) -> list[int] | None:
        nonlocal turn
        if turn >= _TURNS:
            return None
        turn += 1
        prompt.extend([*answer, *_words(shape, step, name, number, turn)])
        return list(prompt)

    return following


def _chat(shape: Shape, number: int) -> Conversation:
    return _growing(shape, number, "chat", 0.1)


def _agents(shape: Shape, number: int) -> Conversation:
    return _growing(shape, number, "tools", 0.6)


def prompt_of(shape: Shape, number: int) -> list[int]:
    """Return a prompt that shares nothing with others."""
    return _words(shape, shape.tokens, "unique", number)


class Workload(NamedTuple):
    """What is measured together. conversations: makes one from its number. prompts: in each conversation."""

    name: str
    summary: str
    conversation: Callable[[Shape, int], Conversation]
    prompts: int


WORKLOADS = (
    Workload("unique", "prompts that share nothing", _unique, 1),
    Workload("repeat", "the prompts of `unique` once more", _repeat, 1),
    Workload("prefix", "one shared beginning of 80 %", _prefix, 1),
    Workload("chat", f"conversations of {_TURNS} turns", _chat, _TURNS),
    Workload("rag", f"{_DOCUMENTS_OF_PROMPT} of {_DOCUMENTS} documents in any order", _rag, 1),
    Workload("agents", f"one list of tools (60 %), then {_TURNS} steps", _agents, _TURNS),
)
