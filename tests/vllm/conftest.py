"""What the tests with real vLLM share: two models, and a server for each file of tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_processes import PYTHON, Server

from real_engines import make_model, mark, swept


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, Path(__file__).parent, "vllm", timeout=1800)


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where everything lies. What a vLLM that is killed leaves behind, in shared memory and in /tmp, goes with the folder."""
    if getattr(request.config.option, "loadgroup", False):  # a worker of xdist
        assert all("@test_" in item.nodeid for item in request.session.items if item.get_closest_marker("vllm"))
    with (
        tempfile.TemporaryDirectory(prefix="lmvllm-", ignore_cleanup_errors=True) as scratch,
        pytest.MonkeyPatch.context() as patch,
        swept("psm_*", "sem.mp-*", "vllm_dist_*"),
    ):
        patch.setenv("TMPDIR", scratch)  # sockets and the like
        yield tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A model whose answer depends on the whole prompt."""
    return make_model(PYTHON, folder / "model")


@pytest.fixture(scope="session")
def other_model(folder: Path) -> Path:
    """The same shapes and configuration with other weights."""
    return make_model(PYTHON, folder / "other-model", 7)


@pytest.fixture(scope="module")
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with 16-token chunks, eight to a block of vLLM-CPU."""
    made = Server(folder, name=f"server-of-{request.module.__name__}")
    yield made
    made.end()
