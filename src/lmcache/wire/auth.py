"""Who may speak over ZMQ: CURVE with one shared key file, or, on loopback, proofs by both sides that they can read the server's
cookie file.

A proof is keyed BLAKE3 over the side that gives it, the server's id, a fresh nonce of either side, and the TCP connection: the
addresses and ports of both its ends, as the kernel tells them to each end, and their network namespace. No two connections of a
namespace have all that in common while either lasts. So a proof is worth nothing on another connection, in the other direction,
or to a program that stands between the two, each of whom then has a connection to that program and sees other ends of it.

The key file holds one Z85 secret (40 characters). The server's CURVE key is that secret; the engines' key is derived from it,
so one file, given to server and engines, is all there is to manage. Without it nobody gets past the handshake.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Literal

import zmq
import zmq.auth
from blake3 import blake3
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from lmcache.config.hosts import ends, in_url
from lmcache.config.load import KEY_REMEDY
from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import printable

COOKIE_BYTES = 32
KEY_FOR_BOTH = "give both the same key file (server: --auth-key-file, engine: LMCACHE_AUTH_KEY_FILE)"
NO_FILE, OTHER_USER, UNSAFE_FILE, OTHER_PLACE = (
    "no cookie file",
    "another user",
    "unsafe cookie file",
    "another address",
)
BEYOND_LOOPBACK = "beyond loopback"
REASONS = {
    NO_FILE: "it cannot read this server's cookie file: mount --socket-dir where the engine runs, at the same path",
    OTHER_USER: "it runs as another user than this server: run both as the same user",
    UNSAFE_FILE: "this server's cookie file has been changed: start the server anew",
    OTHER_PLACE: "it came through something that forwards to this server's port: give it the address of the port itself",
    BEYOND_LOOPBACK: "this server has no key, and the engine no LMCACHE_INSECURE_NO_AUTH=1",
}
"""Why an engine does without a server -> what the server's log says of it."""


class Unproven(LMCacheError):
    """The server has not shown that it is this user's. `reason` is a key of `REASONS`, or "" where it seems to be no server of
    ours."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def proof(
    cookie: bytes,
    by: Literal["server", "engine"],
    server_id: bytes,
    engine_nonce: bytes,
    server_nonce: bytes,
    where: str,
) -> bytes:
    """What `by` shows to the other side instead of the cookie itself: 32 bytes. where: the connection's `place`."""
    hasher = blake3(key=cookie)
    for part in (by.encode(), server_id, engine_nonce, server_nonce, where.encode()):
        hasher.update(len(part).to_bytes(4, "little") + part)
    return hasher.digest()


def place(message: zmq.Frame, receiver: Literal["server", "engine"]) -> str:
    """`127.0.0.1:40000 to 127.0.0.1:5555 in net:[4026531840]`: the connection that brought `message`, the engine's end first.
    Each network namespace has a loopback of its own. Both ends of a connection within one say the same.

    Where the kernel does not tell (the connection has ended, or there is no /proc), it is like no other, and nothing is proved.
    After the end its descriptor may be another connection's: a proof made for that one helps nobody who is not an end of it.
    """
    try:
        own, other = (f"{in_url(host)}:{port}" for host, port in ends(int(message.get(zmq.SRCFD))))
        namespace = os.readlink("/proc/self/ns/net")
    except (OSError, zmq.ZMQError):
        return f"an unknown connection ({secrets.token_hex(8)})"
    return f"{f'{own} to {other}' if receiver == 'engine' else f'{other} to {own}'} in {namespace}"


def read_cookie(path: str) -> bytes:
    """The cookie at a path that a server told, which may be any: only this user's own file is read, and nothing waited for.

    Raises:
        Unproven: it is not this user's own 0600 file of the right size and name.
    """
    shown = printable(path, 200)
    if not path.endswith(".cookie"):
        raise Unproven(NO_FILE, f"{shown} is no cookie file")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise Unproven(OTHER_USER, f"{shown} is another user's") from None
    except (OSError, ValueError) as error:
        raise Unproven(NO_FILE, f"{shown} cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid():
            raise Unproven(OTHER_USER, f"{shown} is of user {status.st_uid}, and this engine runs as {os.getuid()}")
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode) or mode != 0o600 or status.st_size != COOKIE_BYTES:
            raise Unproven(UNSAFE_FILE, f"{shown} has mode {mode:o} and {status.st_size} bytes")
        return os.read(descriptor, COOKIE_BYTES)
    finally:
        os.close(descriptor)


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
