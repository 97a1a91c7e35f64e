"""What a URL of a Redis tier says about where the keys are: servers, logins, certificates, and the prefix of the keys."""

from __future__ import annotations

import re
import ssl
from urllib.parse import urlsplit

from lmcache.config.options import integer, word
from lmcache.errors import ConfigError
from lmcache.tiers.redis.nodes import Cluster, Nodes, Sentinels, with_sentinels_login
from lmcache.tiers.redis.resp import Login
from lmcache.tiers.url import TierURL

SENTINEL_PORT = 26379


def prefix_of(text: str) -> str:
    """Return the text if keys may begin with it. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", text):
        raise ValueError("must be 1 to 64 letters, digits and _ . : -")
    return text


def nodes_of(url: TierURL) -> Nodes:
    """Take from the URL who has the keys, and how to log in there."""
    is_cluster = url.take("cluster", word("yes", "no"), "no") == "yes"
    sentinel = url.take("sentinel", str, "")
    database = url.path.strip("/") or "0"
    if not url.host or not database.isdecimal() or (is_cluster and int(database)):
        raise ConfigError(f"{url.redacted}: write redis://host:6379/0, with the number of a database (0 in a cluster)")
    if sentinel and is_cluster:
        raise ConfigError(f"{url.redacted}: a cluster has no Sentinels: leave out ?sentinel= or ?cluster=yes")
    login = Login(url.username, url.take_password(), int(database), _tls(url))
    limit = url.take("connections", integer(1, 64), 8)
    others: list[tuple[str, int]] = url.take("also", _hosts, [])
    sentinel_password = url.take_secret("sentinel_password_file")
    if sentinel:
        first = url.host, url.port or SENTINEL_PORT
        return Sentinels([first, *others], login, limit, sentinel, with_sentinels_login(login, sentinel_password))
    if others or sentinel_password:
        raise ConfigError(f"{url.redacted}: also and sentinel_password_file need sentinel=NAME, the primary's name")
    return (Cluster if is_cluster else Nodes)(url.host, url.port or 6379, login, limit)


def _hosts(text: str) -> list[tuple[str, int]]:
    found = []
    for one in text.split(","):
        parts = urlsplit(f"//{one}")
        if not parts.hostname or parts.path:
            raise ValueError(f"{one!r} is no HOST:PORT")
        found.append((parts.hostname, parts.port or SENTINEL_PORT))
    return found


def _tls(url: TierURL) -> ssl.SSLContext | None:
    files = {name: url.take(name, str, "") for name in ("ca_file", "cert_file", "cert_key_file")}
    if url.scheme != "rediss":
        for name, path in files.items():
            if path:
                raise ConfigError(f"{url.redacted}: {name} is for rediss://")
        return None
    try:
        context = ssl.create_default_context(cafile=files["ca_file"] or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{url.redacted}: cannot use ca_file {files['ca_file']}: {error}") from None
    if files["cert_key_file"] and not files["cert_file"]:
        raise ConfigError(f"{url.redacted}: cert_key_file needs cert_file, the client's certificate")
    if files["cert_file"]:
        try:
            context.load_cert_chain(files["cert_file"], files["cert_key_file"] or None, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{url.redacted}: cannot use cert_file {files['cert_file']}: {error};"
                " both files must be PEM, and the key of cert_key_file without a passphrase"
            ) from None
    return context
