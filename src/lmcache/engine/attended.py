"""How much attention tokens pay to others: by it blending chooses what matters to a question."""

from __future__ import annotations

import torch

_ELEMENTS = 1 << 25


def rows_at_once(heads: int, tokens: int) -> int:
    """Return for how many rows `paid` may be called at once."""
    return max(1, _ELEMENTS // (heads * tokens))


def paid(query: torch.Tensor, key: torch.Tensor, scale: float, seen: torch.Tensor | None) -> torch.Tensor:
    """Return the attention that each row pays to each token, float32 [heads, rows, tokens]; the sum over the tokens is 1.

    query: [heads, rows, size]. key: [KV heads, tokens, size]. seen: which tokens a row sees, as bool or as what is added to its
    scores, of a shape that fits; None for all of them."""
    heads, rows, size = query.shape
    # The heads that share a KV head are rows of it, so that no keys are repeated.
    grouped = query.float().reshape(len(key), -1, size)
    scores = (grouped @ key.float().transpose(1, 2) * scale).view(heads, rows, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    return scores.softmax(dim=-1)
