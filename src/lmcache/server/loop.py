"""The server's event loop: one thread with epoll and the clock, which also runs the calls that other threads submit.

The loop also creates the thread pools for work that would block it.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import ParamSpec, TypeVar

from lmcache.observability.log import init_logger

logger = init_logger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
TICK_SECONDS = 0.25
_END_SECONDS = 0.2
"""`close` waits for so long in total for the threads of all executors. Threads that hang in a call go on."""


class Loop:
    """Runs callbacks for readable or writable descriptors, calls from other threads, and `on_tick` four times a second.

    If a callback raises, the exception is logged and counted in `errors`, and the loop goes on.

    clock: returns seconds, as `time.monotonic` does. All code in the loop reads the time from `now`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        """Returns the time of the loop's clock. Any thread may call it."""
        self.errors = 0
        self.on_tick: list[Callable[[], None]] = []
        self.after_events: list[Callable[[], None]] = []
        """Called after every batch of events, for sockets whose descriptors are edge-triggered (ZMQ)."""
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._drain_wakes)
        self._wake_lock = threading.RLock()
        """Guards writing to `_wake_write` and closing it. It is reentrant, since a signal handler may interrupt its holder."""
        self._executors: list[Executor] = []
        self._thread_names: list[str] = []
        """The prefixes of the names of the executors' threads."""
        self._stopping = False
        self._thread: int | None = None

    def watch(self, descriptor: int, callback: Callable[[], None], write: bool = False) -> None:
        """Call `callback` when the descriptor is readable and, if `write`, when it is writable."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        if descriptor in self._selector.get_map():
            self._selector.modify(descriptor, events, callback)
        else:
            self._selector.register(descriptor, events, callback)

    def unwatch(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread. Any thread and any signal handler may call this; after `close` it does nothing."""
        with self._wake_lock:
            if self._wake_write < 0:
                return
            self._calls.append(call)
            try:
                os.write(self._wake_write, b"x")
            except BlockingIOError:
                pass  # the pipe is full, so the loop wakes anyway

    def executor(self, name: str, threads: int) -> Executor:
        """Create a pool of at most `threads` threads, whose names begin with `lmcache-NAME`. The pool ends with the loop."""
        self._thread_names.append(f"lmcache-{name}")
        self._executors.append(_Pool(threads, thread_name_prefix=self._thread_names[-1]))
        return self._executors[-1]

    def ask(self, call: Callable[[], T], timeout_seconds: float = 1.0) -> T:
        """Run `call` in the loop's thread, and wait for its result in the calling thread.

        Raises:
            TimeoutError: the call has not ended in time.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # raised in the thread that called `ask`
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
        """Handle events, calls and ticks until `stop` is called."""
        self._thread = threading.get_ident()
        next_tick = self.now() + TICK_SECONDS
        while not self._stopping:
            self._turn(next_tick - self.now())
            if self.now() >= next_tick:
                next_tick = self.now() + TICK_SECONDS
                for call in self.on_tick:
                    self._guarded(call)

    def run_until(self, done: Callable[[], bool], seconds: float) -> None:
        """Handle events and calls, but no ticks, before or after `run`, until `done` returns true or `seconds` have passed."""
        self._thread = threading.get_ident()
        until = self.now() + seconds
        while not done() and (left := until - self.now()) > 0:
            self._turn(left)

    def stop(self) -> None:
        """End `run` soon. Any thread and any signal handler may call this."""
        self._stopping = True
        self.call_soon(lambda: None)

    def close(self) -> None:
        """Close the loop and end the threads of its executors. Threads that hang in a call end with the process."""
        with self._wake_lock:
            os.close(self._wake_write)
            self._wake_write = -1
        os.close(self._wake_read)
        self._selector.close()
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        ends = time.monotonic() + _END_SECONDS
        for thread in threading.enumerate():
            if thread.name.startswith(tuple(self._thread_names)):
                thread.join(max(0.0, ends - time.monotonic()))

    def _turn(self, seconds: float) -> None:
        """Wait for events for at most `seconds`; handle the events and the calls of other threads."""
        for key, _ in self._selector.select(max(0.0, seconds)):
            self._guarded(key.data)
        while self._calls:
            self._guarded(self._calls.popleft())
        for call in self.after_events:
            self._guarded(call)

    def _drain_wakes(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # top of the thread: one failing callback must not stop the server
            self.errors += 1
            logger.exception("A callback of the main loop failed; the server goes on, but a request may have no answer")


class _Pool(ThreadPoolExecutor):
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
