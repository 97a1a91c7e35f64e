"""What Transformers' blending answers, with the same weights: `python blended_reference.py '{...}'` prints JSON.

The argument names the model's folder, the separator's tokens, the prompts that come before, the prompt that is asked for, and for
each answer the options of `Blending`. Each answer has tokens, their log probabilities, and what was blended.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from lmcache.engine.blending import Blending
from lmcache.integration.transformers import attach
from transformers import AutoModelForCausalLM


def answer(model: Any, prompt: list[int]) -> dict[str, Any]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    made = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    tokens = made.sequences[0, len(prompt) :].tolist()
    values = torch.stack(made.logits)[:, 0].float().log_softmax(-1)
    return {"tokens": tokens, "logprobs": [float(values[at, token]) for at, token in enumerate(tokens)]}


def main() -> None:
    asked = json.loads(sys.argv[1])
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    found = []
    for options in asked["settings"]:
        blending = Blending(separator=tuple(asked["separator"]), **options)
        with attach(model, embedded_gb=0.3, blending=blending, deadline_seconds=120.0) as attached:
            assert attached.wait_connected(120), attached.refusal
            for prompt in asked["before"]:
                answer(model, prompt)
                assert attached.flush()
            assert not attached.blended_requests and not attached.blending_refusal
            one = answer(model, asked["prompt"])
            found.append(one | {"blended": attached.blended_tokens, "recomputed": attached.recomputed_tokens})
    print("ANSWER " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
