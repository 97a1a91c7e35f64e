"""The prefill side of hand-overs, in a process of its own, without a real engine: a JSON object in `argv` says what to compute.

It computes the prompt chunk by chunk, says `{"computed": chunks}` after each, and stands still at one place if `halt` names one:
[chunk, "before"], "midway" through the copy of the chunk, or "after" it was stored. There it says `{"halted": chunk}` and goes on
when a line comes. It ends with {"done": true} and waits for the end of its stdin.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine_process import PATIENCE, Engine, pause_once
from lmcache.engine import Copies, Request, Requests


def main() -> None:
    config = json.loads(sys.argv[1])
    ids, chunk, (at, place) = config["ids"], config["chunk"], config["halt"]

    def say(**what: Any) -> None:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()

    def halt() -> None:
        say(halted=at)
        sys.stdin.readline()

    name = config["instance"]
    engine = Engine(config["address"], name).connect()
    assert engine.scheduler is not None
    requests: Requests[Request] = Requests(engine.scheduler, name=name, loads=False)
    requests.prefill.tokens_per_second = config["tokens_per_second"]
    copies = Copies(engine.worker, 0, requests=requests)
    request = requests.open["r"] = Request("r", tail_leaves=1, stores_tail=True)
    requests.find(request, ids)
    say(computed=0)
    for number in range(-(-len(ids) // chunk)):
        if number == at and place == "before":
            halt()
        if number == at and place == "midway":
            pause_once(engine.worker._access.parts[0].copier, "gather", halt)
        computed = min(len(ids), (number + 1) * chunk)
        engine.fill(ids[:computed])
        plan = requests.store(request, ids[:computed], computed, ends=computed == len(ids))
        if plan is not None:
            copy = copies.store(plan, engine.table(computed))
            copies.wait([copy], PATIENCE)
        say(computed=number + 1)
        if number == at and place == "after":
            halt()
    requests.finish("r")
    say(done=True)
    sys.stdin.readline()
    engine.close()


if __name__ == "__main__":
    main()
