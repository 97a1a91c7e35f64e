"""Tests with real models of Hugging Face Transformers, in the environment that LMCACHE_TEST_VLLM_PYTHON names (vLLM's has it)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers_user import PYTHON, User

from real_engines import ROOT, make_model, mark


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They run beside those with real vLLM, whose environment they use."""
    mark(items, Path(__file__).parent, "vllm")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answer depends on the whole prompt."""
    return make_model(PYTHON, tmp_path_factory.mktemp("transformers") / "model")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes and configuration with other weights."""
    return make_model(PYTHON, tmp_path_factory.mktemp("transformers") / "other", 7)


@pytest.fixture(scope="session")
def group_models(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of small models with several kinds of KV."""
    path = tmp_path_factory.mktemp("transformers-groups")
    command = [PYTHON, str(ROOT / "tests/scripts/group_models.py"), str(path), str(model)]
    subprocess.run(command, check=True, timeout=240)
    return path


@pytest.fixture(scope="module")
def long_lived() -> Iterator[list[User]]:
    made: list[User] = []
    yield made
    for one in made:
        one.end()


@pytest.fixture
def user(long_lived: list[User], model: Path) -> User:
    """A script with the model, which many tests share; each attaches to a server of its own."""
    if not long_lived or long_lived[-1].child.poll() is not None:
        long_lived.append(User(model))
    long_lived[-1].log.clear()
    return long_lived[-1]


@pytest.fixture
def script() -> Iterator[Callable[[Path], User]]:
    made: list[User] = []

    def start(model: Path) -> User:
        made.append(User(model))
        return made[-1]

    yield start
    for one in made:
        one.end()
