"""What tests with real engines share: when they run, the models they serve, and scripts in the engines' environments."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zygotes
from servers import Process

ROOT = Path(__file__).resolve().parents[1]
SHARED_MEMORY = Path("/dev/shm")


def mark(items: Iterable[pytest.Item], folder: Path, engine: str, timeout: float | None = None) -> None:
    """Tests of the folder need this engine's environment. One worker runs all of a file, in their order: they share engines.

    All of SGLang's share one. To be called from a hook that comes before xdist's, which looks at the groups.
    """
    variable = f"LMCACHE_TEST_{engine.upper()}_PYTHON"
    skip = pytest.mark.skip(reason=f"{variable} is not set (./run test sets it)")
    for item in items:
        if folder in item.path.parents:
            item.add_marker(getattr(pytest.mark, engine))
            item.add_marker(pytest.mark.xdist_group(engine if engine == "sglang" else item.path.stem))
            if timeout is not None:
                item.add_marker(pytest.mark.timeout(timeout))
            if not os.environ.get(variable):
                item.add_marker(skip)


def make_model(python: str, path: Path, seed: int = 0) -> Path:
    """A model whose answer depends on the whole prompt; those of other seeds have other weights and are alike otherwise."""
    subprocess.run([python, "-m", "demo.model", str(path), "--seed", str(seed)], check=True, cwd=ROOT, timeout=120)
    return path


@contextlib.contextmanager
def swept(*patterns: str) -> Iterator[None]:
    """What engines that are killed leave of these in shared memory goes at the end."""
    before = {path for pattern in patterns for path in SHARED_MEMORY.glob(pattern)}
    yield
    left = {path for pattern in patterns for path in SHARED_MEMORY.glob(pattern)} - before
    used = _mapped()
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino not in used:
                path.unlink()


def _mapped() -> set[int]:
    """Inodes in shared memory that some process still uses. A semaphore's name is not in the maps of who has made it."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= {int(line.split()[4]) for line in maps.read_text().splitlines() if str(SHARED_MEMORY) in line}
    return used


class Script(Process):
    """A script in an engine's environment that takes commands and says answers, as `scripts/commands.py` has it."""

    MODULES: tuple[str, ...] = ()
    """What it imports and a zygote can import for all of them."""

    def __init__(self, python: str, script: Path, *arguments: str, seconds: float, **environment: str) -> None:
        """seconds: for its start, and for each answer."""
        self._seconds = seconds
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "scripts"), environment.pop("PYTHONPATH", "")])
        start = functools.partial(zygotes.start, self.MODULES)
        super().__init__([python, str(script), *arguments], start, env={**environment, "PYTHONPATH": path}, cwd=ROOT)
        assert self.hear() == "ready"

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.child.stdin.flush()
        try:
            return self.hear()
        except BaseException:  # the answer may come yet, and would be taken for that to the next command
            self.kill()
            raise

    def hear(self) -> Any:
        """The next answer; lines of logs are passed over."""
        return json.loads(self.line_with("ANSWER ", self._seconds).partition("ANSWER ")[2])

    def said(self, words: str) -> bool:
        return any(words in line for line in self.log)
