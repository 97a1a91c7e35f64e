"""The speeds at which the engine computes prompts and ranks load them, as its scheduler knows them: a load from a tier has to be
faster than computing, and a load that others wait for has to be short."""

from __future__ import annotations

MIN_TOKENS = 128
"""Steps with fewer tokens are decodes, which do not measure prefill, and loads of fewer are mostly overhead."""
_FORGET = 0.05


class TokenRate:
    """Tokens per second. Whatever else happens makes some measurements look slow. Hence a faster one sets the rate at once, and a
    slower one moves it by a twentieth of the difference."""

    def __init__(self) -> None:
        self.tokens_per_second = 0.0
        """0 while nothing has been measured."""

    def took(self, tokens: int, seconds: float) -> None:
        """Record that `tokens` tokens took at most `seconds`. Fewer than `MIN_TOKENS` are no measurement."""
        if tokens >= MIN_TOKENS and seconds > 0:
            seen, before = tokens / seconds, self.tokens_per_second
            self.tokens_per_second = seen if seen > before else before + _FORGET * (seen - before)


class PrefillRate(TokenRate):
    """Tokens per second of steps that compute prompts. A step is taken to last until the next one begins."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._tokens = 0

    def step(self, now: float, tokens: int) -> None:
        """Record that a step that computes `tokens` tokens begins now."""
        self.took(self._tokens, now - self._began)
        self._began, self._tokens = now, tokens
