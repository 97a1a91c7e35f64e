"""Where an engine that computes one prompt at a time should stop to keep the states of recurrent layers.

A state can be used only by prompts that begin with all of the tokens before it. It is kept at the end of a prompt's last whole
chunk, for the next turn of a conversation. Prompts that share a beginning (instructions, examples, a document) part before that:
the second one shows where, and the state that it keeps there serves all that follow.
"""

from __future__ import annotations

from lmcache.chunks import HASH_BYTES, TokenChain

_REMEMBERED_CHUNKS = 1 << 16


class Forks:
    """Remembers the chunks of the latest prompts."""

    def __init__(self) -> None:
        self._seen: dict[bytes, None] = {}
        """Their hashes, those of the latest prompt last."""

    def boundaries(self, chain: TokenChain, tokens: int) -> list[int]:
        """Return where a prompt of so many tokens should be stopped at, in tokens, ascending: where it parts from earlier ones,
        if it does within its whole chunks, and the end of the last whole chunk before its last token. Remember its chunks.

        chain: the prompt's, complete."""
        size = chain.chunk_tokens
        last = max(0, tokens - 1) // size
        hashes = [chain.hashes[at : at + HASH_BYTES] for at in range(0, last * HASH_BYTES, HASH_BYTES)]
        shared = next((number for number, one in enumerate(hashes) if one not in self._seen), last)
        for one in hashes:
            self._seen.pop(one, None)
            self._seen[one] = None
        while len(self._seen) > _REMEMBERED_CHUNKS:
            del self._seen[next(iter(self._seen))]
        return [chunks * size for chunks in sorted({shared, last}) if chunks]
