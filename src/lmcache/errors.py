"""All exceptions of LMCache. Each message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class LMCacheError(Exception):
    """The base class of every exception that LMCache raises on purpose."""


class ConfigError(LMCacheError):
    """A setting is unknown, malformed, or asks for what the machine lacks. The command line exits with status 2."""


class LayoutError(LMCacheError):
    """KV tensors cannot be described by a layout, or KV does not belong to the given layout."""


class Unroundable(LMCacheError):
    """KV that has to be rounded contains a value that cannot be. It is not stored."""


class IdentityUnknown(LayoutError):
    """The weights are not identified: they are still being hashed, or could not be hashed, in which case the log says why."""


class WireError(LMCacheError):
    """A message cannot be decoded: it is malformed, too large, or of another protocol version."""


class ServerUnavailable(LMCacheError):
    """There is no server, or it gave no answer within the deadline. An engine treats this as a miss."""


class ServerRefused(LMCacheError):
    """The server understood the request and answered it with an error."""


def plainly(error: BaseException) -> str:
    """Return what went wrong without the number and the path that Python puts around it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
