"""A script that does what it is told on stdin: one JSON command a line, one line "ANSWER json" each."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

PATIENCE = 60.0  # seconds, for what should come soon on a machine that is not starved


def serve(names: Mapping[str, Any], *first: Any) -> None:
    """Say "ready", then call `do_NAME` of `names` for each command NAME, with `first` and the command's own arguments."""
    commands: dict[str, Callable[..., Any]] = {
        name.removeprefix("do_"): call for name, call in names.items() if name.startswith("do_")
    }
    _say("ready")
    for line in sys.stdin:
        command = json.loads(line)
        _say(commands[command.pop("do")](*first, **command))


def set_deadline(seconds: float) -> int:
    """Of all calls to servers that this process makes from now on over the links that it has. Returns how many these are."""
    from lmcache.engine.connection import Connection

    gc.unfreeze()  # vLLM hides what there is at its start from the collector, and so from us
    # A weak reference would be asked for the class of what it refers to, which may be gone.
    connections = [one for one in gc.get_objects() if type(one) is Connection]
    for connection in connections:
        connection.endpoint = replace(connection.endpoint, deadline_seconds=seconds)
    return len(connections)


def _say(answer: Any) -> None:
    """In one write, so that no line of a log comes between: `print` makes several where output is not buffered."""
    sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
    sys.stdout.flush()
