"""Who may speak over ZMQ: CURVE with one shared key file, or a proof of reading the server's cookie on loopback.

The key file holds one Z85 secret (40 characters). The server's CURVE key is that secret; the engines' key is derived from it,
so one file, given to server and engines, is all there is to manage. Without it nobody gets past the handshake.
"""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

import zmq
import zmq.auth
from blake3 import blake3
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from lmcache.config.load import KEY_REMEDY
from lmcache.errors import ConfigError

COOKIE_BYTES = 32


def proof(cookie: bytes, server_id: bytes) -> bytes:
    """What a loopback engine shows instead of the cookie itself."""
    return blake3(server_id, key=cookie).digest()


def read_cookie(path: str) -> bytes | None:
    """The cookie at a path that a server told; None unless it is this user's own 0600 file of the right size and name."""
    if not path.endswith(".cookie"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o600 or status.st_size != COOKIE_BYTES:
            return None
        return file.read()


def protect_server(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], key_file: Path
) -> ThreadAuthenticator:
    """Make a server socket speak CURVE, and only with engines that hold the same key file.

    Raises:
        ConfigError: the file is missing, readable by others, or not a Z85 key.
    """
    secret = read_key(key_file)
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    allowed = zmq.curve_public(_engine_secret(secret))

    class OneKey:
        def callback(self, domain: str, key: bytes) -> bool:
            return hmac.compare_digest(key, allowed)  # pyzmq gives it in Z85, as keys are written

    authenticator.configure_curve_callback(domain="*", credentials_provider=OneKey())
    socket.curve_secretkey = secret
    socket.curve_publickey = zmq.curve_public(secret)
    socket.curve_server = True
    return authenticator


def protect_engine(socket: zmq.Socket[bytes], key_file: Path) -> None:
    """Make an engine's socket speak CURVE with the server that holds the same key file. Raises ConfigError as above."""
    secret = read_key(key_file)
    own = _engine_secret(secret)
    socket.curve_secretkey = own
    socket.curve_publickey = zmq.curve_public(own)
    socket.curve_serverkey = zmq.curve_public(secret)


def read_key(key_file: Path) -> bytes:
    """The 40-character Z85 secret of a key file.

    Raises:
        ConfigError: the file is missing, readable by others, or not a Z85 key.
    """
    try:
        if stat.S_IMODE(key_file.stat().st_mode) & 0o077:
            raise ConfigError(f"--auth-key-file {key_file}: others may read it; chmod 600 it")
        secret = key_file.read_bytes().strip()
        zmq.curve_public(secret)
    except OSError as error:
        raise ConfigError(f"--auth-key-file {key_file}: {error.strerror}; {KEY_REMEDY}") from error
    except (ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"--auth-key-file {key_file}: not one Z85 secret of 40 characters; {KEY_REMEDY}") from error
    return secret


def _engine_secret(secret: bytes) -> bytes:
    return z85.encode(blake3(secret, derive_key_context="lmcache engine curve key v1").digest())
