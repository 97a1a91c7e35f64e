"""What one rank of an engine serves, and what engines that cannot be served are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmcache.chunks import Layout, Shard, shard_of_rank
from lmcache.engine.identity import Identity, plain
from lmcache.errors import LayoutError, LMCacheError
from lmcache.transfer.paged import PagedKV

NOT_SERVED = (
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    LMCacheError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Whatever a release of an engine that we do not know may raise where we look into it: that engine must run on without us."""


KV_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}
"""Our names of the dtypes that KV may have, by PyTorch's."""
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su", "yarn-dynamic"})


@dataclass(frozen=True)
class ServedKV:
    """The KV of a model, and the part of it on this rank.

    model: the layout in chunks of one token, without a name of the weights. stores: whether this rank is the one, of those that
    hold this shard, which stores it.
    """

    identity: Identity
    model: Layout
    shard: Shard
    paged: PagedKV
    stores: bool

    def layout(self, chunk_tokens: int) -> Layout:
        """The model's layout for chunks of so many tokens.

        Raises:
            IdentityUnknown: it is not known (yet) which weights are served.
        """
        return self.identity.layout(self.model, chunk_tokens)


def stores_its_shard(model: Layout, tp_rank: int, tp_size: int) -> bool:
    """Whether this tensor-parallel rank is the first of those that hold the same heads."""
    layers = 0, model.num_layers
    return not tp_rank or (
        shard_of_rank(model, tp_rank, tp_size, *layers).index
        != shard_of_rank(model, tp_rank - 1, tp_size, *layers).index
    )


def kv_dtype(dtype: Any, remedy: str) -> str:
    """Our name of KV's dtype, by PyTorch's. remedy: what to do where there is none.

    Raises:
        LayoutError: KV of that dtype is not supported.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in KV_DTYPES:
        raise LayoutError(f"KV of dtype {name} is not supported; {remedy}")
    return KV_DTYPES[name]


def refuse_encoder_decoder(config: Any) -> None:
    """Return if a model of this configuration is no encoder with a decoder.

    Raises:
        LayoutError: it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise LayoutError(
            "encoder-decoder models are not supported: their KV does not depend on the prompt's tokens alone"
        )


def refuse_length_dependent_rope(config: Any) -> None:
    """Return if no RoPE of this configuration turns keys by angles that depend on how long the whole prompt is.

    Raises:
        LayoutError: one does.
    """
    kinds = set(_strings_at(plain(config), ("rope_type", "type"))) & _LENGTH_DEPENDENT_ROPE
    if kinds:
        raise LayoutError(f"RoPE of type {kinds.pop()!r} makes KV depend on what follows it; not supported")


def _strings_at(config: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Every string at one of these keys, however deep."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in names and isinstance(value, str):
                yield value
            yield from _strings_at(value, names)


def refusal_of(error: Exception, engine: str) -> str:
    """Why an engine of this name cannot be served, for people; `error` is one of `NOT_SERVED`."""
    known = isinstance(error, LMCacheError)
    return str(error) if known else f"this release of {engine} is not understood ({error!r})"
