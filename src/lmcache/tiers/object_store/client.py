"""Requests to an object store, through obstore, and the meaning of their errors. No text of a server or library is passed on:
people see the place, the operation, the status and the service's own code, so that no credential can leak.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from lmcache.tiers.object_store.service import Place, Service
from lmcache.tiers.tier import TierError

STREAM_BYTES = 1 << 20
"""An object arrives in pieces of at least this size. Each is copied to its target while the next one is received."""
MULTIPART_FROM_BYTES = 64 << 20
"""Smaller objects are one PUT, which is atomic. An interrupted multipart upload leaves hidden parts behind."""
MULTIPART_BYTES = 16 << 20
_METADATA = re.compile(
    r"/meta-data/iam/|/latest/api/token|//169\.254\.|metadata\.google\.internal|performing token request"
)
"""Endpoints where instances and containers get their role: an error there is about credentials, not about the bucket."""
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""S3 answers 400 with these codes to temporary keys that are valid no more."""
_NO_CONTAINER = ("NoSuchBucket", "ContainerNotFound")
LIST_BYTES_LIMIT = 64 << 20
"""Larger objects of other servers' uses are not read."""


Version = dict[str, str]
"""What names one version of an object to its service: its ETag, its generation."""


@dataclass(frozen=True)
class Listed:
    """One object in a listing. `path` is relative to the prefix."""

    path: str
    size: int
    modified: datetime


class Client:
    """Requests for objects under the prefix. Each ends within `timeout_seconds`, including one retry where that is allowed."""

    def __init__(self, place: Place, service: Service, store: Any) -> None:
        """store: obstore's store of this place."""
        self.place, self.service, self._store = place, service, store
        at = f" at {place.endpoint}" if place.endpoint else ""
        self.text = f"{service.container} {place.bucket}{at}"
        """The name of the place for people."""

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
            raise TierError("protocol", f"{self.text}: GET answered with more than was asked for") from None
        except (BaseError, OSError) as error:
            if _status(error) == 416:  # the object ends before the range begins
                return self.size(path)
            raise self._failed("GET", error) from None

    def read_all(self, path: str) -> tuple[bytes, Version] | None:
        """GET a small object and its version; None where there is none, or it is larger than `LIST_BYTES_LIMIT`."""
        try:
            answer = obstore.get(self._store, path)
            if answer.meta["size"] > LIST_BYTES_LIMIT:
                return None
            version = {name: answer.meta.get(name) for name in ("e_tag", "version")}
            return bytes(answer.bytes()), {name: text for name, text in version.items() if text}
        except FileNotFoundError as error:
            self._must_exist("GET", error)
            return None
        except (BaseError, OSError) as error:
            raise self._failed("GET", error) from None

    def write(self, path: str, pieces: Sequence[bytes | memoryview], over: Version | None = None) -> bool:
        """PUT one object atomically. over: write only over this version, {} only if there is none; else return False."""
        size = sum(memoryview(piece).nbytes for piece in pieces)
        mode: Any = None if over is None else over or "create"
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
        """Delete the objects that exist, as many in a request as the service allows."""
        try:
            for start in range(0, len(paths), self.service.bulk):
                self._delete(list(paths[start : start + self.service.bulk]))
        except (BaseError, OSError) as error:
            raise self._failed("DELETE", error) from None

    def _delete(self, paths: Sequence[str]) -> None:
        try:
            obstore.delete(self._store, paths)
        except FileNotFoundError as error:
            self._must_exist("DELETE", error)
            if len(paths) > 1:  # which of them are left is not said
                for path in paths:
                    self._delete([path])

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
        if _code(error) in _NO_CONTAINER:
            raise self._failed(verb, error)

    def _failed(self, verb: str, error: Exception) -> TierError:
        status, code = _status(error), _code(error)
        said = " ".join(filter(None, (str(status or ""), code))) or type(error).__name__
        text = str(error)
        no_credentials = f"{self.text}: no credentials in {self.service.credentials}; {self.service.missing()}"
        if _METADATA.search(text):
            return TierError("denied", no_credentials)
        if code in _NO_CONTAINER or (status == 404 and verb in ("LIST", "PUT")):
            kind = self.service.container.split()[-1]
            return TierError("no bucket", f"{self.text}: there is no such {kind}; create it")
        expired = code in _EXPIRED or (self.service.bad_request_means_denied and verb == "HEAD" and status == 400)
        if expired or isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            remedy = (
                f"check the credentials ({self.service.credentials}) and {self.service.page} for what they must allow"
            )
            return TierError("denied", f"{self.text}: {verb} was denied ({said}); {remedy}")
        if status in (429, 503) or code in ("SlowDown", "ServerBusy"):
            return TierError("slow down", f"{self.text}: {verb} was answered with {said}")
        if status == 507 or "quota" in code.lower() or "StorageFull" in code:
            return TierError("full", f"{self.text}: {verb} was answered with {said}")
        if status:
            return TierError("refused", f"{self.text}: {verb} was answered with {said}")
        if "credential" in text.lower():
            return TierError("denied", no_credentials)
        if "Timeout" in text or "timed out" in text:
            return TierError("timeout", f"{self.text}: {verb} did not end in time; raise ?timeout=")
        return TierError("unreachable", f"{self.text}: {verb} got no answer; check the endpoint and the network")


def _status(error: Exception) -> int:
    found = re.search(r"non-2xx status code: (\d{3})", str(error))
    return int(found[1]) if found else 0


def _code(error: Exception) -> str:
    found = re.search(r"<Code>(\w{1,64})</Code>", str(error))
    return found[1] if found else ""
