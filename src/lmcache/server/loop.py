"""The server's event loop: one thread, epoll, timers, and a door through which other threads hand in calls."""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from lmcache.observability.log import init_logger

logger = init_logger(__name__)
T = TypeVar("T")
TICK_SECONDS = 0.25


class Loop:
    """Runs callbacks of readable or writable descriptors, calls from other threads, and `on_tick` four times a second.

    A callback that raises is logged and counted in `errors`; the loop goes on.
    """

    def __init__(self) -> None:
        self.errors = 0
        self.on_tick: list[Callable[[], None]] = []
        self.after_events: list[Callable[[], None]] = []
        """Called after every batch of events: for sockets whose descriptor is edge-triggered (ZMQ)."""
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wakes)
        self._stopping = False
        self._thread: int | None = None

    def watch(self, descriptor: int, callback: Callable[[], None], write: bool = False) -> None:
        """Call `callback` when the descriptor is readable (and, with `write`, when it is writable)."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        if descriptor in self._selector.get_map():
            self._selector.modify(descriptor, events, callback)
        else:
            self._selector.register(descriptor, events, callback)

    def unwatch(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread. Safe from any thread."""
        self._calls.append(call)
        if self._wake_write < 0:
            return  # closed; a signal came late
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full of wakes already

    def ask(self, call: Callable[[], T], timeout_seconds: float = 1.0) -> T:
        """Run `call` in the loop's thread and wait for its result, from another thread.

        Raises:
            TimeoutError: the loop did not get to it in time.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # belongs to whoever asked
                    future.set_exception(error)

        if threading.get_ident() == self._thread:
            return call()
        self.call_soon(run)
        try:
            return future.result(timeout_seconds)
        except FutureTimeout:  # before Python 3.11 not the built-in TimeoutError
            future.cancel()
            raise TimeoutError(f"the server's main loop did not answer within {timeout_seconds} s") from None

    def run(self) -> None:
        """Until `stop`."""
        self._thread = threading.get_ident()
        next_tick = time.monotonic() + TICK_SECONDS
        while not self._stopping:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                self._guarded(key.data)
            self.run_calls()
            for call in self.after_events:
                self._guarded(call)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_SECONDS
                for call in self.on_tick:
                    self._guarded(call)

    def run_calls(self) -> None:
        """Run what other threads have handed in so far; `run` does, and whoever ends threads after it."""
        while self._calls:
            self._guarded(self._calls.popleft())

    def stop(self) -> None:
        """End `run` soon. Safe from any thread and from signal handlers."""
        self._stopping = True
        self.call_soon(lambda: None)

    def close(self) -> None:
        wake, self._wake_write = self._wake_write, -1
        os.close(wake)
        os.close(self._wake_read)
        self._selector.close()

    def _drain_wakes(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # the edge of the thread: one bad event must not stop the server
            self.errors += 1
            logger.exception("An event could not be handled; the server goes on")
