"""How fast the engine computes prompts, as seen from its scheduler: what a load from a tier has to beat."""

from __future__ import annotations

MIN_TOKENS = 128
"""Steps with fewer tokens are decodes, and tell nothing about prefill."""
_FORGET = 0.05


class PrefillRate:
    """Tokens a second of steps that compute prompts.

    A step is as long as it is until the next one begins, so pauses between requests make some look slow: a faster step
    counts at once, a slower one by a twentieth.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        """0 while no prompt has been computed."""
        self._began = 0.0
        self._tokens = 0

    def step(self, now: float, tokens: int) -> None:
        """A step that computes so many tokens begins now."""
        self.took(self._tokens, now - self._began)
        self._began, self._tokens = now, tokens

    def took(self, tokens: int, seconds: float) -> None:
        """So many tokens of prompts were computed in at most that time."""
        if tokens >= MIN_TOKENS and seconds > 0:
            seen, before = tokens / seconds, self.tokens_per_second
            self.tokens_per_second = seen if seen > before else before + _FORGET * (seen - before)
