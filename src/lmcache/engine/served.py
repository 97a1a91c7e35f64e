"""The KV that one rank of an engine serves, and the reasons why an engine cannot be served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmcache.chunks import Group, Layout, Shard, shard_of_rank
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
"""The errors that reading the objects of an unknown release of an engine may raise. That engine must run on without LMCache."""


KV_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}
"""The names of KV dtypes in a layout, by PyTorch's names."""
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope", "su", "yarn-dynamic"})


@dataclass(frozen=True)
class ServedModel:
    """The KV of a complete model. model: the layout with one-token chunks and without the weights' name."""

    identity: Identity
    model: Layout

    def layout(self, chunk_tokens: int) -> Layout:
        """Return the model's layout for chunks of `chunk_tokens` tokens.

        Raises:
            IdentityUnknown: the weights are not identified (yet).
        """
        return self.identity.layout(self.model, chunk_tokens)


@dataclass(frozen=True)
class ServedKV(ServedModel):
    """The KV of a model, or of one group of it, and the part of it that is on this rank. stores: whether this rank, of all ranks
    that hold this shard, is the one that stores it. group, block_tokens: as in `RankGroup`. only_last: as in `GroupTable`."""

    shard: Shard
    paged: PagedKV
    stores: bool
    group: Group | None = None
    block_tokens: int = 0
    only_last: bool = False


def stores_its_shard(model: Layout, tp_rank: int, tp_size: int) -> bool:
    """Return whether this tensor-parallel rank is the first of those that hold the same KV heads."""
    layers = 0, model.num_layers
    return not tp_rank or (
        shard_of_rank(model, tp_rank, tp_size, *layers).index
        != shard_of_rank(model, tp_rank - 1, tp_size, *layers).index
    )


def kv_dtype(dtype: Any, remedy: str) -> str:
    """Return the layout's name for a PyTorch dtype. remedy: what to do about an unsupported dtype.

    Raises:
        LayoutError: KV of that dtype is not supported.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in KV_DTYPES:
        raise LayoutError(f"KV of dtype {name} is not supported; {remedy}")
    return KV_DTYPES[name]


def refuse_encoder_decoder(config: Any) -> None:
    """Return if a model of this configuration is not an encoder-decoder model.

    Raises:
        LayoutError: it is one.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise LayoutError(
            "encoder-decoder models are not supported: their KV does not depend on the prompt's tokens alone"
        )


def refuse_length_dependent_rope(config: Any) -> None:
    """Return if no RoPE of this configuration rotates keys by angles that depend on the length of the prompt.

    Raises:
        LayoutError: one does.
    """
    kinds = set(_strings_at(plain(config), ("rope_type", "type"))) & _LENGTH_DEPENDENT_ROPE
    if kinds:
        raise LayoutError(f"RoPE of type {kinds.pop()!r} makes KV depend on what follows it; not supported")


def _strings_at(config: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Yield every string at one of these keys, at any depth."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in names and isinstance(value, str):
                yield value
            yield from _strings_at(value, names)


def refusal_of(error: Exception, engine: str) -> str:
    """Return for the log why an engine of this name cannot be served; `error` is one of `NOT_SERVED`."""
    known = isinstance(error, LMCacheError)
    return str(error) if known else f"this release of {engine} is not understood ({error!r})"
