"""Tests with real models of Hugging Face Transformers, in the environment that LMCACHE_TEST_VLLM_PYTHON names (vLLM's has it)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from servers import Process

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")
ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
ANSWER_SECONDS = 120.0


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They run beside those with real vLLM, one at a time: torch takes both cores."""
    skip = pytest.mark.skip(reason="LMCACHE_TEST_VLLM_PYTHON is not set (./run test sets it)")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.xdist_group("vllm"))
            if not PYTHON:
                item.add_marker(skip)


class Script(Process):
    """`models.py`, a user's script that does what it is told."""

    def __init__(self, model: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
        script = Path(__file__).with_name("models.py")
        super().__init__([PYTHON, str(script), str(model)], env=environment, cwd=ROOT)
        assert self.hear(START_SECONDS) == "ready"

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.child.stdin.flush()
        return self.hear(ANSWER_SECONDS)

    def hear(self, seconds: float) -> Any:
        """The next answer; lines of logs are passed over."""
        return json.loads(self.line_with("ANSWER ", seconds).partition("ANSWER ")[2])

    def said(self, words: str) -> bool:
        return any(words in line for line in self.log)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answer depends on the whole prompt."""
    return _write(tmp_path_factory.mktemp("transformers") / "model", "0")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes and configuration with other weights."""
    return _write(tmp_path_factory.mktemp("transformers") / "other", "7")


@pytest.fixture(scope="module")
def long_lived() -> Iterator[list[Script]]:
    made: list[Script] = []
    yield made
    for one in made:
        one.end()


@pytest.fixture
def user(long_lived: list[Script], model: Path) -> Script:
    """A script with the model, which many tests share; each attaches to a server of its own."""
    if not long_lived or long_lived[-1].child.poll() is not None:
        long_lived.append(Script(model))
    long_lived[-1].log.clear()
    return long_lived[-1]


@pytest.fixture
def script() -> Iterator[Callable[[Path], Script]]:
    made: list[Script] = []

    def start(model: Path) -> Script:
        made.append(Script(model))
        return made[-1]

    yield start
    for one in made:
        one.end()


def _write(path: Path, seed: str) -> Path:
    subprocess.run([PYTHON, "-m", "demo.model", str(path), "--seed", seed], check=True, cwd=ROOT, timeout=120)
    return path
