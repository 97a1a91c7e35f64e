"""Which weights an engine serves, free of any engine's types.

A repository is named with its resolved commit; a local directory by every byte of every file in it: weights, configuration, code.
Two engines may exchange KV only if this agrees, so in doubt it differs. Weights are hashed once, about a second a gigabyte: the
digests of large files are remembered on disk (`digests`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from lmcache.errors import LayoutError
from lmcache.integration.digests import DigestMemory, Stamp, digest_file, stamp_of
from lmcache.observability.log import init_logger

logger = init_logger(__name__)

_SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PART = re.compile(r"(?P<before>.*)-\d{5}-of-(?P<after>\d{5}\.\w+)")
_MAX_FILES, _MAX_DEPTH = 10_000, 16
"""Bounds of a model's directory: more is a home directory, or links in a circle."""
_REMEMBERED_BYTES = 64 << 20
"""Files of less than that together are hashed in milliseconds, and their digests are not kept on disk."""
_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "name_or_path"})


def path_identity(name: str, unchanged_since: float = 0.0) -> str:
    """The identity of a local directory or file, "" if there is none of that name.

    unchanged_since: seconds since the epoch; 0 for any time.

    Raises:
        LayoutError: there are no weights in it, it was changed after `unchanged_since`, or it changes while it is read.
    """
    path = Path(name)
    commit = _commit_of(Path(os.path.abspath(name)))
    if commit:
        return commit
    if not path.exists():
        return ""
    root, files = (path, _files_below(path)) if path.is_dir() else (path.parent, _parts_of(path))
    if not any(file.suffix in _WEIGHT_SUFFIXES for file in files):
        raise LayoutError(f"no weight files in {name!r}; set lmcache.mp.model_id to a name of yours")
    if unchanged_since and max(_changed_at(one) for one in (*path.absolute().parents, path, *files)) > unchanged_since:
        raise LayoutError(f"{name!r} has changed since the engine may have read it")
    return "files:" + _files_digest(root, tuple((file, stamp_of(file.stat())) for file in files))


def repository_identity(name: str, model_config: Any) -> str:
    """A repository's name with the commit that was resolved for it.

    Raises:
        LayoutError: the commit is not known.
    """
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    if not commit or getattr(model_config, "hf_config_path", None) not in (
        None,
        "",
        name,
    ):  # else another repository's commit
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


def _commit_of(path: Path) -> str:
    """Repository and commit of a snapshot in a hub's cache; "" where a file in it is somebody's own and not the hub's."""
    snapshot = _SNAPSHOT.search(str(path))
    if snapshot is None or not path.is_dir():
        return ""
    blobs = (path.parent.parent / "blobs").resolve()
    files = _files_below(path)
    if not files or any(not file.is_symlink() or file.resolve().parent != blobs for file in files):
        return ""
    return f"{snapshot['repository'].replace('--', '/')}@{snapshot['commit']}"


def _files_below(folder: Path) -> tuple[Path, ...]:
    """Every file below a directory, whatever it is called, but hidden ones: engines read weights, configuration and code under
    many names.

    Raises:
        LayoutError: there are more than a model has.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file()]
        if len(found) > _MAX_FILES or len(Path(parent).parts) - len(folder.parts) > _MAX_DEPTH:
            raise LayoutError(
                f"{str(folder)!r} holds {len(found)} files and more, too many for a model; set lmcache.mp.model_id to a name"
            )
    return tuple(sorted(found))


def _parts_of(file: Path) -> tuple[Path, ...]:
    """The file, with all other parts where its name says that it is one of several (split GGUF)."""
    part = _PART.fullmatch(file.name)
    if part is None:
        return (file,)
    together = re.compile(f"{re.escape(part['before'])}-\\d{{5}}-of-{re.escape(part['after'])}")
    return tuple(sorted(one for one in file.parent.iterdir() if together.fullmatch(one.name)))


def _changed_at(path: Path) -> float:
    """When this name came to mean what it means now: the last change of a file, or of a symbolic link and what it leads to. Of a
    directory only links count, since files beside those that matter come and go."""
    changed = path.lstat().st_ctime if path.is_symlink() or path.is_file() else 0.0
    return max(changed, path.stat().st_ctime if path.is_file() else 0.0)


@functools.lru_cache(maxsize=64)
def _files_digest(root: Path, files: tuple[tuple[Path, Stamp], ...]) -> str:
    """A digest of the files' names below `root` and of all of their bytes. A copy of a directory has the same."""
    total = sum(stamp.size for _, stamp in files)
    large, memory = total > _REMEMBERED_BYTES, _memory()
    with memory.turn(sum(stamp.inode for _, stamp in files)) if large else contextlib.nullcontext():
        digests = memory.find(stamp for _, stamp in files) if large else {}
        missing = {stamp: file for file, stamp in files if stamp not in digests}
        if large and missing:
            logger.info("Hashing %.1f GB of weights, once", sum(stamp.size for stamp in missing) / 1e9)
        began = time.monotonic()
        fresh = {stamp: digest_file(file, stamp) for stamp, file in missing.items()}
        if large and missing:
            logger.info("Hashed the weights in %.1f s", time.monotonic() - began)
            memory.add(fresh)
    digests |= fresh
    together = blake3()
    for file, stamp in files:
        together.update(f"{file.relative_to(root)}\0{stamp.size}\0{digests[stamp]}\0".encode())
    return together.hexdigest(16)


def _memory() -> DigestMemory:
    """The digests of this user; without a home directory none are kept."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home if os.path.isabs(home) else os.devnull, ".cache")
    return DigestMemory(Path(cache) / "lmcache")
