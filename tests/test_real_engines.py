"""What the tests with real engines leave behind, and what they leave alone."""

from __future__ import annotations

import multiprocessing

from real_engines import SHARED_MEMORY, swept


def test_what_is_left_in_shared_memory_goes_and_what_another_engine_uses_stays() -> None:
    left = SHARED_MEMORY / "sem.mp-left-behind"
    with swept("sem.mp-*"):
        left.touch()
        lock = multiprocessing.get_context("spawn").Lock()  # as engines make them for their ranks
        name = SHARED_MEMORY / f"sem.{lock._semlock.name[1:]}"  # type: ignore[attr-defined]
        assert name.exists()
    assert name.exists() and not left.exists()
