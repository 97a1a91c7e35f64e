"""The connectors of older releases, and the agreement of ranks, on PyTorch's own tensors and process groups."""

from __future__ import annotations

from pathlib import Path

import pytest
from sglang_processes import Daemons, answer_of, start_script

SCRIPT = Path(__file__).with_name("tensors.py")


@pytest.mark.parametrize("calls", ["layerwise", "multi_process"])
def test_older_calls(folder: Path, daemons: Daemons, calls: str) -> None:
    config, model = folder / f"{calls}.yaml", folder / f"{calls}-model"
    config.write_text(f"mp_host: 127.0.0.1\nmp_port: {daemons(chunk=8).port}\n")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    assert answer_of(start_script(SCRIPT, calls, str(config), str(model))) == {"loaded": 128 - 32, "same": True}


@pytest.mark.parametrize(("dtype", "name"), [("float8_e4m3fn", "fp8_e4m3"), ("float8_e5m2", "fp8_e5m2")])
def test_fp8_in_sglangs_own_pool(dtype: str, name: str) -> None:
    """Without AMX, SGLang does not run with KV of fp8 on a CPU; its pool does."""
    token_bytes = 2 * 3 * 4 * 8
    assert answer_of(start_script(SCRIPT, "fp8", dtype)) == {"dtype": name, "token_bytes": token_bytes, "same": True}


def test_two_ranks_agree(folder: Path) -> None:
    one, other = [start_script(SCRIPT, "agreement", str(folder / "store"), rank) for rank in ("0", "1")]
    answers = answer_of(one), answer_of(other)
    assert answers[0] == answers[1]
    assert answers[0]["least"] == 6
