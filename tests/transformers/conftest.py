"""Tests with real models of Hugging Face Transformers, in the environment that LMCACHE_TEST_VLLM_PYTHON names (vLLM's has it)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from real_engines import Script, make_model, mark

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They run beside those with real vLLM, whose environment they use."""
    mark(items, Path(__file__).parent, "vllm")


class User(Script):
    """`models.py`, a user's script that does what it is told."""

    MODULES = ("torch", "transformers.models.qwen3.modeling_qwen3")

    def __init__(self, model: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        super().__init__(PYTHON, Path(__file__).with_name("models.py"), str(model), seconds=240.0, **environment)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answer depends on the whole prompt."""
    return make_model(PYTHON, tmp_path_factory.mktemp("transformers") / "model")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes and configuration with other weights."""
    return make_model(PYTHON, tmp_path_factory.mktemp("transformers") / "other", 7)


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
