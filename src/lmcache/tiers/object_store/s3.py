"""Amazon S3 and what speaks like it: its store, and the credentials of environment, shared files and roles."""

from __future__ import annotations

import configparser
import contextlib
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from obstore.store import S3Store

from lmcache.errors import ConfigError
from lmcache.runtime import RUNTIME
from lmcache.tiers.object_store.service import Place, Service, options_of
from lmcache.tiers.object_store.tier import ObjectTier
from lmcache.tiers.url import TierURL

REREAD_SECONDS = 60.0
"""Temporary keys of a profile are used so long before the file is read again."""


def s3_store(place: Place, timeout_seconds: float) -> Any:
    """Return obstore's store of a bucket.

    Raises:
        ConfigError: `AWS_PROFILE` names no profile.
    """
    config: dict[str, Any] = {"unsigned_payload": True}  # the frame has its own checksum
    if place.endpoint:
        config["endpoint"] = place.endpoint
    profile = profile_of(os.environ)
    region = place.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config["region"] = region or profile.pop("region", "us-east-1")
    profile.pop("region", None)
    # Whoever gives out temporary keys writes new ones into the file before the former ones expire.
    renewed = _temporary_keys if "session_token" in profile else None
    config |= profile if renewed is None else {}
    return S3Store(place.bucket, config=config, credential_provider=renewed, **options_of(place, timeout_seconds))


def _temporary_keys() -> Any:
    """Return the profile's keys as obstore's credentials. obstore asks again after `REREAD_SECONDS`."""
    found = profile_of(os.environ)
    return {
        "access_key_id": found["access_key_id"],
        "secret_access_key": found["secret_access_key"],
        "token": found.get("session_token"),
        "expires_at": datetime.fromtimestamp(RUNTIME.wall() + REREAD_SECONDS, timezone.utc),
    }


def profile_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return credentials and region of the shared files as obstore's settings, where the environment has no keys itself.

    Raises:
        ConfigError: `AWS_PROFILE` names a profile that is in neither file.
    """
    name = environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    there: set[str] = set()
    for _, section, parser in _shared_files(environ, name):
        there |= {each.removeprefix("profile ") for each in parser.sections()}
        if parser.has_section(section):
            for theirs, ours in _PROFILE.items():
                if value := parser.get(section, theirs, fallback=""):
                    found.setdefault(ours, value)
    has_keys = bool(environ.get("AWS_ACCESS_KEY_ID"))
    if "AWS_PROFILE" in environ and name not in there and not has_keys:
        paths = " and ".join(str(path) for path, _, _ in _shared_files(environ, name))
        known = f"; they have {', '.join(sorted(there))}" if there else ""
        raise ConfigError(f"AWS_PROFILE={name}: there is no such profile in {paths}{known}")
    if has_keys or "secret_access_key" not in found:
        return {key: value for key, value in found.items() if key == "region"}
    return found


def missing_keys(environ: Mapping[str, str]) -> str:
    """Return what to type where there are no credentials: it depends on what the profile has in place of keys."""
    name = environ.get("AWS_PROFILE", "default")
    for _, section, parser in _shared_files(environ, name):
        for key in ("sso_session", "sso_start_url", "role_arn", "credential_process"):
            if parser.has_option(section, key):
                command = f'eval "$(aws configure export-credentials --profile {name} --format env)"'
                return f"the profile {name} has {key}, which is not followed here: type `{command}` before `lmcache server`"
    return (
        "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with the name of a profile of"
        " ~/.aws/credentials that has keys, or give the machine a role"
    )


def _shared_files(environ: Mapping[str, str], name: str) -> list[tuple[Path, str, configparser.ConfigParser]]:
    """Return path, the profile's section, and content of AWS's two files; empty content for a file that cannot be read."""
    home, found = Path(environ.get("HOME", "/")), []
    for variable, default, section in (
        ("AWS_SHARED_CREDENTIALS_FILE", home / ".aws/credentials", name),
        ("AWS_CONFIG_FILE", home / ".aws/config", name if name == "default" else f"profile {name}"),
    ):
        path, parser = (
            Path(environ.get(variable, default)),
            configparser.ConfigParser(interpolation=None, strict=False),
        )
        # the other file may have them; without any, the first request reports it
        with contextlib.suppress(OSError, ValueError, configparser.Error):
            parser.read(path, encoding="utf-8")
        found.append((path, section, parser))
    return found


_PROFILE = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
}


class S3Tier(ObjectTier):
    scheme = "s3"
    service = Service(
        container="S3 bucket",
        credentials="environment, profile or instance role",
        missing=lambda: missing_keys(os.environ),
        bulk=1000,
        page="docs/tiers/s3.md",
        bad_request_means_denied=True,
    )
    make_store = staticmethod(s3_store)

    @staticmethod
    def more_of_place(url: TierURL) -> dict[str, str]:
        return {"region": url.take("region", str, "")}
