"""`lmcache codec check`: what it reads and prints, without a model (`tests/transformers` has one)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcache.cli.main import main

ROW = {
    "codec": "int8",
    "bit_exact": False,
    "ratio": 1.88,
    "prompts": 2,
    "kl": 0.0002,
    "kl_interval": (0.0001, 0.0003),
    "kl_worst": 0.0004,
    "next_token_same": 1.0,
    "next_token_same_interval": (0.34, 1.0),
    "answer_same": 0.5,
    "answer_same_interval": (0.09, 0.91),
}


class Subject:
    """A model of one token a word."""

    def __init__(self) -> None:
        self.model, self.kv_dtype = SimpleNamespace(dtype="torch.float32"), "torch.bfloat16"
        self.prompts: list[list[Any]] = []

    def encode(self, text: str) -> list[str]:
        return text.split()

    def chat(self, messages: list[dict[str, str]]) -> list[str]:
        return ["<user>", *messages[0]["content"].split()]

    def measure(self, prompts: list[list[Any]], codecs: Any, tokens: int, progress: Any, seconds: float) -> list[Any]:
        self.prompts, self.asked = prompts, (list(codecs), tokens)
        return [SimpleNamespace(told=lambda: ROW)]


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> Subject:
    made = Subject()
    quality: Any = SimpleNamespace(opened=lambda *given: made)
    monkeypatch.setitem(sys.modules, "lmcache.bench.quality", quality)
    return made


def check(*flags: Any) -> int:
    return main(["codec", "check", "--model", "m", *map(str, flags)])


def test_prompts_of_all_kinds(subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    lines: list[Any] = [
        "one two three",
        {"prompt": "four five"},
        {"messages": [{"role": "user", "content": "six seven"}]},
    ]
    lines[0] = "one \u2028two three"  # a line separator of Unicode, which separates no lines of JSON
    file.write_text("\n\n".join(json.dumps(one, ensure_ascii=False) for one in lines))
    assert check("--prompts", file, "--context", 2, "--codec", "int8", "--tokens", 4) == 0
    assert subject.prompts == [["two", "three"], ["four", "five"], ["six", "seven"]]
    assert subject.asked == (["int8"], 4)
    printed = capsys.readouterr().out
    assert "m, KV in bfloat16: 2 prompts of about 2 tokens, answers of 4" in printed
    assert "int8   rounded  1.88   0.00020  [0.00010, 0.00030]  0.00040" in printed
    plain = tmp_path / "prompts.txt"
    plain.write_bytes(b'"one" two\r\n\r\nthree four\r\nfive six\r\n')
    assert check("--prompts", plain, "--samples", 2, "--json") == 0
    assert subject.prompts == [['"one"', "two"], ["three", "four"]] and subject.asked[0] == ["none", "pack12", "int8"]
    assert json.loads(capsys.readouterr().out)["codecs"][0]["kl_worst"] == 0.0004


def test_passages_are_distinct_and_from_all_over_the_texts(subject: Subject, tmp_path: Path) -> None:
    for name, words in (("a", range(50)), ("b", range(50, 100))):
        (tmp_path / name).write_text(" ".join(map(str, words)))
    texts = "--texts", tmp_path / "a", tmp_path / "b", "--context", 10
    assert check(*texts, "--samples", 3) == 0
    assert [one[0] for one in subject.prompts] == ["0", "33", "66"] and {len(one) for one in subject.prompts} == {10}
    assert check(*texts) == 0 and len(subject.prompts) == 10, "no passage overlaps another one"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ([], "pass --prompts FILE or --texts FILE"),
        (["--prompts", "p.txt", "--texts", "t"], "pass --prompts FILE or --texts FILE"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--prompts", "empty.txt"], "there is no prompt in it"),
        (["--prompts", "bad.jsonl"], "bad.jsonl:2: is not JSON"),
        (["--prompts", "number.jsonl"], "number.jsonl:1: must be a string, or an object with `prompt`"),
        (["--texts", "p.txt"], "2 tokens are fewer than one passage of 300"),
        (["--texts", "p.txt", "--tokens", "0"], "--tokens 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_named(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("p.txt", "a b"), ("empty.txt", "\n"), ("bad.jsonl", '"a"\n{'), ("number.jsonl", "5")):
        (tmp_path / name).write_text(text)
    assert check(*flags) == 2
    assert why in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "lmcache.bench.quality", raising=False)
    (tmp_path / "p.txt").write_text("a b")
    assert check("--prompts", tmp_path / "p.txt") == 2
    assert "torch is not installed; pip install 'lmcache[transformers]'" in capsys.readouterr().err
