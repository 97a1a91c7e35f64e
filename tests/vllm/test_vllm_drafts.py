"""Speculative decoding: the answers of cold runs, and drafters that have their own KV of the prompt after a load."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import CHUNK, PROMPTS, Outputs, Serving
from vllm_processes import PYTHON, Engine, Server

from prompts import tokens
from real_engines import ROOT

METHODS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ngram": ("gemma3", 3, {"prompt_lookup_max": 2}),
    "draft_model": ("drafted", 3, {"model": "drafter"}),
    "eagle": ("target", 3, {"model": "eagle"}),
    "eagle3": ("target", 1, {"model": "eagle3"}),
    "mtp": ("mtp", 1, {}),
}
"""Method of vLLM -> the model, how many tokens are drafted at once, and what else is configured. Gemma 3 and the target of EAGLE
have windows."""


@pytest.fixture(scope="module")
def drafting(folder: Path, model: Path) -> Path:
    path = folder / "drafting"
    for script, names in (("group_models.py", ["gemma3", "drafted", "drafter"]), ("drafters.py", [])):
        command = [PYTHON, str(ROOT / "tests/scripts" / script), str(path), str(model), *names]
        subprocess.run(command, check=True, timeout=600)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_speculative_decoding(folder: Path, drafting: Path, method: str) -> None:
    """Drafts from the prompt, and of layers that belong to the group of full attention. These foresee nearly all tokens as long
    as they have their own KV of the prompt."""
    kind, count, more = METHODS[method]
    speculative = {"method": method, "num_speculative_tokens": count, **more}
    if "model" in speculative:
        speculative["model"] = str(drafting / speculative["model"])
    one = Serving(folder, kind, drafting / kind, Server(folder, CHUNK, 0, f"{method}-server"), None)  # type: ignore[arg-type]
    small = {"max_num_batched_tokens": 192, "max_num_seqs": 8, "kv_cache_memory_bytes": 24 << 20}
    one.engine = Engine(folder, method, one.path, **one.options(**small, speculative_config=speculative))
    prompts, most = [*PROMPTS[:3], (tokens(20, 650) * 20)[:390]], {"max_tokens": 16}

    def counted(generate: Callable[..., Outputs]) -> tuple[Outputs, list[float]]:
        """The answers, how many tokens were drafted for them, and how many of these were right."""
        names = [f"vllm:spec_decode_num_{name}_tokens" for name in ("draft", "accepted")]
        before = one.engine.ask("metrics")
        outputs = [generate([prompt], **most)[0] for prompt in prompts]
        after = one.engine.ask("metrics")
        return outputs, [after[name] - before.get(name, 0) for name in names]

    def warm(asked: list[list[int]], **options: Any) -> Outputs:
        """The answers when nothing is left of what the engine has computed, of the drafter's KV neither."""
        one.engine.forget()
        one.engine.ask("digests", wipe=True)
        return one.engine.generate(asked, **options)

    try:
        one.engine.connected()
        cold, _ = counted(one.engine.generate)
        own, drafts_of_own = counted(one.engine.generate)
        alone, drafts = counted(warm)
        one.same(own, cold)
        one.same(alone, cold)
        assert one.are_whole(alone, prompts)
        if method in ("ngram", "draft_model"):
            assert drafts == drafts_of_own, "after a load as many drafts are right as after a hit in vLLM's own cache"
        else:  # of which vLLM leaves out the last block, so that a few numbers are rounded in another way
            assert drafts[1] / drafts[0] == pytest.approx(drafts_of_own[1] / drafts_of_own[0], abs=0.1)
        assert drafts[0] > 0
        assert method == "ngram" or drafts[1] > 0.7 * drafts[0]
        one.same(warm(prompts, **most), cold)
        turns = [prompt + output["tokens"] for prompt, output in zip(prompts, cold, strict=True)]
        one.same(warm(turns), one.warm(turns, salts=[f"cold {at}" for at in range(len(turns))]))
    finally:
        one.engine.end()
        one.server.end()
