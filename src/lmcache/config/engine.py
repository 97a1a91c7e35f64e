"""The settings of an engine's own server (in-process mode): LMCACHE_CONFIG_FILE and LMCACHE_* variables.

The names are those of the public LMCache project. `Row.effect` is "" where a setting does what its name says, else it describes
what the setting does here. A row with a `refusal` cannot be switched on. A name without a row is an error in the file, and a
warning in the environment, where names may belong to other software.
A value in `kv_connector_extra_config` (`lmcache.chunk_size`) overrides the variable, which overrides the file, then the default.
"""
# ruff: noqa: RUF009 - fields get their defaults and their row of the table from one call

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from lmcache.config import options as read
from lmcache.config.given import Given, entries, is_null, nearest, read_yaml
from lmcache.config.mooncake import SCHEMES, mooncake_url
from lmcache.config.server import HUGE_PAGES, OPTIONS, POLICIES
from lmcache.errors import ConfigError

ENV_PREFIX = "LMCACHE_"
FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
PREFIX_OF_EXTRA = "lmcache."
OTHERS = {
    "CONFIG_FILE": "The YAML or JSON file with the settings of in-process mode; for SGLang also `--lmcache-config-file`.",
    "L1_SIZE_GB": "Another name for the server's `LMCACHE_SERVER_L1_SIZE_GB`.",
    "LOG_LEVEL": "How much servers and engines log: DEBUG, INFO, WARNING, ERROR or CRITICAL. Default: INFO.",
    "LOG_FORMAT": "How engines log: text or json. Default: text.",
    "AUTH_KEY_FILE": "An engine's copy of the server's `--auth-key-file` (0600).",
    "INSECURE_NO_AUTH": "1: an engine sends KV to a server on another host that has proved nothing. Only for closed networks.",
    "USE_UPSTREAM_MP": "1: under vLLM, use vLLM's own connector class instead of LMCache's, with fewer features.",
    "ALLOW_SERVER_UID": "The user id of a server of another user, whose memory this engine may map.",
    "CONTROLLER_SERVERS": "The HTTP addresses of servers that the router of vLLM's production stack asks, with commas. Default: "
    "http://127.0.0.1:8080.",
    "GPU_STAGING_MB": "MiB of GPU memory for the staging rings of a rank. Default: 128.",
}
"""Variables with this prefix that other modules read -> what they are for."""
_OTHER_PREFIXES = ("SERVER_", "TEST_", "DEMO_", "MP_")
SGLANG_KEYS = ("mp_host", "mp_port", "model_id")
"""Keys of the file that only SGLang's connector reads: the daemon's address, and a name for the weights."""
_SERDES = ("naive", "cachegen", "kivi", "fp8")
_NOTHING = ("", "null", "none", "~", "[]", "{}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting: how its text is parsed, and what it does here."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    effect: str = ""
    refusal: str = ""

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() in _NOTHING else parse(text)


def _first(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Parse a value, or a list of one: the public project's settings take lists, of which it uses the first."""

    def parsed(text: str) -> Any:
        values = text.strip("[] ").split(",")
        if len(values) > 1:
            raise ValueError("must be one value, or a list of one")
        return parse(values[0].strip())

    return parsed


def _mapping(text: str) -> dict[str, Any]:
    if text.lower() in _NOTHING:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError('must be a mapping, such as {"key": 1}')
    return value


def _serde(text: str) -> str | None:
    """Parse a name that the `codec` of a tier's URL may have."""
    if text.lower() in _NOTHING:
        return None
    if text.lower() not in _SERDES:
        raise ValueError(f"must be one of {', '.join(_SERDES)}; leave it out for a lossless codec where that pays")
    return text.lower()


def _codec_of(url: str) -> str | None:
    """Return the option `codec` of a tier's URL; None without one."""
    return dict(parse_qsl(urlsplit(url).query, keep_blank_values=True)).get("codec")


def _disk(text: str) -> str | None:
    """Parse an absolute path, also given as file:///path."""
    if text.lower() in (*_NOTHING, "false"):
        return None
    parts = urlsplit(text)
    path = parts.path if parts.scheme == "file" and not parts.netloc else text
    if not path.startswith("/"):
        raise ValueError("must be an absolute path, or file:///path")
    return path


def _remote(text: str) -> str | None:
    if text.lower() in _NOTHING:
        return None
    scheme = urlsplit(text).scheme
    if not scheme or "://" not in text:
        raise ValueError("must be a URL, such as redis://host:6379")
    if scheme == "lm":
        raise ValueError("lm:// servers are not supported: start `lmcache server` and use LMCacheMPConnector with it")
    return text


def _row(parse: Callable[[str], Any], default: Any, effect: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "effect": effect})


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The settings of an engine with a server of its own. `load_engine` fills it."""

    chunk_size: int = _row(read.integer(1, 1 << 20), 256)
    local_cpu: bool = _row(
        read.switch, True, "false: memory of max_local_cpu_size is used all the same, because all KV passes through it"
    )
    max_local_cpu_size: float = _row(read.number(0.001, 1e6), 5.0)
    local_disk: str | None = _row(_disk, None)
    max_local_disk_size: float = _row(read.number(0, 1e6), 0.0)
    remote_url: str | None = _row(_remote, None)
    remote_serde: str | None = _row(
        _serde, None, "cachegen, kivi, fp8: KV is rounded by int8, which is more exact (docs/codecs.md)"
    )
    lossy_kv: str = _row(read.word("auto", "none", "int8", "int8-l1", "k8v4-l1"), "auto")
    save_decode_cache: bool = _row(read.switch, False)
    save_unfull_chunk: bool = _row(read.switch, True)
    cache_policy: str = _row(read.policy(*POLICIES), "LRU")
    blocking_timeout_secs: float = _row(
        read.deadline, 2.0, "how long a server that does not answer may delay a request, once"
    )
    priority_limit: int | None = _row(_optional(read.integer(-(1 << 31), 1 << 31)), None)
    huge_pages: str = _row(read.word(*HUGE_PAGES), "auto")
    min_retrieve_tokens: int = _row(read.integer(0, 1 << 31), 0)
    use_layerwise: bool = _row(
        read.switch, True, "vLLM, SGLang: forwards wait for loads layer by layer; other engines wait for complete loads"
    )
    extra_config: dict[str, Any] | None = _row(
        _mapping,
        None,
        "only these are read: the keys of a Mooncake Store if remote_url names one, and NIXL's storage"
        " (enable_nixl_storage, nixl_backend, nixl_path)",
    )
    internal_api_server_enabled: bool = _row(
        read.switch, False, "true: health, status and metrics over HTTP, one port for the engine, not one a worker"
    )
    internal_api_server_host: str = _row(read.address, "127.0.0.1")
    internal_api_server_port_start: int = _row(read.integer(0, 65535), 6999)

    @property
    def server_flags(self) -> tuple[str, ...]:
        """Flags for `lmcache server`, except those for sizes and the chunk size."""
        flags = ["--eviction-policy", self.cache_policy, "--huge-pages", self.huge_pages]
        if self.internal_api_server_enabled:
            flags += ["--http-host", self.internal_api_server_host]
            flags += ["--http-port", str(self.internal_api_server_port_start)]
        for url in self.tiers:
            flags += ["--l2", url]
        if adapter := self.nixl_adapter:
            flags += ["--l2-adapter", adapter]
        return tuple(flags)

    @property
    def nixl_adapter(self) -> str:
        """The store that `extra_config` of NIXL's own names, as a value of `--l2-adapter`; "" without one."""
        extra = self.extra_config or {}
        if str(extra.get("enable_nixl_storage", "false")).lower() not in ("true", "1"):
            return ""
        params = dict(extra.get("nixl_backend_params") or {})
        if extra.get("nixl_path"):
            params["file_path"] = extra["nixl_path"]
        adapter = {"type": "nixl_store", "backend": extra.get("nixl_backend", "POSIX"), "backend_params": params}
        return json.dumps(adapter | ({"pool_size": extra["nixl_pool_size"]} if "nixl_pool_size" in extra else {}))

    @property
    def tiers(self) -> tuple[str, ...]:
        """URLs of the tiers behind L1, the nearest first."""
        urls = []
        if self.local_disk is not None:
            urls.append(f"disk://{quote(self.local_disk)}?max_gb={self.max_local_disk_size:.15g}")
        if self.remote_url is not None:
            is_mooncake = urlsplit(self.remote_url).scheme in SCHEMES
            extra = dict(self.extra_config or {})
            url = mooncake_url(extra, self.remote_url, "extra_config") if is_mooncake else self.remote_url
            urls.append(self._with_codec(url))
        return tuple(urls)

    @property
    def lossy_kv_of_tiers(self) -> str:
        """What `lossy_kv` is if these tiers say it: int8 if one of them rounds KV."""
        return "int8" if any(_codec_of(url) in ("int8", *_SERDES[1:]) for url in self.tiers) else "none"

    def _with_codec(self, url: str) -> str:
        """Add `remote_serde` to a URL that names no codec itself."""
        if self.remote_serde is None or _codec_of(url) is not None:
            return url
        return f"{url}{'&' if urlsplit(url).query else '?'}codec={self.remote_serde}"


MEANING = {
    "chunk_size": "Tokens in a chunk; any size works with any block size of the engine.",
    "local_cpu": "Whether memory is used.",
    "max_local_cpu_size": "Memory for KV in GiB, for all ranks of the engine together.",
    "local_disk": "A tier on disk: an absolute path, or file:///path. The size is max_local_disk_size.",
    "max_local_disk_size": "The size of local_disk in GiB.",
    "remote_url": "A remote tier: any URL that --l2 of the server takes.",
    "remote_serde": "How KV is stored behind remote_url: naive, cachegen, kivi or fp8.",
    "lossy_kv": "What may have changed the KV: none, int8, int8-l1, k8v4-l1, or auto: as the codec of remote_url says.",
    "save_decode_cache": "Whether generated tokens are stored too.",
    "save_unfull_chunk": "Whether the last, unfull chunk of a prompt is stored too.",
    "cache_policy": "The eviction policy.",
    "blocking_timeout_secs": "Seconds that one request waits for a server that does not answer.",
    "priority_limit": "Requests with a larger priority number are neither loaded nor stored.",
    "huge_pages": "--huge-pages of the server: auto, always or never.",
    "min_retrieve_tokens": "Hits of fewer tokens are not loaded.",
    "use_layerwise": "Whether a forward pass begins while its loads run, each layer waiting for its own KV.",
    "extra_config": "Settings of stores and plugins.",
    "internal_api_server_enabled": "Whether the engine's server answers over HTTP.",
    "internal_api_server_host": "The address of that HTTP endpoint.",
    "internal_api_server_port_start": "Its port.",
}
"""Setting -> what its name says, for people; `Row.effect` adds what is different here."""


def _refused(name: str, remedy: str, parse: Callable[[str], Any] = read.switch, default: Any = False) -> Row:
    return Row(name, parse, default, refusal=remedy)


def _ignored(names: str, effect: str) -> tuple[Row, ...]:
    return tuple(Row(name, str, None, effect=effect) for name in names.split())


_ONE_DAEMON = "let the engines share one `lmcache server` through LMCacheMPConnector"
_OFF = "no effect: it belongs to a feature that is not on"
_HANDED_OVER = (
    "no effect: the engines of one `lmcache server` find each other's KV there without addresses and buffers of their own, and "
    "vLLM's kv_role says what each of them does"
)
_ENABLE_PD = f"for disaggregated prefill {_ONE_DAEMON}, kv_role kv_producer in place of sender, kv_consumer of receiver"
_NOT_EVERYWHERE = (
    "no effect: blending is not there under this engine, which goes on reusing prefixes (vLLM and Transformers have it)"
)
_BLENDING: tuple[tuple[str, Callable[[str], Any], Any], ...] = (
    ("enable_blending", read.switch, False),
    ("blend_special_str", str, " # # "),
    ("blend_min_tokens", read.integer(1, 1 << 20), 256),
    ("blend_recompute_ratios", _optional(_first(read.number(0, 1))), None),
    ("blend_check_layers", _optional(_first(read.integer(0, 1 << 10))), None),
)
ROWS: tuple[Row, ...] = (
    *(
        Row(field.name, field.metadata["parse"], field.default, field.metadata["effect"])
        for field in dataclasses.fields(EngineConfig)
    ),
    *(Row(name, parse, default, _NOT_EVERYWHERE) for name, parse, default in _BLENDING),
    _refused("enable_p2p", _ONE_DAEMON),
    _refused("enable_pd", _ENABLE_PD),
    _refused("enable_nixl", f"for disaggregated prefill {_ONE_DAEMON}"),
    _refused("enable_controller", "GET /status of the server shows what is cached; leave it out"),
    _refused("external_lookup_client", "lookups go to the engine's own server; leave it out", _optional(str), None),
    _refused("gds_path", "use local_disk", _optional(str), None),
    _refused("maru_path", "use local_disk or remote_url", _optional(str), None),
    _refused("run_script_api_enabled", "the server runs no scripts; leave it out"),
    _refused(
        "remote_config_url",
        "settings come from LMCACHE_CONFIG_FILE and the environment; leave it out",
        _optional(str),
        None,
    ),
    _refused("audit_actual_remote_url", "write the address into remote_url", _optional(str), None),
    _refused("enable_hidden_state_cache", "only KV is stored; leave it out"),
    _refused("weka_path", "use local_disk", _optional(str), None),
    _refused("storage_plugins", "use local_disk or remote_url", _optional(str), None),
    _refused("remote_storage_plugins", "use remote_url", _optional(str), None),
    _refused("runtime_plugin_locations", "only lmcache's own code is run; leave it out", _optional(str), None),
    *_ignored("pre_caching_hash_algorithm", "no effect: chunks are named by BLAKE3, the same in every process"),
    *_ignored("py_enable_gc error_handling", "no effect"),
    *_ignored("local_cpu_use_hugepages", "no effect: huge_pages says whether L1 uses pages of 2 MiB"),
    *_ignored(
        "local_disk_path_sharding gds_path_sharding",
        "no effect: all ranks share the engine's one server, which writes the tiers",
    ),
    *_ignored(
        "retrieve_locations store_location",
        "no effect: read=no and write=none in a tier's URL say what a tier is used for",
    ),
    *_ignored("hit_miss_ratio enable_scheduler_bypass_lookup", "no effect: every prompt is looked up, once"),
    *_ignored("use_gpu_connector_v3 use_gds", "no effect: there is one way to copy from and to a GPU"),
    *_ignored(
        "pin_timeout_sec pin_check_interval_sec", "no effect: a lease lasts until the engine's copies have ended"
    ),
    *_ignored("numa_mode", "no effect: the kernel places the pages"),
    *_ignored("enable_async_loading", "no effect: loads are short, and tiers are read ahead of them"),
    *_ignored("enable_kv_events", "no effect: vLLM's --kv-events-config decides"),
    *_ignored(
        "enable_lazy_memory_allocator lazy_memory_initial_ratio lazy_memory_expand_trigger_ratio lazy_memory_step_ratio"
        " lazy_memory_safe_size",
        "no effect: memory is always allocated in the background, step by step",
    ),
    *_ignored("reserve_local_cpu_size", "no effect: a size beyond the machine's memory is refused at the start"),
    *_ignored("mp_host mp_port", "no effect outside SGLang, which reads it in its file"),
    *_ignored(
        "model_id",
        "no effect outside SGLang, which reads it in its file, and TensorRT-LLM, which reads LMCACHE_MODEL_ID",
    ),
    *_ignored("lmcache_instance_id", "no effect: the engine's id is the instance"),
    *_ignored(
        "pd_role pd_buffer_size pd_buffer_device pd_peer_host pd_peer_init_port pd_peer_alloc_port pd_peer_query_port"
        " pd_proxy_host pd_proxy_port pd_allocation_timeout_sec pd_shutdown_timeout_sec pd_condition_poll_interval_sec"
        " pd_max_prefill_len pd_backend_mode pd_skip_proxy_notification pd_bidirectional",
        _HANDED_OVER,
    ),
    *_ignored(
        "blend_recompute_ratio p2p_host"
        " p2p_init_ports p2p_lookup_ports peer_init_ports peer_lookup_ports transfer_channel controller_url"
        " controller_pull_url controller_reply_url lmcache_worker_port lmcache_worker_ports nixl_role"
        " nixl_receiver_host nixl_receiver_port nixl_buffer_size nixl_buffer_device nixl_backends nixl_enable_gc"
        " cufile_buffer_size internal_api_server_include_index_list internal_api_server_socket_path_prefix"
        " lookup_timeout_ms lookup_server_worker_ids distributed_url blend_thresholds lmcache_worker_ids"
        " lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time"
        " gds_buffer_size maru_pool_size gds_backend script_allowed_imports app_id max_hidden_state_cpu_size"
        " hidden_state_layers hidden_states_retrieve_mode enable_chunk_statistics chunk_statistics_auto_start_statistics"
        " chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks chunk_statistics_strategy",
        _OFF,
    ),
)
_BY_NAME = {row.name: row for row in ROWS}


def ignored_by_daemons_engines(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each variable by which the public LMCache's engines hand prompts over. An engine with a daemon reads no
    settings of in-process mode, and only these would make its user expect something else than it does."""
    found = []
    for variable in sorted(environ):
        name, given = variable.removeprefix(ENV_PREFIX).lower(), environ[variable].lower()
        if not variable.startswith(ENV_PREFIX) or given in (*_NOTHING, "false", "0"):
            continue
        if name == "enable_pd" or (name in _BY_NAME and name.startswith("pd_")):
            found.append(f"{variable} has {_HANDED_OVER}")
    return found


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """A filled configuration and its origin. values: the values of all rows for display, with secrets in URLs as `***`."""

    config: EngineConfig
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    """Maps each name to the source of its value: a variable, FILE:LINE, or `default`."""
    warnings: tuple[str, ...] = ()


def load_engine(
    environ: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    file: Path | None = None,
    blends: bool = False,
) -> EngineSettings:
    """Fill an EngineConfig. environ: os.environ by default. extra: `kv_connector_extra_config`. file: overrides the variable.
    blends: whether the engine heeds the settings of blending, with `load_blending`.

    Raises:
        ConfigError: one line that names the setting, its value, where it came from and what to do.
    """
    environ = os.environ if environ is None else environ
    path = file or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    warnings: list[str] = []
    found = _from_file(path) if path is not None else {}
    found |= _from_environment(environ, warnings)
    found |= _from_extra(extra or {}, warnings)
    values: dict[str, Any] = {}
    for name, one in found.items():
        row = _BY_NAME[name]
        value = one.parsed(row.parse)
        if row.refusal and value != row.default:
            raise ConfigError(f"{one.said}: is not supported: {row.refusal}")
        heeded = blends and row.effect is _NOT_EVERYWHERE
        if row.effect.startswith("no effect") and not heeded and value and value != row.default:
            warnings.append(f"{one.source}: {name} has {row.effect}")
        values[name] = value
    config = EngineConfig(
        **{field.name: values[field.name] for field in dataclasses.fields(EngineConfig) if field.name in values}
    )
    _check_tiers(config, found)
    sources = {row.name: found[row.name].source if row.name in found else "default" for row in ROWS}
    shown = {row.name: _redacted(values.get(row.name, row.default)) for row in ROWS}
    return EngineSettings(config, shown, sources, tuple(warnings))


def load_blending(environ: Mapping[str, str] | None = None, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings of blending that are given, in `extra` (as for `load_engine`), in the environment or in the file that
    it names: name -> value.

    Raises:
        ConfigError: as `load_engine`, of these settings only.
    """
    environ = os.environ if environ is None else environ
    found = _from_file(Path(environ[FILE_VARIABLE])) if environ.get(FILE_VARIABLE) else {}
    found |= _from_environment(environ, [])
    found |= _from_extra(extra or {}, [])
    return {name: found[name].parsed(parse) for name, parse, _ in _BLENDING if name in found}


def is_for_engines(path: Path) -> bool:
    """Return whether the file has a key, possibly misspelt, that only an engine's file can have and the daemon's cannot."""
    servers = {option.name for option in OPTIONS}
    try:
        keys = [str(key.value) for key, _ in read_yaml(path, str(path), "")]
    except ConfigError:
        return False  # whoever reads the file next reports its errors
    unknown = [key for key in keys if key.replace("-", "_") not in servers]
    return any(_meant_for_engines(key, servers) for key in unknown)


def _meant_for_engines(key: str, servers: set[str]) -> bool:
    """Return whether the known key nearest to `key` belongs to engines only."""
    meant = difflib.get_close_matches(key, [*servers, *_BY_NAME], n=1)
    return bool(meant) and meant[0] not in servers


def _check_tiers(config: EngineConfig, found: Mapping[str, Given]) -> None:
    if config.local_disk is not None and not config.max_local_disk_size:
        source = found["local_disk"].source
        raise ConfigError(f"{source}: local_disk: {config.local_disk}: limit its size with max_local_disk_size (GB)")


def _from_environment(environ: Mapping[str, str], warnings: list[str]) -> dict[str, Given]:
    found = {}
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or not environ[variable]:
            continue
        name = variable.removeprefix(ENV_PREFIX)
        if name.lower() in _BY_NAME:
            found[name.lower()] = _given(name.lower(), environ[variable], variable)
        elif name not in OTHERS and not name.startswith(_OTHER_PREFIXES):
            near = nearest(variable, [row.variable for row in ROWS])
            warnings.append(f"{variable} is not a setting and is ignored{': ' + near if 'did' in near else ''}")
    return found


def _from_extra(extra: Mapping[str, Any], warnings: list[str]) -> dict[str, Given]:
    """Read keys under `lmcache.`, except `lmcache.mp.`, which a daemon's engine reads. Other prefixes are not LMCache's."""
    found = {}
    for key, value in extra.items():
        name, where = key.removeprefix(PREFIX_OF_EXTRA), f"kv_connector_extra_config {key}"
        if not key.startswith(PREFIX_OF_EXTRA) or name.startswith("mp."):
            continue
        if name in _BY_NAME:
            found[name] = _given(name, _as_text(value), where)
        else:
            warnings.append(f"{where} is not a setting and is ignored: {nearest(name, _BY_NAME)}")
    return found


def _redacted(value: Any) -> Any:
    return read.redacted_url(value) if isinstance(value, str) else value


def _from_file(path: Path) -> dict[str, Given]:
    remedy = f": {FILE_VARIABLE} must name a YAML file"
    found = {
        key: _given(key, "" if is_null(node) else _text_of(node, where), where)
        for key, node, where in entries(path, str(path), "chunk_size: 256", _BY_NAME, remedy)
    }
    return {key: one for key, one in found.items() if one.text}


def _given(name: str, text: str, source: str) -> Given:
    return Given(text, source, f"{source}: {name}: {text}")


def _text_of(node: Any, where: str) -> str:
    """Return the text of one value of the file, that of a list or a mapping as JSON."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    try:
        return _as_text(yaml.SafeLoader("").construct_object(node, deep=True))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: is not YAML: {getattr(error, 'problem', '')}") from None


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
