"""The server's settings: one table that defines flags, environment variables, file keys and help texts.

The table is `ServerConfig` itself: each field has its parser and its help text. A field `l1_size_gb` is the flag
`--l1-size-gb`, the variable `LMCACHE_SERVER_L1_SIZE_GB` and the file's key `l1-size-gb` (also `l1_size_gb`).
A flag overrides the environment, which overrides the file, which overrides the default.
"""
# ruff: noqa: RUF009 - fields get their defaults and their row of the table from one call

from __future__ import annotations

import dataclasses
import functools
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lmcache.config import options as read
from lmcache.config.hosts import in_url
from lmcache.config.options import GIB, Option
from lmcache.errors import ConfigError

POLICIES = ("LRU", "learned")
L1_CODECS = ("auto", "none", "int8", "k8v4")
HUGE_PAGES = ("auto", "always", "never")
METRICS_NAMES = ("own", "lmcache-0.5")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
GROUPS = {
    "cache": "the cache",
    "tiers": "tiers behind it (L2)",
    "network": "network",
    "security": "who may do what",
    "machine": "the machine",
}


def _option(group: str, metavar: str, parse: Callable[[str], Any], default: Any, help: str, **more: Any) -> Any:
    """Return a field of ServerConfig with its row of the table in the metadata."""
    text = more.pop(
        "default_text", "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
    )
    row = {"group": group, "metavar": metavar, "parse": parse, "help": help, "default_text": text, **more}
    shown = not more.get("secret", False)
    if callable(default):
        return dataclasses.field(default_factory=default, repr=shown, metadata=row)
    return dataclasses.field(default=default, repr=shown, metadata=row)


_cache, _tiers, _network, _security, _machine = (functools.partial(_option, group) for group in GROUPS)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """All settings of `lmcache server`, checked for meaning. `load` fills it; code may also construct it directly."""

    l1_size_gb: float = _cache(
        *("GB", read.l1_size, 0.0),
        default_text="auto, a quarter of what is available",
        extra_env="LMCACHE_L1_SIZE_GB",
        help="Memory for KV, in GiB (2^30 bytes); fractions are fine, and so are 2GB and 512MB. The arena never grows past it.",
    )
    eviction_policy: str = _cache(
        *("NAME", read.policy(*POLICIES), "LRU"),
        help="Which chunks a full L1 evicts. LRU: those unused for longest go first, a prompt's end before its start. learned: "
        "those that are least likely to be used for the time they would be held, which the server learns from its requests.",
    )
    chunk_size: int = _cache(
        *("TOKENS", read.integer(1, 1 << 20), 256),
        help="Tokens in a chunk, the unit of reuse. Small chunks find more in short prompts and cost more per token; "
        "any size works with any block size of the engine. Engines learn the size from the server.",
    )
    l1_codec: str = _cache(
        *("CODEC", read.word(*L1_CODECS), "auto"),
        help="Which KV memory takes. auto: what engines store, exact or rounded, as lossy_kv says. none: only exact KV. int8, "
        "k8v4: only KV in 8 bits, or with V in 4, which takes 0.52 or 0.42 of the memory. Other engines are refused, "
        "and compute without this server.",
    )
    pinned_share: float = _cache(
        *("SHARE", read.number(0, 1), 0.5),
        help="How much of L1 operators may pin (`lmcache kvcache pin`), from 0 to 1. What is pinned is not evicted, so engines "
        "have the rest.",
    )
    lease_seconds: float = _cache(
        *("SECONDS", read.number(1, 3600), 30.0),
        help="How long an engine may take to load what a lookup found or to store what it reserved, and a tier to finish a "
        "load. After that their memory counts as quarantined: out of use until they release it or have ended.",
    )
    max_workers: int = _cache(
        *("N", read.integer(1, 256), 2),
        help="I/O threads for engines on other hosts. Engines on this host copy by themselves; tiers have their own threads.",
    )
    predict: str = _cache(
        *("WHEN", read.word("on", "off"), "on"),
        help="on: estimate what other sizes of L1 would find, from a sample of the lookups (`lmcache predict`).",
    )
    record_trace: Path | None = _cache(
        *("FILE", read.path, None),
        help="Write the chunk hashes of all lookups and stores, without tokens, to FILE (0600) for `lmcache replay`.",
    )
    record_trace_mb: int = _cache(
        *("MB", read.integer(1, 1 << 20), 1000),
        help="The most that the trace takes, in MiB: FILE and FILE.1, the part before it, have half of it each.",
    )

    peers: tuple[str, ...] = _tiers(
        *("HOST:PORT,...", read.peers_or_directory, ()),
        default_text="none",
        repeat=True,
        help="Other servers whose L1 lookups may use: addresses of their ports for engines. They are the nearest tier. A name "
        "with several addresses stands for as many servers, and this one may be among them. redis://host:6379/0 names a "
        "directory, in which servers with the same key find each other. docs/peers.md has more.",
    )
    peer_address: str = _tiers(
        *("HOST:PORT", read.one_peer, ""),
        default_text="what --host says, or the address by which this host reaches the store",
        help="By which address other servers reach this one: what it writes into the directory of --peers redis://... .",
    )
    peer_keep: str = _tiers(
        *("WHEN", read.word("yes", "no"), "yes"),
        help="yes: what was pulled from --peers stays in L1 as any other chunk. no: it leaves L1 when an engine has read it.",
    )
    peer_transport: str = _tiers(
        *("HOW", read.word("tcp", "nixl"), "tcp"),
        help="nixl: where the other server says so too, the KV of pulls goes by NIXL (UCX: RDMA, or TCP, or shared memory) from "
        "arena to arena. UCX asks for no proof and encrypts nothing: who reaches its ports can read and overwrite L1.",
    )
    peer_devices: str = _tiers(
        *("NAME,...", read.devices, ""),
        default_text="lo where --host is a loopback address",
        help="The network devices for --peer-transport nixl, as UCX names them: mlx5_0:1, eth1. It listens on no other.",
    )
    l2: tuple[str, ...] = _tiers(
        *("URL", read.urls, ()),
        default_text="none",
        repeat=True,
        help="A tier behind L1; may be given several times, the nearest first: disk:///var/lib/lmcache?max_gb=200, "
        "dir:///mnt/shared, redis://:${PASSWORD}@host:6379/0?max_gb=50, s3://bucket/prefix?region=... . For every tier: "
        "write=through|on-evict|none, read=yes|no, name=NAME. docs/tiers has a page for each.",
    )
    l2_adapter: tuple[str, ...] = _tiers(
        *("JSON", read.lines, ()),
        default_text="none",
        repeat=True,
        help="""A tier as JSON: '{"type": "fs", "base_path": "/data"}'. docs/tiers/README.md lists the types.""",
    )
    l2_required: bool = _tiers(
        *("", read.switch, False),
        default_text="off",
        help="Refuse to start when a tier cannot be reached. Otherwise the server starts without it and tries again.",
    )
    l2_patience_seconds: float = _tiers(
        *("SECONDS", read.number(0.01, 600), 10.0),
        help="The longest that a request waits for loads from tiers, where the measured speeds suggest nothing shorter.",
    )
    l2_queue_gb: float = _tiers(
        *("GB", read.gibibytes(0, 1e6), 0.0),
        default_text="half of L1",
        help="Bytes of chunks that may wait to be written to a tier, in GiB; beyond it the newest chunks are not written.",
    )
    worth: str = _tiers(
        *("WHEN", read.word("auto", "always"), "auto"),
        help="auto: do not load what the engine computes sooner, by the measured speeds. always: load whatever a tier holds.",
    )
    drain_seconds: float = _tiers(
        *("SECONDS", read.number(0, 3600), 10.0),
        help="How long the server, after SIGTERM, goes on writing queued chunks to tiers.",
    )

    host: str = _network(
        *("ADDRESS", read.address, "127.0.0.1"),
        help="Address that engines connect to (ZMQ). Beyond loopback it needs --auth-key-file or --insecure-no-auth.",
    )
    port: int = _network(
        *("PORT", read.integer(0, 65535), 5555),
        help="TCP port for engines (ZMQ). 0 takes a free one, which the log names.",
    )
    http_host: str = _network(
        *("ADDRESS", read.address, "0.0.0.0"),
        help="Address of health, status and metrics (HTTP). Calls that change something need a local client or the token.",
    )
    http_port: int = _network(
        "PORT", read.integer(0, 65535), 8080, help="TCP port of health, status and metrics. 0 takes a free one."
    )
    prometheus_port: int = _network(
        *("PORT", read.integer(0, 65535), 0),
        default_text="none",
        help="A second TCP port that answers as --http-port does, for a Prometheus that is configured for the public project's.",
    )
    metrics_names: str = _network(
        *("NAMES", read.word(*METRICS_NAMES), "own"),
        help="lmcache-0.5: /metrics also has the names that dashboards of the public project read "
        "(docs/coming-from-lmcache-0.5.md). own: only this server's.",
    )
    instance_id: str = _network(
        *("NAME", read.one_line, ""),
        default_text="HOSTNAME:HTTP-PORT",
        help="What the server is called in the answers of /lookup and the other routes of the public project's controller.",
    )
    control_peers: tuple[str, ...] = _network(
        *("URL,...", read.http_urls, ()),
        default_text="none",
        repeat=True,
        help="The HTTP addresses of other servers, such as http://10.0.0.8:8080, which /lookup, /move and the other routes of "
        "the public project's controller ask, too. They are sent this server's API token, so all have the same.",
    )
    tokenizer_url: str = _network(
        *("URL", read.one_url, ""),
        default_text="none",
        help="The HTTP address of an engine, such as http://localhost:8000, whose /tokenize turns the text of `lmcache kvcache` "
        "into tokens. Without it, callers send token ids. No other address is asked, whatever a request says.",
    )
    otlp_endpoint: str = _network(
        *("URL", read.one_url, ""),
        default_text="none, nothing is sent",
        help="Send a span for each request to this OpenTelemetry collector, by OTLP over HTTP: http://localhost:4318. "
        "Needs pip install 'lmcache[otel]'.",
    )
    socket_dir: Path = _network(
        *("DIR", read.socket_dir, read.default_socket_dir),
        default_text="$XDG_RUNTIME_DIR/lmcache or /tmp/lmcache-UID",
        help="Directory (0700) of the Unix socket through which engines on this host get the arena. "
        "Mount it in an engine's container so that the engine maps the arena too.",
    )

    auth_key_file: Path | None = _security(
        *("FILE", read.path, None),
        help="CURVE key file (0600) that engines on other hosts must prove to know; needed for --host beyond loopback. "
        "Engines take theirs from LMCACHE_AUTH_KEY_FILE.",
    )
    insecure_no_auth: bool = _security(
        *("", read.switch, False),
        default_text="off",
        help="Let anybody who can reach --host read and write the cache. For closed networks only. "
        "Engines need LMCACHE_INSECURE_NO_AUTH=1, since they cannot tell that it is this server.",
    )
    allow_uid: tuple[int, ...] = _security(
        *("UID,...", read.ids, ()),
        default_text="only the server's own",
        repeat=True,
        help="Users whose engines on this host may map L1 as the server's own user's do. They may read and overwrite all of it. "
        "Each engine must name the server's user in LMCACHE_ALLOW_SERVER_UID.",
    )
    allow_gid: tuple[int, ...] = _security(
        *("GID,...", read.ids, ()),
        default_text="none",
        repeat=True,
        help="Groups whose members' engines may do so: the kernel tells the groups of the process that connects.",
    )
    api_token: str = _security(
        *("TOKEN", read.token, ""),
        secret=True,
        help="Bearer token for HTTP calls that change something, from other hosts. On the command line it is visible "
        "to every user of this machine: prefer --api-token-file or the environment.",
    )
    api_token_file: Path | None = _security("FILE", read.path, None, help="File (0600) that holds the token.")

    arena_dir: Path = _machine(
        *("DIR", read.path, Path("/dev/shm")),
        help="Directory of the L1 memory file, in a memory file system (tmpfs, hugetlbfs).",
    )
    numa: str = _machine(
        *("NODES", read.numa, "auto"),
        help="Memory nodes of L1. auto and spread: interleaved over all nodes (auto does nothing on a single node); "
        "0 or 0,2-3: only these, for engines whose GPUs are attached to them.",
    )
    huge_pages: str = _machine(
        *("WHEN", read.word(*HUGE_PAGES), "auto"),
        help="Pages of 2 MiB for L1: a faster start, and less memory for page tables. auto: if --arena-dir gives them (a "
        "tmpfs mounted with huge=advise, a hugetlbfs); always: refuse to start if not; never: no. The log says what L1 has got.",
    )
    log_level: str = _machine(
        *("LEVEL", read.word(*LOG_LEVELS), "INFO"),
        extra_env="LMCACHE_LOG_LEVEL",
        help=f"How much to log: {', '.join(LOG_LEVELS)}.",
    )
    log_format: str = _machine(
        *("FORMAT", read.word(*LOG_FORMATS), "text"),
        extra_env="LMCACHE_LOG_FORMAT",
        help="text, or json: one object a line. Times are UTC.",
    )
    records_mb: float = _machine(
        *("MB", read.number(0, 1e5), 64.0),
        help="Memory, in MiB, for one record a request and for what has become of chunks, so that `lmcache why` can tell why "
        "tokens were not found. It grows only with use. 0: remember nothing, and only count.",
    )
    config: Path | None = _machine(
        *("FILE", read.path, None),
        in_file=False,
        help="YAML file with any of these settings, `l1-size-gb: 20` for --l1-size-gb 20; ${NAME} takes a value from "
        "the environment. `lmcache config check FILE` prints the result.",
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
    def nixl_devices(self) -> str:
        """The network devices of NIXL; "" if it is not used, or no device is known."""
        if self.peer_transport != "nixl":
            return ""
        return self.peer_devices or ("" if self.beyond_loopback else "lo")

    @property
    def tier_urls(self) -> tuple[str, ...]:
        """The URLs of all tiers but those given as JSON, the nearest first."""
        if not self.peers:
            return self.l2
        # Quoted twice, since `${NAME}` in the directory's URL must be replaced in its parts, and not in the complete URL.
        directory = [f"directory={quote(quote(one, safe=''))}" for one in self.peers if "://" in one]
        first, *others = [one for one in self.peers if "://" not in one] or [""]
        also, keep = [f"also={','.join(others)}"] if others else [], ["keep=no"] if self.peer_keep == "no" else []
        return f"peer://{first}?{'&'.join(['name=peers', *also, *directory, *keep])}", *self.l2

    @property
    def endpoint(self) -> str:
        """The address that ZMQ binds, such as `tcp://127.0.0.1:5555`."""
        return f"tcp://{in_url(self.host)}:{self.port}"

    @property
    def http_url(self) -> str:
        """The URL at which HTTP listens, such as `http://0.0.0.0:8080`."""
        return f"http://{in_url(self.http_host)}:{self.http_port}"

    @property
    def beyond_loopback(self) -> bool:
        """Whether other hosts may connect to the engines' port."""
        return not ipaddress.ip_address(self.host).is_loopback

    @property
    def reach(self) -> str:
        """One line for the log that says who can reach the engines' port."""
        where = f"Engines' port {self.endpoint}"
        if not self.beyond_loopback:
            return f"{where}: reachable from this host only"
        every = "every host with a way to any address of this one"
        who = every if ipaddress.ip_address(self.host).is_unspecified else f"every host with a way to {self.host}"
        proof = f"that knows the key in {self.auth_key_file}" if self.auth_key_file else "WITHOUT any authentication"
        return f"{where}: reachable by {who}, {proof}"

    def redacted(self) -> dict[str, object]:
        """Return flag name -> value for /status and for people: JSON types only, secrets as `***`."""
        return {option.key: shown(option, getattr(self, option.name)) for option in OPTIONS}


def _row(field: dataclasses.Field[Any]) -> Option:
    return Option(name=field.name, **field.metadata)


OPTIONS: tuple[Option, ...] = tuple(_row(field) for field in dataclasses.fields(ServerConfig))


def shown(option: Option, value: object) -> object:
    """Return a value as people and JSON may see it, without secrets."""
    if option.secret:
        return "***" if value else None
    if option.name == "l1_size_gb" and not value:
        return "auto"
    if option.name == "l2_queue_gb" and not value:
        return "half of L1"
    if option.name in ("otlp_endpoint", "tokenizer_url"):
        return read.redacted_url(str(value))
    if isinstance(value, tuple):
        return [read.redacted_url(one) if isinstance(one, str) else one for one in value]
    return str(value) if isinstance(value, Path) else value
