"""Where a prompt parts from the nearest one that this engine has computed, to the token.

The server sees hashes of chunks only. So the engine, which has the tokens, tells it a position. It keeps no tokens for this:
eight bits of each, mixed with a number that only this process knows.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache.chunks import HASH_BYTES, TokenChain
from lmcache.chunks.hashing import token_bytes

MOST_CHUNKS = 8192
"""Chunks that are remembered; of more, the oldest are forgotten. With 256 tokens a chunk they take 6 MB."""
_REMEMBERED, _WALKED = 8, 64
"""Of a prompt, so many chunks behind the first missing one are remembered, and so many are looked through."""
_BRANCHES = 4
"""Chunks with the same parent that are compared, the latest first."""
Sketch = npt.NDArray[np.uint8]


class Nearest:
    """Remembers the beginnings of what was missing."""

    def __init__(self) -> None:
        self._factor = np.uint32(secrets.randbits(31) << 1 | 1)
        self._chunks: OrderedDict[bytes, tuple[bytes, Sketch]] = OrderedDict()
        """Hash of a chunk -> its parent's, and its sketch."""
        self._branches: dict[bytes, list[bytes]] = {}
        """Hash of a parent, or root -> the chunks after it."""

    def __len__(self) -> int:
        return len(self._chunks)

    def missed(self, chain: TokenChain, tokens: Any, first: int) -> int:
        """Remember the prompt, whose chunks from number `first` on were not found. Return the first token from which on it
        differs from the nearest prompt; -1 if none is known that parts from it in a full chunk. It can be a token late, once
        in 256 times."""
        end, chunk = min(len(chain), first + _WALKED), first
        while chunk < end and self._hash(chain, chunk) in self._chunks:
            chunk += 1
        position, last = -1, min(len(chain), chunk + _REMEMBERED)
        if chunk >= last:
            return -1
        size = chain.chunk_tokens
        sketches = self._sketches(tokens[chunk * size : last * size]).reshape(-1, size)
        known = [self._chunks[one][1] for one in self._branches.get(chain.parent(chunk), ())]
        if known:
            shared = max(int((one != sketches[0]).argmax()) for one in known)
            position = chunk * size + shared
        for number, sketch in enumerate(sketches, chunk):
            self._remember(self._hash(chain, number), chain.parent(number), sketch.copy())
        return position

    @staticmethod
    def _hash(chain: TokenChain, chunk: int) -> bytes:
        return chain.hashes[HASH_BYTES * chunk : HASH_BYTES * chunk + HASH_BYTES]

    def _sketches(self, tokens: Any) -> Sketch:
        ids = np.frombuffer(token_bytes(tokens), "<u4")
        sketches: Sketch = ((ids ^ ids >> np.uint32(16)) * self._factor >> np.uint32(24)).astype(np.uint8)
        return sketches

    def _remember(self, chunk: bytes, parent: bytes, sketch: Sketch) -> None:
        if chunk in self._chunks:
            return
        self._chunks[chunk] = parent, sketch
        branches = self._branches.setdefault(parent, [])
        branches.insert(0, chunk)
        if len(branches) > _BRANCHES:
            self._forget(branches[-1])
        if len(self._chunks) > MOST_CHUNKS:
            self._forget(next(iter(self._chunks)))

    def _forget(self, chunk: bytes) -> None:
        parent, _ = self._chunks.pop(chunk)
        branches = self._branches[parent]
        branches.remove(chunk)
        if not branches:
            del self._branches[parent]
