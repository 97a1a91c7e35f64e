"""A hit after the server's restart from a Mooncake Store, InfiniStore and Azure (Azurite), with the answers of the cold run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tier_hits import prompts_of, restarted

from azurite import KEY, Azurite
from stores import InfiniStoreServer, MooncakeClient, MooncakeMaster, mooncake_environment

Hits = Callable[..., None]


@pytest.fixture(scope="module")
def hits(folder: Path, model: Path) -> Iterator[Hits]:
    """One engine for all stores; the servers come and go."""
    with restarted(folder, "stores", model) as made:
        yield made


def test_mooncake(hits: Hits, tmp_path: Path) -> None:
    environment = mooncake_environment()
    master = MooncakeMaster(tmp_path)
    lender = MooncakeClient(master, 256)
    try:
        hits("mooncake", master.url("?timeout=60"), prompts_of(701), **environment)
    finally:
        lender.kill()
        master.kill()


def test_infinistore(hits: Hits) -> None:
    store = InfiniStoreServer()
    try:
        hits("infinistore", store.url("?timeout=60"), prompts_of(711))
    finally:
        store.kill()


def test_azure(hits: Hits) -> None:
    store = Azurite()
    try:
        hits("az", store.url("kv", "&max_gb=1"), prompts_of(721), AZURE_STORAGE_ACCOUNT_KEY=KEY)
    finally:
        store.end()
