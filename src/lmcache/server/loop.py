"""The server's event loop: one thread with epoll and the clock, which also runs the calls that other threads submit.

The loop also creates the thread pools for work that would block it.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from typing import TypeVar

from lmcache.observability.log import init_logger
from lmcache.runtime import RUNTIME, Runtime

logger = init_logger(__name__)
T = TypeVar("T")
TICK_SECONDS = 0.25
IDLE_SECONDS = 0.001
"""Calls for `when_idle` are made when nothing has happened for so long."""
MOST_IDLE = 256
"""When more calls wait, the oldest one is made at once."""
_IDLE_AT_ONCE = 16
"""So many calls are made before events are looked for again."""
_END_SECONDS = 0.2
"""`close` waits for so long in total for the threads of all executors. Threads that hang in a call go on."""


class Loop:
    """Runs callbacks for readable or writable descriptors, calls from other threads, and `on_tick` four times a second.

    If a callback raises, the exception is logged and counted in `errors`, and the loop goes on.

    runtime: clock and threads. All code in the loop reads the time from `now`.
    """

    def __init__(self, runtime: Runtime = RUNTIME) -> None:
        self.runtime, self.now = runtime, runtime.now
        """`now` returns the time of the loop's clock. Any thread may call it."""
        self.errors = 0
        self.on_tick: list[Callable[[], None]] = []
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        """Descriptor -> callback."""
        self._calls: deque[Callable[[], None]] = deque()
        self._idle: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self._wake_read, self._drain_wakes)
        self._wake_lock = threading.RLock()
        """Guards writing to `_wake_write` and closing it. It is reentrant, since a signal handler may interrupt its holder."""
        self._executors: list[Executor] = []
        self._thread_names: list[str] = []
        """The prefixes of the names of their threads, in the same order."""
        self._stopping = False
        self._thread: int | None = None

    def watch(self, descriptor: int, callback: Callable[[], None], write: bool = False) -> None:
        """Call `callback` when the descriptor is readable and, if `write`, when it is writable."""
        change = self._epoll.modify if descriptor in self._watched else self._epoll.register
        change(descriptor, select.EPOLLIN | (select.EPOLLOUT if write else 0))
        self._watched[descriptor] = callback

    def unwatch(self, descriptor: int) -> None:
        if self._watched.pop(descriptor, None) is not None:
            with suppress(OSError):  # the descriptor has been closed
                self._epoll.unregister(descriptor)

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run `call` in the loop's thread. Any thread and any signal handler may call this; after `close` it does nothing.

        What a call of the loop adds is made in the next turn, after the events that have come meanwhile."""
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
        self._executors.append(self.runtime.pool(threads, self._thread_names[-1]))
        return self._executors[-1]

    def release(self, executor: Executor) -> None:
        """End a pool before the loop ends. A thread that hangs in a call ends with the process."""
        executor.shutdown(wait=False, cancel_futures=True)
        if executor in self._executors:
            at = self._executors.index(executor)
            del self._executors[at], self._thread_names[at]

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

    def when_idle(self, call: Callable[[], None]) -> None:
        """Make a call that nobody waits for when the loop has nothing else to do; in the loop's thread only."""
        self._idle.append(call)
        if len(self._idle) > MOST_IDLE:
            self._guarded(self._idle.popleft())

    def settle(self) -> None:
        """Make all calls that wait for the loop to be idle; in the loop's thread only."""
        while self._idle:
            self._guarded(self._idle.popleft())

    def run(self) -> None:
        """Handle events, calls and ticks until `stop` is called."""
        self._thread = threading.get_ident()
        now = self.now()
        next_tick = now + TICK_SECONDS
        while not self._stopping:
            self._turn(next_tick - now)
            now = self.now()
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                for call in self.on_tick:
                    self._guarded(call)
                now = self.now()

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
        self._epoll.close()
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        ends = self.now() + _END_SECONDS
        for thread in threading.enumerate():
            if thread.name.startswith(tuple(self._thread_names)):
                thread.join(max(0.0, ends - self.now()))

    def _turn(self, seconds: float) -> None:
        """Wait for events for at most `seconds`; handle the events and the calls of other threads."""
        # A callback may close a descriptor, whose number then stands for another one, so all are looked up first.
        if self._idle:
            seconds = min(seconds, IDLE_SECONDS)
        events = self.runtime.poll(self._epoll, seconds if seconds > 0.0 else 0.0)
        if not events:
            for _ in range(min(len(self._idle), _IDLE_AT_ONCE)):
                self._guarded(self._idle.popleft())
        for callback in [self._watched[descriptor] for descriptor, _ in events]:
            self._guarded(callback)
        for _ in range(len(self._calls)):  # those that are added meanwhile wait for the next turn
            self._guarded(self._calls.popleft())

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
