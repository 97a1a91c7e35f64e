"""docs/correctness.md names a test for each way in which the numbers for equal tokens can change: these tests exist."""

from __future__ import annotations

import re
from pathlib import Path

import lmcache

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "correctness.md").read_text()


def test_every_row_names_a_test_that_exists() -> None:
    known = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 50
    for row in rows:
        _way, _how, tests, *_ = (cell.strip() for cell in row.strip("|").split(" | "))
        named = re.findall(r"`(test_\w+)`", tests)
        assert set(named) <= known, row
        assert named or "`tests/" in tests or tests.startswith("Test"), row


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"`(?:tests/)?[a-z_/]+\.py`", PAGE):
        path = name.strip("`")
        assert (ROOT / path).exists() or list(Path(lmcache.__file__).parent.rglob(path)), name
