"""Makes copies go wrong on demand, in an SGLang that `launch.py` has started: a test writes a file for the next load, and stores
wait while there is another one."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "LMTEST_SPOIL"
"""The variable that names the folder of the files. A file is named as the number of a group; its text is `spoil` or `fail`."""
HOLD = "hold"
"""The file for which stores wait."""


def install() -> None:
    """Before a load copies a group: write something else over its extents in the arena, or end it there."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    from lmcache.engine.access import ArenaAccess
    from lmcache.errors import ServerUnavailable

    copy = ArenaAccess.load

    def load(access: ArenaAccess, source: Any, leased: Any, blocks: Any, runs: Any, progress: Any = None) -> None:
        file = Path(folder, str([part.copier for part in access.parts].index(source.reader)))
        if file.exists():
            wish = file.read_text()
            file.unlink()
            if wish == "fail":
                raise ServerUnavailable("the test ends this load")
            size = source.shard_bytes
            other = np.full(size // 4, 0.7, np.float32)
            for start in runs[:, 0].tolist():
                ctypes.memmove(access._mapping.address + start, other.ctypes.data, size)
        copy(access, source, leased, blocks, runs, progress)

    gather = ArenaAccess.gather

    def held(access: ArenaAccess, *given: Any) -> Any:
        while Path(folder, HOLD).exists():
            time.sleep(0.01)
        return gather(access, *given)

    ArenaAccess.load, ArenaAccess.gather = load, held  # type: ignore[method-assign]
