"""The known tiers, and how a tier is made from the URL that a user wrote."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points

from lmcache.config.options import label, word
from lmcache.errors import ConfigError
from lmcache.runtime import RUNTIME, Runtime
from lmcache.tiers.adapters import instead_of_scheme, url_of_adapter
from lmcache.tiers.coder import LOSSY, NAIVE, OPTIONS
from lmcache.tiers.operation import AsyncTier
from lmcache.tiers.tier import Tier, TierBase
from lmcache.tiers.url import TierURL, parse_url

ENTRY_POINTS = "lmcache.tiers"
"""Group of the entry points behind which third parties put a class of tiers; the entry's name is the URL's scheme."""
WRITE_MODES = ("through", "on-evict", "none")
ADMISSIONS = ("all", "second-touch")
_OWN = {
    "disk": ("lmcache.tiers.disk.tier", "DiskTier", ""),
    "dir": ("lmcache.tiers.directory.tier", "DirectoryTier", ""),
    "redis": ("lmcache.tiers.redis.tier", "RedisTier", "redis"),
    "rediss": ("lmcache.tiers.redis.tier", "RedisTier", "redis"),
    "s3": ("lmcache.tiers.object_store.s3", "S3Tier", "s3"),
    "az": ("lmcache.tiers.object_store.azure", "AzureTier", "azure"),
    "gs": ("lmcache.tiers.object_store.gcs", "GCSTier", "gcs"),
    "mooncake": ("lmcache.tiers.mooncake.tier", "MooncakeTier", "mooncake"),
    "mooncakestore": ("lmcache.tiers.mooncake.tier", "MooncakeTier", "mooncake"),
    "infinistore": ("lmcache.tiers.infinistore.tier", "InfiniStoreTier", ""),
    "peer": ("lmcache.peers.tier", "PeersTier", ""),
}
"""Maps each scheme to its module, its class, and the extra of the package that it needs."""


@dataclass(frozen=True)
class TierSpec:
    """A tier and how the server uses it. `url` is redacted. write: when shards are stored in it. read: whether lookups ask it.
    admit: which shards are stored in it."""

    name: str
    url: str
    write: str
    read: bool
    tier: TierBase
    warning: str = ""
    admit: str = "all"


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
    admit = url.take("admit", word(*ADMISSIONS), "all")
    read = url.take("read", word("yes", "no"), "yes") == "yes"
    name = url.take("name", label, url.scheme)
    codec = "none"
    if kind.codecs or url.options.get("codec") in ("none", NAIVE):
        codec = url.take("codec", word(*OPTIONS, NAIVE, *LOSSY), "auto")
    tier = kind.from_url(url)
    tier.codec = "none" if codec == NAIVE else "int8" if codec in LOSSY else codec
    url.finish()
    warnings = []
    if url.inline_secret:
        warnings.append(
            "a password in the URL can be read by every user of this machine; use ${NAME} or ?password_file="
        )
    if codec in LOSSY:
        warnings.append(
            f"codec={codec} is served by int8, which is more exact: it rounds the KV of engines with lossy_kv=int8 only"
        )
    warning = f"{url.redacted}: {'; '.join(warnings)}" if warnings else ""
    return TierSpec(name, url.redacted, write, read, tier, warning, admit)


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
    return make_tiers([*l2, *(url_of_adapter(text).url for text in l2_adapter)], runtime)


def _class_of(url: TierURL) -> type[TierBase]:
    if url.scheme in _OWN:
        module, name, extra = _OWN[url.scheme]
        try:
            found: type[TierBase] = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ConfigError(
                f"{url.redacted}: {str(error.name).partition('.')[0]} is not installed; pip install 'lmcache[{extra}]'"
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
    remedy = instead_of_scheme(url.scheme)
    if remedy:
        raise ConfigError(f"{url.redacted}: {url.scheme}:// is not supported: {remedy}")
    raise ConfigError(f"{url.redacted}: unknown tier {url.scheme!r}; known: {', '.join(schemes())}")
