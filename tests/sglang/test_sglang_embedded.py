"""Without mp_host and mp_port the server is inside the engine: it starts with it, and ends with it however that ends."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_processes import Engine

from prompts import assert_same, tokens
from servers import eventually

DOCUMENTED = {"chunk_size": 8, "local_cpu": True, "use_layerwise": True, "max_local_cpu_size": 1}
FIRST = tokens(100, 80)
SECOND = FIRST[:24] + tokens(81, 81)


@pytest.fixture(scope="module")
def engine(folder: Path, model: Path) -> Iterator[Engine]:
    made = Engine(folder, model, 1, DOCUMENTED)
    made.connected()
    yield made
    made.kill()


def test_the_documented_pair_of_prompts(engine: Engine) -> None:
    """135 tokens have KV at the end of the first request: 100 of the prompt, and all of the answer but the last."""
    engine.answer(FIRST, max_tokens=36)
    eventually(lambda: said(engine, "Stored 128 out of total 135 tokens. ", "skipped: 0 tokens"))
    engine.flush()
    second = engine.answer(SECOND, max_tokens=36)
    assert second["cached"] == 24
    eventually(lambda: said(engine, "Stored 112 out of total 140 tokens. ", "skipped: 24 tokens"))
    assert "Retrieved 24 out of 24 required tokens (from 104 total tokens)" in engine.text()
    assert_same([engine.answer(SECOND, max_tokens=36, extra_key="cold")], [second])


def test_its_server_ends_with_a_killed_engine(engine: Engine) -> None:
    found = re.search(r"own LMCache server: pid (\d+)", engine.text())
    assert found is not None
    pid = int(found[1])
    assert _lives(pid)
    engine.kill()
    eventually(lambda: not _lives(pid))


def said(engine: Engine, *words: str) -> bool:
    """Whether one line of the log has all of these."""
    return any(all(word in line for word in words) for line in engine.log)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
