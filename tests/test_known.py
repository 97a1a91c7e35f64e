"""Which blocks of known prompts the server has: an independent router follows what is told, and never learns anything wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lmcache.chunks import TokenChain, chunk_root, split_hashes
from lmcache.engine.known import L1, MEDIA, TIERS, Known, Prompt

ROOT = chunk_root(b"f" * 16)


class Router:
    """Keeps which blocks are where. A block's hash is here the tuple of all tokens up to its end."""

    def __init__(self, block: int) -> None:
        self.block, self.has = block, {medium: set[Any]() for medium in MEDIA}

    def take(self, known: Known) -> None:
        told, known.told = known.told, []
        for one in told:
            there = self.has[one.medium]
            if one.tokens is None:
                assert set(one.blocks) <= there and len(set(one.blocks)) == len(one.blocks), "removed, and not stored"
                there.difference_update(one.blocks)
                continue
            assert one.parent is None or one.parent in there, "the parent is not known"
            before = one.parent or ()
            for at, block in enumerate(one.blocks):
                before = (*before, *one.tokens[at * self.block : (at + 1) * self.block])
                assert block == before and block not in there
                there.add(block)


class Engine:
    """Prompts that share beginnings, and which of their chunks are where."""

    def __init__(self, seed: int, chunk: int, block: int, **bounds: int) -> None:
        self.random, self.chunk, self.block = random.Random(seed), chunk, block
        self.known, self.router = Known(block, **bounds), Router(block)
        self.texts: dict[int, list[int]] = {}
        self.chains: dict[int, TokenChain] = {}
        self.has = {medium: set[bytes]() for medium in MEDIA}

    def note(self, name: int, tokens: list[int]) -> None:
        chain = self.chains.setdefault(name, TokenChain(ROOT, self.chunk))
        chain.extend(tokens)
        self.texts[name] = tokens
        blocks = [tuple(tokens[:end]) for end in range(self.block, len(tokens) + 1, self.block)]
        prompt = self.known.prompt(name, chain) or Prompt(chain, tokens, blocks)
        if prompt.tokens is not None:
            prompt.tokens, prompt.blocks = tokens, blocks
        self.known.note(name, prompt)

    def step(self) -> None:
        what, medium = self.random.random(), self.random.choice(MEDIA)
        if what < 0.3 or not self.texts:
            name = self.random.randrange(6)
            begin = self.random.choice(list(self.texts.values()) or [[]])
            old = self.texts.get(name)
            tokens = (old if old is not None else begin[: self.random.randrange(60)]) + self.tokens()
            self.note(name, tokens)
        elif what < 0.95:
            chain = self.random.choice(list(self.chains.values()))
            for key in split_hashes(chain.hashes)[: self.random.randrange(8)] if what < 0.7 else ():
                self.has[medium].add(key)
                self.known.has(key, medium)
            if what >= 0.7 and len(chain):
                key = self.random.choice(split_hashes(chain.hashes))
                self.has[medium].discard(key)
                self.known.gone(key, medium)
        elif what < 0.97:
            self.has[medium].clear()
            self.known.emptied(medium)
        else:
            self.known.tell_again()
        self.router.take(self.known)

    def tokens(self) -> list[int]:
        return [self.random.randrange(3) for _ in range(self.random.randrange(30))]

    def expected(self, medium: int) -> set[Any]:
        """The blocks before the first chunk that is not there."""
        found = set()
        for name, chain in self.chains.items():
            there = 0
            for key in split_hashes(chain.hashes):
                if key not in self.has[medium]:
                    break
                there += self.chunk
            found |= {tuple(self.texts[name][:end]) for end in range(self.block, there + 1, self.block)}
        return found


@pytest.mark.parametrize(("chunk", "block"), [(4, 4), (8, 4), (2, 8), (6, 4), (4, 6), (5, 3)])
def test_a_router_knows_the_blocks_whose_chunks_are_all_there(chunk: int, block: int) -> None:
    for seed in range(15):
        engine = Engine(seed, chunk, block)
        for _ in range(60):
            engine.step()
            for medium in MEDIA:
                assert engine.router.has[medium] == engine.expected(medium), (seed, medium)
        engine.known.forget()
        engine.router.take(engine.known)
        assert not any(engine.router.has.values()), "everything that was told can be taken back"


@pytest.mark.parametrize(("chunk", "block"), [(4, 4), (2, 8), (6, 4)])
def test_what_is_forgotten_is_told_as_removed_before(chunk: int, block: int) -> None:
    """With little memory less is told, and nothing wrong."""
    most, known_at_once = 12, 0
    for seed in range(30):
        engine = Engine(seed, chunk, block, most_blocks=most, most_tokens=100)
        for _ in range(60):
            engine.step()
            for medium in MEDIA:
                assert engine.router.has[medium] <= engine.expected(medium), (seed, medium)
                known_at_once = max(known_at_once, len(engine.router.has[medium]))
    assert 1 <= known_at_once <= most


def test_what_follows_a_chunk_that_was_forgotten_and_noted_again_goes_with_it() -> None:
    engine = Engine(1, 4, 4, most_blocks=2)
    engine.note(1, [0] * 4)
    engine.note(1, [0] * 8)
    engine.note(2, [1] * 4)  # for which the oldest chunk is forgotten, and not the one after it
    engine.known.most_blocks = 99
    engine.note(3, [0] * 4 + [2] * 4)
    first, second = split_hashes(engine.chains[1].hashes)
    engine.known.has(first, L1)
    engine.known.has(second, L1)
    engine.router.take(engine.known)
    assert len(engine.router.has[L1]) == 2
    engine.known.gone(first, L1)
    engine.router.take(engine.known)
    assert not engine.router.has[L1]


def test_a_prompt_is_told_in_one_event_and_in_order() -> None:
    engine = Engine(1, 4, 4)
    tokens = list(range(40))
    engine.note(1, tokens)
    keys = split_hashes(engine.chains[1].hashes)
    for key in keys[1:]:
        engine.known.has(key, L1)
    assert not engine.known.told, "a router would drop what has no parent"
    engine.known.has(keys[0], L1)
    (told,) = engine.known.told
    assert told.parent is None and told.tokens == tokens and len(told.blocks) == 10
    engine.known.has(keys[0], TIERS)
    engine.known.gone(keys[3], L1)
    assert [(one.medium, len(one.blocks)) for one in engine.known.told[1:]] == [(TIERS, 1), (L1, 7)]
