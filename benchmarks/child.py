"""A process that is asked things: one JSON object a line in, one out, its log in a file."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def end_with_parent() -> None:
    """For `preexec_fn`: the kernel ends this process when the thread that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Child:
    """`call` sends `{"call": name, **arguments}` and returns the answer.

    Raises:
        RuntimeError: it has ended; the end of its log is in the text.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self.name, self._log = name, log
        with log.open("a") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                env=env,
                cwd=cwd,
                preexec_fn=end_with_parent,
            )

    def call(self, name: str, **arguments: Any) -> Any:
        self.begin(name, **arguments)
        return self.end()

    def begin(self, name: str, **arguments: Any) -> None:
        """Start a call without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """The answer to the call that was begun."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended:\n{self._log.read_text()[-6000:]}")
        return json.loads(line)

    def runs(self) -> bool:
        return self._process.poll() is None

    def stop(self, patience_seconds: float = 30) -> None:
        """Let it end by itself: nothing more will be asked."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
