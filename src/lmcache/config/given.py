"""Settings as users give them, in the environment, in files and to engines: texts with their sources."""

from __future__ import annotations

import dataclasses
import difflib
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from lmcache.errors import ConfigError

_LONGEST_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Given:
    """One setting as found: its text, its source, and (`said`) how messages quote it."""

    text: str
    source: str
    said: str

    def parsed(self, parse: Callable[[str], Any]) -> Any:
        """Return the value of the text.

        Raises:
            ConfigError: `parse` has raised ValueError.
        """
        try:
            return parse(self.text)
        except ValueError as error:
            raise ConfigError(f"{self.said}: {error}") from None


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a remedy for an unknown name: the known name that was probably meant, `otherwise`, or all known names."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {found[0]}?" if found else otherwise or f"known: {', '.join(names)}"


def check_secret_file(path: Path, said: str, remedy: str = "") -> None:
    """Check that a file with a secret can be read, and by its owner only; a file of root also by one group of this process, as
    Kubernetes mounts a secret for a process that is not root. remedy: appended when it cannot be read.

    Raises:
        ConfigError: the check failed; the message contains the chmod command.
    """
    try:
        found = path.stat()
        mode = found.st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{said}: {path} is not a file")
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{said}: cannot read {path}: {error.strerror}{remedy}") from error
    of_group = found.st_uid == 0 != os.geteuid() and found.st_gid in (os.getegid(), *os.getgroups())
    if mode & (0o037 if of_group else 0o077):
        raise ConfigError(f"{said}: {path} holds a secret, but other users may read it: chmod 600 {path}")


def entries(
    path: Path, name: str, example: str, known: Collection[str], remedy: str = "", spelling: Callable[[str], str] = str
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, node of the value, FILE:LINE) of a YAML file of settings. Arguments and errors are as in `read_yaml`.

    known: the keys that there are. spelling: makes a known key of a key as it is written.

    Raises:
        ConfigError: a key is unknown, or is given twice.
    """
    places: dict[str, str] = {}
    for key_node, value_node in read_yaml(path, name, example, remedy):
        key, where = spelling(str(key_node.value)), f"{path}:{key_node.start_mark.line + 1}"
        if key not in known:
            raise ConfigError(f"{where}: unknown key {str(key_node.value)!r}: {nearest(key, known)}")
        if key in places:
            raise ConfigError(f"{where}: {key} is given twice (first at {places[key]}): remove one")
        places[key] = where
        yield key, value_node, where


def is_null(node: Any) -> bool:
    """Return whether a node of a YAML file is `null` or empty."""
    return bool(node.tag.endswith(":null"))


def _read_file(path: Path, name: str, remedy: str) -> bytes:
    """What a configuration file holds. ConfigError, which calls it `name`, where it cannot be read or is larger than 1 MiB."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}{remedy}") from error
    if len(raw) > _LONGEST_FILE_BYTES:
        raise ConfigError(f"{name}: larger than {_LONGEST_FILE_BYTES >> 20} MiB: name a configuration file")
    return raw


def read_yaml(path: Path, name: str, example: str, remedy: str = "") -> list[tuple[Any, Any]]:
    """Return the (key, value) nodes of a YAML file of settings. Arguments and errors are as in `_read_file`.

    Raises:
        ConfigError: the file is not UTF-8, not YAML, or not a mapping, such as the line `example`.
    """
    import yaml  # imported here, because most starts have no file

    raw = _read_file(path, name, remedy)
    try:
        root = yaml.compose(raw.decode(), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    if not isinstance(root, yaml.MappingNode | None):
        raise ConfigError(f"{name}: must be lines of `key: value`, such as `{example}`")
    return list(root.value) if root else []
