"""A name that vLLM imports from here."""

from __future__ import annotations

from typing import Any


def mla_enabled(model_config: Any) -> bool:
    """Return whether the model keeps one latent per token (MLA) instead of keys and values."""
    return bool(getattr(model_config, "use_mla", False))
