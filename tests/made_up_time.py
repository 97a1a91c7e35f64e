"""A made-up clock for a complete simulation in one process: time passes only where everybody waits, and then at once.

`MadeUpTime.runtime` is the runtime of servers, tiers and engines. The thread of the test drives them: whenever it waits, sleeps
or calls `advance`, the clock jumps from one deadline to the next, and the thread whose deadline it is runs until all wait again.
So a run takes the same course each time. A thread that waits for a lock, a socket or another thread counts as running.
"""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from lmcache.runtime import Pool, Runtime
from servers import PATIENCE

T = TypeVar("T")


class _Waiter:
    """A thread that waits until its deadline, or until `MadeUpTime.wake`. epoll: what it waits for too."""

    def __init__(self, deadline: float, epoll: select.epoll | None = None) -> None:
        self.deadline, self.epoll = deadline, epoll
        self.woken = self.notified = False
        self.gate = threading.Semaphore(0)
        self.alarm = -1 if epoll is None else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def open(self) -> None:
        self.gate.release()
        if self.alarm >= 0:
            os.eventfd_write(self.alarm, 1)

    @property
    def ready(self) -> bool:
        """Whether a descriptor has an event, of which the thread may not have taken note yet."""
        with suppress(ValueError, OSError):  # closed meanwhile
            return self.epoll is not None and not self.woken and bool(self.epoll.poll(0))
        return False


class MadeUpTime:
    """The clock, and who waits for it. wall: what it shows at the beginning, in seconds since the epoch."""

    def __init__(self, wall: float) -> None:
        self.time = 0.0
        self._lock = threading.Condition()
        self._waiters: dict[_Waiter, None] = {}
        self._running = 0
        """Threads and calls of pools that do not wait for the clock."""
        self._own = threading.local()
        """`counted` in threads that count while they run, which the thread of the test does not."""
        self.runtime = Runtime(
            now=lambda: self.time,
            wall=lambda: wall + self.time,
            sleep=lambda seconds: self._wait(_Waiter(self.time + seconds)),
            event=lambda: _Event(self),
            condition=lambda lock: _Condition(self, lock),
            poll=self._poll,
            hung_up=self._hung_up,
            start=self._start,
            pool=lambda threads, name: _Pool(self, threads, name),
        )

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, and let everybody do what is due meanwhile."""
        self.runtime.sleep(seconds)
        self._settle()

    def until(self, what: Callable[[], T], seconds: float) -> T:
        """Let time pass until `what` is true, at most so many seconds; return its value."""
        end = self.time + seconds
        while True:
            self._settle()
            if value := what():
                return value
            assert self.time < end, f"not so after {seconds} made-up seconds"
            self.advance(min(0.25, end - self.time))

    def count(self, run: Callable[..., T], *arguments: Any) -> T:
        """Make a call that `begin` has counted."""
        self._own.counted = True
        try:
            return run(*arguments)
        finally:
            self._own.counted = False

    def begin(self, step: int = 1) -> None:
        with self._lock:
            self._running += step
            self._lock.notify_all()

    def wake(self, waiter: _Waiter, notified: bool = True) -> bool:
        """Wake a thread, which counts as running from now on. Return False if it has been woken already."""
        with self._lock:
            if waiter.woken:
                return False
            waiter.woken, waiter.notified = True, notified
            if waiter in self._waiters:
                self._running += 1
            waiter.open()
            return True

    def _wait(self, waiter: _Waiter) -> bool:
        """Wait in the calling thread. Return whether somebody has woken it before its deadline."""
        if not getattr(self._own, "counted", False):
            while not (waiter.woken or waiter.ready):
                self._step(waiter)
            return waiter.notified
        with self._lock:
            if not waiter.woken:
                self._waiters[waiter] = None
                self._running -= 1
                self._lock.notify_all()
        if waiter.epoll is None:
            waiter.gate.acquire()
        else:
            waiter.epoll.poll()
            self.wake(waiter)
        with self._lock:
            self._waiters.pop(waiter, None)
        return waiter.notified

    def _step(self, mine: _Waiter) -> None:
        """When everybody waits, move the clock to the next deadline and wake whose it is."""
        self._settle()
        if mine.woken or mine.ready:
            return
        with self._lock:
            asleep = [one for one in self._waiters if not one.woken]
        first = min([mine, *asleep], key=lambda one: one.deadline)
        assert first.deadline < math.inf, "everybody waits for something that will never happen"
        self.time = max(self.time, first.deadline)
        self.wake(first, notified=False)

    def _settle(self) -> None:
        """Return when all threads wait for the clock."""
        given_up = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                rests = self._lock.wait_for(lambda: not self._running, max(0.0, given_up - time.monotonic()))
                waiters = list(self._waiters)
            assert rests, f"{self._running} threads do not come to rest: {[one.name for one in threading.enumerate()]}"
            if not any(waiter.ready for waiter in waiters) and not self._running:
                return
            time.sleep(0)

    def _poll(self, epoll: select.epoll, seconds: float) -> list[tuple[int, int]]:
        waiter = _Waiter(self.time + seconds, epoll)
        epoll.register(waiter.alarm, select.EPOLLIN)
        try:
            if seconds > 0 and not waiter.ready:
                self._wait(waiter)
            return [event for event in epoll.poll(0) if event[0] != waiter.alarm]
        finally:
            epoll.unregister(waiter.alarm)
            os.close(waiter.alarm)

    def _hung_up(self, connection: socket.socket, seconds: float) -> bool:
        try:
            # Of a duplicate: a descriptor that another thread closes leaves the epoll object without an event.
            with connection.dup() as own, select.epoll() as epoll:
                epoll.register(own, select.EPOLLRDHUP)
                return bool(self._poll(epoll, seconds))
        except OSError:
            return True

    def _start(self, run: Callable[[], object], name: str) -> threading.Thread:
        def counted() -> None:
            try:
                self.count(run)
            finally:
                self.begin(-1)

        self.begin()
        thread = threading.Thread(target=counted, name=name, daemon=True)
        thread.start()
        return thread


class _Condition(threading.Condition):
    def __init__(self, time: MadeUpTime, lock: Any) -> None:
        super().__init__(lock)
        self._time, self._asleep = time, deque[_Waiter]()

    def wait(self, timeout: float | None = None) -> bool:
        waiter = _Waiter(math.inf if timeout is None else self._time.time + timeout)
        self._asleep.append(waiter)
        self.release()
        try:
            return self._time._wait(waiter)
        finally:
            self.acquire()
            with suppress(ValueError):
                self._asleep.remove(waiter)

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        end = math.inf if timeout is None else self._time.time + timeout
        while not (value := predicate()) and self._time.time < end:
            self.wait(None if end == math.inf else end - self._time.time)
        return value

    def notify(self, n: int = 1) -> None:
        while self._asleep and n > 0:
            n -= self._time.wake(self._asleep.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._asleep))


class _Event(threading.Event):
    def __init__(self, time: MadeUpTime) -> None:
        super().__init__()
        self._cond = _Condition(time, threading.Lock())


class _Pool(Pool):
    def __init__(self, time: MadeUpTime, threads: int, name: str) -> None:
        super().__init__(threads, name)
        self._time = time

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs
        self._time.begin()
        try:
            future = super().submit(self._time.count, fn, *args)
        except BaseException:
            self._time.begin(-1)
            raise
        future.add_done_callback(lambda _: self._time.begin(-1))
        return future
