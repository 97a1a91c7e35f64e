"""Copy a model and give its checkpoint static scales of an fp8 KV: `python kv_scales.py TARGET MODEL SCALE`, with safetensors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def main(target: Path, model: Path, scale: float) -> None:
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "frozen",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": SCHEME,
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))
    weights = load_file(target / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name in ("k_scale", "v_scale"):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, target / "model.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
