"""Azure Blob Storage: its store, and the credentials of the environment or of a managed identity."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore

from lmcache.errors import ConfigError
from lmcache.tiers.object_store.service import Place, Service, options_of
from lmcache.tiers.object_store.tier import ObjectTier
from lmcache.tiers.url import TierURL


def azure_store(place: Place, timeout_seconds: float) -> Any:
    """Return obstore's store of a container.

    Raises:
        ConfigError: no account is named, or its key is none.
    """
    config = connection_of(os.environ)
    if place.account:
        config["account_name"] = place.account
    if place.endpoint:
        config["endpoint"] = place.endpoint
    place = replace(place, endpoint=config.get("endpoint", ""))
    if not config.get("account_name") and not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise ConfigError(
            f"az://{place.bucket}: no storage account: add ?account=NAME, or export AZURE_STORAGE_ACCOUNT_NAME"
        )
    try:
        return AzureStore(place.bucket, config=config or None, **options_of(place, timeout_seconds))
    except BaseError:  # its text may contain a part of the key
        raise ConfigError(
            f"az://{place.bucket}: the credentials cannot be used: AZURE_STORAGE_ACCOUNT_KEY must be the base64 text of"
            " `az storage account keys list`, AZURE_STORAGE_SAS_KEY the part of a SAS URL behind the question mark"
        ) from None


def connection_of(environ: Mapping[str, str]) -> dict[str, str]:
    """Return account, key and endpoint of `AZURE_STORAGE_CONNECTION_STRING` as obstore's settings."""
    pairs = (part.partition("=") for part in environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"))
    given = {name.strip(): value for name, _, value in pairs}
    return {ours: given[theirs] for theirs, ours in _CONNECTION.items() if given.get(theirs)}


_CONNECTION = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "SharedAccessSignature": "sas_key",
    "BlobEndpoint": "endpoint",
}


class AzureTier(ObjectTier):
    scheme = "az"
    service = Service(
        container="Azure container",
        credentials="environment, connection string or managed identity",
        missing=lambda: (
            "export AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_SAS_KEY, or give the machine an"
            " identity with the role Storage Blob Data Contributor"
        ),
        bulk=256,
        page="docs/tiers/azure-and-gcs.md",
    )
    make_store = staticmethod(azure_store)

    @staticmethod
    def endpoint(text: str) -> str:
        if not re.fullmatch(r"https?://[^?#@\s]+", text):
            raise ValueError(
                "must be https://ACCOUNT.blob.core.windows.net, or http://host:port/ACCOUNT of an emulator"
            )
        return text.rstrip("/")

    @staticmethod
    def more_of_place(url: TierURL) -> dict[str, str]:
        return {"account": url.take("account", str, "")}
