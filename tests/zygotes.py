"""Processes of an engine's environment that start at once: a zygote has imported the engine already, and forks them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import IO, Any


def die_with_parent() -> None:
    """A test run that is killed leaves no process behind (PR_SET_PDEATHSIG is 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Forked:
    """A process that a zygote has forked, with what the tests use of `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self._zygote, self.pid, self.stdin, self.stdout = zygote, pid, stdin, stdout
        self._handle = os.pidfd_open(pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._handle], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._zygote.ask({"reap": self.pid})
            os.close(self._handle)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """Forks the processes of one interpreter, after it has imported some modules. It ends with the process of the tests."""

    def __init__(self, python: str, modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).parent / "scripts" / "zygote.py"
        one_thread = environment | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy starts others at its import
        with its:
            self._process = subprocess.Popen(
                [python, str(script), *modules], stdin=its, env=one_thread, preexec_fn=die_with_parent
            )

    def ask(self, request: dict[str, Any], *descriptors: int) -> int:
        socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        answer = self._socket.recv(100)
        assert answer, f"the zygote has ended with {self._process.wait()}"
        return int(answer)

    def start(self, command: list[str], stderr: int | IO[Any], env: dict[str, str], cwd: Path) -> Forked:
        """stderr: a file, or `subprocess.STDOUT`."""
        (its_in, to_it), (from_it, its_out) = os.pipe(), os.pipe()
        its_err = its_out if isinstance(stderr, int) else stderr.fileno()
        pid = self.ask({"command": command, "environment": env, "folder": str(cwd)}, its_in, its_out, its_err)
        os.close(its_in)
        os.close(its_out)
        return Forked(self, pid, os.fdopen(to_it, "w"), os.fdopen(from_it))


def start(
    modules: tuple[str, ...], command: list[str], *, stderr: int | IO[Any], env: dict[str, str], cwd: Path, **_: Any
) -> Forked:
    """As `subprocess.Popen` does it, with pipes, in a session of its own, by a zygote that has imported the modules.

    The command is an interpreter, a script and its arguments. What its interpreter reads from the environment when it starts is
    the same for all that a zygote forks.
    """
    python, *rest = command
    read_at_start = tuple(sorted((name, value) for name, value in env.items() if name.startswith("PYTHON")))
    if (zygote := zygotes.get(key := (python, modules, read_at_start))) is None:
        zygote = zygotes[key] = Zygote(python, modules, env)
    return zygote.start(rest, stderr, env, cwd)


zygotes: dict[Any, Zygote] = {}
