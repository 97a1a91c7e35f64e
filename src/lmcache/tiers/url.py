"""A tier as a URL: `disk:///var/lib/lmcache?max_gb=200`, `redis://user:${REDIS_PASSWORD}@host:6379/0?max_gb=50`.

Every option of the query must be taken by the tier, or `finish` raises an error that names the nearest one. Secrets come from
`${NAME}` references or `?password_file=`; people, logs and /status see `redacted`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from lmcache.config.given import check_secret_file
from lmcache.config.hosts import in_url
from lmcache.config.options import GIB, number, redacted_url
from lmcache.errors import ConfigError
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME, Runtime

_REFERENCE = re.compile(r"\$\{(\w+)\}")
_MOST_SHOWN = 2000
_PUBLIC = frozenset(
    [
        "max_gb",
        "read",
        "write",
        "admit",
        "name",
        "region",
        "account",
        "endpoint",
        "timeout",
        "connections",
        "ttl",
        "prefix",
        "io",
        "codec",
        "cluster",
        "sentinel",
        "sweep",
        "also",
        "segment_gb",
        "replicas",
        "workers",
        "protocol",
        "device",
        "hostname",
        "metadata",
    ]
)
"""Options whose values may be shown; those of `*_file` are paths. Values of all other options are shown as `***`."""
_SENTINELS = re.compile(
    r"redis(?P<tls>s?)-sentinel://(?P<who>[^@/?]*@)?(?P<hosts>[^/?]*)(?P<path>/[^?]*)?(\?(?P<query>.*))?"
)
T = TypeVar("T")


@dataclass
class TierURL:
    """The parts of one tier's URL. `take` reads options; `finish` checks that all were read."""

    scheme: str
    username: str = ""
    password: str = field(default="", repr=False)
    host: str = ""
    port: int | None = None
    path: str = ""
    """The path as in the URL, with its leading slash; percent-encoding is decoded."""
    options: dict[str, str] = field(default_factory=dict, repr=False)
    inline_secret: bool = False
    """Whether the URL itself contains a password, which every user of the machine can read."""
    runtime: Runtime = RUNTIME
    """Clock and threads for the tier."""
    _taken: set[str] = field(default_factory=set, repr=False)

    @property
    def redacted(self) -> str:
        """The URL for people and for one line of a log, without the password and without options that may be secret."""
        who = f"{self.username}:***@" if self.password else f"{self.username}@" if self.username else ""
        host = in_url(self.host)
        shown = (
            f"{key}={redacted_url(value) if key in _PUBLIC or key.endswith('_file') else '***'}"
            for key, value in self.options.items()
        )
        query = "&".join(shown)
        port = f":{self.port}" if self.port is not None else ""
        return printable(f"{self.scheme}://{who}{host}{port}{self.path}" + (f"?{query}" if query else ""), _MOST_SHOWN)

    def folder(self, example: str) -> Path:
        """Return the path, of a tier in the file system. example: such a path, for the message.

        Raises:
            ConfigError: the URL has a host, or no path.
        """
        if self.host or not self.path.strip("/"):
            raise ConfigError(f"{self.redacted}: write an absolute path with three slashes: {self.scheme}://{example}")
        return Path(os.path.normpath(self.path))

    def folders(self, example: str) -> list[Path]:
        """Return the paths of a tier that may have several: `disk:///a,/b`. A comma before anything but a slash is a letter.

        Raises:
            ConfigError: as `folder`, or a path is given twice, or lies in another one.
        """
        self.folder(example)
        found = [Path(os.path.normpath(path)) for path in re.split(r",(?=/)", self.path)]
        for path, other in itertools.combinations(found, 2):
            if path.is_relative_to(other) or other.is_relative_to(path):
                raise ConfigError(f"{self.redacted}: {path} and {other}: each device needs a folder of its own")
        return found

    def take(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Return the value of an option, or the default.

        Raises:
            ConfigError: `parse` raised ValueError, whose text says what the value must be.
        """
        self._taken.add(name)
        if name not in self.options:
            return default
        try:
            return parse(self.options[name])
        except ValueError as error:
            raise ConfigError(f"{self.redacted}: {name}: {error}") from None

    def take_max_bytes(self) -> int | None:
        """Return `max_gb` (GiB) in bytes; None where it is not given."""
        gigabytes = self.take("max_gb", number(0.001, 1e9), 0.0)
        return int(gigabytes * GIB) if gigabytes else None

    def take_frame_key(self) -> bytes:
        """Return the 32 bytes of `key_file` for keyed checksums, b"" without the option.

        Raises:
            ConfigError: the file's mode is not 0600, or it holds neither 32 bytes nor 64 hexadecimal digits.
        """
        path = self.take("key_file", str, "")
        return read_secret(path, self.redacted, 32) if path else b""

    def take_password(self) -> str:
        """Return the URL's password, or the content of `password_file`."""
        return self.take_secret("password_file") or self.password

    def take_secret(self, name: str) -> str:
        """Return the content of the file that this option names, "" without the option."""
        path = self.take(name, str, "")
        return read_secret(path, self.redacted).decode() if path else ""

    def finish(self) -> None:
        """Check that all options were taken. Raises ConfigError for one that was not."""
        for name in self.options:
            if name not in self._taken:
                near = difflib.get_close_matches(name, self._taken, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(self._taken))}"
                raise ConfigError(f"{self.redacted}: unknown option {name!r}; {hint}")


def parse_url(text: str, environ: Mapping[str, str] = os.environ, runtime: Runtime = RUNTIME) -> TierURL:
    """Parse the URL of a tier. Raises ConfigError for invalid text or an unset `${NAME}`. The message shows no secret."""
    text = _one_host(text)
    scheme = text.partition("://")[0]
    if "://" not in text or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise ConfigError(
            f"tier {text.partition(':')[0][:40]!r}: write a URL such as disk:///var/lib/lmcache?max_gb=200"
        )

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ConfigError(f"{scheme}://...: ${{{match[1]}}} is not set: export {match[1]}")
        return environ[match[1]]

    try:
        parts = urlsplit(text)
        port = parts.port
        if "#" in text or (port is not None and "@" in parts.path):
            raise ValueError("it ends, or the host does, in the middle of a password")
    except ValueError:  # its text may contain a part of the password
        raise ConfigError(
            f"{scheme}://...: not a URL: the port must be a number up to 65535, an IPv6 address in brackets, and in a password"
            " write / as %2F, # as %23, ? as %3F, @ as %40 and : as %3A"
        ) from None
    pairs = parse_qsl(parts.query, keep_blank_values=True)
    options = {key: _REFERENCE.sub(value_of, value) for key, value in pairs}
    if len(options) != len(pairs):
        raise ConfigError(f"{scheme}://...: an option is given twice")
    raw_password = unquote(parts.password or "")
    return TierURL(
        scheme=scheme,
        username=_REFERENCE.sub(value_of, unquote(parts.username or "")),
        password=_REFERENCE.sub(value_of, raw_password),
        host=parts.hostname or "",
        port=port,
        path=unquote(parts.path),
        options=options,
        inline_secret=bool(raw_password) and not _REFERENCE.fullmatch(raw_password),
        runtime=runtime,
    )


def _one_host(text: str) -> str:
    """Return `redis-sentinel://a:1,b:2/NAME/0?...` as `redis://a:1/0?sentinel=NAME&also=b:2&...`, others as they are."""
    found = _SENTINELS.fullmatch(text)
    if not found:
        return text
    first, _, others = found["hosts"].partition(",")
    name, _, database = (found["path"] or "").strip("/").partition("/")
    if not name:
        raise ConfigError(
            "redis-sentinel://...: write redis-sentinel://host:26379,host2:26379/NAME/0, with the primary's name"
        )
    options = [f"sentinel={name}", *([f"also={others}"] if others else []), *filter(None, [found["query"]])]
    return f"redis{found['tls']}://{found['who'] or ''}{first}/{database or 0}?{'&'.join(options)}"


def read_secret(path: str, said: str, binary_bytes: int = 0) -> bytes:
    """Return the content of a file that only its owner may read. binary_bytes: its exact size, raw or in hexadecimal; 0: any.

    Raises:
        ConfigError: the file cannot be read, other users may read it, or it has another size.
    """
    check_secret_file(Path(path), said)
    content = Path(path).read_bytes()
    if not binary_bytes:
        return content.strip()
    if len(content) == binary_bytes:
        return content
    try:
        content = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        content = b""
    if len(content) != binary_bytes:
        raise ConfigError(f"{said}: {path} must hold {binary_bytes} bytes, or {2 * binary_bytes} hexadecimal digits")
    return content
