"""The known tiers, and how a tier is made from the URL or JSON that a user wrote."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from urllib.parse import quote, urlencode

from lmcache.config.mooncake import mooncake_url
from lmcache.config.options import word
from lmcache.errors import ConfigError
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers.operation import AsyncTier
from lmcache.tiers.tier import Tier, TierBase
from lmcache.tiers.url import TierURL, parse_url

ENTRY_POINTS = "lmcache.tiers"
"""Group of the entry points behind which third parties put a class of tiers; the entry's name is the URL's scheme."""
WRITE_MODES = ("through", "on-evict", "none")
_OWN = {
    "disk": ("lmcache.tiers.disk.tier", "DiskTier", ""),
    "dir": ("lmcache.tiers.directory.tier", "DirectoryTier", ""),
    "redis": ("lmcache.tiers.redis.tier", "RedisTier", "redis"),
    "rediss": ("lmcache.tiers.redis.tier", "RedisTier", "redis"),
    "s3": ("lmcache.tiers.s3.tier", "S3Tier", "s3"),
    "mooncake": ("lmcache.tiers.mooncake.tier", "MooncakeTier", "mooncake"),
    "mooncakestore": ("lmcache.tiers.mooncake.tier", "MooncakeTier", "mooncake"),
    "infinistore": ("lmcache.tiers.infinistore.tier", "InfiniStoreTier", ""),
    "peer": ("lmcache.peers.tier", "PeersTier", ""),
}
"""Maps each scheme to its module, its class, and the extra of the package that it needs."""


@dataclass(frozen=True)
class TierSpec:
    """A tier and how the server uses it. `url` is redacted. write: when shards are stored in it. read: whether lookups ask it."""

    name: str
    url: str
    write: str
    read: bool
    tier: TierBase
    warning: str = ""


def schemes() -> list[str]:
    """Return all schemes that a tier's URL may have."""
    return sorted({*_OWN, *(entry.name for entry in entry_points(group=ENTRY_POINTS))})


def make_tier(text: str, runtime: Runtime = RUNTIME) -> TierSpec:
    """Make the tier of one URL, without opening it.

    Raises:
        ConfigError: a scheme or option is unknown, a value is invalid, or a library that the tier needs is not installed.
    """
    url = parse_url(text, runtime=runtime)
    kind = _class_of(url)
    write = url.take("write", word(*WRITE_MODES), "none" if kind.read_only else "through")
    if kind.read_only and write != "none":
        raise ConfigError(f"{url.redacted}: write={write}: {url.scheme}:// only reads; leave `write` out")
    read = url.take("read", word("yes", "no"), "yes") == "yes"
    name = url.take("name", str, url.scheme)
    tier = kind.from_url(url)
    url.finish()
    warning = (
        f"{url.redacted}: a password in the URL can be read by every user of this machine; use ${{NAME}} or ?password_file="
        if url.inline_secret
        else ""
    )
    return TierSpec(name, url.redacted, write, read, tier, warning)


def make_tiers(texts: list[str], runtime: Runtime = RUNTIME) -> list[TierSpec]:
    """Make the tiers of several URLs, in order. Default names are made unique by a number.

    Raises:
        ConfigError: as `make_tier`, or two tiers were given the same name.
    """
    specs: list[TierSpec] = []
    for text in texts:
        spec = make_tier(text, runtime)
        taken = {one.name for one in specs}
        if spec.name in taken:
            if spec.name != spec.tier.scheme:
                raise ConfigError(f"{spec.url}: name={spec.name} is taken by another tier")
            number = next(n for n in range(2, len(taken) + 3) if f"{spec.name}{n}" not in taken)
            spec = replace(spec, name=f"{spec.name}{number}")
        specs.append(spec)
    return specs


def tiers_of(l2: Iterable[str], l2_adapter: Iterable[str], runtime: Runtime = RUNTIME) -> list[TierSpec]:
    """Make the tiers of a server's settings, in order, without opening them.

    Raises:
        ConfigError: as `make_tiers` and `url_of_adapter`.
    """
    return make_tiers([*l2, *map(url_of_adapter, l2_adapter)], runtime)


def url_of_adapter(text: str) -> str:
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
    if kind not in _ADAPTERS:
        raise ConfigError(f"--l2-adapter: type {kind!r} is not supported; known: {', '.join(_ADAPTERS)}")
    values = {key: str(value) for key, value in given.items()}
    url = _ADAPTERS[kind](values)
    if values:
        raise ConfigError(
            f"--l2-adapter: {kind} does not support {sorted(values)[0]!r}; write it as --l2 {url.partition('?')[0]}?..."
        )
    return url


def _fs(values: dict[str, str]) -> str:
    return _with_options(f"disk://{quote(_needed(values, 'fs', 'base_path'))}", values, {"max_capacity_gb": "max_gb"})


def _redis(values: dict[str, str]) -> str:
    host, port = _needed(values, "redis", "host"), values.pop("port", "6379")
    user, password = quote(values.pop("username", ""), safe=""), quote(values.pop("password", ""), safe="${}")
    who = f"{user}:{password}@" if user or password else ""
    return _with_options(f"redis://{who}{host}:{port}/0", values, {"max_capacity_gb": "max_gb"})


def _s3(values: dict[str, str]) -> str:
    bucket = _needed(values, "s3", "bucket")
    named = {"endpoint": "endpoint", "region": "region", "max_capacity_gb": "max_gb"}
    return _with_options(f"s3://{bucket}/{values.pop('prefix', '')}", values, named)


def _mooncake(values: dict[str, str]) -> str:
    if "max_capacity_gb" in values:
        raise ConfigError(
            "--l2-adapter: mooncake_store: max_capacity_gb is not enforced by this store, which evicts by itself; leave it out"
        )
    return mooncake_url(values, "", "--l2-adapter")


_ADAPTERS: dict[str, Callable[[dict[str, str]], str]] = {
    "fs": _fs,
    "fs_native": _fs,
    "resp": _redis,
    "redis": _redis,
    "s3": _s3,
    "mooncake_store": _mooncake,
}


def _needed(values: dict[str, str], kind: str, name: str) -> str:
    if not values.get(name):
        raise ConfigError(f"--l2-adapter: {kind} needs {name!r}")
    return values.pop(name)


def _with_options(url: str, values: dict[str, str], named: dict[str, str]) -> str:
    options = {ours: values.pop(theirs) for theirs, ours in named.items() if theirs in values}
    return url + (f"?{urlencode(options)}" if options else "")


def _class_of(url: TierURL) -> type[TierBase]:
    if url.scheme in _OWN:
        module, name, extra = _OWN[url.scheme]
        try:
            found: type[TierBase] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ConfigError(
                f"{url.redacted}: {error.name} is not installed; pip install 'lmcache[{extra}]'"
            ) from error
        return found
    for entry in entry_points(group=ENTRY_POINTS, name=url.scheme):
        try:
            loaded = entry.load()
        except Exception as error:  # a third party's module may raise anything
            raise ConfigError(f"{url.redacted}: cannot load {entry.value}: {type(error).__name__}: {error}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, (Tier, AsyncTier))):
            raise ConfigError(
                f"{url.redacted}: entry point {entry.value} is not a class derived from Tier or AsyncTier"
            )
        if getattr(loaded, "scheme", None) != url.scheme:
            raise ConfigError(
                f"{url.redacted}: {entry.value} must have scheme = {url.scheme!r}, the name of its entry point"
            )
        return loaded
    raise ConfigError(f"{url.redacted}: unknown tier {url.scheme!r}; known: {', '.join(schemes())}")
