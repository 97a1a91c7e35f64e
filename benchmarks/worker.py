"""One engine-side process that a benchmark drives: `python -m benchmarks.worker ours|peer`.

It reads one JSON object a line, `{"call": NAME, ...arguments}`, and answers each with one line. `open` connects; every
other call is a method of `Scenarios`. Runs under the peer's Python as well.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from benchmarks.scenarios import SHAPES, Cache, Scenarios


def open_cache(side: str, **arguments: Any) -> Cache:
    shape = SHAPES[arguments.pop("shape")]
    if side == "peer":
        from benchmarks.peer import PeerCache

        return PeerCache(shape, **arguments)
    from benchmarks.ours import OurCache

    return OurCache(shape, **arguments)


def main(side: str) -> None:
    # Libraries like to print: standard output is for answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scenarios: Scenarios | None = None
    for line in sys.stdin:
        request = json.loads(line)
        call = request.pop("call")
        try:
            if call == "open":
                seed = request.pop("seed")
                scenarios = Scenarios(open_cache(side, **request), seed)
                answer = None
            else:
                answer = getattr(scenarios, call)(**request)
            reply = {"answer": answer}
        except Exception as error:  # the process's edge: the parent raises it again
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
    os._exit(0)  # the peer's threads would keep the process
