"""KV that went through a tier gives the same answers: stored, the server ended, L1 gone, started again, hit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_processes import Engine, Server

from prompts import assert_same, tokens
from stores import ACCESS, SECRET, RedisServer, Seaweed, binary_of

KINDS = ("redis", "disk", "dir", "s3")
PROMPTS = {
    kind: [tokens(300, 501 + 2 * at), tokens(300, 501 + 2 * at)[:200] + tokens(60, 502 + 2 * at)]
    for at, kind in enumerate(KINDS)
}


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


def kept(server: Server) -> int:
    (tier,) = server.status()["tiers"]
    return int(tier["counters"].get("kept_shards", 0))


def wait_until_kept(server: Server, shards: int) -> None:
    server.wait_until(lambda: kept(server) >= shards, f"{shards} shards in the tier", 60)


def test_a_hit_from_each_tier_answers_as_before(folder: Path, model: Path, urls: dict[str, str]) -> None:
    first = Server(folder, 16, 0, "l1-only")
    engine = Engine(folder, "tiers", model, kv_transfer_config=first.config(), max_model_len=1024)
    port, server, sessions = first.port, first, 2
    try:
        engine.connected(sessions)
        for name, url in urls.items():
            server.end()
            server = Server(folder, 16, port, f"{name}-writes", "--l2", url, "--worth", "always")
            cold = _generate(engine, sessions := sessions + 2, name)
            wait_until_kept(server, 18 + 4 + 1)  # the first answer fills one more
            server.end()
            server = Server(folder, 16, port, f"{name}-reads", "--l2", url, "--worth", "always")
            warm = _generate(engine, sessions := sessions + 2, name)
            assert_same(warm, cold)
            assert [output["cached"] for output in warm] == [288, 256], name
            (tier,) = server.status()["tiers"]
            assert tier["counters"]["loaded_shards"] == 18 + 4 and not tier["counters"].get("written_shards")
            records = [one for one in server.status()["fetches"] if one["outcome"] == "arrived"]
            assert len({one["request"] for one in records} - {""}) == 2, "each under vLLM's id of the request"
        assert engine.text().count("Traceback") == 0
    finally:
        engine.end()
        server.end()


def _generate(engine: Engine, sessions: int, name: str) -> list[dict[str, object]]:
    """Once the engine has connected so many times: two for each server, which it finds by itself."""
    engine.connected(sessions)
    engine.forget()
    return engine.generate(PROMPTS[name])


def test_another_vllm_on_another_server_hits_what_they_share(folder: Path, model: Path, urls: dict[str, str]) -> None:
    """Two servers, as on two machines, over one Valkey and one S3."""
    tiers = ("--l2", urls["redis"] + "?name=near", "--l2", urls["s3"], "--worth", "always")
    server = Server(folder, 16, 0, "second-server", *tiers)
    engine = Engine(folder, "second-vllm", model, kv_transfer_config=server.config(), max_model_len=1024)
    try:
        for name in ("redis", "s3"):
            outputs = _generate(engine, 2, name)
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
    prompts = [tokens(300, 601), tokens(300, 601)[:200] + tokens(60, 602)]
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
