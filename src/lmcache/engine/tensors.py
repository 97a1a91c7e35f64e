"""The identity of the weights that a PyTorch model has in memory, whatever files they came from, and whether they changed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from blake3 import blake3

from lmcache.engine.digests import hash_threads
from lmcache.engine.identity import Finding, Identity
from lmcache.errors import LayoutError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime
from lmcache.transfer.gpu.driver import beside_captures

logger = init_logger(__name__)

_PIECE_BYTES = 64 << 20
_ROW_WORDS = 4096
_PIECE_ROWS = 2048
"""Rows that are summed at once, in 64 MiB of the device's memory."""


def weights_identity(model: Any, runtime: Runtime = RUNTIME) -> Identity:
    """Return the identity of every byte of the weights in memory, so that trained, merged and quantized weights differ.

    Raises:
        LayoutError: some weights are not in memory, or are not plain tensors.
    """
    tensors, stamp, unwanted = list(_tensors(model)), weights_stamp(model), runtime.event()

    def find() -> str:
        with beside_captures(str(model.device)):
            name = _digest_of(tensors, unwanted)
        if weights_stamp(model) != stamp:
            logger.info("The weights have changed while they were hashed; the next generate begins anew")
            unwanted.set()
            raise LayoutError("the weights have changed while they were hashed")
        return name

    size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
    return Identity((Finding("the model's weights", "pass model_id=", find, size, unwanted=unwanted, runtime=runtime),))


def _digest_of(tensors: Iterable[tuple[str, torch.Tensor]], unwanted: threading.Event) -> str:
    """Return the digest of all bytes. Raises LayoutError: the bytes cannot be read, or the digest is no longer needed."""
    digest = blake3(max_threads=hash_threads())
    for name, tensor in tensors:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        try:
            for piece in tensor.detach().reshape(-1).contiguous().view(torch.uint8).split(_PIECE_BYTES):
                if unwanted.is_set():
                    raise LayoutError("other weights are hashed by now, so this digest is not needed")
                digest.update(piece.cpu().numpy())
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise LayoutError(f"the bytes of weight {name} cannot be read ({error})") from None
    return f"weights:{digest.hexdigest(16)}"


def weights_stamp(model: Any) -> int:
    """Return a number that differs whenever a weight was replaced or changed in place, in whatever way.

    Writes through `.data` change nothing but the bytes. So every byte is read, which takes as long as computing one token.

    Raises:
        LayoutError: changes of a weight cannot be detected.
    """
    try:
        tensors = [tensor.detach() for _, tensor in _tensors(model)]
        versions = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        return hash((*versions, *_checksums(tensors)))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise LayoutError(f"changes of the weights cannot be detected ({error}); pass model_id=") from None


def _checksums(tensors: Sequence[torch.Tensor]) -> Iterator[int]:
    """Yield a checksum for each tensor on the host, then one for each other tensor, computed on its device."""
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
    """Return a checksum of the bytes in `flat` (uint8, one axis) and their order: an int64 scalar on the device, modulo 2**64.

    Each 32-bit word is multiplied by the factors of its column and its row, and all products are added up. A change of one word,
    or a swap of two words of a row, always changes the sum: differences of words are divisible by 2**31 at most, and those of
    factors by 2**32.
    """
    if flat.storage_offset() % 4:
        flat = flat.clone()
    full = flat.numel() // (4 * _ROW_WORDS) * 4 * _ROW_WORDS
    rows, rest = flat[:full].view(torch.int32).view(-1, _ROW_WORDS), flat[full:]
    columns = _factors(_ROW_WORDS, flat.device)
    sums = torch.cat([*((piece * columns).sum(dim=1) for piece in rows.split(_PIECE_ROWS)), rest.long()])
    return (sums * _factors(len(sums), flat.device)).sum()


@functools.lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Return int64 [count]: distinct odd numbers below 2**33, in an order that cannot cancel (mixed bits of 0, 1, 2 ...)."""
    bits = torch.arange(count, device=device)
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * odd & 0xFFFFFFFF
    return 2 * bits + 1


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
