"""Google Cloud Storage: its store, and the credentials of the environment, of gcloud or of the machine's service account."""

from __future__ import annotations

from typing import Any

from obstore.exceptions import BaseError
from obstore.store import GCSStore

from lmcache.errors import ConfigError
from lmcache.tiers.object_store.service import Place, Service, options_of
from lmcache.tiers.object_store.tier import ObjectTier


def gcs_store(place: Place, timeout_seconds: float) -> Any:
    """Return obstore's store of a bucket.

    Raises:
        ConfigError: a file of credentials is named that cannot be used.
    """
    config = {"base_url": place.endpoint} if place.endpoint else None
    try:
        return GCSStore(place.bucket, config=config, **options_of(place, timeout_seconds))
    except (BaseError, OSError):  # its text may contain a part of the file
        raise ConfigError(
            f"gs://{place.bucket}: the credentials cannot be used: GOOGLE_APPLICATION_CREDENTIALS must name a file that"
            " `gcloud auth application-default login` or `gcloud iam service-accounts keys create` has written"
        ) from None


class GCSTier(ObjectTier):
    scheme = "gs"
    service = Service(
        container="GCS bucket",
        credentials="environment, gcloud's file or the machine's service account",
        missing=lambda: (
            "export GOOGLE_APPLICATION_CREDENTIALS=FILE, type `gcloud auth application-default login`, or give the machine a"
            " service account with the role Storage Object User"
        ),
        bulk=100,  # one request each, several at once
        page="docs/tiers/azure-and-gcs.md",
    )
    make_store = staticmethod(gcs_store)
