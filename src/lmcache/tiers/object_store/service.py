"""What the three services differ in: names, credentials, and how many objects one request deletes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class Place:
    """The location of the objects. `endpoint`: "" for the cloud itself. `region` is S3's, `account` Azure's."""

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    account: str = ""


@dataclass(frozen=True)
class Service:
    """One kind of object store.

    container: what it calls a bucket, for people. credentials: where they come from. missing: returns what to type where there
    are none. bulk: how many objects a request deletes. page: where users read about it.
    """

    container: str
    credentials: str
    missing: Callable[[], str]
    bulk: int
    page: str
    bad_request_means_denied: bool = False
    """Whether HEAD is answered with 400, and no more, where keys have expired."""


def options_of(place: Place, timeout_seconds: float) -> dict[str, Any]:
    """Return obstore's options that all stores have. A request ends within the time, also if it is tried again."""
    limit = timedelta(seconds=timeout_seconds)
    client = {"allow_http": place.endpoint.startswith("http://"), "timeout": limit, "connect_timeout": limit}
    return {
        "prefix": place.prefix or None,
        "client_options": client,
        "retry_config": {"max_retries": 1, "retry_timeout": limit / 2},
    }
