"""A script that does what it is told on stdin: one JSON command a line, one line "ANSWER json" each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def serve(names: Mapping[str, Any], *first: Any) -> None:
    """Say "ready", then call `do_NAME` of `names` for each command NAME, with `first` and the command's own arguments."""
    commands: dict[str, Callable[..., Any]] = {
        name.removeprefix("do_"): call for name, call in names.items() if name.startswith("do_")
    }
    _say("ready")
    for line in sys.stdin:
        command = json.loads(line)
        _say(commands[command.pop("do")](*first, **command))


def _say(answer: Any) -> None:
    """In one write, so that no line of a log comes between: `print` makes several where output is not buffered."""
    sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
    sys.stdout.flush()
