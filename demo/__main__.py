"""`./run demo`: select the engine, run its demo, and report failures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from demo.processes import CACHE, DemoFailed, end_on_signals


def main() -> int:
    """Run one demo. The exit code is 0 if every answer was correct and its KV came from the expected cache."""
    parser = argparse.ArgumentParser(prog="./run demo", description="Time to the first token with and without LMCache.")
    parser.add_argument(
        "--engine", choices=("vllm", "numpy"), default="vllm", help="real vLLM on the CPU, or the 10-second one"
    )
    parser.add_argument("--png", type=Path, help="where to write the plot (default: .cache/demo/ttft-ENGINE.png)")
    options = parser.parse_args()
    png = options.png or CACHE / f"ttft-{options.engine}.png"
    end_on_signals()
    try:
        if options.engine == "numpy":
            from demo.numpy_process import run
        else:
            from demo.vllm_engine import run
        right = run(png)
    except DemoFailed as failure:
        print(f"\nthe demo failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
