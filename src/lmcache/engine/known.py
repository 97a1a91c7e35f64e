"""Which blocks of known prompts the server has, for engines that publish KV events.

The server tells what happens to chunks, by their hashes. Routers want the engine's blocks, by the engine's hashes, with their
tokens. So an engine keeps for each chunk of the prompts that it has seen lately which of its blocks end in it. A block is told
as stored once all chunks from the prompt's start to the block's end are there, so it is never told before its parent. It is told
as removed when one of these chunks is gone, and also when its chunk is forgotten here, since nobody could tell its removal later.
Prompts that part within a chunk share the blocks before that, so a block can end in several chunks.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache.chunks import HASH_BYTES, TokenChain, split_hashes

L1, TIERS = MEDIA = 1, 2
"""The places where chunks can be. Each is one bit of `_Chunk.has` and `_Chunk.told`."""
MOST_BLOCKS = 1 << 18
"""Bound of the blocks whose removal can be told. A chunk in which no block ends counts as one."""
MOST_TOKENS = 1 << 20
"""Bound of the tokens of prompts that may still be told as stored; those of running requests take no memory of their own."""
BLOCKS_OF_EVENT = 4096


@dataclass
class Told:
    """Consecutive blocks of a prompt that are stored (`tokens`), or blocks that are removed, in one medium."""

    medium: int
    blocks: list[Hashable]
    parent: Hashable | None = None
    tokens: list[int] | None = None
    prompt: Prompt | None = None
    first: int = 0
    """Number of the first block in the prompt."""


@dataclass(eq=False)
class Prompt:
    """A prompt whose chunks are told. tokens, blocks: the engine's own lists, which grow with the prompt; None once it has been
    forgotten. about: what else the engine says of its blocks. found: the last hit that was told."""

    chain: TokenChain
    tokens: Sequence[int] | None
    blocks: Sequence[Hashable] | None
    about: Any = None
    noted: int = 0
    found: object = None


class _Chunk:
    """A chunk. blocks: those that end in it. has, told: the media in which it is, and in which its blocks are told as stored."""

    __slots__ = ("_children", "blocks", "has", "number", "parent", "prompt", "told")

    def __init__(self, prompt: Prompt, number: int, parent: bytes, blocks: tuple[Hashable, ...]) -> None:
        self.prompt, self.number, self.parent, self.blocks = prompt, number, parent, blocks
        self._children: bytes | dict[bytes, None] | None = None
        """Most chunks have one, and a dictionary takes as much memory as all the rest."""
        self.has = self.told = 0

    @property
    def children(self) -> Collection[bytes]:
        """The known chunks that follow this one."""
        found = self._children
        return () if found is None else (found,) if isinstance(found, bytes) else found

    def adopt(self, key: bytes) -> None:
        if self._children is None:
            self._children = key
        elif isinstance(self._children, dict):
            self._children[key] = None
        elif self._children != key:
            self._children = {self._children: None, key: None}

    def disown(self, key: bytes) -> None:
        if isinstance(self._children, dict):
            self._children.pop(key, None)
        elif self._children == key:
            self._children = None


@dataclass
class Known:
    """The chunks of known prompts. block_tokens: tokens of a block."""

    block_tokens: int
    most_blocks: int = MOST_BLOCKS
    most_tokens: int = MOST_TOKENS
    told: list[Told] = field(default_factory=list)
    """The changes that have not been published yet, the oldest first."""
    _chunks: OrderedDict[bytes, _Chunk] = field(default_factory=OrderedDict)
    _prompts: OrderedDict[Hashable, Prompt] = field(default_factory=OrderedDict)
    _copies: dict[int, dict[Hashable, int]] = field(default_factory=lambda: {medium: {} for medium in MEDIA})
    """For each medium, and each block: the number of chunks told as stored in which the block ends."""
    _blocks: int = 0
    _tokens: int = 0

    def prompt(self, name: Hashable, chain: TokenChain) -> Prompt | None:
        """Return the prompt that was noted under this name, if it still has this chain."""
        found = self._prompts.get(name)
        return found if found is not None and found.chain is chain else None

    def note(self, name: Hashable, prompt: Prompt) -> None:
        """Note those full chunks of the prompt's chain that were not noted before, as far as their blocks have hashes."""
        size, chain, blocks = prompt.chain.chunk_tokens, prompt.chain, prompt.blocks
        if prompt.noted >= len(chain) or blocks is None:
            return
        first = prompt.noted
        end = min(len(chain), (len(blocks) + 1) * self.block_tokens // size)
        keys = split_hashes(chain.hashes[first * HASH_BYTES : end * HASH_BYTES])
        parent = chain.parent(first) if first else b""
        above = self._chunks.get(parent)
        for number, key in enumerate(keys, first):
            begin, after = number * size // self.block_tokens, (number + 1) * size // self.block_tokens
            if after > len(blocks):
                break
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = self._chunks[key] = _Chunk(prompt, number, parent, tuple(blocks[begin:after]))
                self._blocks += max(1, after - begin)
            if above is not None:
                above.adopt(key)
            chunk.prompt, parent, above = prompt, key, chunk
            prompt.noted = number + 1
        # The beginning is forgotten last, so that it is there for the chunks after it.
        for key in reversed(keys[: prompt.noted - first]):
            self._chunks.move_to_end(key)
        self._keep(name, prompt, (prompt.noted - first) * size)
        self._forget_oldest()

    def ended(self, prompt: Prompt) -> None:
        """Keep only what was noted of a prompt that grows no more: the engine's lists also hold the answer, which may be long."""
        if prompt.tokens is not None and prompt.blocks is not None:
            tokens = prompt.noted * prompt.chain.chunk_tokens
            prompt.tokens = array("q", prompt.tokens[:tokens])
            prompt.blocks = list(prompt.blocks[: tokens // self.block_tokens])

    def has(self, key: bytes, medium: int) -> None:
        """Note that this chunk is there. If it is a known one, its blocks are told as stored, and those of the chunks after it
        that are there."""
        chunk = self._chunks.get(key)
        if chunk is None:
            return
        chunk.has |= medium
        above = self._chunks.get(chunk.parent) if chunk.number else None
        if above is not None:  # which may have been forgotten and noted again since this chunk was noted
            above.adopt(key)
        if not chunk.number or (above is not None and above.told & medium):
            self._tell(key, medium)

    def gone(self, key: bytes, medium: int) -> None:
        """Note that this chunk is not there any more. What is told of it, and of the chunks after it, is told as removed."""
        chunk = self._chunks.get(key)
        if chunk is not None:
            chunk.has &= ~medium
            self._retract(key, medium)

    def emptied(self, medium: int) -> None:
        """Note that no chunk is there any more."""
        for chunk in self._chunks.values():
            chunk.has &= ~medium
            self._remove(chunk, medium)

    def forget(self) -> None:
        """Tell everything as removed, and forget all prompts."""
        for medium in MEDIA:
            self.emptied(medium)
        self._chunks.clear()
        self._prompts.clear()
        self._blocks = self._tokens = 0

    def last_words(self) -> list[Told]:
        """Return what tells everything as removed that was told as stored and published. It works whatever has failed."""
        removed = [one for one in self.told if one.tokens is None]
        for medium, copies in self._copies.items():
            blocks = list(copies)
            cuts = range(0, len(blocks), BLOCKS_OF_EVENT)
            removed += [Told(medium, blocks[at : at + BLOCKS_OF_EVENT]) for at in cuts]
        return removed

    def tell_again(self) -> None:
        """Tell everything as removed, and then as stored what is there, as far as its tokens are still known."""
        for medium in MEDIA:
            for chunk in self._chunks.values():
                self._remove(chunk, medium)
            for key in [key for key, chunk in self._chunks.items() if not chunk.number]:
                self._tell(key, medium)

    def _tell(self, key: bytes, medium: int) -> None:
        """Tell the chunk, whose parent is told, and those after it, as far as they are there and not told."""
        waiting = [key]
        while waiting:
            key = waiting.pop()
            chunk = self._chunks.get(key)
            if chunk is None or chunk.told & medium or not chunk.has & medium or chunk.prompt.tokens is None:
                continue
            chunk.told |= medium
            self._add(chunk, medium)
            waiting += chunk.children

    def _add(self, chunk: _Chunk, medium: int) -> None:
        """Tell the chunk's blocks as stored, together with those before them where that is possible."""
        prompt, size, copies = chunk.prompt, self.block_tokens, self._copies[medium]
        first, new = chunk.number * prompt.chain.chunk_tokens // size, list[Hashable]()
        for block in chunk.blocks:
            before = copies.get(block, 0)
            copies[block] = before + 1
            if not before:
                new.append(block)
            else:  # of a block that is told, all blocks before it are told
                first += 1
        if not new:
            return
        end = first + len(new)
        assert prompt.tokens is not None and prompt.blocks is not None
        tokens = list(prompt.tokens[first * size : end * size])
        last = self.told[-1] if self.told else None
        if (
            last is not None and last.prompt is prompt and last.medium == medium
            and last.first + len(last.blocks) == first and end - last.first <= BLOCKS_OF_EVENT
        ):  # fmt: skip
            last.blocks += new
            assert last.tokens is not None
            last.tokens += tokens
        else:
            parent = prompt.blocks[first - 1] if first else None
            self.told.append(Told(medium, new, parent, tokens, prompt, first))

    def _retract(self, key: bytes, medium: int) -> None:
        waiting = [key]
        while waiting:
            chunk = self._chunks.get(waiting.pop())
            if chunk is not None and chunk.told & medium:
                self._remove(chunk, medium)
                waiting += chunk.children

    def _remove(self, chunk: _Chunk, medium: int) -> None:
        """Tell the chunk's blocks as removed, if they are told as stored."""
        if not chunk.told & medium:
            return
        chunk.told &= ~medium
        gone, copies = list[Hashable](), self._copies[medium]
        for block in chunk.blocks:
            left = copies.pop(block) - 1
            if left:
                copies[block] = left
            else:
                gone.append(block)
        if not gone:
            return
        last = self.told[-1] if self.told else None
        if last is None or last.tokens is not None or last.medium != medium or len(last.blocks) >= BLOCKS_OF_EVENT:
            last = Told(medium, [])
            self.told.append(last)
        last.blocks += gone

    def _keep(self, name: Hashable, prompt: Prompt, tokens: int) -> None:
        """Keep the prompt's tokens until there are too many newer ones."""
        before = self._prompts.get(name)
        if before is not None and before is not prompt:
            self._drop(before)
        self._prompts[name] = prompt
        self._prompts.move_to_end(name)
        self._tokens += tokens
        while self._tokens > self.most_tokens and len(self._prompts) > 1:
            self._drop(self._prompts.popitem(last=False)[1])

    def _drop(self, prompt: Prompt) -> None:
        self._tokens -= prompt.noted * prompt.chain.chunk_tokens
        prompt.tokens = prompt.blocks = None

    def _forget_oldest(self) -> None:
        while self._blocks > self.most_blocks:
            key = next(iter(self._chunks))
            for medium in MEDIA:
                self._retract(key, medium)
            chunk = self._chunks.pop(key)
            self._blocks -= max(1, len(chunk.blocks))
            above = self._chunks.get(chunk.parent)
            if above is not None:
                above.disown(key)
