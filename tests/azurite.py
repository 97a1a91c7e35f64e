"""Azurite, Microsoft's own emulator of Azure Blob Storage, on a free port of 127.0.0.1. It is a program of npm's."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from obstore.store import AzureStore

from ports import free_port
from servers import eventually

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account and the key that every emulator has: they are in its documentation."""
CONTAINER = "kvbucket"
FETCHED = Path(__file__).resolve().parents[1] / ".cache/azurite/node_modules/.bin"
"""Where `./run test` puts it."""


class Azurite:
    """An emulator with one container, in memory."""

    def __init__(self) -> None:
        binary = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=FETCHED)
        if not binary:
            pytest.skip("no azurite-blob on PATH, nor one that `./run test` fetched (it needs npm)")
        self.port = free_port()
        options = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--inMemoryPersistence"]
        self.child = subprocess.Popen(
            [binary, *options, "--skipApiVersionCheck", "--disableTelemetry", "--silent"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        eventually(self._listens)
        self._create()

    def _listens(self) -> bool:
        assert self.child.poll() is None, "azurite-blob has ended"
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except OSError:
            return False
        return True

    def _create(self) -> None:
        """Create the container, signed as Azure's documentation of Shared Key says."""
        headers = {
            "x-ms-date": datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT"),
            "x-ms-version": "2021-12-02",
        }
        said = "".join(f"{name}:{value}\n" for name, value in headers.items())
        text = "PUT" + "\n" * 12 + said + f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"{self.endpoint}/{CONTAINER}?restype=container"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=60):
            pass

    def store(self) -> AzureStore:
        """The container, for tests that look behind the tier."""
        config = {"account_name": ACCOUNT, "account_key": KEY, "endpoint": self.endpoint}
        return AzureStore(
            CONTAINER, config=config, client_options={"allow_http": True, "timeout": timedelta(seconds=60)}
        )

    def url(self, prefix: str, options: str = "", port: int = 0, container: str = CONTAINER) -> str:
        endpoint = f"http://127.0.0.1:{port or self.port}/{ACCOUNT}"
        return f"az://{container}/{prefix}?account={ACCOUNT}&endpoint={endpoint}&timeout=60{options}"

    def end(self) -> None:
        self.child.kill()
        self.child.wait()
