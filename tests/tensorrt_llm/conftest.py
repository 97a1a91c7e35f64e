"""Contract tests of the TensorRT-LLM connectors: a double of its executor, in an environment with torch (vLLM's has it)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real_engines import Script, mark

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_size": 64,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, Path(__file__).parent, "vllm")


class Engines(Script):
    """`tensorrt_drive.py` in a process of its own; its calls are its commands."""

    MODULES = ("torch",)

    def __init__(self, *arguments: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
        script = Path(__file__).with_name("tensorrt_drive.py")
        super().__init__(PYTHON, script, *arguments, seconds=240.0, **(kept | environment))

    def ask(self, do: str, name: str = "engine", **arguments: Any) -> Any:
        return super().ask(do, name=name, **arguments)


@pytest.fixture
def engines() -> Iterator[Callable[..., Engines]]:
    made: list[Engines] = []

    def start(*arguments: str, **environment: str) -> Engines:
        made.append(Engines(*arguments, **environment))
        return made[-1]

    yield start
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def long_lived() -> Iterator[list[Engines]]:
    made: list[Engines] = []
    yield made
    for one in made:
        one.end()


@pytest.fixture
def process(long_lived: list[Engines]) -> Iterator[Engines]:
    """A process of engines, without any yet; the next test has it too, where nothing went wrong in it."""
    if not long_lived or long_lived[-1].child.poll() is not None:
        long_lived.append(Engines())
    one = long_lived[-1]
    one.log.clear()
    yield one
    try:
        one.ask("drop", "*")
    except AssertionError:
        one.kill()


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """A folder with a configuration and weights: model(weights=b"...", **changes of the configuration)."""

    def make(name: str = "model", weights: bytes = b"weights", **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        (folder / "model.bin").write_bytes(weights)
        return str(folder)

    return make
