"""Serve an engine over standard input and output: one JSON object a line in, one out.

    python -m demo.numpy_engine --address 127.0.0.1:5555
    {"tokens": [1, 2, 3], "max_tokens": 8}      -> {"tokens": [...], "ttft_seconds": 0.1, "hit_tokens": 0, ...}

The first line out is {"ready": true, "connected": ...}: whether the server was reached, for which it waits two seconds.
At the end of the input everything is stored before the process ends.
"""

from __future__ import annotations

import argparse
import json
import sys

from demo.numpy_engine.engine import Engine, EngineConfig
from demo.numpy_engine.model import ModelConfig


def main() -> None:
    """Answer the lines of standard input until it ends."""
    parser = argparse.ArgumentParser(prog="python -m demo.numpy_engine", description=__doc__)
    parser.add_argument("--address", help="host:port of `lmcache server`; without it the engine runs alone")
    parser.add_argument("--tiny", action="store_true", help="a model of 2 layers instead of 8")
    parser.add_argument("--num-blocks", type=int, default=512, help="KV blocks of 16 tokens (default: %(default)s)")
    parser.add_argument(
        "--deadline-seconds", type=float, default=2.0, help="of calls to the server (default: %(default)s)"
    )
    options = parser.parse_args()
    model = ModelConfig.tiny() if options.tiny else ModelConfig()
    config = EngineConfig(model=model, num_blocks=options.num_blocks)
    engine = Engine(config, options.address, deadline_seconds=options.deadline_seconds)
    try:
        _say({"ready": True, "connected": engine.wait_connected(2.0)})
        for line in sys.stdin:
            request = json.loads(line)
            result = engine.generate(request["tokens"], request.get("max_tokens", 8), request.get("cache_salt", ""))
            engine.flush()
            _say(
                {
                    "tokens": result.tokens,
                    "ttft_seconds": result.ttft_seconds,
                    "seconds": result.seconds,
                    "hit_tokens": result.hit_tokens,
                    "stored_tokens": engine.cache.stored_tokens if engine.cache else 0,
                }
            )
    finally:
        engine.close()


def _say(answer: dict[str, object]) -> None:
    # One write: `print` makes two where output is not buffered, and a line of the log may come between them.
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
