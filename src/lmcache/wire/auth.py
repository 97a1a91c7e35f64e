"""Authentication over ZMQ: with a shared key file by CURVE, or, on loopback, by proofs of both sides that they can read a cookie.

The *cookie* is a file of random bytes that the ZMQ endpoint of the server creates, readable for the server's user only. A proof
is keyed BLAKE3 (the key is the cookie) over the proving side, the server's id, a fresh nonce from each side, and the name of the
TCP connection: the addresses and ports of both its ends, which each side reads from its kernel, and its network namespace. While
a connection lasts, no other connection of the namespace has the same values. So a proof is worthless on another connection and in
the other direction. It is worthless to a man in the middle, too, because server and engine each have a connection to him, and
these connections have different names.

The key file holds one Z85 secret (40 characters). The secret is the server's CURVE key, and the engines' key is derived from
it, so server and engines need only this one file. Without it no peer gets past the CURVE handshake.
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

from lmcache.config.given import check_secret_file
from lmcache.config.hosts import ends, in_url
from lmcache.config.load import KEY_REMEDY
from lmcache.errors import ConfigError, LMCacheError
from lmcache.observability.log import printable

COOKIE_BYTES = 32
KEY_FOR_BOTH = "give both the same key file (server: --auth-key-file, engine: LMCACHE_AUTH_KEY_FILE)"
NO_FILE, OTHER_USER, UNSAFE_FILE, OTHER_ADDRESS = (
    "no cookie file",
    "another user",
    "unsafe cookie file",
    "another address",
)
BEYOND_LOOPBACK = "beyond loopback"
REASONS = {
    NO_FILE: "it cannot read this server's cookie file: mount --socket-dir where the engine runs, at the same path",
    OTHER_USER: "it runs as another user than this server: run both as the same user",
    UNSAFE_FILE: "this server's cookie file has been changed: restart the server",
    OTHER_ADDRESS: "it connected through something that forwards to this server's port: give it the address of the port itself",
    BEYOND_LOOPBACK: "this server has no key, and the engine does not set LMCACHE_INSECURE_NO_AUTH=1",
}
"""Maps the reason why an engine without a key sends no payload to a server to the explanation in the server's log."""


class Unproven(LMCacheError):
    """The server has not proved that it runs as this user. reason: a key of `REASONS`; "" if it seems to be no LMCache server."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def proof(
    cookie: bytes,
    by: Literal["server", "engine"],
    server_id: bytes,
    engine_nonce: bytes,
    server_nonce: bytes,
    connection: str,
) -> bytes:
    """Return the 32 bytes by which the side `by` proves that it knows the cookie. connection: its `connection_name`."""
    hasher = blake3(key=cookie)
    for part in (by.encode(), server_id, engine_nonce, server_nonce, connection.encode()):
        hasher.update(len(part).to_bytes(4, "little") + part)
    return hasher.digest()


def connection_name(message: zmq.Frame, receiver: Literal["server", "engine"]) -> str:
    """Name the TCP connection that brought `message`: `127.0.0.1:40000 to 127.0.0.1:5555 in net:[4026531840]`, the engine's end
    first. receiver: which side calls this.

    Both ends of a connection within one network namespace get the same name. Each namespace has a loopback of its own. If the
    kernel gives no addresses (the connection has ended, or there is no /proc), the name is random, so that no proof matches. If
    the connection has ended and its descriptor is in use for a new one, that one is named; its proof helps only its own peers.
    """
    try:
        own, other = (f"{in_url(host)}:{port}" for host, port in ends(int(message.get(zmq.SRCFD))))
        namespace = os.readlink("/proc/self/ns/net")
    except (OSError, zmq.ZMQError):
        return f"an unknown connection ({secrets.token_hex(8)})"
    return f"{f'{own} to {other}' if receiver == 'engine' else f'{other} to {own}'} in {namespace}"


def read_cookie(path: str) -> bytes:
    """Return the cookie at a path that a server has named which has proved nothing yet.

    No file of another user is read, and no kind of file (such as a FIFO) can make this call block.

    Raises:
        Unproven: there is no such file, or it is not this user's own 0600 `.cookie` file of `COOKIE_BYTES` bytes.
    """
    shown = printable(path, 200)
    if not path.endswith(".cookie"):
        raise Unproven(NO_FILE, f"{shown} is not named like a cookie file")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise Unproven(OTHER_USER, f"{shown} belongs to another user") from None
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
    """Make a server's socket, not bound yet, accept only engines with the same key file. The caller has to `stop()` the result.

    Raises:
        ConfigError: the file is missing, readable by others, or not a Z85 key.
    """
    secret = read_key(key_file)
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    allowed = zmq.curve_public(_engine_secret(secret))

    class OneKey:
        def callback(self, domain: str, key: bytes) -> bool:
            return hmac.compare_digest(key, allowed)  # both are in Z85

    authenticator.configure_curve_callback(domain="*", credentials_provider=OneKey())
    socket.curve_secretkey = secret
    socket.curve_publickey = zmq.curve_public(secret)
    socket.curve_server = True
    return authenticator


def protect_engine(socket: zmq.Socket[bytes], key_file: Path) -> None:
    """Make an engine's socket connect only to a server that has the same key file, by CURVE. Raises ConfigError as `read_key`."""
    secret = read_key(key_file)
    own = _engine_secret(secret)
    socket.curve_secretkey = own
    socket.curve_publickey = zmq.curve_public(own)
    socket.curve_serverkey = zmq.curve_public(secret)


def read_key(key_file: Path) -> bytes:
    """Return the Z85 secret (40 characters) in a key file of a server or an engine.

    Raises:
        ConfigError: the file is missing, readable by others, or not a Z85 key. The message names the server's flag.
    """
    check_secret_file(key_file, "--auth-key-file", f"; {KEY_REMEDY}")
    secret = key_file.read_bytes().strip()
    try:
        zmq.curve_public(secret)
    except (ValueError, zmq.ZMQError) as error:
        raise ConfigError(f"--auth-key-file {key_file}: not one Z85 secret of 40 characters; {KEY_REMEDY}") from error
    return secret


def _engine_secret(secret: bytes) -> bytes:
    return z85.encode(blake3(secret, derive_key_context="lmcache engine curve key v1").digest())
