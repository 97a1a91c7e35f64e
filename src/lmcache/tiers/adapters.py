"""Stores as the public LMCache project names them, `--l2-adapter JSON` and schemes of `remote_url`: which tier serves each.

A store whose work one of our tiers does is served by that tier, and one line says so. Others are refused with a replacement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from lmcache.config.hosts import in_url
from lmcache.config.mooncake import mooncake_url
from lmcache.errors import ConfigError
from lmcache.tiers.coder import LOSSY, NAIVE


class Translated(NamedTuple):
    """A tier's URL, and lines for the log about what of the JSON is served differently."""

    url: str
    said: tuple[str, ...] = ()


def url_of_adapter(text: str) -> Translated:
    """Translate the JSON form `{"type": "fs", "base_path": "/data", ...}` to a URL.

    Raises:
        ConfigError: the JSON is invalid, or a type or key has no counterpart; the message says what to write.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--l2-adapter: not JSON ({error}); write --l2 disk:///path?max_gb=200 instead") from None
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise ConfigError('--l2-adapter: write {"type": "fs", "base_path": "/path"}, or --l2 disk:///path?max_gb=200')
    kind = given.pop("type")
    if kind in _REFUSED:
        raise ConfigError(f"--l2-adapter: type {kind!r} is not supported: {_REFUSED[kind]}")
    if kind not in _ADAPTERS:
        raise ConfigError(f"--l2-adapter: type {kind!r} is not supported; known: {', '.join(_ADAPTERS)}")
    serde = given.pop("serde", None)
    values = {key: value if isinstance(value, dict | list) else str(value) for key, value in given.items()}
    found = _ADAPTERS[kind](kind, values)
    if values:
        shown = re.sub("//[^/]*@", "//...@", found.url.partition("?")[0])  # without the password
        raise ConfigError(f"--l2-adapter: {kind} does not support {sorted(values)[0]!r}; write it as --l2 {shown}?...")
    name = serde.get("type") if isinstance(serde, dict) else serde
    if name in (None, ""):
        return found
    if name not in (NAIVE, *LOSSY):
        raise ConfigError(
            f"--l2-adapter: serde {name!r} is not supported; write {NAIVE}, or leave it out for a lossless codec where it pays"
        )
    return found._replace(url=f"{found.url}{'&' if '?' in found.url else '?'}codec={name}")


def instead_of_scheme(scheme: str) -> str:
    """Return what to write in place of a scheme of the public project's `remote_url`, "" for one that it does not have."""
    return _SCHEMES.get(scheme, "")


def _fs(kind: str, values: dict[str, Any]) -> Translated:
    url = f"disk://{quote(_needed(values, kind, 'base_path'))}"
    said = _without_effect(kind, values)
    return Translated(_with_options(url, values, {"max_capacity_gb": "max_gb"}), said)


def _redis(kind: str, values: dict[str, Any]) -> Translated:
    host, port = _needed(values, "redis", "host"), values.pop("port", "6379")
    user, password = quote(values.pop("username", ""), safe=""), quote(values.pop("password", ""), safe="${}")
    who, said = f"{user}:{password}@" if user or password else "", _without_effect(kind, values)
    url = _with_options(f"redis://{who}{in_url(host)}:{port}/0", values, {"max_capacity_gb": "max_gb"})
    return Translated(url, said)


def _s3(kind: str, values: dict[str, Any]) -> Translated:
    bucket = _needed(values, kind, "bucket")
    named, said = (
        {"endpoint": "endpoint", "region": "region", "max_capacity_gb": "max_gb"},
        _without_effect(kind, values),
    )
    return Translated(_with_options(f"s3://{bucket}/{values.pop('prefix', '')}", values, named), said)


def _without_effect(kind: str, values: dict[str, Any]) -> tuple[str, ...]:
    """Take out what a tier decides by itself, its threads and its eviction, and return the line about that, if there is one.

    Raises:
        ConfigError: another order of eviction than a tier's is asked for.
    """
    eviction = values.get("eviction", {})
    policy = eviction.get("eviction_policy", "LRU") if isinstance(eviction, dict) else eviction
    if str(policy).upper() != "LRU":
        raise ConfigError(
            f"--l2-adapter: {kind}: eviction_policy {str(policy)[:80]!r} is not supported: a tier that has reached"
            " max_capacity_gb evicts what was used least recently; write LRU, or leave it out"
        )
    names = [name for name in ("num_workers", "eviction") if values.pop(name, None) is not None]
    why = "the tier has threads of its own, and never exceeds max_capacity_gb: it evicts what was used least recently"
    return (f"--l2-adapter {kind}: {', '.join(names)}: no effect: {why}",) if names else ()


def _mooncake(kind: str, values: dict[str, Any]) -> Translated:
    if "max_capacity_gb" in values:
        raise ConfigError(
            f"--l2-adapter: {kind}: max_capacity_gb is not enforced by this store, which evicts by itself; leave it out"
        )
    return Translated(mooncake_url(values, "", "--l2-adapter"))


# ---- NIXL. Measured with 1.5.1: its POSIX backend is about as fast as plain reads and writes; its OBJ backend reads at 0.6 of
# obstore's rate, waits half a minute for a dead server, and answers DONE to a read beyond an object's end. Neither finds damage.


def _nixl(kind: str, values: dict[str, Any]) -> Translated:
    backend = str(values.pop("backend", "POSIX")).upper()
    params = values.pop("backend_params", {})
    if not isinstance(params, dict):
        raise ConfigError(f'--l2-adapter: {kind}: backend_params must be a mapping, such as {{"file_path": "/data"}}')
    params = {key: value if isinstance(value, list) else str(value) for key, value in params.items()}
    if backend not in _NIXL_BACKENDS:
        remedy = _NIXL_REFUSED.get(backend, f"known: {', '.join(_NIXL_BACKENDS)}")
        raise ConfigError(f"--l2-adapter: {kind} with backend {backend} is not supported: {remedy}")
    ignored = [key for key in ("pool_size", "num_workers", "persist_enabled") if values.pop(key, None) is not None]
    url = _NIXL_BACKENDS[backend](kind, values, params)
    if params:
        raise ConfigError(
            f"--l2-adapter: {kind} does not support {sorted(params)[0]!r} with {backend};"
            f" write it as --l2 {url.partition('?')[0]}?..."
        )
    line = f"--l2-adapter {kind} with {backend} is served by {url.partition('?')[0]}, {_NIXL_WHY[backend]}"
    return Translated(url, (line + (f" ({', '.join(ignored)}: no effect)" if ignored else ""),))


def _nixl_posix(kind: str, values: dict[str, Any], params: dict[str, Any]) -> str:
    folders = values.pop("shard_dirs", None) or params.pop("file_path", "")
    if isinstance(folders, list):
        folders = ",".join(str(folder) for folder in folders)
    params.pop("file_path", None)
    if not str(folders).startswith("/"):
        raise ConfigError(f'--l2-adapter: {kind} needs "backend_params": {{"file_path": "/an/absolute/path"}}')
    if params.pop("use_direct_io", "true").lower() in ("false", "0"):
        values["io"] = "buffered"
    return _with_options(f"disk://{quote(folders, safe='/,')}", values, {"max_capacity_gb": "max_gb", "io": "io"})


def _nixl_obj(kind: str, values: dict[str, Any], params: dict[str, Any]) -> str:
    for secret in ("access_key", "secret_key", "session_token"):
        if params.get(secret):
            raise ConfigError(
                f"--l2-adapter: {kind}: {secret} may not be in the JSON, which every user of the machine can read:"
                " export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        params.pop(secret, None)
    bucket, scheme = _needed(params, kind, "bucket"), params.pop("scheme", "https")
    endpoint = params.pop("endpoint_override", "")
    if endpoint:
        values["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    values |= {"region": params.pop("region")} if "region" in params else {}
    return _with_options(
        f"s3://{bucket}/", values, {"endpoint": "endpoint", "region": "region", "max_capacity_gb": "max_gb"}
    )


def _nixl_azure(kind: str, values: dict[str, Any], params: dict[str, Any]) -> str:
    container, account = _needed(params, kind, "container_name"), params.pop("account_url", "")
    if account:
        values |= {"endpoint": account, "account": account.partition("://")[2].partition(".")[0]}
    return _with_options(
        f"az://{container}/", values, {"account": "account", "endpoint": "endpoint", "max_capacity_gb": "max_gb"}
    )


_NIXL_BACKENDS: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], str]] = {
    "POSIX": _nixl_posix,
    "OBJ": _nixl_obj,
    "AZURE_BLOB": _nixl_azure,
}
_NIXL_WHY = {
    "POSIX": "which is about as fast and finds damaged data",
    "OBJ": "which reads faster, ends in time when the store does not answer, and finds damaged data",
    "AZURE_BLOB": "which finds damaged data",
}
_GDS = "there is no GPU Direct Storage: write --l2 disk:///PATH?max_gb=N, which is read through L1"
_NIXL_REFUSED = {
    "GDS": _GDS,
    "GDS_MT": _GDS,
    "HF3FS": "mount 3FS and write --l2 dir:///MOUNT/FOLDER?max_gb=N",
}

_ADAPTERS: dict[str, Callable[[str, dict[str, Any]], Translated]] = {
    "fs": _fs,
    "fs_native": _fs,
    "resp": _redis,
    "redis": _redis,
    "s3": _s3,
    "mooncake_store": _mooncake,
    "nixl_store": _nixl,
    "nixl_store_dynamic": _nixl,
    "nixl_native": _nixl,
}
_PLUGIN = (
    "a class of the public project's cannot be loaded: docs/tiers/your-own.md shows the interface here, and"
    " docs/tiers/plugins.md how to carry a class over"
)
_NO_SUCH = "nothing is stored there: leave it out"
_REFUSED = {
    "plugin": _PLUGIN,
    "native_plugin": _PLUGIN,
    "mock": _NO_SUCH,
    "dax": "mount the device as a file system and write --arena-dir MOUNT, or --l2 disk:///MOUNT?max_gb=N",
    "raw_block": "make a file system on the device (`mkfs.xfs DEVICE`), mount it and write --l2 disk:///MOUNT?max_gb=N",
    "azure": "write --l2 az://CONTAINER/PREFIX?account=NAME",
    "azure_blob": "write --l2 az://CONTAINER/PREFIX?account=NAME",
    "gcs": "write --l2 gs://BUCKET/PREFIX",
    "bigtable": "write --l2 gs://BUCKET/PREFIX",
    "hfbucket": "write --l2 s3://BUCKET/PREFIX?endpoint=URL of a store that speaks S3",
    "aerospike": "write --l2 redis://HOST:6379/0?max_gb=N for a store in memory, or --l2 disk:///PATH?max_gb=N for SSDs",
}
"""Types of adapters that the public project has, and what to write instead."""
_SCHEMES = {
    "valkey": "write redis:// (rediss:// with TLS), which is for Valkey, too",
    "valkeys": "write rediss://, which is for Valkey, too",
    "fs": "write dir:///PATH for a file system that several machines mount, disk:///PATH for a local SSD",
    "file": "write dir:///PATH for a file system that several machines mount, disk:///PATH for a local SSD",
    "azure": "write az://CONTAINER/PREFIX?account=NAME",
    "abfs": "write az://CONTAINER/PREFIX?account=NAME",
    "gcs": "write gs://BUCKET/PREFIX",
    "raw": "make a file system on the device, mount it and write disk:///MOUNT?max_gb=N",
    "dax": "mount the device as a file system and write --arena-dir MOUNT, or disk:///MOUNT?max_gb=N",
    "external": _PLUGIN,
    "plugin": _PLUGIN,
    "audit": "/fetches and /metrics of the server show every call: write the address behind audit://",
    "blackhole": _NO_SUCH,
    "mock": _NO_SUCH,
    "lm": "start `lmcache server` on that host and name it with --peers HOST:PORT",
}


def _needed(values: dict[str, Any], kind: str, name: str) -> str:
    if not values.get(name):
        raise ConfigError(f"--l2-adapter: {kind} needs {name!r}")
    return str(values.pop(name))


def _with_options(url: str, values: dict[str, Any], named: dict[str, str]) -> str:
    options = {ours: values.pop(theirs) for theirs, ours in named.items() if theirs in values}
    return url + (f"?{urlencode(options)}" if options else "")
