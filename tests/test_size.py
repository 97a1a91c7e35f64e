"""`lmcache size`: the KV of known models, from their configurations. tests/vllm compares others with what an engine registers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmcache.cli.main import main
from lmcache.sizing.model_kv import Kind, kinds_of

QWEN3_8B = {
    "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "sliding_window": None, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3_12B = {
    "model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": {
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
        "sliding_window_pattern": 6, "hidden_size": 3840, "model_type": "gemma3_text",
    },
}  # fmt: skip
QWEN3_NEXT = {
    "model_type": "qwen3_next", "num_hidden_layers": 48, "full_attention_interval": 4, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
NEMOTRON_H = {
    "model_type": "nemotron_h", "num_hidden_layers": 4, "hybrid_override_pattern": "M-M*", "num_attention_heads": 8,
    "num_key_value_heads": 2, "attention_head_dim": 64, "hidden_size": 512, "mamba_num_heads": 16, "mamba_head_dim": 32,
    "ssm_state_size": 64, "n_groups": 2, "conv_kernel": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
FP8 = {"quantization_config": {"kv_cache_scheme": {"type": "float", "num_bits": 8}}}
SIZES: dict[str, tuple[dict[str, Any], list[Kind]]] = {
    "heads": (QWEN3_8B, [Kind("full attention", 36, 4096)]),
    "8 bits": (QWEN3_8B | FP8, [Kind("full attention", 36, 2048)]),
    "MLA": (DEEPSEEK_V3, [Kind("MLA", 61, 1152)]),
    "indexers": (DEEPSEEK_V3 | {"index_topk": 2048}, [Kind("MLA", 61, 1152), Kind("indexer", 61, 132)]),
    "windows": (GEMMA3_12B, [Kind("full attention", 8, 8192), Kind("sliding window", 40, 8192, 1024)]),
    "a window that is off": (
        QWEN3_8B | {"sliding_window": 4096, "use_sliding_window": False},
        [Kind("full attention", 36, 4096)],
    ),
    "states": (QWEN3_NEXT, [Kind("full attention", 12, 2048), Kind("state", 36, 3 * 8192 * 2 + 32 * 128 * 128 * 2, 1)]),
    "states in 32 bits": (
        QWEN3_NEXT | {"mamba_ssm_dtype": "float32"},
        [Kind("full attention", 12, 2048), Kind("state", 36, 3 * 8192 * 2 + 32 * 128 * 128 * 4, 1)],
    ),
    "Mamba 2": (NEMOTRON_H, [Kind("full attention", 1, 512), Kind("state", 2, 3 * 768 * 2 + 512 * 64 * 2, 1)]),
    "32 bits are served as 16": (QWEN3_8B | {"torch_dtype": "float32"}, [Kind("full attention", 36, 4096)]),
    "no head size": (
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        [Kind("full attention", 2, 2 * 4 * 16 * 2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_kinds_of_kv_of_a_model(name: str) -> None:
    config, kinds = SIZES[name]
    assert kinds_of(config) == kinds


def sized(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["size", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    found = sized(capsys, str(tmp_path), "--l1-size-gb", "36", "--context", "4096", "--users", "100")
    assert found["bytes_per_token"] == 147_456 and found["chunk_bytes"] == 36 << 20
    assert found["l1_tokens"] == 1024 * 256 and found["l1_conversations"] == 64
    assert found["users_bytes"] == 100 * 16 * (36 << 20)
    assert sized(capsys, "--model", str(tmp_path / "config.json"))["context_tokens"] == 40960
    assert main(["size", str(tmp_path), "--l1-size-gb", "36"]) == 0
    text = capsys.readouterr().out
    assert "147,456 bytes a token" in text and "holds 262,144 tokens, 6 such conversations" in text


@pytest.mark.parametrize(
    ("lossy_kv", "bytes_per_token"),
    [("int8", 147_456), ("int8-l1", 36 * 8 * 2 * 132), ("k8v4-l1", 36 * 8 * (132 + 80))],
)
def test_rounded_kv_takes_fewer_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lossy_kv: str, bytes_per_token: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    assert sized(capsys, str(tmp_path), "--lossy-kv", lossy_kv)["bytes_per_token"] == bytes_per_token
    assert main(["size", str(tmp_path), "--lossy-kv", lossy_kv]) == 0
    assert f"KV in bfloat16 with lossy_kv={lossy_kv}" in capsys.readouterr().out
    assert main(["size", str(tmp_path), "--lossy-kv", "k8v4-l1", "--kv-dtype", "fp8"]) == 2
    assert "heads of 128 values in fp8_e4m3 cannot be rounded" in capsys.readouterr().err


def test_a_name_is_looked_for_in_the_local_cache_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["size", "Qwen/Qwen3-8B"]) == 2
    assert "nothing is downloaded: run `hf download Qwen/Qwen3-8B config.json`" in capsys.readouterr().err
    folder = tmp_path / "hub" / "models--Qwen--Qwen3-8B"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(QWEN3_8B))
    assert sized(capsys, "Qwen/Qwen3-8B")["bytes_per_token"] == 147_456


BAD = {
    "{": "not JSON",
    "[]": "not a JSON object",
    "{}": "no num_hidden_layers",
    json.dumps(QWEN3_8B | {"layer_types": ["magic"] * 36}): "layer 0 is of kind 'magic'",
    json.dumps(QWEN3_8B | {"num_attention_heads": "many"}): "no num_attention_heads",
    json.dumps(QWEN3_8B | {"num_key_value_heads": "x"}): "this is no configuration of a language model",
    json.dumps(QWEN3_8B | {"is_encoder_decoder": True}): "encoder-decoder",
    json.dumps(QWEN3_8B | {"torch_dtype": "int3"}): "int3 is unknown",
    json.dumps({"model_type": "mamba2", "num_hidden_layers": 1, "hidden_size": 8, "conv_kernel": 4, "state_size": 4}):
        "without attention",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD)
def test_a_configuration_that_tells_no_size_is_an_error(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    words = ["size", str(path)] + (["--users", "3"] if 'attention_heads": "many' in text else [])
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and BAD[text] in line


def test_wrong_flags_of_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(DEEPSEEK_V3))
    for words, said in (
        ([], "pass a model's folder"),
        ([str(tmp_path / "none")], "there is no config.json"),
        ([str(path), "--users", "3"], "pass --context"),
        ([str(path), "--l1-size-gb", "x"], "--l1-size-gb x: must be a number"),
        ([str(path), "--chunk-size", "0"], "--chunk-size 0: must be a whole number"),
        ([str(path), "--kv-dtype", "fp4"], "fp4 is unknown"),
    ):
        assert main(["size", *words]) == 2
        assert said in capsys.readouterr().err
