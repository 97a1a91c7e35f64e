"""docs/quickstart/transformers.md, with real Transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from transformers_user import PYTHON

from pages import NEEDS_ENGINE, Shell, blocks, commands, found_in_l1


def test_the_quick_start_reaches_a_hit(model: Path, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    page, ours = "quickstart/transformers.md", NEEDS_ENGINE["transformers"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    shell = Shell(tmp_path, folders, **environment, ENGINE_PYTHON=PYTHON, MODEL=str(model))
    (script,) = (one.text for one in blocks(page) if one.language == "python" and one.title.startswith(ours))
    assert script.count("attach(model)") == 1
    here = script.replace("attach(model)", f'attach(model, "tcp://127.0.0.1:{shell.port}")')
    (tmp_path / "script.py").write_text(here)
    said = shell.run([one.text for one in commands(page, ours)])
    first, second = re.findall(r"stored (\d+) tokens, found (\d+)", said)
    assert int(first[0]) >= 256 and int(first[1]) == 0
    assert int(second[1]) >= 256, said[-3000:]
    assert found_in_l1(said) >= 256
