"""A row of the table of settings, and the parsers that rows use: text -> value, or ValueError with what it must be."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache.errors import ConfigError

ENV_PREFIX = "LMCACHE_SERVER_"
GIB = 1 << 30
_LONGEST_FILE_BYTES = 1 << 20
_LONGEST_SOCKET_DIR = 80  # bytes: sun_path holds 108, and the socket's own name needs its share


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of the table: how a setting is called, read and explained."""

    name: str
    group: str
    help: str
    metavar: str
    parse: Callable[[str], Any]
    """Text -> value. Raises ValueError with what was expected ("must be ...")."""
    default_text: str
    secret: bool = False
    in_file: bool = True
    extra_env: str = ""
    repeat: bool = False
    """May be given several times; the values come one a line, and `parse` gives a tuple."""

    @property
    def flag(self) -> str:
        """As typed: `--l1-size-gb`."""
        return "--" + self.key

    @property
    def key(self) -> str:
        """As written in a file: `l1-size-gb`."""
        return self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """As exported: `LMCACHE_SERVER_L1_SIZE_GB`."""
        return ENV_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone, without a value."""
        return self.parse is switch


def integer(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


class TypedNumber(float):
    """A number that is shown as it was typed, so that an error names what the user wrote: `1000000`, not `1e+06`."""

    def __new__(cls, text: str | float) -> TypedNumber:
        made = super().__new__(cls, text)
        made._text = str(text).strip()
        return made

    _text: str

    def __str__(self) -> str:
        return self._text


def number(low: float, high: float) -> Callable[[str], float]:
    """A finite number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = TypedNumber(text)
        except ValueError:
            value = TypedNumber("nan")
        if not low <= value <= high:
            raise ValueError(f"must be a number from {low:.15g} to {high:.15g}")
        return value

    return parse


def l1_size(text: str) -> float:
    """GiB; `auto` is 0, which `lmcache.server.preflight` replaces by what suits the machine."""
    return 0.0 if text.lower() == "auto" else number(0.001, 1e6)(text)


def choice(names: tuple[str, ...]) -> Callable[[str], str]:
    """One of some upper-case names, typed in any case."""

    def parse(text: str) -> str:
        if text.upper() not in names:
            raise ValueError(f"unknown; known: {', '.join(names)}")
        return text.upper()

    return parse


def address(text: str) -> str:
    """An IP address; names are not looked up, since their answer may change. `localhost` and `*` are spelled out."""
    named = {"localhost": "127.0.0.1", "*": "0.0.0.0"}.get(text.lower(), text.strip("[]"))
    try:
        return str(ipaddress.ip_address(named))
    except ValueError:
        raise ValueError("must be an IP address of this machine (127.0.0.1, 0.0.0.0 for all, ::1 ...)") from None


def path(text: str) -> Path:
    """An absolute path; `~` is the home directory."""
    if not text or "\0" in text:
        raise ValueError("must be a path")
    return Path(text).expanduser().absolute()


def socket_dir(text: str) -> Path:
    """A directory short enough for the address of a Unix socket in it."""
    directory = path(text)
    if len(os.fsencode(directory)) > _LONGEST_SOCKET_DIR:
        raise ValueError(f"too long for a Unix socket: use a path of at most {_LONGEST_SOCKET_DIR} bytes")
    return directory


def switch(text: str) -> bool:
    """true or false, as YAML and shells say it."""
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("must be true or false")
    return text.lower() in ("1", "true", "yes", "on")


def word(*names: str) -> Callable[[str], str]:
    """One of some lower-case words, typed in any case."""

    def parse(text: str) -> str:
        if text.lower() not in names:
            raise ValueError(f"unknown; known: {', '.join(names)}")
        return text.lower()

    return parse


def urls(text: str) -> tuple[str, ...]:
    """URLs, one a line or separated by blanks. What they mean is looked at by whoever uses them."""
    found = tuple(text.split())
    for one in found:
        if "://" not in one:
            raise ValueError(f"must be URLs; {redacted_url(one)!r} is none")
    return found


def lines(text: str) -> tuple[str, ...]:
    """One value a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def redacted_url(text: str) -> str:
    """The text with everything that could be a password in a URL as `***`."""
    text = re.sub(r"(://[^:/?#@]*):[^/?#]*@", r"\1:***@", text)
    return re.sub(r"([?&][^=&]*(?:key|secret|token|password)(?<!_file)=)[^&]+", r"\1***", text, flags=re.IGNORECASE)


def numa(text: str) -> str:
    """`auto`, `spread`, or a list of node numbers; whether they exist is looked at when memory is placed."""
    if text.lower() in ("auto", "spread"):
        return text.lower()
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise ValueError("must be auto, spread, or nodes such as 0 or 0,2-3")
    return text


def token(text: str) -> str:
    """A bearer token."""
    if not re.fullmatch(r"[!-~]{1,512}", text):
        raise ValueError("must be 1 to 512 printable ASCII characters without spaces")
    return text


def read_file(path: Path, name: str, remedy: str = "") -> bytes:
    """What a configuration file holds. ConfigError, which calls it `name`, where it cannot be read or is larger than 1 MiB."""
    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}{remedy}") from error
    if len(raw) > _LONGEST_FILE_BYTES:
        raise ConfigError(f"{name}: larger than {_LONGEST_FILE_BYTES >> 20} MiB; that is no configuration")
    return raw


def default_socket_dir() -> Path:
    """The user's runtime directory where there is one, else a private place in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and len(os.fsencode(runtime)) < _LONGEST_SOCKET_DIR - 8 and os.access(runtime, os.W_OK):
        return Path(runtime, "lmcache")
    return Path(f"/tmp/lmcache-{os.getuid()}")
