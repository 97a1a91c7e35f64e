"""Which files of a model's directory an engine has loaded its weights from, by the name of its load format.

The names are those of vLLM and SGLang. The identity of a directory (`identity`) covers every file in it, and two engines may
still have read different ones: a directory can hold a model twice, and each format chooses in its own way. vLLM's `auto` prefers
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
"""Where there is one set of safetensors they read the same files, one slower than the other."""
_OTHERS = frozenset(
    {"pt", "npcache", "mistral", "gguf", "bitsandbytes", "sharded_state", "runai_streamer_sharded", "expert_pack"}
)


def refuse_weights_from_anywhere(load_format: str, remedy: str = REMEDY) -> None:
    """Return if weights of this load format come from the model's directory or repository. remedy: what to do where not.

    Raises:
        LayoutError: they may come from anywhere.
    """
    if load_format not in _SAFETENSORS | _OTHERS:
        raise LayoutError(f"--load-format {load_format} may read weights from anywhere; {remedy}")


def files_read(load_format: str, options: Any, folder: Path | None) -> Any:
    """What decides which of the model's files are read, in JSON's terms; None where that is its only set of safetensors.

    options: of the format. folder: where the files are; None where that is not known.
    """
    alike = load_format in _SAFETENSORS and folder is not None and has_one_set(folder)
    return None if alike else [load_format, plain(options)]
