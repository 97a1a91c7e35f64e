"""Fork processes in which modules have been imported already: `python zygote.py MODULE...`, with a Unix socket as its stdin.

A request is one message of JSON. {"command": [SCRIPT, ARGUMENT...], "environment": ..., "folder": ...} comes with three
descriptors, which become stdin, stdout and stderr of a process that runs the script; the answer is its pid. {"reap": PID} waits
for the end of one of them; the answer is its return code, as `subprocess` has it. The end of the socket ends the zygote.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    before = dict(os.environ)
    requests = socket.socket(fileno=os.dup(0))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"no process can be forked safely: the imports have started {len(threads) - 1} threads"
    gc.collect()
    gc.freeze()  # what is imported here stays, so no collection in a fork has to go through it
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        request = json.loads(message)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif (answer := os.fork()) == 0:
            requests.close()
            become(request, descriptors, before)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(answer).encode())


def become(request: dict[str, Any], descriptors: list[int], before: dict[str, str]) -> None:
    """Run the script in this process, a fork. What the imports have put into the environment stays."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive the zygote
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    wanted = request["environment"]
    for name in before.keys() - wanted.keys():
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in wanted.items() if before.get(name) != value})
    os.chdir(request["folder"])
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
