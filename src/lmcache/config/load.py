"""Filling a ServerConfig: flags > environment > file > defaults. Each source gives text, which the table's parsers read."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lmcache.config import options
from lmcache.config.given import Given, check_secret_file, entries, is_null, nearest
from lmcache.config.options import ENV_PREFIX, redacted_url
from lmcache.config.server import GROUPS, OPTIONS, ServerConfig
from lmcache.errors import ConfigError

_SHORT_TOKEN = 16  # characters: below this a token can be guessed over a fast network
_KUBERNETES_LINK = re.compile(r"(tcp|udp|sctp)://")
_KUBERNETES_NAME = re.compile(r"(_|^)(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)$")
KEY_REMEDY = 'make one with: (umask 077; python3 -c "import zmq; print(zmq.curve_keypair()[1].decode())" > FILE)'
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BY_NAME = {option.name: option for option in OPTIONS}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A filled configuration and the origin of its values."""

    config: ServerConfig
    sources: Mapping[str, str]
    """Maps each field name to the source of its value: a flag, a variable, FILE:LINE, or `default`."""
    warnings: tuple[str, ...] = ()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add every option of the table to a parser. Parsed values are text under the field's name, None where not given."""
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    for option in OPTIONS:
        default = f" Default: {option.default_text}." if option.default_text else ""
        names = " or ".join(filter(None, (option.env, option.extra_env)))
        text = f"{option.help}{default} [{names}]".replace("%", "%%")
        if option.is_switch:
            groups[option.group].add_argument(
                option.flag, dest=option.name, action="store_const", const="true", help=text
            )
        else:
            action = "append" if option.repeat else "store"
            groups[option.group].add_argument(
                option.flag, dest=option.name, metavar=option.metavar, help=text, action=action
            )


def load(flags: Mapping[str, str | list[str] | None], environ: Mapping[str, str] | None = None) -> Settings:
    """Fill a ServerConfig. flags: field name -> text (a list of texts for a repeated flag), None where not given.
    environ: os.environ by default.

    Raises:
        ConfigError: one line that names the setting, its value, where it came from and what to do.
    """
    environ = os.environ if environ is None else environ
    warnings: list[str] = []
    given = _from_environment(environ, warnings)
    given |= {name: _from_flag(name, text) for name, text in flags.items() if text is not None}
    if "config" in given:
        path = given["config"].parsed(_BY_NAME["config"].parse)
        given = {**_from_file(path, environ), **given}
    values = {name: found.parsed(_BY_NAME[name].parse) for name, found in given.items()}
    if "api_token" in given and given["api_token"].source == "--api-token":
        warnings.append("--api-token is visible to every user of this machine (ps): prefer --api-token-file")
    values |= _token_from_file(values, given)
    config = ServerConfig(**values)
    _check_together(config, given)
    if config.api_token and len(config.api_token) < _SHORT_TOKEN:
        warnings.append(f"the API token has fewer than {_SHORT_TOKEN} characters and can be guessed: make a longer one")
    sources = {option.name: given[option.name].source if option.name in given else "default" for option in OPTIONS}
    return Settings(config, sources, tuple(warnings))


def _from_flag(name: str, text: str | list[str]) -> Given:
    option = _BY_NAME[name]
    if isinstance(text, list):
        return Given("\n".join(text), option.flag, option.flag)
    return Given(text, option.flag, option.flag if option.secret or option.is_switch else f"{option.flag} {text}")


def _from_environment(environ: Mapping[str, str], warnings: list[str]) -> dict[str, Given]:
    """Return every LMCACHE_SERVER_* variable that is set and not empty."""
    found: dict[str, Given] = {}
    for option in OPTIONS:
        for variable in (option.extra_env, option.env):
            text = environ.get(variable, "") if variable else ""
            if option.name in ("port", "http_port", "prometheus_port") and _KUBERNETES_LINK.match(text):
                warnings.append(f"{variable}={text} is Kubernetes' link to a service, not a port: ignored")
            elif text:
                plain = not option.secret and not option.repeat
                found[option.name] = Given(text, variable, f"{variable}={text}" if plain else variable)
    names = [option.env for option in OPTIONS]
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in names and not _KUBERNETES_NAME.search(variable):
            warnings.append(f"{variable} is not a setting and is ignored: {nearest(variable, names)}")
    return found


def _from_file(path: Path, environ: Mapping[str, str]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    known = [option.key for option in OPTIONS if option.in_file]
    for key, node, where in entries(path, f"--config {path}", "l1-size-gb: 20", known, spelling=_as_key):
        option, said = _BY_NAME[key.replace("-", "_")], f"{where}: {key}"
        if option.repeat:
            found[option.name] = Given(_listed(path, where, key, node), where, said)
        elif not isinstance(node.value, str):
            raise ConfigError(f"{said} must be one value, not a list or a mapping")
        elif not is_null(node):
            text = _resolved(node.value, said, environ)
            if option.secret and text == node.value:
                check_secret_file(path, said)
            found[option.name] = Given(text, where, said if option.secret else f"{said}: {text}")
    return found


def _as_key(text: str) -> str:
    return text.replace("_", "-")


def _listed(path: Path, where: str, key: str, value_node: Any) -> str:
    """Join one value or a list of values by newlines. `${NAME}` is not replaced here: URLs are split into parts first."""
    items = [value_node] if isinstance(value_node.value, str) else value_node.value
    texts = [str(item.value) for item in items if isinstance(getattr(item, "value", None), str)]
    if len(texts) != len(items) or any("\n" in text for text in texts):
        raise ConfigError(f"{where}: {key} must be a value or a list of values, one line each")
    if any(redacted_url(text) != text and "${" not in unquote(unquote(text)) for text in texts):
        check_secret_file(path, f"{where}: {key}")
    return "\n".join(texts)


def _resolved(text: str, said: str, environ: Mapping[str, str]) -> str:
    """Replace each `${NAME}` by the variable of that name."""

    def value(reference: re.Match[str]) -> str:
        name = reference[1]
        if name not in environ:
            raise ConfigError(f"{said}: ${{{name}}} is not set: export {name}, or write the value")
        return environ[name]

    return _REFERENCE.sub(value, text)


def _token_from_file(values: Mapping[str, Any], given: Mapping[str, Given]) -> dict[str, str]:
    if values.get("api_token_file") is None:
        return {}
    said = given["api_token_file"].said
    if values.get("api_token"):
        raise ConfigError(f"{said}: {given['api_token'].source} gives a token as well: keep one of the two")
    path: Path = values["api_token_file"]
    check_secret_file(path, said)
    text = path.read_bytes()[:1024].decode("ascii", "replace").strip()
    try:
        return {"api_token": options.token(text)}
    except ValueError as error:
        raise ConfigError(f"{said}: the token in {path} {error}") from None


def _check_together(config: ServerConfig, given: Mapping[str, Given]) -> None:
    """Check settings against each other."""

    def said(name: str) -> str:
        return given[name].said if name in given else f"{_BY_NAME[name].flag} {getattr(config, name)}"

    if config.auth_key_file and config.insecure_no_auth:
        raise ConfigError("--auth-key-file and --insecure-no-auth contradict each other: keep one of the two")
    if config.auth_key_file:
        check_secret_file(config.auth_key_file, f"--auth-key-file {config.auth_key_file}", f": {KEY_REMEDY}")
    if config.beyond_loopback and not config.auth_key_file and not config.insecure_no_auth:
        raise ConfigError(
            f"{said('host')} lets other hosts in: pass --auth-key-file FILE, "
            "or --insecure-no-auth if everybody on that network may read and write the cache"
        )
    if any("://" in one for one in config.peers) and not config.auth_key_file:
        raise ConfigError(
            "--peers redis://...: a directory of servers needs --auth-key-file FILE, since others may write to the store"
        )
    if config.peer_transport == "nixl" and not config.nixl_devices:
        raise ConfigError(
            f"--peer-transport nixl with {said('host')}: name the network devices of the servers' own network with "
            "--peer-devices (such as mlx5_0:1), since whoever reaches them can read and overwrite L1"
        )
    ports: dict[int, str] = {}
    for name in ("port", "http_port", "prometheus_port"):
        port = getattr(config, name)
        if port and port in ports:
            raise ConfigError(f"{ports[port]} and {said(name)} are the same: change one")
        ports[port] = said(name)
