"""The S3 tier's requests, through obstore, and the meaning of their errors. No text of a server or library is passed on: people
see the place, the operation, the status and S3's own code, so that no credential can leak.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from lmcache.errors import ConfigError
from lmcache.runtime import RUNTIME
from lmcache.tiers.tier import TierError

STREAM_BYTES = 1 << 20
"""An object arrives in pieces of at least this size. Each is copied to its target while the next one is received."""
MULTIPART_FROM_BYTES = 64 << 20
"""Smaller objects are one PUT, which is atomic. An interrupted multipart upload leaves hidden parts behind."""
MULTIPART_BYTES = 16 << 20
_METADATA = re.compile(r"/meta-data/iam/|/latest/api/token|//169\.254\.")
"""Endpoints where instances and containers get their role: an error there is about credentials, not about the bucket."""
REREAD_SECONDS = 60.0
"""Temporary keys of a profile are used so long before the file is read again."""
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""S3 answers 400 with these codes to temporary keys that are valid no more."""
LIST_BYTES_LIMIT = 64 << 20
"""Larger objects of other servers' uses are not read."""


@dataclass(frozen=True)
class Place:
    """The location of the objects. `endpoint`: "" for AWS itself."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""

    @property
    def text(self) -> str:
        """The name of the location for people."""
        at = f" at {self.endpoint}" if self.endpoint else ""
        return f"S3 bucket {self.bucket}{at}"


@dataclass(frozen=True)
class Listed:
    """One object in a listing. `path` is relative to the prefix."""

    path: str
    size: int
    modified: datetime


class Client:
    """Requests for objects under the prefix. Each ends within `timeout_seconds`, including one retry where that is allowed."""

    def __init__(self, place: Place, timeout_seconds: float) -> None:
        self.place = place
        limit = timedelta(seconds=timeout_seconds)
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
        self._store = S3Store(
            place.bucket,
            prefix=place.prefix or None,
            config=config,
            client_options={
                "allow_http": place.endpoint.startswith("http://"),
                "timeout": limit,
                "connect_timeout": limit,
            },
            retry_config={"max_retries": 1, "retry_timeout": limit / 2},
            credential_provider=renewed,
        )

    def size(self, path: str) -> int | None:
        """HEAD: return the bytes of the object, None where there is none."""
        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._failed("HEAD", error) from None

    def read(
        self, path: str, start: int, memories: Sequence[memoryview], arrived: Callable[[memoryview], None] | None = None
    ) -> int | None:
        """GET a range into these memories, one after another. Return the bytes of the complete object, None where there is none.

        Memory beyond the end of the object is not written. `arrived` is called with each piece of the last memory, in order,
        while the piece is still in the processor's cache.
        """
        wanted = sum(len(memory) for memory in memories)
        try:
            answer = obstore.get(self._store, path, options={"range": (start, start + wanted)})
            targets = iter(memories)
            target, at = next(targets), 0
            for chunk in answer.stream(min_chunk_size=STREAM_BYTES):
                piece = memoryview(chunk)
                while len(piece):
                    if at == len(target):
                        target, at = next(targets), 0
                    step = min(len(piece), len(target) - at)
                    target[at : at + step] = piece[:step]
                    if arrived and target is memories[-1]:
                        arrived(target[at : at + step])
                    piece, at = piece[step:], at + step
            return int(answer.meta["size"])
        except FileNotFoundError as error:
            self._must_exist("GET", error)
            return None
        except StopIteration:
            raise TierError("protocol", f"{self.place.text}: GET answered with more than was asked for") from None
        except (BaseError, OSError) as error:
            if _status(error) == 416:  # the object ends before the range begins
                return self.size(path)
            raise self._failed("GET", error) from None

    def read_all(self, path: str) -> tuple[bytes, str] | None:
        """GET a small object and its ETag; None where there is none, or it is larger than `LIST_BYTES_LIMIT`."""
        try:
            answer = obstore.get(self._store, path)
            if answer.meta["size"] > LIST_BYTES_LIMIT:
                return None
            return bytes(answer.bytes()), answer.meta["e_tag"] or ""
        except FileNotFoundError as error:
            self._must_exist("GET", error)
            return None
        except (BaseError, OSError) as error:
            raise self._failed("GET", error) from None

    def write(self, path: str, pieces: Sequence[bytes | memoryview], if_etag: str | None = None) -> bool:
        """PUT one object atomically. if_etag: write only over this version, "" only if there is none; else return False."""
        size = sum(memoryview(piece).nbytes for piece in pieces)
        mode: Any = None if if_etag is None else {"e_tag": if_etag} if if_etag else "create"
        try:
            obstore.put(
                self._store,
                path,
                iter(pieces),
                mode=mode,
                use_multipart=size >= MULTIPART_FROM_BYTES,
                chunk_size=MULTIPART_BYTES,
            )
        except (AlreadyExistsError, PreconditionError):
            return False
        except (BaseError, OSError) as error:
            raise self._failed("PUT", error) from None
        return True

    def delete(self, paths: Sequence[str]) -> None:
        """Delete the objects that exist, a thousand a request."""
        try:
            if paths:
                obstore.delete(self._store, list(paths))
        except FileNotFoundError as error:
            self._must_exist("DELETE", error)
        except (BaseError, OSError) as error:
            raise self._failed("DELETE", error) from None

    def list(self) -> Iterator[Listed]:
        """Yield all objects under the prefix, a thousand a request."""
        try:
            for batch in obstore.list(self._store, chunk_size=1000):
                for meta in batch:
                    yield Listed(meta["path"], meta["size"], meta["last_modified"])
        except (BaseError, OSError) as error:
            raise self._failed("LIST", error) from None

    def _must_exist(self, verb: str, error: Exception) -> None:
        """Raise TierError when a 404 means that the bucket does not exist."""
        if _code(error) == "NoSuchBucket":
            raise self._failed(verb, error)

    def _failed(self, verb: str, error: Exception) -> TierError:
        status, code = _status(error), _code(error)
        said = " ".join(filter(None, (str(status or ""), code))) or type(error).__name__
        text = str(error)
        no_credentials = (
            f"{self.place.text}: no credentials in environment, profile or instance role; {missing_keys(os.environ)}"
        )
        if _METADATA.search(text):
            return TierError("denied", no_credentials)
        if code == "NoSuchBucket" or (status == 404 and verb == "LIST"):
            return TierError("no bucket", f"{self.place.text}: there is no such bucket; create it")
        expired = code in _EXPIRED or (verb == "HEAD" and status == 400)  # an answer to HEAD has no code
        if expired or isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            remedy = "check the credentials (environment, profile, instance role) and docs/tiers/s3.md for what they must allow"
            return TierError("denied", f"{self.place.text}: {verb} was denied ({said}); {remedy}")
        if status in (429, 503) or code == "SlowDown":
            return TierError("slow down", f"{self.place.text}: {verb} was answered with {said}")
        if status == 507 or "quota" in code.lower() or "StorageFull" in code:
            return TierError("full", f"{self.place.text}: {verb} was answered with {said}")
        if status:
            return TierError("refused", f"{self.place.text}: {verb} was answered with {said}")
        if "credential" in text.lower():
            return TierError("denied", no_credentials)
        if "Timeout" in text or "timed out" in text:
            return TierError("timeout", f"{self.place.text}: {verb} did not end in time; raise ?timeout=")
        return TierError("unreachable", f"{self.place.text}: {verb} got no answer; check the endpoint and the network")


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


def _status(error: Exception) -> int:
    found = re.search(r"non-2xx status code: (\d{3})", str(error))
    return int(found[1]) if found else 0


def _code(error: Exception) -> str:
    found = re.search(r"<Code>(\w{1,64})</Code>", str(error))
    return found[1] if found else ""
