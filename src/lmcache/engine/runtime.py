"""The clock and the threads of the engine's side: no other module there reads a clock, sleeps or starts a thread.

A simulation of engines gives sessions a runtime of its own; everything above a session uses that session's runtime.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def process_started() -> float:
    """Return when this process began, in seconds since the epoch, rounded up: the kernel counts in ticks."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) + 1
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


@dataclass(frozen=True)
class Runtime:
    """A clock and a way to start threads. now: seconds of a clock that never goes back. wall: seconds since the epoch, as in file
    times. sleep: waits for some seconds. start: runs a function in a daemon thread of the given name."""

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    start: Callable[[Callable[[], object], str], threading.Thread] = _start_thread


RUNTIME = Runtime()
"""The runtime of the operating system, and the default of every session."""
