"""KV of fp8: what is loaded gives the answers of what was computed, and engines with KV of another dtype share none of it."""

from __future__ import annotations

from pathlib import Path

from sglang_processes import Engine, World

from prompts import assert_same, differs, mixed


def test_fp8(folder: Path, model: Path, world: World) -> None:
    whole = [mixed()[number] for number in (0, 4)]
    for prompt in whole:  # in float32
        world.first.answer(prompt, max_tokens=1)
    settings = {"mp_host": "127.0.0.1", "mp_port": world.server.port}
    engine = Engine(folder, model, 16, settings, "--kv-cache-dtype", "fp8_e4m3")
    try:
        engine.connected()
        cold, warm = (list(map(engine.alone, whole)) for _ in range(2))
        assert [one["cached"] for one in cold] == [0, 0], "KV of float32 is there, and is not ours"
        assert [one["cached"] for one in warm] == [688, 496]
        assert_same(warm, cold)
        assert differs(cold, [world.expected[number] for number in (0, 4)]), "eight bits are fewer than float32 has"
        assert "serves nothing" not in engine.text()
    finally:
        engine.end()
