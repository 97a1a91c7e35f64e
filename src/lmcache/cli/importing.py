"""Translates settings of the public LMCache project (0.4, 0.5) into those of `lmcache server`.

They come as an engine's YAML file, a manifest of the operator (LMCacheEngine), or any Kubernetes manifest that runs a server. The
reasons for what is left out are those of `config.earlier` (flags) and `config.engine` (settings of engines): nothing is decided
here a second time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmcache.config.earlier import EARLIER_FLAGS, add_earlier_flags, answers
from lmcache.config.engine import ROWS, EngineConfig
from lmcache.config.given import nearest
from lmcache.config.load import add_flags
from lmcache.config.server import OPTIONS
from lmcache.errors import ConfigError

_LONGEST_FILE_BYTES = 1 << 20
_MOST_DEPTH = 40
_OPTIONS = {option.name: option for option in OPTIONS}
_FLAGS = [*(option.flag for option in OPTIONS), *(one.flag for one in EARLIER_FLAGS)]
_SERVERS = "server", "lmcache_server", "lmcache.v1.multiprocess.server", "lmcache.v1.multiprocess.http_server"
"""Words of a command after which the flags of a server come."""
_SPEC = {
    "server.port": "--port",
    "server.httpPort": "--http-port",
    "server.chunkSize": "--chunk-size",
    "server.maxWorkers": "--max-workers",
    "server.hashAlgorithm": "--hash-algorithm",
    "l1.sizeGB": "--l1-size-gb",
    "eviction.policy": "--eviction-policy",
    "eviction.triggerWatermark": "--eviction-trigger-watermark",
    "eviction.evictionRatio": "--eviction-ratio",
    "prometheus.port": "--prometheus-port",
    "l2Backend.storePolicy": "--l2-store-policy",
    "l2Backend.prefetchPolicy": "--l2-prefetch-policy",
    "l2Backend.prefetchMaxInFlight": "--l2-prefetch-max-in-flight",
    "logLevel": "--log-level",
}
"""Field of an LMCacheEngine -> the flag that the operator makes of it."""
_OF_POD = [
    "image",
    "imagePullSecrets",
    "initContainers",
    "nodeSelector",
    "affinity",
    "tolerations",
    "env",
    "volumes",
    "volumeMounts",
    "podAnnotations",
    "podLabels",
    "serviceAccountName",
    "priorityClassName",
    "privileged",
    "runtimeClassName",
    "resourceOverrides",
    "injection",
]
_ENGINE_TO_SERVER = {
    "chunk_size": "chunk_size",
    "max_local_cpu_size": "l1_size_gb",
    "cache_policy": "eviction_policy",
    "huge_pages": "huge_pages",
    "internal_api_server_host": "http_host",
    "internal_api_server_port_start": "http_port",
}
_TIERS = "local_disk", "max_local_disk_size", "remote_url", "remote_serde", "extra_config"
_OF_ENGINES = "an engine that shares a daemon has no such setting: leave it out, or keep the file for in-process mode"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"the flags in the file: {message}")


class Imported:
    """settings: our options by name, as text; a list of texts for one that may be repeated. dropped: (what, why)."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.dropped: list[tuple[str, str]] = []

    def lines(self) -> Iterator[str]:
        """Yield the configuration file, with what was left out as comments."""
        for option in OPTIONS:
            value = self.settings.get(option.name)
            if isinstance(value, list):
                yield f"{option.key}:"
                yield from (f"  - {json.dumps(one)}" for one in value)
            elif value is not None:
                yield f"{option.key}: {_plain(value)}"
        for what, why in self.dropped:
            yield f"# left out: {' '.join(what.split())}: {' '.join(why.split())}"


def read(path: Path) -> Imported:
    """Translate a file.

    Raises:
        ConfigError: it cannot be read, has no settings of LMCache, or a value has no meaning.
    """
    documents = [one for one in _documents(path) if one is not None]
    out = Imported()
    manifests = [one for one in documents if isinstance(one, dict) and "kind" in one]
    if manifests:
        found = [argv for one in manifests if (argv := _of_manifest(one, out)) is not None]
        if len(found) != 1:
            what = "none of its objects runs" if not found else f"{len(found)} of its objects run"
            raise ConfigError(
                f"{path}: {what} `lmcache server`: name a file with one LMCacheEngine, or one pod with a server"
            )
        _take_flags(found[0], out)
    elif len(documents) == 1 and isinstance(documents[0], dict):
        _of_settings(path, documents[0], out)
    else:
        raise ConfigError(f"{path}: must be lines of `key: value`, or a Kubernetes manifest")
    for name, value in out.settings.items():
        for text in value if isinstance(value, list) else [value]:
            try:
                _OPTIONS[name].parse(text)
            except ValueError as error:
                raise ConfigError(f"{path}: {_OPTIONS[name].key}: {text}: {error}") from None
    return out


def _documents(path: Path) -> list[Any]:
    import yaml

    try:
        with path.open("rb") as file:
            raw = file.read(_LONGEST_FILE_BYTES + 1)
        if len(raw) > _LONGEST_FILE_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB: name a configuration file")
        return list(yaml.safe_load_all(raw.decode()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None


def _plain(value: str) -> str:
    """Return a value as YAML, quoted where it would be read as something else than its text."""
    words = value.replace(".", "").replace("/", "").replace("-", "").replace("_", "")
    return value if words.isalnum() and value.lower() not in ("null", "none", "yes", "no") else json.dumps(value)


# Manifests


def _of_manifest(manifest: Mapping[str, Any], out: Imported) -> list[str] | None:
    """Return the flags of the server that a manifest runs; None if it runs none."""
    spec = manifest.get("spec")
    if str(manifest["kind"]) in ("LMCacheEngine", "CacheBlendEngine") and isinstance(spec, dict):
        return list(_of_operator(manifest, spec, out))
    return next(_commands(manifest, 0), None)


def _commands(node: Any, depth: int) -> Iterator[list[str]]:
    """Yield the flags of each container that runs a server."""
    if depth > _MOST_DEPTH:
        return
    if isinstance(node, dict):
        words = [str(word) for key in ("command", "args") for word in _listed(node.get(key))]
        words = [
            part
            for word in words
            for part in (word.split() if " " in word and "--" in word and "{" not in word else [word])
        ]
        at = next((place for place, word in enumerate(words) if word in _SERVERS), None)
        if at is not None and any("lmcache" in word for word in words):
            yield words[at + 1 :]
    for one in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _commands(one, depth + 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _of_operator(manifest: Mapping[str, Any], spec: Mapping[str, Any], out: Imported) -> Iterator[str]:
    """Yield the flags that the operator would pass."""
    if manifest["kind"] == "CacheBlendEngine":
        out.dropped.append(
            ("kind: CacheBlendEngine", "prefixes are reused, and nothing else: this is an ordinary server")
        )
    yield from ("--host", "0.0.0.0")
    prometheus = spec.get("prometheus") if isinstance(spec.get("prometheus"), dict) else {}
    assert isinstance(prometheus, dict)
    if prometheus.get("enabled") is False:
        yield "--disable-prometheus"
    elif "port" not in prometheus:
        yield from ("--prometheus-port", "9090")
    for name, value in _fields(spec, ""):
        if name in _SPEC and not (name == "prometheus.port" and prometheus.get("enabled") is False):
            yield from (_SPEC[name], str(value))
        elif name == "extraArgs":
            yield from map(str, _listed(value))
        elif name in ("l2Backend.resp", "l2Backend.raw"):
            yield from ("--l2-adapter", json.dumps(_adapter(name, value, out)))
        elif name == "l2Backend.encryption":
            out.dropped.append((f"spec.{name}", "tiers hold KV as it is: use a store that encrypts, or leave it out"))
        elif name.partition(".")[0] in _OF_POD:
            out.dropped.append((f"spec.{name}", "it describes the pod: see deploy/kubernetes and the Helm chart"))
        elif name not in ("prometheus.enabled", "prometheus.port"):
            out.dropped.append(
                (f"spec.{name}", "it has no counterpart here: docs/deployment.md, docs/disaggregation.md")
            )


def _fields(spec: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the fields that mean something by themselves, with their paths."""
    for key, value in spec.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in ("server", "l1", "eviction", "prometheus", "l2Backend"):
            yield from _fields(value, f"{name}.")
        else:
            yield name, value


def _adapter(name: str, value: Any, out: Imported) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"spec.{name} must be a mapping")
    if name == "l2Backend.raw":
        config = value.get("config")
        return {"type": str(value.get("type")), **(config if isinstance(config, dict) else {})}
    if "authSecretRef" in value:
        said = (
            "write ${REDIS_PASSWORD} into the URL (redis://:${REDIS_PASSWORD}@HOST), and give the server that variable"
        )
        out.dropped.append((f"spec.{name}.authSecretRef", said))
    if "numWorkers" in value:
        out.dropped.append(
            (f"spec.{name}.numWorkers", "connections are opened as they are needed: `?connections=` bounds them")
        )
    known = {"host": "host", "port": "port", "maxCapacityGB": "max_capacity_gb"}
    return {"type": "resp"} | {theirs: value[ours] for ours, theirs in known.items() if value.get(ours)}


# Flags


def _take_flags(argv: Sequence[str], out: Imported) -> None:
    """Take the flags of a server's command line."""
    from lmcache.tiers.adapters import url_of_adapter

    parser = _Parser(add_help=False, allow_abbrev=False)
    add_flags(parser)
    add_earlier_flags(parser)
    parsed, unknown = parser.parse_known_args([_flag(word) for word in argv])
    for word in unknown:
        out.dropped.append((word, f"no release of either project has it: {nearest(word, _FLAGS, 'leave it out')}"))
    given = vars(parsed)
    for one in EARLIER_FLAGS:
        if (values := given.get(one.dest)) is not None:
            try:
                lines = list(answers({one.dest: values}))
            except ConfigError as error:
                lines = [str(error)]
            for line in lines:
                what, _, why = line.partition(": ")
                out.dropped.append((what, why))
    out.settings |= {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    for text in out.settings.pop("l2_adapter", []):
        try:
            translated = url_of_adapter(text)
            out.settings.setdefault("l2", []).append(translated.url)
            out.dropped += [(f"--l2-adapter {text}", line.removeprefix("--l2-adapter ")) for line in translated.said]
        except ConfigError as error:
            out.dropped.append((f"--l2-adapter {text}", str(error).removeprefix("--l2-adapter: ")))
    proof = out.settings.keys() & {"auth_key_file", "insecure_no_auth"}
    if out.settings.get("host") not in (None, "127.0.0.1") and not proof:
        what = f"host: {out.settings.pop('host')}"
        why = "other hosts need a key: add `host` and `auth-key-file` (SECURITY.md); engines on this host need neither"
        out.dropped.append((what, why))


def _flag(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


# Files of settings


def _of_settings(path: Path, given: Mapping[Any, Any], out: Imported) -> None:
    rows, flags = {row.name: row for row in ROWS}, list[str]()
    servers = {one.lstrip("-") for one in _FLAGS}
    engines = [key for key in given if str(key) in rows and str(key).replace("_", "-") not in servers]
    if not engines:  # a server's own file, or one with its flags as keys
        for key, value in given.items():
            texts = value if isinstance(value, list) else [value]
            switch = isinstance(value, bool)
            if value is not None and not (switch and not value):
                for text in texts:
                    flags += [f"--{str(key).replace('_', '-')}", *([] if switch else [_text(text)])]
        _take_flags(flags, out)
        if not out.settings:
            raise ConfigError(f"{path}: has no setting of LMCache")
        return
    said = {str(key): _text(value) for key, value in given.items() if value is not None}
    for name, text in said.items():
        row = rows.get(name)
        if row is None:
            out.dropped.append(
                (
                    f"{name}: {text}",
                    f"not a setting: {nearest(name, rows, 'docs/coming-from-lmcache-0.5.md lists them')}",
                )
            )
            continue
        try:
            value = row.parse(text)
        except ValueError as error:
            out.dropped.append((f"{name}: {text}", str(error)))
            continue
        if row.refusal:
            if value != row.default:
                out.dropped.append((f"{name}: {text}", f"is not supported: {row.refusal}"))
        elif name in _ENGINE_TO_SERVER:
            out.settings[_ENGINE_TO_SERVER[name]] = text
        elif name not in _TIERS and name != "internal_api_server_enabled" and value != row.default:
            out.dropped.append((f"{name}: {text}", row.effect or _OF_ENGINES))
    usable = {
        name: rows[name].parse(said[name]) for name in _TIERS if name in said and _parses(rows[name].parse, said[name])
    }
    if usable.get("local_disk") and not usable.get("max_local_disk_size"):
        out.dropped.append((f"local_disk: {usable.pop('local_disk')}", "limit its size with max_local_disk_size (GB)"))
    tiers = EngineConfig(**usable).tiers
    if tiers:
        out.settings["l2"] = list(tiers)


def _parses(parse: Any, text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
