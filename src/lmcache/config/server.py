"""The server's settings: one table, from which flags, environment names, file keys and the help text all come.

The table is `ServerConfig` itself: each field carries its parser and its help. A field `l1_size_gb` is the flag
`--l1-size-gb`, the variable `LMCACHE_SERVER_L1_SIZE_GB` and the file's key `l1-size-gb` (`l1_size_gb` too).
A flag beats the environment, which beats the file, which beats the default.
"""
# ruff: noqa: RUF009 - fields get their defaults and their row of the table from one call

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache.config import options as read
from lmcache.config.hosts import in_url
from lmcache.config.options import GIB, Option
from lmcache.errors import ConfigError

POLICIES = ("LRU",)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _option(group: str, metavar: str, parse: Callable[[str], Any], default: Any, help: str, **more: Any) -> Any:
    """A field of ServerConfig with its row of the table in the metadata."""
    text = more.pop(
        "default_text", "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    )
    row = {"group": group, "metavar": metavar, "parse": parse, "help": help, "default_text": text, **more}
    shown = not more.get("secret", False)
    if callable(default):
        return dataclasses.field(default_factory=default, repr=shown, metadata=row)
    return dataclasses.field(default=default, repr=shown, metadata=row)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Everything `lmcache server` was told, checked for meaning. `load` fills it; code may construct it directly."""

    l1_size_gb: float = _option(
        "cache",
        "GB",
        read.l1_size,
        0.0,
        default_text="auto, a quarter of what is available",
        help="Memory for KV, in GiB (2^30 bytes); fractions are fine. The arena never grows past it.",
    )
    eviction_policy: str = _option(
        "cache",
        "NAME",
        read.choice(POLICIES),
        "LRU",
        help="What makes room in a full L1. LRU: what was unused longest goes first, a prompt's end before its start.",
    )
    chunk_size: int = _option(
        "cache",
        "TOKENS",
        read.integer(1, 1 << 20),
        256,
        help="Tokens in a chunk, the unit of reuse. Small finds more in short prompts and costs more per token; "
        "any size works with any block size of the engine. Engines learn it from the server.",
    )
    lease_seconds: float = _option(
        "cache",
        "SECONDS",
        read.number(1, 3600),
        30.0,
        help="How long an engine may take to fetch what a lookup promised it, or to store what it got room for, and a tier to "
        "load what it has. Later their slots count as quarantined: out of use until they let go of them or have ended.",
    )
    max_workers: int = _option(
        "cache",
        "N",
        read.integer(1, 256),
        2,
        help="I/O threads for engines on other hosts. Engines on this host copy by themselves; tiers have threads of their own.",
    )

    l2: tuple[str, ...] = _option(
        "tiers",
        "URL",
        read.urls,
        (),
        default_text="none",
        repeat=True,
        help="A tier behind L1, may be given several times, the nearest first: disk:///var/lib/lmcache?max_gb=200, "
        "dir:///mnt/shared, redis://:${PASSWORD}@host:6379/0?max_gb=50, s3://bucket/prefix?region=... . For every tier: "
        "write=through|on-evict|none, read=yes|no, name=NAME. docs/tiers has a page for each.",
    )
    l2_adapter: tuple[str, ...] = _option(
        "tiers",
        "JSON",
        read.lines,
        (),
        default_text="none",
        repeat=True,
        help="""The same as JSON: '{"type": "fs", "base_path": "/data"}'. Types: fs, resp (Redis), s3.""",
    )
    l2_required: bool = _option(
        "tiers",
        "",
        read.switch,
        False,
        default_text="off",
        help="Do not start when a tier cannot be reached. Otherwise the server goes on without it and tries again.",
    )
    l2_patience_seconds: float = _option(
        "tiers",
        "SECONDS",
        read.number(0.01, 600),
        10.0,
        help="The longest that a request waits for loads from tiers, where nothing shorter is known to be sensible.",
    )
    l2_queue_gb: float = _option(
        "tiers",
        "GB",
        read.number(0, 1e6),
        0.0,
        default_text="half of L1",
        help="Bytes of chunks that may wait to be written to a tier, in GiB; beyond it the newest are not written.",
    )
    worth: str = _option(
        "tiers",
        "WHEN",
        read.word("auto", "always"),
        "auto",
        help="auto: do not load what the engine computes sooner, by both measured speeds. always: load whatever is there.",
    )
    drain_seconds: float = _option(
        "tiers",
        "SECONDS",
        read.number(0, 3600),
        10.0,
        help="How long SIGTERM waits for what is still to be written to tiers.",
    )

    host: str = _option(
        "network",
        "ADDRESS",
        read.address,
        "127.0.0.1",
        help="Address that engines connect to (ZMQ). Beyond loopback it needs --auth-key-file or --insecure-no-auth.",
    )
    port: int = _option(
        "network",
        "PORT",
        read.integer(0, 65535),
        5555,
        help="TCP port for engines (ZMQ). 0 takes a free one; the log says which.",
    )
    http_host: str = _option(
        "network",
        "ADDRESS",
        read.address,
        "0.0.0.0",
        help="Address of health, status and metrics (HTTP). To change something, be local or hold the token.",
    )
    http_port: int = _option(
        "network",
        "PORT",
        read.integer(0, 65535),
        8080,
        help="TCP port of health, status and metrics. 0 takes a free one.",
    )
    socket_dir: Path = _option(
        "network",
        "DIR",
        read.socket_dir,
        read.default_socket_dir,
        default_text="$XDG_RUNTIME_DIR/lmcache or /tmp/lmcache-UID",
        help="Folder (0700) of the Unix socket through which engines on this host get the arena. "
        "Share it with an engine's container to give it the fast way.",
    )

    auth_key_file: Path | None = _option(
        "security",
        "FILE",
        read.path,
        None,
        help="CURVE key file (0600) that engines on other hosts must prove to know; needed for --host beyond loopback. "
        "Engines take theirs from LMCACHE_AUTH_KEY_FILE.",
    )
    insecure_no_auth: bool = _option(
        "security",
        "",
        read.switch,
        False,
        default_text="off",
        help="Let anybody who can reach --host read and write the cache. For closed networks only. "
        "Engines need LMCACHE_INSECURE_NO_AUTH=1, since they cannot tell that it is this server.",
    )
    api_token: str = _option(
        "security",
        "TOKEN",
        read.token,
        "",
        secret=True,
        help="Bearer token for HTTP calls that change something, from other hosts. On the command line it is visible "
        "to every user of this machine: prefer --api-token-file or the environment.",
    )
    api_token_file: Path | None = _option("security", "FILE", read.path, None, help="File (0600) that holds the token.")

    arena_dir: Path = _option(
        "machine",
        "DIR",
        read.path,
        Path("/dev/shm"),
        help="Where the L1 memory file lives; a memory file system (tmpfs, hugetlbfs).",
    )
    numa: str = _option(
        "machine",
        "NODES",
        read.numa,
        "auto",
        help="Memory nodes of L1. auto and spread: all of them by turns (auto leaves a machine with one alone); "
        "0 or 0,2-3: these only, for engines whose GPUs hang on them.",
    )
    log_level: str = _option(
        "machine",
        "LEVEL",
        read.choice(LOG_LEVELS),
        "INFO",
        extra_env="LMCACHE_LOG_LEVEL",
        help=f"How much to log: {', '.join(LOG_LEVELS)}.",
    )
    config: Path | None = _option(
        "machine",
        "FILE",
        read.path,
        None,
        in_file=False,
        help="YAML file with any of these settings, `l1-size-gb: 20` for --l1-size-gb 20; ${NAME} takes a value from "
        "the environment. `lmcache config check FILE` shows the outcome.",
    )

    @property
    def l1_bytes(self) -> int:
        """Bytes of the arena. Only after `preflight` has replaced `auto` by a size."""
        if not self.l1_size_gb:
            raise ConfigError("--l1-size-gb auto: not decided yet; pass a size in GiB")
        return int(self.l1_size_gb * GIB)

    @property
    def l2_queue_bytes(self) -> int:
        """Bytes of chunks that may wait to be written to one tier."""
        return int(self.l2_queue_gb * GIB) or self.l1_bytes // 2

    @property
    def endpoint(self) -> str:
        """Where ZMQ binds: `tcp://127.0.0.1:5555`."""
        return f"tcp://{in_url(self.host)}:{self.port}"

    @property
    def http_url(self) -> str:
        """Where HTTP listens: `http://0.0.0.0:8080`."""
        return f"http://{in_url(self.http_host)}:{self.http_port}"

    @property
    def beyond_loopback(self) -> bool:
        """Whether other hosts may reach the engines' port."""
        return not ipaddress.ip_address(self.host).is_loopback

    @property
    def reach(self) -> str:
        """One line for the log: who can reach the engines' port now."""
        where = f"Engines' port {self.endpoint}"
        if not self.beyond_loopback:
            return f"{where}: reachable from this host only"
        every = "every host with a way to any address of this one"
        who = every if ipaddress.ip_address(self.host).is_unspecified else f"every host with a way to {self.host}"
        proof = f"that knows the key in {self.auth_key_file}" if self.auth_key_file else "WITHOUT any authentication"
        return f"{where}: reachable by {who}, {proof}"

    def redacted(self) -> dict[str, object]:
        """For /status and people: flag name -> value, JSON types only, secrets as `***`."""
        return {option.key: shown(option, getattr(self, option.name)) for option in OPTIONS}


def _row(field: dataclasses.Field[Any]) -> Option:
    return Option(name=field.name, **field.metadata)


OPTIONS: tuple[Option, ...] = tuple(_row(field) for field in dataclasses.fields(ServerConfig))
GROUPS = {
    "cache": "the cache",
    "tiers": "tiers behind it (L2)",
    "network": "network",
    "security": "who may do what",
    "machine": "the machine",
}


def shown(option: Option, value: object) -> object:
    """A value as people and JSON may see it."""
    if option.secret:
        return "***" if value else None
    if option.name == "l1_size_gb" and not value:
        return "auto"
    if option.name == "l2_queue_gb" and not value:
        return "half of L1"
    if isinstance(value, tuple):
        return [read.redacted_url(one) for one in value]
    return str(value) if isinstance(value, Path) else value
