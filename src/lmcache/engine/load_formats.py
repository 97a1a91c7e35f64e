"""The files that an engine loads its weights from, by the name of its load format, and the identity of these weights.

The names are those of vLLM and SGLang. The identity of a directory (`identity`) covers every file in it, but two engines may read
different files: a directory can hold a model twice, and each format selects files in its own way. vLLM's `auto` prefers
`consolidated*.safetensors`, `hf` and `safetensors` read what the index names, and `runai_streamer` reads everything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache.engine.identity import REMEDY, Identity, has_one_set, named, path_identity, plain, repository_identity
from lmcache.errors import LayoutError

_SAFETENSORS = frozenset(
    {"", "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "layered"}
)
"""In a directory with one set of safetensors these formats read the same files and differ only in speed."""
_OTHERS = frozenset(
    {"pt", "npcache", "mistral", "gguf", "bitsandbytes", "sharded_state", "runai_streamer_sharded", "expert_pack"}
)


def weights_identity(name: str, load_format: str, model_config: Any, engine_id: str, remedy: str = REMEDY) -> Identity:
    """Return the identity of the weights that an engine has read from a directory or a repository. Dummy weights are shared with
    no other engine.

    name: path of the directory, or name of the repository. model_config: the engine's configuration of the model. engine_id: the
    same in all ranks of this engine only. remedy: what the user can do about an error.

    Raises:
        LayoutError: the weights cannot be identified; the message says what to do.
    """
    if load_format == "dummy":
        return named(f"dummy:{engine_id}")
    if load_format not in _SAFETENSORS | _OTHERS:
        raise LayoutError(f"--load-format {load_format} may read weights from anywhere; {remedy}")
    return path_identity(name, remedy) or repository_identity(name, model_config, remedy)


def files_read(load_format: str, options: Any, folder: Path | None) -> Any:
    """Return what decides which of the model's files are read, as JSON types; None if they are its only set of safetensors.

    options: the format's options. folder: the model's directory; None if it is not known.
    """
    alike = load_format in _SAFETENSORS and folder is not None and has_one_set(folder)
    return None if alike else [load_format, plain(options)]
