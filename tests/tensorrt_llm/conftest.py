"""Contract tests of the TensorRT-LLM connectors: a double of its executor, in an environment with torch (vLLM's has it)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Process

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
ANSWER_SECONDS = 60.0
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_size": 64,
}


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="LMCACHE_TEST_VLLM_PYTHON is not set (./run test sets it)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.xdist_group("vllm"))
            if not PYTHON:
                item.add_marker(skip)


class Engines(Process):
    """`tensorrt_drive.py` in a process of its own; its calls are its commands."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
        path = os.pathsep.join([str(ROOT / "src"), kept.pop("PYTHONPATH", "")])
        script = Path(__file__).with_name("tensorrt_drive.py")
        super().__init__([PYTHON, str(script), *arguments], env={**kept, "PYTHONPATH": path, **environment}, cwd=ROOT)
        assert self.hear(START_SECONDS) == "ready"

    def ask(self, do: str, name: str = "engine", **arguments: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": do, "name": name, **arguments}) + "\n")
        self.child.stdin.flush()
        return self.hear(ANSWER_SECONDS)

    def hear(self, seconds: float) -> Any:
        return json.loads(self.line_with("ANSWER ", seconds).partition("ANSWER ")[2])

    def said(self, words: str) -> bool:
        return any(words in line for line in self.log)


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
