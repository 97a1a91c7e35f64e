"""Death of the writer at every operation that changes something on the medium."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_points.py")


@pytest.mark.parametrize(
    ("kind", "operations"),
    [
        ("disk", ("pwritev torn", "punch", "rename", "sync", "unlink", "allocate")),
        ("dir", ("pwritev torn", "rename", "unlink")),
    ],
)
def test_whoever_is_killed_anywhere_left_every_shard_whole_or_absent(
    kind: str, operations: tuple[str, ...], folders: Callable[[str], Path]
) -> None:
    """In memory, since a killed process loses nothing of the page cache, and a disk would only make it slow."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(folders("/dev/shm"))], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for operation in operations:  # the script found such points, and tried them
        assert f"{operation} " in done.stdout
