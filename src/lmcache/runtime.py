"""The clock and the threads of a server or an engine: no other module reads a clock, waits for time to pass or starts a thread.

Whoever starts a server or a session may give it a runtime of its own, such as one with a made-up clock; everything below uses it.
"""

from __future__ import annotations

import os
import select
import socket
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


def _hung_up(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    try:
        poll.register(connection, select.POLLRDHUP)
        return bool(poll.poll(seconds * 1000))
    except (OSError, ValueError):
        return True  # another thread has closed the socket


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
                del fn, args, kwargs  # `make` stays in the queue until a thread is free
                raise
        return future


@dataclass(frozen=True)
class Runtime:
    """A clock, and the ways to wait and to start threads."""

    now: Callable[[], float] = time.monotonic
    """Returns the seconds of a clock that never goes back."""
    wall: Callable[[], float] = time.time
    """Returns the seconds since the epoch, as in file times."""
    sleep: Callable[[float], None] = time.sleep
    event: Callable[[], threading.Event] = threading.Event
    """Makes an event whose timed waits count the seconds of this clock."""
    condition: Callable[[threading.Lock], threading.Condition] = threading.Condition
    """Makes a condition of this lock, whose timed waits count the seconds of this clock."""
    poll: Callable[[select.epoll, float], list[tuple[int, int]]] = select.epoll.poll
    """Waits for events for some seconds; returns (descriptor, events) of each."""
    hung_up: Callable[[socket.socket, float], bool] = _hung_up
    """Waits for some seconds until the other side of a connection hangs up; returns whether it has."""
    start: Callable[[Callable[[], object], str], threading.Thread] = _start_thread
    """Runs a function in a daemon thread of the given name."""
    pool: Callable[[int, str], Executor] = Pool
    """Makes an executor of at most so many threads, whose names begin with the given text."""


RUNTIME = Runtime()
"""The runtime of the operating system, and the default of servers, tiers and sessions."""
