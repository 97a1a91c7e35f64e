"""The rows of the table of settings, and their parsers, which turn text into a value or raise ValueError ("must be ...")."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmcache.config.hosts import in_url
from lmcache.observability.log import redacted

redacted_url = redacted
ENV_PREFIX = "LMCACHE_SERVER_"
GIB = 1 << 30
_LONGEST_SOCKET_DIR = 80  # bytes: sun_path holds 108, and the socket's own name needs its share


@dataclasses.dataclass(frozen=True)
class Option:
    """One row of the table: the name, the parser and the help text of a setting."""

    name: str
    group: str
    help: str
    metavar: str
    parse: Callable[[str], Any]
    """Turns text into a value. Raises ValueError that says what was expected ("must be ...")."""
    default_text: str
    secret: bool = False
    in_file: bool = True
    extra_env: str = ""
    repeat: bool = False
    """Whether the setting may be given several times. The values are then joined by newlines, and `parse` returns a tuple."""

    @property
    def flag(self) -> str:
        """The name of the flag, such as `--l1-size-gb`."""
        return "--" + self.key

    @property
    def key(self) -> str:
        """The key in a file, such as `l1-size-gb`."""
        return self.name.replace("_", "-")

    @property
    def env(self) -> str:
        """The environment variable, such as `LMCACHE_SERVER_L1_SIZE_GB`."""
        return ENV_PREFIX + self.name.upper()

    @property
    def is_switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.parse is switch


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return a parser of integers in [low, high]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return parse


class TypedNumber(float):
    """A number that is shown as it was typed, so that an error repeats what the user wrote: `1000000`, not `1e+06`."""

    def __new__(cls, text: str | float) -> TypedNumber:
        made = super().__new__(cls, text)
        made._text = str(text).strip()
        return made

    _text: str

    def __str__(self) -> str:
        return self._text


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of finite numbers in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = TypedNumber(text)
        except ValueError:
            value = TypedNumber("nan")
        if not low <= value <= high:
            raise ValueError(f"must be a number from {low:.15g} to {high:.15g}")
        return value

    return parse


deadline = number(0.001, 3599)
"""Parses how many seconds a server that does not answer may delay a request."""


def gibibytes(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of sizes in GiB within [low, high]. A unit may follow: `2GB`, `2GiB` and `2G` are 2, `512MB` is 0.5; the
    letters mean powers of 1024 throughout."""
    plain = number(low, high)

    def parse(text: str) -> float:
        found = re.fullmatch(r"([0-9.]+) ?([MGT])(?:i?B)?", text.strip(), re.IGNORECASE)
        if not found:
            return plain(text)
        gib = {"M": 1 / 1024, "G": 1.0, "T": 1024.0}[found[2].upper()]
        return plain(found[1]) if gib == 1 else plain(f"{number(0, 1e15)(found[1]) * gib:.15g}")

    return parse


def l1_size(text: str) -> float:
    """Parse GiB. `auto` is 0, which `lmcache.server.preflight` replaces by a size that suits the machine."""
    return 0.0 if text.lower() == "auto" else gibibytes(0.001, 1e6)(text)


def address(text: str) -> str:
    """Parse an IP address. Only the names `localhost` and `*` are accepted, since others may resolve differently later."""
    named = {"localhost": "127.0.0.1", "*": "0.0.0.0"}.get(text.lower(), text.strip("[]"))
    try:
        return str(ipaddress.ip_address(named))
    except ValueError:
        raise ValueError("must be an IP address of this machine (127.0.0.1, 0.0.0.0 for all, ::1 ...)") from None


def path(text: str) -> Path:
    """Parse a path and make it absolute; `~` is the home directory."""
    if not text or "\0" in text:
        raise ValueError("must be a path")
    return Path(text).expanduser().absolute()


def socket_dir(text: str) -> Path:
    """Parse the path of a directory, short enough for the address of a Unix socket in it."""
    directory = path(text)
    if len(os.fsencode(directory)) > _LONGEST_SOCKET_DIR:
        raise ValueError(f"too long for a Unix socket: use a path of at most {_LONGEST_SOCKET_DIR} bytes")
    return directory


def switch(text: str) -> bool:
    """Parse true or false, in the spellings of YAML and shells."""
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError("must be true or false")
    return text.lower() in ("1", "true", "yes", "on")


def word(*names: str) -> Callable[[str], str]:
    """Return a parser of one of the `names`, typed in any case."""

    def parse(text: str) -> str:
        for name in names:
            if name.lower() == text.lower():
                return name
        raise ValueError(f"unknown; known: {', '.join(names)}")

    return parse


def policy(*names: str) -> Callable[[str], str]:
    """Return a parser of a policy of eviction. The public project's names of adaptive ones stand for `learned`."""
    known = word(*names)
    refused = {
        "isolatedlru": "no part of L1 is set aside for each cache_salt: pass LRU, and a server for each tenant if they need that",
        "noop": "a full L1 evicts: pass LRU, and a size that is never full",
    }

    def parse(text: str) -> str:
        if text.lower() in refused:
            raise ValueError(f"is not supported, since {refused[text.lower()]}")
        return "learned" if text.lower() == "arc" else known(text)

    return parse


def label(text: str) -> str:
    """Parse a name that metrics, logs and the paths of HTTP routes will show."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise ValueError(
            f"{text[:80]!r}: must be up to 64 letters, digits, dots, dashes and underscores, and begin with a letter or digit"
        )
    return text


def urls(text: str) -> tuple[str, ...]:
    """Parse URLs, separated by newlines or blanks. Their users check what they mean."""
    found = tuple(text.split())
    for one in found:
        if "://" not in one:
            raise ValueError(f"must be URLs; {redacted_url(one)!r} is not one")
    return found


def one_url(text: str) -> str:
    """Parse the URL of an HTTP server, or nothing."""
    if text and not re.fullmatch(r"https?://[^\s/?#]+[^\s]*", text):
        raise ValueError("must be a URL such as http://localhost:4318")
    return text


def http_urls(text: str) -> tuple[str, ...]:
    """Parse URLs of HTTP servers, separated by commas, newlines or blanks."""
    return tuple(dict.fromkeys(one_url(one).rstrip("/") for one in text.replace(",", " ").split()))


def one_line(text: str) -> str:
    """Parse a name of up to 200 printable characters."""
    if len(text) > 200 or not text.isprintable():
        raise ValueError("must have at most 200 characters, all of them printable")
    return text


def peers(text: str) -> tuple[str, ...]:
    """Parse the addresses of servers, separated by commas. A port that is missing is 5555."""
    return tuple(dict.fromkeys(address for line in text.splitlines() for address in _addresses(line)))


def one_peer(text: str) -> str:
    """Parse the address of one server, or nothing."""
    found = peers(text)
    if len(found) > 1:
        raise ValueError("must be one HOST:PORT")
    return found[0] if found else ""


def devices(text: str) -> str:
    """Parse names of network devices with commas between them, as UCX takes them."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+(,[A-Za-z0-9_.:-]+)*", text):
        raise ValueError("must be names of network devices with commas between them, such as mlx5_0:1,eth1")
    return text


def peers_or_directory(text: str) -> tuple[str, ...]:
    """Parse lines of addresses as `peers` does, of which one may be the URL of a directory instead."""
    lines = [line.strip() for line in text.splitlines()]
    urls = [line for line in lines if re.match(r"\w+(-sentinel)?://", line)]
    for one in urls:
        if not re.match(r"rediss?(-sentinel)?://\S+$", one):
            raise ValueError(f"must be HOST:PORT,HOST:PORT or redis://HOST:PORT/0; {redacted_url(one)!r} is not one")
    if len(urls) > 1:
        raise ValueError("must name one directory at most")
    return *peers("\n".join(line for line in lines if line not in urls)), *urls


def _addresses(line: str) -> list[str]:
    found = []
    for one in filter(None, (part.strip() for part in line.split(","))):
        host, _, port = one.rpartition(":")
        if not host or one.endswith("]") or (":" in host and not host.startswith("[")):
            host, port = in_url(one), "5555"
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"must be HOST:PORT,HOST:PORT; {one!r} is not one")
        found.append(f"{host}:{int(port)}")
    return found


def ids(text: str) -> tuple[int, ...]:
    """Parse numbers of users or groups, separated by commas.

    Raises:
        ValueError: something else, or the number that the kernel shows for everybody whom it cannot name here.
    """
    found = []
    for one in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        if not one.isascii() or not one.isdecimal() or int(one) >= (1 << 32) - 1:
            raise ValueError(f"must be numbers, such as 1000,1001 (`id` shows them); {one!r} is not one")
        if int(one) in _nobody():
            raise ValueError(
                f"{one} is what the kernel shows for every user of another user namespace: give the process a number of its own"
            )
        found.append(int(one))
    return tuple(dict.fromkeys(found))


def _nobody() -> set[int]:
    """Return the numbers for users and groups that have none in this user namespace."""
    found = {65534}
    for name in ("overflowuid", "overflowgid"):
        with suppress(OSError, ValueError):
            found.add(int(Path(f"/proc/sys/kernel/{name}").read_text()))
    return found


def lines(text: str) -> tuple[str, ...]:
    """Parse one value a line, skipping empty lines."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def numa(text: str) -> str:
    """Parse `auto`, `spread`, or a list of node numbers. Whether the nodes exist is checked when memory is placed."""
    if text.lower() in ("auto", "spread"):
        return text.lower()
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text):
        raise ValueError("must be auto, spread, or nodes such as 0 or 0,2-3")
    return text


def token(text: str) -> str:
    """Parse a bearer token."""
    if not re.fullmatch(r"[!-~]{1,512}", text):
        raise ValueError("must be 1 to 512 printable ASCII characters without spaces")
    return text


def default_socket_dir() -> Path:
    """Return the user's runtime directory where there is one, else a private directory in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and len(os.fsencode(runtime)) < _LONGEST_SOCKET_DIR - 8 and os.access(runtime, os.W_OK):
        return Path(runtime, "lmcache")
    return Path(f"/tmp/lmcache-{os.getuid()}")


def size_text(size_bytes: float) -> str:
    """Return a size for people, in GiB or MiB (2^30 and 2^20 bytes)."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:,.2f} GiB"
    return f"{size_bytes / 2**20:,.1f}".removesuffix(".0") + " MiB"
