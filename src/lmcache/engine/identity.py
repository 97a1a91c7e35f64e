"""The identity of the weights that an engine serves, free of any engine's types.

A repository is identified by its name and resolved commit, a local directory by every byte of its files: weights, configuration
and code. Two engines may exchange KV only if their identities are equal, so in doubt they differ. Weights are hashed once: the
digests of large files are kept on disk (`digests`). Hashing takes seconds or minutes, in which the engine runs without a cache:
`Identity.layout` raises until then, so the sessions of `lmcache.engine` connect to no server.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from blake3 import blake3

from lmcache.chunks import LOSSY_KV, Layout
from lmcache.engine.digests import DigestMemory, Stamp, be_nice, digest_file, stamp_of
from lmcache.errors import IdentityUnknown, LayoutError
from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime, process_started

logger = init_logger(__name__)

_SNAPSHOT = re.compile(r"models--(?P<repository>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PART = re.compile(r"(?P<before>.*)-\d{5}-of-(?P<after>\d{5}\.\w+)")
_MAX_FILES, _MAX_DEPTH = 10_000, 16
"""Bounds of a model's directory: beyond them it is taken for a home directory or a cycle of links."""
_AT_ONCE_BYTES = 256 << 20
"""Up to this size files are hashed within the call, in a fraction of a second, and their digests are not kept on disk."""
_VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "name_or_path"})
REMEDY = "set lmcache.mp.model_id to a name of yours"
MEANWHILE = "nothing is served or stored"
_Files = tuple[tuple[Path, Stamp], ...]


class Mark(NamedTuple):
    """The stamp of a file, or of one folder or link on the path to a model's files, when it was examined."""

    step: Path
    whole: bool
    """True if every change counts. False for a folder that the path only passes through: then only device and inode count."""
    stamp: Stamp


class Finding:
    """A name that takes long to compute. `find` runs in a daemon thread of low priority, or within this call if it reads little.

    what: the thing that is named, for the log. remedy: what the user can do if `find` raises. size_bytes: how much `find` reads.
    meanwhile: what does not happen until then, for the log. unwanted: set when the name is no longer needed. `find` should check
    it often; what `find` raises after that is not logged.

    Raises:
        LayoutError: `find` ran within this call and raised.
    """

    def __init__(
        self,
        what: str,
        remedy: str,
        find: Callable[[], str],
        size_bytes: int,
        meanwhile: str = MEANWHILE,
        unwanted: threading.Event | None = None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.name = self.failure = ""
        self._unwanted, self._now = unwanted or runtime.event(), runtime.now
        self._thread: threading.Thread | None = None
        self._what, self._remedy, self._find, self._gigabytes = what, remedy, find, size_bytes / 1e9
        if size_bytes <= _AT_ONCE_BYTES:
            self.name = self._found()
        else:
            logger.info("Hashing %.1f GB of %s: %s until it is done", self._gigabytes, what, meanwhile)
            self._thread = runtime.start(self._run, "lmcache-identity")

    def give_up(self) -> None:
        """Cancel `find`, and return when it has ended."""
        self._unwanted.set()
        if self._thread is not None:
            self._thread.join()

    def _found(self) -> str:
        try:
            return self._find()
        except Exception as error:  # whatever it is, callers that wait for the name must learn that it will not come
            raise LayoutError(f"{error}; {self._remedy}") from error

    def _run(self) -> None:
        be_nice()
        began = self._now()
        try:
            self.name = self._found()
        except LayoutError as error:
            self.failure = str(error)
            if not self._unwanted.is_set():
                logger.warning("LMCache serves nothing of %s: %s", self._what, self.failure)
        else:
            seconds = self._now() - began
            logger.info("Hashed %.1f GB of %s in %.1f s: LMCache serves it now", self._gigabytes, self._what, seconds)


@dataclass(frozen=True)
class Identity:
    """The name of the weights that an engine serves; it has several parts if the engine also serves a draft model. lossy_kv: what
    may have changed the KV that the engine accepts, a name of `LOSSY_KV`; it is part of every layout."""

    parts: tuple[str | Finding, ...]
    lossy_kv: str = "none"

    @property
    def name(self) -> str:
        """The names of the parts, joined.

        Raises:
            IdentityUnknown: at least one name is not known (yet).
        """
        names = [part if isinstance(part, str) else part.name for part in self.parts]
        if not all(names):
            raise IdentityUnknown(self.failure or "the weights are still being hashed")
        return "+".join(names)

    @property
    def failure(self) -> str:
        """Why the name will never be known, and what to do; "" if it is known or still being computed."""
        return next((part.failure for part in self.parts if isinstance(part, Finding) and part.failure), "")

    def give_up(self) -> None:
        """Cancel the computation of the name, and return when its threads have ended."""
        for part in self.parts:
            if isinstance(part, Finding):
                part.give_up()

    def layout(self, model: Layout, chunk_tokens: int) -> Layout:
        """Return `model` with these weights and chunks of `chunk_tokens`.

        Raises:
            IdentityUnknown: as `name`.
        """
        return msgspec.structs.replace(
            model, model_id=self.name, chunk_tokens=chunk_tokens, codec=LOSSY_KV[self.lossy_kv]
        )

    def accepting(self, lossy_kv: str) -> Identity:
        """Return the identity for an engine that accepts this KV, a name of `LOSSY_KV`."""
        return replace(self, lossy_kv=lossy_kv)

    def __add__(self, other: Identity) -> Identity:
        return replace(self, parts=self.parts + other.parts)


def named(name: str) -> Identity:
    """Return the identity of weights whose name is known."""
    return Identity((name,))


def path_identity(
    name: str,
    remedy: str = REMEDY,
    unchanged_since: float | None = None,
    meanwhile: str = MEANWHILE,
    runtime: Runtime = RUNTIME,
) -> Identity | None:
    """Return the identity of a local directory or file, or None if it does not exist.

    remedy: what the engine's user can do about an error. unchanged_since: a time in seconds since the epoch (None: the start of
    this process); the engine may have read a file before it was changed after that time. meanwhile: what does not happen while
    the files are hashed, for the log.

    Raises:
        LayoutError: there are no weights at `name`, or they were changed after `unchanged_since`.
    """
    path = Path(name)
    commit = _commit_of(Path(os.path.abspath(name)))
    if commit:
        return named(commit)
    if not path.exists():
        return None
    files = _listed(path)
    if not any(file.suffix in _WEIGHT_SUFFIXES for file, _ in files):
        raise LayoutError(f"no weight files in {name!r}; {remedy}")
    limit = process_started() if unchanged_since is None else unchanged_since
    for step, whole, _ in marks_of(path):
        if _newer(step, whole, limit):
            raise LayoutError(
                f"{str(step)!r} has changed since the engine may have read it, so it is not known which weights it serves; "
                f"start the engine in a new process, or {remedy}"
            )
    return Identity((_finding(path, files, remedy, meanwhile, runtime),))


def marks_of(path: Path) -> tuple[Mark, ...]:
    """Return the marks of a model's files, and of every folder and link on the paths to them, for `unchanged`.

    Raises:
        LayoutError: there are more files than a model has.
        OSError: one of them cannot be examined.
    """
    files = _listed(path)
    steps = dict.fromkeys(step for file, _ in files for step in _steps(file.absolute()))
    folders = {folder for file, _ in files for folder in file.parents if folder.is_relative_to(path)}
    model = {stamp_of(folder.stat())[:2] for folder in folders}
    wholes = ((step, not stat.S_ISDIR((one := step.lstat()).st_mode) or stamp_of(one)[:2] in model) for step in steps)
    return tuple(Mark(step, whole, _look(step, whole)) for step, whole in wholes)


def unchanged(marks: Iterable[Mark]) -> bool:
    """Return whether every mark still has its stamp. No file is read, and no directory listed."""
    try:
        return all(_look(step, whole) == stamp for step, whole, stamp in marks)
    except OSError:
        return False


def repository_identity(name: str, model_config: Any, remedy: str = REMEDY) -> Identity:
    """Return the identity of a repository: its name and the commit that the engine resolved for it.

    Raises:
        LayoutError: the commit is not known.
    """
    commit = getattr(getattr(model_config, "hf_config", None), "_commit_hash", None)
    config_from = getattr(model_config, "hf_config_path", None)
    if not commit or config_from not in (None, "", name):  # then the commit is another repository's
        raise LayoutError(f"the commit of model {name!r} is not known; {remedy}")
    return named(f"{name}@{commit}")


def plain(value: Any) -> Any:
    """Return `value` as JSON types, the same in every process: it contains no address of an object."""
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


def digest_of(material: Any) -> str:
    """Return a digest (32 hex digits) of settings that change the KV, given as JSON types (`plain`)."""
    return blake3(json.dumps(material, sort_keys=True).encode()).hexdigest(16)


def _commit_of(path: Path) -> str:
    """Return repository@commit for a snapshot in a hub's cache; "" if a file in it does not come from the hub."""
    snapshot = _SNAPSHOT.search(str(path))
    if snapshot is None or not path.is_dir():
        return ""
    blobs = (path.parent.parent / "blobs").resolve()
    files = _files_below(path)
    if not files or any(not file.is_symlink() or file.resolve().parent != blobs for file in files):
        return ""
    return f"{snapshot['repository'].replace('--', '/')}@{snapshot['commit']}"


def _files_below(folder: Path) -> tuple[Path, ...]:
    """Return every file below a directory, except hidden ones: engines read weights, configuration and code under many names.

    Raises:
        LayoutError: there are more files than a model has.
    """
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found += [path for name in names if not name.startswith(".") and (path := Path(parent, name)).is_file()]
        if len(found) > _MAX_FILES or len(Path(parent).parts) - len(folder.parts) > _MAX_DEPTH:
            raise LayoutError(
                f"{str(folder)!r} holds {len(found)} files and more, too many for a model; name a directory that holds only one"
            )
    return tuple(sorted(found))


def _parts_of(file: Path) -> tuple[Path, ...]:
    """Return the file, with all other parts if its name says that it is one of several (split GGUF)."""
    part = _PART.fullmatch(file.name)
    if part is None:
        return (file,)
    together = re.compile(f"{re.escape(part['before'])}-\\d{{5}}-of-{re.escape(part['after'])}")
    return tuple(sorted(one for one in file.parent.iterdir() if together.fullmatch(one.name)))


def _listed(path: Path) -> _Files:
    """Return every file of a model with its stamp, sorted: those below a directory, or a file with its other parts."""
    return tuple((file, stamp_of(file.stat())) for file in (_files_below(path) if path.is_dir() else _parts_of(path)))


def _steps(path: Path) -> Iterator[Path]:
    """Yield every folder and symbolic link on an absolute path, also those behind links, and the file at its end."""
    for step in (*reversed(path.parents), path):
        yield step
        if step.is_symlink():
            yield from _steps(step.parent.resolve() / os.readlink(step))


def _look(step: Path, whole: bool) -> Stamp:
    stamp = stamp_of(step.lstat())
    return stamp if whole else Stamp(stamp.device, stamp.inode, 0, 0, 0)


def _newer(step: Path, whole: bool, limit: float) -> bool:
    """Return whether this name may have stood for another file or folder at `limit`.

    Renaming a folder changes its ctime and that of its parent, but not its mtime. Adding or removing a file in a folder sets the
    folder's ctime and mtime to the same time.
    """
    status = step.lstat()
    if whole or status.st_ctime <= limit:
        return status.st_ctime > limit
    return status.st_ctime_ns != status.st_mtime_ns and (step / "..").stat().st_ctime > limit


@functools.lru_cache(maxsize=64)
def _finding(path: Path, files: _Files, remedy: str, meanwhile: str, runtime: Runtime) -> Finding:
    """Return one `Finding` for all callers in this process."""
    memory = _memory(runtime)
    size, remedy = _missing_bytes(files, _remembered(files, memory)), f"start the engine in a new process, or {remedy}"
    return Finding(repr(str(path)), remedy, lambda: _files_name(path, files, memory), size, meanwhile, runtime=runtime)


os.register_at_fork(after_in_child=_finding.cache_clear)  # a forked child does not have the thread


def _files_name(path: Path, files: _Files, memory: DigestMemory) -> str:
    """Return the name of these files, a digest of their names below the directory and of all their bytes: a copy has the same.

    Raises:
        LayoutError: the files change meanwhile.
        OSError: a file cannot be read.
    """
    large = _missing_bytes(files, _remembered(files, memory)) > _AT_ONCE_BYTES
    with memory.turn(sum(stamp.inode for _, stamp in files)) if large else contextlib.nullcontext():
        digests = _remembered(files, memory)
        fresh = {stamp: digest_file(file, stamp) for file, stamp in files if stamp not in digests}
        if _listed(path) != files:
            raise LayoutError(f"the files of {str(path)!r} have changed while they were hashed")
        if large:
            memory.add(fresh)
    digests |= fresh
    root, together = path if path.is_dir() else path.parent, blake3()
    for file, stamp in files:
        together.update(f"{file.relative_to(root)}\0{stamp.size}\0{digests[stamp]}\0".encode())
    return "files:" + together.hexdigest(16)


def _remembered(files: _Files, memory: DigestMemory) -> dict[Stamp, str]:
    """Return the kept digests of these files. Those of a small model are not kept."""
    stamps = [stamp for _, stamp in files]
    return memory.find(stamps) if sum(stamp.size for stamp in stamps) > _AT_ONCE_BYTES else {}


def _missing_bytes(files: _Files, digests: Iterable[Stamp]) -> int:
    known = set(digests)
    return sum(stamp.size for _, stamp in files if stamp not in known)


def _memory(runtime: Runtime) -> DigestMemory:
    """Return this user's digests; without a home directory none are kept."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home if os.path.isabs(home) else os.devnull, ".cache")
    return DigestMemory(Path(cache) / "lmcache", runtime)


def model_folder(name: str, commit: str | None, download_folder: str | None) -> Path | None:
    """Return a model's directory: its own, or that of its commit in the hub's cache; None if neither exists.

    download_folder: the hub's cache as configured in the engine, None for the default one.
    """
    return next((folder for folder in (Path(name), _snapshot(name, commit, download_folder)) if folder.is_dir()), None)


def _snapshot(name: str, commit: str | None, download_folder: str | None) -> Path:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        HF_HUB_CACHE = ""
    return Path(download_folder or HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots", commit or "none")


def has_one_set(folder: Path) -> bool:
    """Return whether all load formats read the same safetensors below this directory: the index, if any, names them all."""
    found = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")}
    if any("/" in name or name.startswith("consolidated") for name in found):
        return False
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        return found == set(index["weight_map"].values())
    except FileNotFoundError:
        return True
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # a format that does not need the index reads the files without it
