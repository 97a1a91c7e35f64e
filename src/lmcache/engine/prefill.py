"""The speed at which the engine computes prompts, measured by its scheduler: a load from a tier has to be faster."""

from __future__ import annotations

MIN_TOKENS = 128
"""Steps with fewer tokens are decodes, which do not measure prefill."""
_FORGET = 0.05


class PrefillRate:
    """Tokens per second of steps that compute prompts.

    A step is taken to last until the next one begins, so pauses between requests make some steps look slow. Hence a
    faster step sets the rate at once, and a slower one moves it by a twentieth of the difference.
    """

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        """0 while no prompt has been computed."""
        self._began = 0.0
        self._tokens = 0

    def step(self, now: float, tokens: int) -> None:
        """Record that a step that computes `tokens` tokens begins now."""
        self.took(self._tokens, now - self._began)
        self._began, self._tokens = now, tokens

    def took(self, tokens: int, seconds: float) -> None:
        """Record that `tokens` tokens of prompts were computed in at most `seconds`."""
        if tokens >= MIN_TOKENS and seconds > 0:
            seen, before = tokens / seconds, self.tokens_per_second
            self.tokens_per_second = seen if seen > before else before + _FORGET * (seen - before)
