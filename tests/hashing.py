"""Holds up the hashing of large weights, in whatever process it is, for as long as a test wants."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class Turns:
    """Those of all processes of this user to hash, held by the test: hashing in the background waits for them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.held = [os.open(folder / f"lock-{number}", os.O_RDWR | os.O_CREAT) for number in range(8)]
        for descriptor in self.held:
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    def give(self) -> None:
        while self.held:
            os.close(self.held.pop())
