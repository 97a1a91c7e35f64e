"""The clock and the threads of a server or an engine: no other module reads a clock, waits for time to pass or starts a thread.

Whoever starts a server or a session may give it a runtime of its own, such as one with a made-up clock; everything below uses it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def process_started() -> float:
    """Return when this process began, in seconds since the epoch, rounded up: the kernel counts in ticks."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) + 1
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _start_thread(run: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


class Pool(ThreadPoolExecutor):
    """Never makes a call that it has refused. Python's own pool queues a call before it starts a thread for it: where none can
    be started it raises, and another of its threads makes the call later."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def make() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn(*args, **kwargs))
                except BaseException as error:  # belongs to whoever waits for the result
                    future.set_exception(error)

        try:
            super().submit(make).add_done_callback(lambda made: made.cancelled() and future.cancel())
        except RuntimeError:
            if future.cancel():  # no thread has begun with it meanwhile
                raise
        return future


@dataclass(frozen=True)
class Runtime:
    """A clock, and the ways to wait and to start threads.

    now: returns the seconds of a clock that never goes back. wall: returns the seconds since the epoch, as in file times.
    sleep: waits for some seconds. event, condition: make objects whose timed waits take seconds of this clock; `condition` takes
    the lock. poll: waits for events of an epoll object for some seconds. start: runs a function in a daemon thread of the given
    name. pool: makes an executor of at most so many threads, whose names begin with the given text.
    """

    now: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    event: Callable[[], threading.Event] = threading.Event
    condition: Callable[[threading.Lock], threading.Condition] = threading.Condition
    poll: Callable[[select.epoll, float], list[tuple[int, int]]] = select.epoll.poll
    start: Callable[[Callable[[], object], str], threading.Thread] = _start_thread
    pool: Callable[[int, str], Executor] = Pool


RUNTIME = Runtime()
"""The runtime of the operating system, and the default of servers, tiers and sessions."""
