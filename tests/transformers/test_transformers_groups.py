"""Models with several kinds of KV: what is loaded gives the answers of what was computed, and every kind of it matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers_user import User

from servers import PATIENCE, Server, eventually

CHUNK = 48
"""Tokens. Windows of 128 tokens begin within a chunk, and blocks of the pool end within one."""
KINDS = ("gemma3", "mistral", "gptoss", "qwen3next")
TOLERANCE = 1e-4
"""Of float32 logits, whose spread is about 1: the same sums in another order."""
Servers = Callable[..., Server]


def right(answer: dict[str, Any]) -> bool:
    return bool(answer["same"] and answer["difference"] < TOLERANCE and not answer["refusal"])


def whole(tokens: int, chunk: int = CHUNK) -> int:
    """The tokens that a load can bring: whole chunks before the last token, which is computed."""
    return (tokens - 1) // chunk * chunk


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def user(kind: str, group_models: Path) -> Iterator[User]:
    one = User(group_models / kind)
    yield one
    one.end()


@pytest.mark.parametrize("chunk", [CHUNK, 256])
def test_warm_answers_are_cold_ones(server: Servers, user: User, kind: str, chunk: int) -> None:
    """Also for prompts that part within a chunk, and for those that end where a chunk does, or one token before or after."""
    assert user.ask("attach", address=server(l1=64, chunk=chunk).address)["refusal"] == ""
    for tokens in (40, 2 * chunk - 1, 2 * chunk, 2 * chunk + 1):
        cold = user.ask("generate", ids=[tokens, tokens])
        kept = min(chunk, 127) if kind == "mistral" else chunk  # of each chunk, where there are windows only
        assert right(cold) and cold["hit"] == 0 and cold["stored"] == (tokens + 7) // chunk * kept
        warm = user.ask("generate", ids=[tokens, tokens])
        assert right(warm) and warm["hit"] == whole(tokens, chunk)
    answers = [user.ask("generate", ids=[650, seed, 500]) for seed in (2, 3, 4)]
    shared = 500 // chunk * chunk
    # A state is where two prompts have parted once the second one has been computed.
    assert [one["hit"] for one in answers] == [0, 0 if kind == "qwen3next" else shared, shared]
    assert all(map(right, answers))


def test_a_conversation_grows(server: Servers, user: User) -> None:
    user.ask("attach", address=server(l1=64, chunk=CHUNK).address)
    talk = user.ask("continue", ids=[300, 4], turns=4)
    assert talk["same"]
    assert talk["hits"] == [0] + [(300 + 33 * turn + 19) // CHUNK * CHUNK for turn in range(3)]


def test_each_group_matters(server: Servers, user: User) -> None:
    """KV of one group that is not the prompt's changes the answer."""
    user.ask("attach", address=server(l1=64, chunk=CHUNK).address)
    assert right(user.ask("generate", ids=[500, 5]))
    groups = user.ask("spoil", group=None)
    for group in range(groups):
        user.ask("spoil", group=group)
        wrong = user.ask("generate", ids=[500, 5])
        assert wrong["hit"] == whole(500) and wrong["difference"] > 1000 * TOLERANCE
        user.ask("spoil", group=None)
        again = user.ask("generate", ids=[500, 5])
        assert right(again) and again["hit"] == whole(500)


def test_a_longer_answer_than_foreseen(server: Servers, user: User) -> None:
    """It goes on outside the pool; and a cache that was given back is the caller's."""
    user.ask("foresee", tokens=4)
    user.ask("attach", address=server(l1=64, chunk=CHUNK).address)
    first = user.ask("generate", ids=[1000, 6], new=60)
    assert right(first) and first["stored"] == 1024 // CHUNK * CHUNK
    again = user.ask("generate", ids=[1000, 6], new=60)
    assert right(again) and again["hit"] == whole(1000)
    user.ask("foresee", tokens=2048)
    for _ in range(2):  # computed, and loaded
        assert user.ask("keep", ids=[300, 7]) == {"kept": True, "same": True}


def test_what_is_none_of_ours(server: Servers, user: User) -> None:
    user.ask("attach", address=server(l1=64, chunk=CHUNK).address)
    user.ask("generate", ids=[200, 8])
    for more, why in (
        ({"batch": 2}, "a batch of 2 prompts"),
        ({"num_beams": 2}, "several sequences"),
    ):
        answer = user.ask("generate", ids=[200, 8], new=4, **more)
        assert right(answer) and answer["hit"] == 0 and user.said(why)


def test_another_server_its_tier_and_another_process(
    server: Servers, user: User, kind: str, group_models: Path, tmp_path: Path
) -> None:
    """Cold after kill -9 of the server; then warm from a tier alone, also in another process."""
    flags = ("--l2", f"disk://{tmp_path}/tier?max_gb=1", "--worth", "always")
    one = server(l1=64, chunk=CHUNK, flags=flags)
    user.ask("attach", address=one.address)
    assert right(user.ask("generate", ids=[500, 9]))
    eventually(lambda: _all_kept(one))
    one.kill()
    alone = user.ask("generate", ids=[500, 9])
    assert right(alone) and alone["hit"] == alone["stored"] == 0
    server(l1=64, chunk=CHUNK, port=one.port, flags=flags)
    assert user.ask("wait_connected", seconds=PATIENCE)
    warm = user.ask("generate", ids=[500, 9])
    assert right(warm) and warm["hit"] == whole(500)
    other = User(group_models / kind)
    try:
        other.ask("attach", address=one.address)
        warm = other.ask("generate", ids=[500, 9])
        assert right(warm) and warm["hit"] == whole(500)
    finally:
        other.end()


def test_another_server_between_load_and_store(server: Servers, user: User) -> None:
    """It is sent only what the pool has of the prompt: of a window not what was before the reach of what was loaded."""
    one = server(l1=64, chunk=CHUNK)
    user.ask("attach", address=one.address)
    for seed, shared in ((2, 500), (11, 0)):  # the second one's KV fills the pool
        assert right(user.ask("generate", ids=[650, seed, shared]))
    user.log.clear()
    with ThreadPoolExecutor(1) as pool:
        outlived = pool.submit(user.ask, "outlive", ids=[650, 2, 500])
        eventually(lambda: user.said("it waits for another server"))
        one.kill()
        server(l1=64, chunk=CHUNK, port=one.port)
        assert outlived.result() == {"tokens": 654, "hit": whole(650), "flushed": True}
    for seed in (3, 2):
        assert right(user.ask("generate", ids=[650, seed, 500]))


def _all_kept(one: Server) -> bool:
    status = one.status()
    return 0 < status["counters"]["committed_chunks_total"] == status["tiers"][0]["counters"].get("kept_shards", 0)
