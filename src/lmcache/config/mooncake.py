"""The public project's settings for a Mooncake Store, as options of a `mooncake://` URL."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode, urlsplit

from lmcache.config.options import GIB
from lmcache.errors import ConfigError

SCHEMES = ("mooncake", "mooncakestore")
_NAMES = {
    "local_hostname": "hostname",
    "metadata_server": "metadata",
    "protocol": "protocol",
    "device_name": "device",
    "rdma_devices": "device",
    "transfer_timeout": "timeout",
    "num_workers": "workers",
    "replica_num": "replicas",
}
"""Maps each of the public names to ours, where the value stays as it is."""
_MASTER = ("master_server_address", "master_server_addr")
_UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}


def mooncake_url(settings: dict[str, Any], url: str, said: str) -> str:
    """Return the URL of a tier, and remove from `settings` what it uses.

    settings: names of the public project, with their values. url: a URL that they complete; "" if they name the master. said: how
    the user calls the settings, for errors.

    Raises:
        ConfigError: the master is missing, or a value cannot be used here.
    """
    master = next((str(settings.pop(name)) for name in _MASTER if settings.get(name)), "")
    if not master and not url:
        raise ConfigError(f"{said}: mooncake_store needs 'master_server_address', such as 10.0.0.1:50051")
    options = {}
    for theirs, ours in _NAMES.items():
        value = settings.pop(theirs, None)
        if value not in (None, ""):
            options[ours] = str(value)
    segment = settings.pop("global_segment_size", None)
    if segment not in (None, "") and (segment_bytes := _bytes(segment, f"{said}: global_segment_size")):
        options["segment_gb"] = f"{segment_bytes / GIB:.15g}"
    settings.pop("local_buffer_size", None)  # values pass through memory that the tier sizes by itself
    if settings.pop("storage_root_dir", None):
        raise ConfigError(
            f"{said}: storage_root_dir: the store's own processes decide where it keeps files; leave it out"
        )
    scheme, rest = SCHEMES[0], ""
    if url:
        scheme, rest = urlsplit(url).scheme, urlsplit(url).query
        master = master or urlsplit(url).netloc
    query = "&".join(filter(None, (rest, urlencode(options))))
    return f"{scheme}://{master}" + (f"?{query}" if query else "")


def _bytes(value: object, said: str) -> int:
    found = re.fullmatch(r"([0-9.]+) *([kmgt]?b?)", str(value).strip().lower())
    try:
        number = float(found[1]) if found else -1.0
        unit = found[2] if found and found[2] in _UNITS else f"{found[2]}b" if found else ""
        if number < 0:
            raise ValueError
        return int(number * _UNITS[unit])
    except ValueError:
        raise ConfigError(f"{said}: {value!r} is neither a number of bytes nor a size such as 4GB") from None
