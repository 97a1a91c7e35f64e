"""What the KV of a Transformers model looks like and which weights made it, and which models are refused."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from blake3 import blake3
from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache.chunks import Layout
from lmcache.engine.digests import hash_threads
from lmcache.engine.identity import Finding, Identity, plain
from lmcache.errors import LayoutError
from lmcache.integration.transformers.pool import Shape
from lmcache.observability.log import init_logger
from lmcache.transfer.gpu.driver import beside_captures

logger = init_logger(__name__)

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su", "yarn-dynamic")
"""Kinds of RoPE that turn keys by angles that depend on how long the whole prompt is, not on the tokens before alone."""
_PIECE_BYTES = 64 << 20
_ROW_WORDS = 4096
_PIECE_ROWS = 2048
"""So many rows are weighed at once, in 64 MiB of the device's memory."""


def kv_shape(model: Any) -> Shape:
    """The shape of the model's KV, as one token's forward makes it.

    Raises:
        LayoutError: this model's KV cannot be cached; the message says why.
    """
    refuse_unsupported(model)
    try:
        cache = DynamicCache(config=model.config)
    except TypeError:
        raise LayoutError("this release of transformers is too old; install transformers>=4.56") from None
    with torch.no_grad():
        one = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        model(input_ids=one, past_key_values=cache, use_cache=True)
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds:
        raise LayoutError(f"cache layers of kind {', '.join(kinds)}; only full attention is supported")
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = {(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors if tensor is not None}
    if len(found) != 1 or any(tensor is None for tensor in tensors):
        raise LayoutError(
            f"layers with KV of different shapes, dtypes or devices ({len(found)} kinds) are not supported"
        )
    ((batch, heads, tokens, head_size), dtype, device) = found.pop()
    if (batch, tokens) != (1, 1):
        raise LayoutError(f"KV of shape {(batch, heads, tokens, head_size)} for one token is not supported")
    return Shape(len(cache.layers), heads, head_size, dtype, device)


def refuse_unsupported(model: Any) -> None:
    """Return if KV of a model of this kind can be cached, as far as the model as it is now tells.

    Raises:
        LayoutError: it cannot; the message says why.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise LayoutError("encoder-decoder models are not supported: their KV depends on more than the tokens before")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise LayoutError("adapters can be switched without a trace in the weights; call merge_and_unload() first")
    kinds = set(_values_of(plain(model.config), ("rope_type", "type"))) & set(_LENGTH_DEPENDENT_ROPE)
    if kinds:
        raise LayoutError(f"RoPE of type {kinds.pop()!r} makes KV depend on what follows it; not supported")


def layout_of(model: Any, shape: Shape) -> Layout:
    """The layout of the model's KV in chunks of one token, without a name of the weights.

    Raises:
        LayoutError: KV of a dtype that no slot can hold.
    """
    config = json.dumps(["transformers", plain(model.config)], sort_keys=True)
    return Layout(
        model_id="",
        kv_dtype=str(shape.dtype).removeprefix("torch."),
        num_layers=shape.layers,
        num_kv_heads=shape.heads,
        head_size=shape.head_size,
        chunk_tokens=1,
        config_digest=blake3(config.encode()).hexdigest(16),
    )


def weights_identity(model: Any) -> Identity:
    """That of every byte of the weights as they are in memory: trained, merged and quantized ones are what they are.

    Raises:
        LayoutError: weights that are not in memory, or not plain tensors.
    """
    tensors, stamp, unwanted = list(_tensors(model)), weights_stamp(model), threading.Event()

    def find() -> str:
        with beside_captures(str(model.device)):
            name = _digest_of(tensors, unwanted)
        if weights_stamp(model) != stamp:
            logger.info("The weights have changed while they were hashed; the next generate begins anew")
            unwanted.set()
            raise LayoutError("the weights have changed while they were hashed")
        return name

    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    return Identity((Finding("the model's weights", "pass model_id=", find, size, unwanted=unwanted),))


def _digest_of(tensors: Iterable[tuple[str, torch.Tensor]], unwanted: threading.Event) -> str:
    """Raises LayoutError: the bytes cannot be read, or nobody wants their digest any more."""
    digest = blake3(max_threads=hash_threads())
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        try:
            for piece in tensor.detach().reshape(-1).contiguous().view(torch.uint8).split(_PIECE_BYTES):
                if unwanted.is_set():
                    raise LayoutError("other weights are hashed by now")
                digest.update(piece.cpu().numpy())
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise LayoutError(f"the bytes of weight {name} cannot be read ({error})") from None
    return f"weights:{digest.hexdigest(16)}"


def weights_stamp(model: Any) -> int:
    """Another number whenever a weight was replaced or changed in place, in whatever way.

    Writes through `.data` leave no trace but the bytes themselves. So every byte is read, which takes as long as one token.

    Raises:
        LayoutError: weights that do not tell.
    """
    try:
        tensors = [tensor.detach() for _, tensor in _tensors(model)]
        told = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        return hash((*told, *_checksums(tensors)))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise LayoutError(f"the weights do not tell when they change ({error}); pass model_id=") from None


def _checksums(tensors: Sequence[torch.Tensor]) -> Iterator[int]:
    """A number for each tensor on the host, and one for each of the others, which their device computes."""
    on_devices: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        flat = tensor.reshape(-1).contiguous().view(torch.uint8)
        if flat.device.type == "cpu":
            yield xxhash.xxh3_64_intdigest(flat.numpy())
        else:
            on_devices.setdefault(flat.device, []).append(checksum(flat))
    for sums in on_devices.values():
        yield from torch.stack(sums).tolist()


def checksum(flat: torch.Tensor) -> torch.Tensor:
    """A scalar of the bytes in `flat` (uint8, one axis) and of their order, int64 on their device, modulo 2**64.

    Each word of 32 bits is multiplied by its column's factor and its row's, and all are added up. A word that changes, and two
    words of a row that change places, always make another number: differences of words are divisible by 2**31 at most, and
    those of factors by 2**32.
    """
    if flat.storage_offset() % 4:
        flat = flat.clone()
    whole = flat.numel() // (4 * _ROW_WORDS) * 4 * _ROW_WORDS
    rows, rest = flat[:whole].view(torch.int32).view(-1, _ROW_WORDS), flat[whole:]
    columns = _factors(_ROW_WORDS, flat.device)
    sums = torch.cat([*((piece * columns).sum(dim=1) for piece in rows.split(_PIECE_ROWS)), rest.long()])
    return (sums * _factors(len(sums), flat.device)).sum()


@functools.lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers below 2**33 [count], int64, all different and in no order that could cancel: mixed bits of 0, 1, 2 ..."""
    bits = torch.arange(count, device=device)
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * odd & 0xFFFFFFFF
    return 2 * bits + 1


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _values_of(config: Any, names: tuple[str, ...]) -> Iterator[str]:
    """Every string at one of these keys, however deep."""
    if isinstance(config, dict):
        for key, value in config.items():
            if key in names and isinstance(value, str):
                yield value
            yield from _values_of(value, names)
