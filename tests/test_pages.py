"""The quick start, troubleshooting and the like: their commands run, and the log lines that they show are those of the code."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.reference import all_messages

from lmcache.cache.table import Table
from pages import DOCS, NEEDS_ENGINE, Shell, blocks, commands, server_in_use

PAGES = sorted(
    str(path.relative_to(DOCS))
    for folder in ("quickstart", "operating", "contributing", "zh")
    for path in (DOCS / folder).glob("*.md")
)
PAGES += ["index.md", "how-it-works.md", "troubleshooting.md"]
HONEST = (*NEEDS_ENGINE.values(), "Not run", "Run by tests/test_pages.py")
HONEST_CHINESE = "测试不直接运行", "本页的测试不运行", "同样的命令由真实的", "完整脚本见英文页", "从未用真实引擎运行过"
LEVELS = {"warning": "warning", "error": "error", "exception": "error", "info": "info", "critical": "error"}
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="the pages use curl")


@needs_curl
@pytest.mark.parametrize("page", [one for one in PAGES if commands(one)])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    parts = [one.text for one in commands(page)]
    if not parts[0].startswith("lmcache server"):
        parts.insert(0, server_in_use())
    said = Shell(tmp_path, folders).run(parts)
    assert "Traceback" not in said
    if page == "troubleshooting.md":
        assert "exit code 2" in said, "the server was started in vain"


def test_every_block_is_run_or_says_why_not() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language in ("bash", "console"):
                assert not block.title or block.title.startswith((*HONEST, *HONEST_CHINESE)), f"{page}: {block}"
            elif block.language == "python":
                assert block.title.startswith((*HONEST, *HONEST_CHINESE)), f"{page}: {block}"
            else:
                assert block.language == "text", f"{page}: {block}"


def test_what_real_engines_run_is_on_their_pages() -> None:
    """The tests of each engine run the page of that engine, and no other one."""
    for page in PAGES:
        engines = {
            name for name, title in NEEDS_ENGINE.items() for block in blocks(page) if block.title.startswith(title)
        }
        assert engines <= {Path(page).stem}, page


def test_every_log_line_on_a_page_is_one_of_the_code() -> None:
    templates = {one.text for one in all_messages(LEVELS)} | {"LMCache cache server is running..."}
    known = re.compile("|".join(".+?".join(map(re.escape, text.split("…"))) for text in templates))
    assert not known.fullmatch("The engine has lost its mind at 3 o'clock")
    for page in PAGES:
        for block in (one for one in blocks(page) if one.language == "text"):
            for line in block.text.splitlines():
                assert known.fullmatch(line), f"{page}: {line}"


def test_the_policy_of_the_page_evicts_first_in_first_out() -> None:
    names: dict[str, object] = {}
    for block in blocks("contributing/eviction-policy.md"):
        if block.language == "python":
            exec(block.text, names)
    policy, table = names["FirstIn"](), names["table"]  # type: ignore[operator]
    assert isinstance(table, Table)
    for row in (1, 2, 3):
        policy.inserted(row, bytes(16), 0)
    policy.touched([1])
    assert policy.victim(lambda row: True) == 1 and policy.victim(lambda row: row != 1) == 2
    policy.removed(1)
    assert list(policy) == [2, 3]
