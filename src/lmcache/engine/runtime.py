"""The time and the threads of the engine's side: nothing else there reads a clock, sleeps or starts a thread.

A simulation of engines gives sessions a runtime of its own; everything above a session uses that session's runtime.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


def _start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


@dataclass(frozen=True)
class Runtime:
    """now: seconds of a clock that never goes back. sleep: returns after so many seconds. start: runs a function in a thread of
    this name, which ends with the process at the latest."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    start: Callable[[Callable[[], object], str], threading.Thread] = _start_thread


RUNTIME = Runtime()
"""The real one, which every session has unless it is given another."""
