"""Which files of a model's directory an engine has loaded its weights from, by the name of its load format.

The names are those of vLLM and SGLang. The identity of a directory (`identity`) covers every file in it, and two engines may
still have read different ones: a directory can hold a model twice, and each format chooses in its own way. vLLM's `auto` prefers
`consolidated*.safetensors`, `hf` and `safetensors` read what the index names, and `runai_streamer` reads everything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmcache.engine.identity import REMEDY, plain
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
    alike = load_format in _SAFETENSORS and folder is not None and _has_one_set(folder)
    return None if alike else [load_format, plain(options)]


def model_folder(name: str, commit: str | None, download_folder: str | None) -> Path | None:
    """Where the files of a model are: its own directory, or that of its commit in the hub's cache. None where neither is there.

    download_folder: the cache that the engine was given, None for the usual one.
    """
    return next((folder for folder in (Path(name), _snapshot(name, commit, download_folder)) if folder.is_dir()), None)


def _snapshot(name: str, commit: str | None, download_folder: str | None) -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        HF_HUB_CACHE = ""
    return Path(download_folder or HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", commit or "none")


def _has_one_set(folder: Path) -> bool:
    """Whether no format has a choice among the safetensors below this directory: the index, if there is one, names them all."""
    found = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")}
    if any("/" in name or name.startswith("consolidated") for name in found):
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        return found == set(index["weight_map"].values())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # whoever does not need the index reads the files without it
