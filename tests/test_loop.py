"""The server's loop: its clock, its pools of threads, and what happens before it runs and after it was closed."""

from __future__ import annotations

import os
import threading

import pytest

from lmcache.runtime import Runtime
from lmcache.server.loop import Loop
from servers import PATIENCE, eventually


def test_it_runs_until_something_is_done_or_its_clock_says_that_the_time_is_over() -> None:
    time = 100.0
    loop, done, ticks = Loop(Runtime(now=lambda: time)), list[int](), list[int]()
    loop.on_tick.append(lambda: ticks.append(1))

    def pass_time() -> None:
        nonlocal time
        time += 5.0

    loop.call_soon(lambda: done.append(1))
    loop.run_until(lambda: bool(done), 10.0)
    assert done and loop.now() == 100.0
    for _ in range(2):
        loop.call_soon(pass_time)
    loop.run_until(lambda: False, 10.0)
    assert loop.now() == 110.0 and not ticks
    loop.close()


def test_what_gets_the_number_of_a_descriptor_that_was_closed_is_not_taken_for_readable() -> None:
    loop, calls = Loop(), list[str]()
    (first, begin), (second, also), (silent, never) = os.pipe(), os.pipe(), os.pipe()

    def replace() -> None:
        if not calls:
            calls.append("first")
            loop.unwatch(second)
            os.dup2(silent, second)
            loop.watch(second, lambda: calls.append("silent"))

    loop.watch(first, replace)
    loop.watch(second, lambda: calls.append("second"))
    for one in (begin, also):
        os.write(one, b"x")
    loop.run_until(lambda: bool(calls), PATIENCE)
    assert "silent" not in calls
    loop.close()
    for one in (first, begin, second, also, silent, never):
        os.close(one)


def test_work_that_goes_on_with_another_call_lets_events_in_between() -> None:
    loop, done = Loop(), list[str]()
    read, write = os.pipe()

    def work() -> None:
        done.append("work")
        if len(done) == 1:
            os.write(write, b"x")
        if len(done) < 100:
            loop.call_soon(work)

    loop.watch(read, lambda: done.append(os.read(read, 1).decode()))
    loop.call_soon(work)
    loop.run_until(lambda: len(done) >= 100, PATIENCE)
    assert done.index("x") <= 2 and len(done) == 100
    loop.close()
    for one in (read, write):
        os.close(one)


def test_its_threads_end_with_it_but_for_those_that_hang() -> None:
    loop, gate, began, late = Loop(), threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        assert gate.wait(PATIENCE)
        loop.call_soon(late.set)

    idle, busy = loop.executor("idle", 2), loop.executor("busy", 1)
    assert idle.submit(lambda: 7).result(PATIENCE) == 7
    hanging, never = busy.submit(hang), busy.submit(late.set)
    assert began.wait(PATIENCE)
    loop.close()
    eventually(lambda: "lmcache-idle_0" not in names_of_threads())
    assert "lmcache-busy_0" in names_of_threads()
    gate.set()
    assert hanging.result(PATIENCE) is None and never.cancelled() and not late.is_set()


def test_a_call_that_was_refused_for_want_of_a_thread_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever handed it in has given the memory away by then, on which a thread that becomes free would work."""
    loop, gate, began, late = Loop(), threading.Event(), threading.Event(), threading.Event()
    pool = loop.executor("few", 2)

    def hang() -> None:
        began.set()
        assert gate.wait(PATIENCE)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    hanging = pool.submit(hang)
    assert began.wait(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(late.set)
    gate.set()
    assert hanging.result(PATIENCE) is None and pool.submit(lambda: 7).result(PATIENCE) == 7
    pool.shutdown(wait=True)
    assert not late.is_set()
    loop.close()


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]
