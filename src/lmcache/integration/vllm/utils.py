"""A name that vLLM imports from here."""

from __future__ import annotations

from typing import Any


def mla_enabled(model_config: Any) -> bool:
    """Whether the model keeps one latent a token (MLA) in place of keys and values."""
    return bool(getattr(model_config, "use_mla", False))
