"""`lmcache bench engine` with a real `vllm serve` and a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_processes import Api, Server

from lmcache.cli.main import main


def test_a_real_engine_is_measured(
    folder: Path, model: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has no prefix cache of its own to speak of, so what is sent again comes from L1."""
    monkeypatch.setattr("lmcache.wire.http_client.DEADLINE_SECONDS", 60.0)
    monkeypatch.setattr("lmcache.bench.serving._SETTLE_SECONDS", 60.0)
    api = Api(folder, "bench", model, "--kv-transfer-config", json.dumps(server.config()), "--no-enable-prefix-caching")
    try:
        api.connected()
        url, cache = f"http://127.0.0.1:{api.port}", f"http://127.0.0.1:{server.http_port}"
        words = ["bench", "engine", "--url", url, "--lmcache-url", cache, "--tokens", "320", "--requests", "4"]
        words += ["--vocabulary", "128", "--concurrency", "2", "--output-tokens", "4"]
        assert main([*words, "--json"]) == 0
        said = capsys.readouterr().out
        found = json.loads(said)
        rows = {row["workload"]: row for row in found["workloads"]}
        assert not any(row["failures"] or row["without_record"] for row in rows.values()), said
        assert rows["unique"]["found_tokens"] == {} and rows["unique"]["ttft_ms_without_hits"]["samples"] == 4
        assert rows["repeat"]["ttft_ms_with_hits"]["samples"] == 4
        assert rows["repeat"]["found_tokens"]["l1"] >= 4 * 288
        assert rows["agents"]["found_tokens"]["l1"] > 0 and rows["chat"]["found_tokens"]["l1"] > 0
        assert found["memory_after"]["l1_used_bytes"] > found["memory_before"]["l1_used_bytes"]
        assert found["memory_after"]["server_rss_bytes"] > 0
        assert main([*words, "--workloads", "prefix"]) == 0
        assert "TTFT p50" in capsys.readouterr().out
    finally:
        api.end()
