"""Write a small DeepSeek-V2 model, whose attention is MLA: `python mla_model.py FOLDER TOKENIZER`, in an engine's environment.

TOKENIZER is the folder of a model whose tokenizer it gets. The answer depends on the whole prompt, as in `demo/model.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
config = DeepseekV2Config(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=512,
    q_lora_rank=None,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=2,  # no experts
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
)
model = DeepseekV2ForCausalLM(config).float()
noise = torch.Generator().manual_seed(0)
with torch.no_grad():
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            gain = 1.0 if "embed_tokens" in name else (3.0 if "lm_head" in name else 2.0) / weight.shape[1] ** 0.5
            weight.copy_(gain * torch.randn(weight.shape, generator=noise))
model.save_pretrained(folder)
described = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
(folder / "config.json").write_text(json.dumps(described))
for file in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(tokenizer / file, folder)
