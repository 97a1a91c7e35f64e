"""Which weights an engine serves, free of any engine's types.

A repository is named with its resolved commit; a local directory by what is in it. Two engines may exchange KV only if this
agrees, so in doubt it differs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from lmcache.errors import LayoutError

_SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_CONFIG_FILES = ("config.json", "params.json", "hf_quant_config.json", "quantize_config.json", "adapter_config.json")
_SAMPLE_BYTES = 512
_SAMPLES_PER_FILE = 2048
"""One sample in the middle of every tensor, up to so many a file: milliseconds, and a changed tensor shows."""
_MAX_HEADER_BYTES = 100 << 20
"""The limit that the safetensors format itself sets for its header."""
_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "name_or_path"})


def path_identity(name: str) -> str:
    """The identity of a local directory or file, "" if there is none of that name."""
    path = Path(name)
    snapshot = _SNAPSHOT.search(os.path.abspath(name))
    if path.is_dir() and snapshot:
        return f"{snapshot['repository'].replace('--', '/')}@{snapshot['commit']}"
    if path.is_dir():
        files = tuple(sorted(entry for entry in path.iterdir() if _counts(entry)))
    elif path.is_file():
        files = (path,)
    else:
        return ""
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in files):
        raise LayoutError(f"no weight files in {name!r}; set lmcache.mp.model_id to a name of yours")
    return "files:" + _files_digest(tuple((str(file), *_stamp(file)) for file in files))


def repository_identity(name: str, model_config: Any) -> str:
    """A repository's name with the commit that was resolved for it.

    Raises:
        LayoutError: the commit is not known.
    """
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    if not commit:
        raise LayoutError(f"the commit of model {name!r} is not known; set lmcache.mp.model_id to a name of yours")
    return f"{name}@{commit}"


def plain(value: Any) -> Any:
    """`value` in JSON's terms, the same in every process: no object's address gets in."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if str(key) not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text


def _counts(entry: Path) -> bool:
    return entry.is_file() and (entry.suffix in _WEIGHT_SUFFIXES or entry.name in _CONFIG_FILES)


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _files_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """The time of change is in the cache's key only: a copy of a directory has the same identity."""
    digest = blake3()
    for name, size, _ in files:
        path = Path(name)
        head = f"{path.name}\0{size}\0".encode()
        digest.update(head)
        with path.open("rb") as file:
            for piece in _samples(file, path.suffix, size):
                digest.update(struct.pack("<I", len(piece)) + piece)
    return digest.hexdigest(16)


def _samples(file: BinaryIO, suffix: str, size: int) -> Iterator[bytes]:
    """A small file whole; of safetensors the header and a piece of every tensor; of others pieces at even distances."""
    if suffix not in _WEIGHT_SUFFIXES or size <= _SAMPLE_BYTES * 8:
        yield file.read()
        return
    places = (
        [size * step // _SAMPLES_PER_FILE for step in range(_SAMPLES_PER_FILE)] if size > 1 << 20 else [0, size // 2]
    )
    if suffix == ".safetensors":
        header = _safetensors_header(file, size)
        yield header
        places = _tensor_middles(header) or places
    for place in (*places, size - _SAMPLE_BYTES):
        file.seek(place)
        yield file.read(_SAMPLE_BYTES)


def _safetensors_header(file: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""


def _tensor_middles(header: bytes) -> list[int]:
    """Where in the file the middle of each tensor is, at most `_SAMPLES_PER_FILE` of them."""
    try:
        tensors = json.loads(header)
        spans = sorted(tuple(entry["data_offsets"]) for name, entry in tensors.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, AttributeError):
        return []
    start = 8 + len(header)
    step = -(-len(spans) // _SAMPLES_PER_FILE) or 1
    return [start + (begin + end) // 2 for begin, end in spans[::step]]
