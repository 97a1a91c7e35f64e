"""Write a small model that reads images: `python image_model.py FOLDER TOKENIZER`, in an engine's environment.

It has LLaVA's architecture: CLIP's for images of 56 x 56, which become 16 tokens, and Llama's for text. TOKENIZER is the folder
of a model whose tokenizer it gets, with the token `<image>`. The weights are random and so large that an answer depends on the
image and on the whole prompt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from group_models import COMMON, gain
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIDE, PATCH = 56, 14


def write(folder: Path, tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        **COMMON
        | {"vocab_size": max(COMMON["vocab_size"], image + 1), "intermediate_size": 512, "num_hidden_layers": 3}
    )
    seen = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(vision_config=seen, text_config=text, image_token_index=image, vision_feature_layer=-1)
    config.architectures = ["LlavaForConditionalGeneration"]
    model = LlavaForConditionalGeneration(config)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            value = gain(name, weight)
            if value and weight.dim() == 2:
                weight.copy_(value * torch.randn(weight.shape, generator=noise))
    model.to(torch.float32).save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")  # under names that vLLM does not know
    renamed = {
        re.sub(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)", r"\1vision_model.", name): saved[name]
        for name in saved
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
