"""The one tree of errors. Each message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class LMCacheError(Exception):
    """Root of every error that LMCache raises on purpose."""


class ConfigError(LMCacheError):
    """A setting is unknown, malformed, or asks for what the machine does not have. The command line exits with 2."""


class LayoutError(LMCacheError):
    """KV tensors that cannot be described, or KV that does not belong to the layout at hand."""


class IdentityUnknown(LayoutError):
    """It is not known which weights the engine serves: they are still being hashed, or could not be, as the log says."""


class WireError(LMCacheError):
    """A message that cannot be understood: malformed, too large, or of another protocol version."""


class ServerUnavailable(LMCacheError):
    """No server, or no answer within the deadline. In an engine's path it becomes a miss."""


class ServerRefused(LMCacheError):
    """The server answered with an error: it understood the request and declined it."""
