"""Models with several kinds of KV: what is loaded gives the answers of what was computed, and every kind of it matters."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sglang_processes import DEADLINE_SECONDS, PYTHON, Daemons, Engine, Output, environment
from spoiler import FOLDER

from prompts import assert_same, differs, tokens
from real_engines import ROOT
from servers import Server, eventually

CHUNK = 64
STEM = tokens(1000, 600)
PROMPTS = [
    STEM,
    STEM[:300] + tokens(500, 601),  # shared up to within a chunk
    STEM[:640] + tokens(1, 602),
    STEM[:768],  # whole chunks,
    STEM[:769],  # and one token more
    tokens(90, 603),
]
LONG = [tokens(900, 610 + number) for number in range(4)]
KINDS = {"mellum": 2, "gemma3": 1}
"""Model -> its kinds of KV. SGLang keeps the windows of Gemma 3 as if they were full attention."""


@dataclass
class Serving:
    """A model, the engine that serves it, and its server. expected: what SGLang has computed without a hit."""

    groups: int
    path: Path
    folder: Path
    server: Server
    engine: Engine
    expected: list[Output] = field(default_factory=list)

    def another_engine(self) -> None:
        settings = {"mp_host": "127.0.0.1", "mp_port": self.server.port, "blocking_timeout_secs": DEADLINE_SECONDS}
        self.engine = Engine(self.folder, self.path, CHUNK, settings, **{FOLDER: str(self.folder / "spoil")})

    def another_server(self, daemons: Daemons, *flags: str) -> None:
        """kill -9, and a new one on the same port. Returns once the engine has found it."""
        sessions = self.engine.connections()
        self.server.kill()
        self.server = daemons(self.server.port, CHUNK, flags)
        self.engine.connected(sessions + 2)

    def warm(self, prompts: list[list[int]], **more: str) -> list[Output]:
        """The answers, each when SGLang's own cache is empty."""
        found = []
        for prompt in prompts:
            self.engine.flush()
            found.append(self.engine.answer(prompt, **more))
        return found

    def next_load(self, group: int, wish: str) -> None:
        (self.folder / "spoil" / str(group)).write_text(wish)


def usable(prompts: list[list[int]]) -> list[int]:
    """The most tokens that a load can bring: SGLang computes the last one."""
    return [(len(prompt) - 1) // CHUNK * CHUNK for prompt in prompts]


def cached(outputs: list[Output]) -> list[int]:
    return [output["cached"] for output in outputs]


@pytest.fixture(scope="module")
def models(folder: Path, model: Path) -> Path:
    path = folder / "group-models"
    script = str(ROOT / "tests/scripts/group_models.py")
    subprocess.run([PYTHON, script, str(path), str(model), *KINDS], check=True, timeout=600, env=environment())
    return path


@pytest.fixture(scope="module", params=KINDS)
def serving(folder: Path, models: Path, daemons: Daemons, request: pytest.FixtureRequest) -> Iterator[Serving]:
    place = folder / request.param
    (place / "spoil").mkdir(parents=True)
    server = daemons(chunk=CHUNK)
    one = Serving(KINDS[request.param], models / request.param, place, server, None)  # type: ignore[arg-type]
    one.another_engine()
    one.engine.connected()
    yield one
    one.engine.end()
    one.server.end()


def test_warm_answers_are_cold_ones(serving: Serving) -> None:
    cold = serving.expected = serving.warm(PROMPTS, extra_key="nothing is stored for it yet")
    assert cached(cold[:1]) == [0]
    assert_same(serving.engine.answers(PROMPTS), cold)
    for prompt, expected in zip(PROMPTS, cold, strict=True):  # what each of them stores by itself
        assert_same(serving.warm([prompt]), [expected])
    found = serving.warm(PROMPTS)
    assert_same(found, cold)
    assert cached(found) == usable(PROMPTS)
    serving.engine.flush()
    assert_same(serving.engine.answers(PROMPTS), cold)
    assert "Traceback" not in serving.engine.text_of_serving()
    assert "LMCache serves nothing" not in serving.engine.text()


def test_many_requests_in_little_space(serving: Serving) -> None:
    """More than SGLang's pools hold: windows and states are evicted, and requests wait for one another."""
    cold = [serving.engine.answer(prompt, 24) for prompt in LONG]
    for _ in range(3):
        assert_same(serving.engine.answers(LONG, 24), cold)
    serving.engine.flush()
    assert_same(serving.engine.answers(LONG, 24), cold)


def test_own_hits_go_on_with_loads(serving: Serving) -> None:
    for length in (40, 400):
        serving.engine.flush()
        serving.engine.answer([*STEM[:length], 7], 1, extra_key="stem")
        found = serving.engine.answer(STEM)
        assert_same([found], serving.expected[:1])
        serving.engine.flush()
        serving.engine.answer([*STEM[:length], 7], 1)
        found = serving.engine.answer(STEM)
        assert_same([found], serving.expected[:1])
        assert cached([found]) == usable([STEM])


def test_the_next_turn_uses_the_answer(serving: Serving) -> None:
    prompt = tokens(150, 620)
    turn = serving.engine.answer(prompt, 60)
    following = prompt + turn["tokens"] + tokens(40, 621)
    found = serving.warm([following])
    assert_same(found, serving.warm([following], extra_key="not seen"))
    assert cached(found) == [3 * CHUNK]


def test_each_group_matters_and_may_fail(serving: Serving) -> None:
    """KV of one group that is not the prompt's changes the answer; a load that fails within a group does not."""
    for group in range(serving.groups):
        serving.next_load(group, "fail")
        assert_same(serving.warm(PROMPTS[:1]), serving.expected[:1])
        assert_same(serving.warm(PROMPTS[:1]), serving.expected[:1])
    for group in range(serving.groups):
        salt = f"spoiled {group}"
        serving.warm(PROMPTS[:1], extra_key=salt)
        right = serving.warm(PROMPTS[:1], extra_key=salt)
        serving.next_load(group, "spoil")
        wrong = serving.warm(PROMPTS[:1], extra_key=salt)
        assert_same(right, serving.expected[:1])
        assert cached(wrong) == cached(right) == usable(PROMPTS[:1])
        assert differs(wrong, right)


def test_another_server_its_tier_and_another_engine(serving: Serving, daemons: Daemons) -> None:
    """Cold after kill -9 of the server; then warm, also from a tier alone, and for an engine that comes after kill -9 of this."""
    tier = ("--l2", f"disk://{serving.folder}/disk?max_gb=1", "--worth", "always")
    expected = serving.expected[:3]
    serving.another_server(daemons, *tier)
    assert_same(serving.warm(PROMPTS[:3]), expected)
    assert_same(serving.warm(PROMPTS[:3]), expected)
    serving.engine.flush()
    eventually(lambda: _kept(serving.server))
    serving.another_server(daemons, *tier)
    warm = serving.warm(PROMPTS[:3])
    assert_same(warm, expected)
    assert cached(warm) == usable(PROMPTS[:3])
    serving.engine.kill()
    serving.another_engine()
    serving.engine.connected()
    warm = [serving.engine.answer(prompt) for prompt in PROMPTS[:1]]
    assert_same(warm, expected[:1])
    assert cached(warm) == usable(PROMPTS[:1])


def _kept(server: Server) -> bool:
    status = server.status()
    return 0 < status["counters"]["committed_chunks_total"] == status["tiers"][0]["counters"].get("kept_shards", 0)


def test_chunks_that_do_not_end_where_pages_do_are_refused(serving: Serving, daemons: Daemons) -> None:
    if serving.groups == 1:
        pytest.skip("any chunk will do")
    serving.server.kill()
    serving.server = daemons(serving.server.port, 48)
    eventually(lambda: "start the server with --chunk-size 64" in serving.engine.text())
    found = serving.warm(PROMPTS[:1] * 2)
    assert_same(found, serving.expected[:1] * 2)
    assert cached(found) == [0, 0]
