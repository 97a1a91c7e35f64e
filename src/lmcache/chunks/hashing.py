"""Chunk hashes, which are equal in every process and on every host for equal tokens.

root  = BLAKE3 derive_key("lmcache chunk v1", fingerprint, cache_salt, LoRA name, LoRA content id, each length-prefixed)
        of a passage: derive_key("lmcache passage v1", the same fields, how its KV was computed)
chunk = first 16 bytes of BLAKE3(parent, token count as u32, token ids as u32, that chunk's extras length-prefixed)

All integers are little-endian. An extra is whatever else changes the KV from that chunk on: a multimodal identifier with its
offset, or a digest of prompt embeddings. So a second image changes only the hashes of its own chunk and of later ones. A partial
chunk, which is not full, is hashed by the same formula and is never a parent.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from blake3 import blake3

if TYPE_CHECKING:  # the server computes no hashes and does not need NumPy
    import numpy as np
    import numpy.typing as npt

    Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.int64]

HASH_BYTES, TENANT_BYTES = 16, 8
_ROOT_CONTEXT, _PASSAGE_CONTEXT, _TENANT_CONTEXT = "lmcache chunk v1", "lmcache passage v1", "lmcache tenant v1"
_U32 = struct.Struct("<I")
_TYPECODE = "I" if array("I").itemsize == 4 else "L"
_ENCODED_TOKENS = 4096
"""How many tokens are encoded at a time. The page faults of larger buffers would take as long as the hashing of their tokens."""

Extras = Callable[[int, int], bytes]
"""Returns the encoded extras inside a half-open token range, or b"" where there are none."""


def chunk_root(
    fingerprint: bytes, cache_salt: str = "", lora_name: str = "", lora_id: str = "", passage: str = ""
) -> bytes:
    """Return the 16-byte root, which takes the place of the parent of a prompt's first chunk.

    passage: how the KV of a passage was computed; "" for prompts. The chunks of a passage are never those of a prompt."""
    fields = [fingerprint, _utf8(cache_salt), _utf8(lora_name), _utf8(lora_id)]
    if passage:
        fields.append(_utf8(passage))
    material = b"".join(_U32.pack(len(field)) + field for field in fields)
    return blake3(material, derive_key_context=_PASSAGE_CONTEXT if passage else _ROOT_CONTEXT).digest(HASH_BYTES)


def tenant_of(cache_salt: str) -> bytes:
    """Return the 8-byte id of a `cache_salt`, by which servers tell tenants apart without being told salts; b"" for no salt."""
    return blake3(_utf8(cache_salt), derive_key_context=_TENANT_CONTEXT).digest(TENANT_BYTES) if cache_salt else b""


def split_hashes(hashes: bytes) -> list[bytes]:
    """Return each of these chunk hashes, which are joined in `hashes`."""
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def chunk_hash(parent: bytes, token_ids: Tokens, extras: bytes = b"") -> bytes:
    """Return the 16-byte hash of one chunk, full or partial.

    Raises:
        OverflowError: a token id is negative or does not fit in 32 bits.
    """
    return blake3(_material(parent, len(token_ids), token_bytes(token_ids), extras)).digest(HASH_BYTES)


def encode_extra(identifier: str | bytes, offset: int) -> bytes:
    """Encode one extra (for example a multimodal item) with its token offset from the prompt's start, length-prefixed."""
    raw = _utf8(identifier) if isinstance(identifier, str) else identifier
    return _U32.pack(len(raw)) + raw + struct.pack("<q", offset)


def token_bytes(token_ids: Tokens) -> bytes:
    """Encode token ids as little-endian uint32.

    Raises:
        OverflowError: a token id is negative or does not fit in 32 bits.
    """
    if hasattr(token_ids, "astype"):
        ndarray = cast("npt.NDArray[np.int64]", token_ids)
        if len(ndarray) and not (ndarray.min() >= 0 and ndarray.max() <= 0xFFFFFFFF):
            raise OverflowError("token ids must be from 0 to 4294967295")
        return ndarray.astype("<u4").tobytes()
    ids = array(_TYPECODE, token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def _utf8(text: str) -> bytes:
    """Encode text that a user has chosen, which may hold half of a surrogate pair: JSON can express it, and UTF-8 cannot."""
    return text.encode("utf-8", "surrogatepass")


def _material(parent: bytes, count: int, ids: bytes, extras: bytes) -> bytes:
    """Return what is hashed for a chunk."""
    material = parent + _U32.pack(count) + ids
    return material + _U32.pack(len(extras)) + extras if extras else material


class TokenChain:
    """The chunk hashes of one prompt, which grow with it: each token is hashed only once.

    >>> chain = TokenChain(chunk_root(b"f" * 16), chunk_tokens=4)
    >>> chain.extend(range(9))
    2
    >>> len(chain.hashes) // HASH_BYTES
    2
    """

    __slots__ = ("_extras", "chunk_tokens", "hashes", "root", "tenant", "text")

    def __init__(self, root: bytes, chunk_tokens: int, extras: Extras | None = None, tenant: bytes = b"") -> None:
        self.root = root
        self.chunk_tokens = chunk_tokens
        self.hashes = b""
        """The hashes of all full chunks so far, 16 bytes each, joined."""
        self.text = b""
        """Eight bytes that name the tokens of the first chunk alone, whatever the root; b"" before it is full."""
        self._extras = extras
        self.tenant = tenant
        """The tenant whose prompt it is (`tenant_of`); b"" if nobody is named."""

    def __len__(self) -> int:
        """Return the number of full chunks hashed so far."""
        return len(self.hashes) // HASH_BYTES

    def tail(self, token_ids: Sequence[int], end: int | None = None) -> bytes:
        """Return the hash of the partial chunk at the end of the first `end` (None: all) of `token_ids`, b"" where there is none.
        Full chunks must be hashed.

        The partial chunk is never a parent: the chunks after it have the full chunk at its place in their chain.
        """
        end = len(token_ids) if end is None else end
        first = end // self.chunk_tokens * self.chunk_tokens
        if first == end:
            return b""
        extras = self._extras(first, end) if self._extras else b""
        return chunk_hash(self.parent(first // self.chunk_tokens), token_ids[first:end], extras)

    def parent(self, chunk: int) -> bytes:
        """Return the parent hash of chunk number `chunk`: the root for the first one."""
        return self.hashes[(chunk - 1) * HASH_BYTES : chunk * HASH_BYTES] if chunk else self.root

    def extend(self, token_ids: Tokens) -> int:
        """Hash the new full chunks of `token_ids`, the complete prompt so far. Return the number of full chunks in it.

        Raises:
            OverflowError: a token id is negative or does not fit in 32 bits.
        """
        size, done = self.chunk_tokens, len(self)
        total = len(token_ids) // size
        if total <= done:
            return total
        parent, out, encoded, step = self.parent(done), [], b"", max(1, _ENCODED_TOKENS // size)
        hasher = blake3()
        for number in range(done, total):
            at = (number - done) % step * size * 4
            if not at:
                encoded = token_bytes(token_ids[number * size : min(number + step, total) * size])
            if not number:
                self.text = blake3(encoded[: size * 4]).digest(8)
            extras = self._extras(number * size, (number + 1) * size) if self._extras else b""
            hasher.update(_material(parent, size, encoded[at : at + size * 4], extras))
            parent = hasher.digest(HASH_BYTES)
            hasher.reset()
            out.append(parent)
        self.hashes += b"".join(out)
        return total
