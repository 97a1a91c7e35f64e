"""A user's script with a model of Hugging Face Transformers."""

from __future__ import annotations

import os
from pathlib import Path

from real_engines import Script

PYTHON = os.environ.get("LMCACHE_TEST_VLLM_PYTHON", "")


class User(Script):
    """`models.py`, a user's script that does what it is told."""

    MODULES = ("torch", "transformers.models.qwen3.modeling_qwen3")

    def __init__(self, model: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        super().__init__(PYTHON, Path(__file__).with_name("models.py"), str(model), seconds=240.0, **environment)
