"""The connector over SGLang's own pools of windows and states: what SGLang runs on GPUs only, and what it never does on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_processes import Daemons, answer_of, start_script

SCRIPT = Path(__file__).with_name("pools.py")
Found = list[list[int | bool]]


def run(how: str, kind: str, folder: Path, model: Path, port: int, page_size: int, chunk: int) -> Found:
    config = folder / f"{how}-{kind}-{page_size}.yaml"
    config.write_text(f"mp_host: 127.0.0.1\nmp_port: {port}\n")
    found: Found = answer_of(start_script(SCRIPT, how, kind, str(config), str(model), str(page_size), str(chunk)))
    return found


@pytest.mark.parametrize(("page_size", "chunk"), [(16, 64), (1, 256), (64, 128)])
@pytest.mark.parametrize("kind", ["windows", "states"])
def test_what_is_in_reach_is_filled_and_nothing_else(
    folder: Path, model: Path, daemons: Daemons, kind: str, page_size: int, chunk: int
) -> None:
    found = run("calls", kind, folder, model, daemons(chunk=chunk).port, page_size, chunk)
    # The third prompt is too short for the only prefix whose windows or states SGLang has kept.
    assert found == [[512, True], [512, True], [0, True], [512, True], [512, True]]


@pytest.mark.parametrize("kind", ["windows", "states"])
def test_through_the_radix_cache_of_sglang(folder: Path, model: Path, daemons: Daemons, kind: str) -> None:
    assert run("tree", kind, folder, model, daemons(chunk=64).port, 64, 64) == [[512, True]]
