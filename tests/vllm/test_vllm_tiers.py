"""KV that went through a tier gives the same answers: stored, the server ended, L1 gone, started again, hit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tier_hits import generate_after, prompts_of, restarted
from vllm_processes import Engine, Server

from prompts import assert_same
from stores import ACCESS, SECRET, RedisServer, Seaweed, binary_of

KINDS = ("redis", "disk", "dir", "s3")
PROMPTS = {kind: prompts_of(501 + 2 * at) for at, kind in enumerate(KINDS)}


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[dict[str, str]]:
    """One tier of each kind, real ones."""
    stores = folder / "valkey", folder / "seaweed"
    for one in stores:
        one.mkdir()
    valkey, seaweed = RedisServer(binary_of("valkey"), stores[0]), Seaweed(stores[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield {
            "redis": valkey.url(),
            "disk": f"disk://{folder}/disk?max_gb=1",
            "dir": f"dir://{folder}/dir?max_gb=1",
            "s3": seaweed.url("kv"),
        }
    valkey.end()
    seaweed.end()


def test_a_hit_from_each_tier_answers_as_before(folder: Path, model: Path, urls: dict[str, str]) -> None:
    with restarted(folder, "tiers", model) as hits:
        for name, url in urls.items():
            hits(name, url, PROMPTS[name])


def test_another_vllm_on_another_server_hits_what_they_share(folder: Path, model: Path, urls: dict[str, str]) -> None:
    """Two servers, as on two machines, over one Valkey and one S3."""
    tiers = ("--l2", urls["redis"] + "?name=near", "--l2", urls["s3"], "--worth", "always")
    server = Server(folder, 16, 0, "second-server", *tiers)
    engine = Engine(folder, "second-vllm", model, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        for name in ("redis", "s3"):
            outputs = generate_after(engine, 2, PROMPTS[name])
            assert [output["cached"] for output in outputs] == [288, 256], name
        near, far = server.status()["tiers"]
        assert near["counters"]["loaded_shards"] == far["counters"]["loaded_shards"] == 18 + 4
        server.wait_until(lambda: server.status()["tiers"][0]["counters"].get("written_shards", 0) >= 22, "nearer", 60)
    finally:
        engine.end()
        server.end()


def test_a_hit_from_another_server_answers_as_before(folder: Path, model: Path) -> None:
    """One engine has stored at the first server and ended; another one finds it at the second server."""
    here = Server(folder, 16, 0, "peer-here")
    there = Server(folder, 16, 0, "peer-there", "--peers", f"127.0.0.1:{here.port}", "--worth", "always")
    prompts = prompts_of(601)
    answers, engine = [], None
    try:
        there.wait_until(lambda: here.status()["pulling_servers"], "the peer's connection", 60)
        for server in (here, there):
            engine = Engine(folder, f"at-{server.port}", model, kv_transfer_config=server.config(), max_model_len=1024)
            engine.connected(2)
            answers.append(engine.generate(prompts))
            server.wait_until(lambda: server.status()["index"]["chunks"] >= 18 + 4, "22 chunks in L1", 60)  # noqa: B023
            engine.end()
        assert_same(answers[1], answers[0])
        assert [output["cached"] for output in answers[1]] == [288, 256]
        (tier,) = there.status()["tiers"]
        assert tier["counters"]["loaded_shards"] >= 18 + 4
        assert engine.text().count("Traceback") == 0
    finally:
        if engine is not None:
            engine.end()
        here.end()
        there.end()
