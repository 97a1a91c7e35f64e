"""The files of a model's directory that an engine loads its weights from, by the name of its load format.

The names are those of vLLM and SGLang. The identity of a directory (`identity`) covers every file in it, but two engines may read
different files: a directory can hold a model twice, and each format selects files in its own way. vLLM's `auto` prefers
`consolidated*.safetensors`, `hf` and `safetensors` read what the index names, and `runai_streamer` reads everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache.engine.identity import REMEDY, has_one_set, plain
from lmcache.errors import LayoutError

_SAFETENSORS = frozenset(
    {"", "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "layered"}
)
"""In a directory with one set of safetensors these formats read the same files and differ only in speed."""
_OTHERS = frozenset(
    {"pt", "npcache", "mistral", "gguf", "bitsandbytes", "sharded_state", "runai_streamer_sharded", "expert_pack"}
)


def refuse_weights_from_anywhere(load_format: str, remedy: str = REMEDY) -> None:
    """Return if weights of this load format come from the model's directory or repository. remedy: what to do otherwise.

    Raises:
        LayoutError: the weights may come from anywhere.
    """
    if load_format not in _SAFETENSORS | _OTHERS:
        raise LayoutError(f"--load-format {load_format} may read weights from anywhere; {remedy}")


def files_read(load_format: str, options: Any, folder: Path | None) -> Any:
    """Return what decides which of the model's files are read, as JSON types; None if they are its only set of safetensors.

    options: the format's options. folder: the model's directory; None if it is not known.
    """
    alike = load_format in _SAFETENSORS and folder is not None and has_one_set(folder)
    return None if alike else [load_format, plain(options)]
