"""The hello of an engine process to its server: over the Unix socket where that can be used, else over the port; and what is
wrong where no server answers it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from lmcache import __version__
from lmcache.config.hosts import connect, in_url
from lmcache.engine.endpoint import Endpoint, key_file
from lmcache.engine.proofs import prove
from lmcache.errors import LMCacheError, ServerRefused, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier, UnixCarrier, ZmqCarrier
from lmcache.wire.knock import knock
from lmcache.wire.sockets import socket_place

_CONNECT_SECONDS = 1.0
_PATH_CHARACTERS = 200
"""The log shows at most this many characters of a path that a server names."""


class Absent(ServerUnavailable):
    """Nothing listens at the port, or something that is no LMCache server."""


class NotThereYet(ServerUnavailable):
    """Nothing listens at the Unix socket."""


def is_away(error: Exception) -> bool:
    """Whether the error means that no server answers, as opposed to one that cannot serve this engine."""
    return isinstance(error, (ServerUnavailable, OSError))


def say_hello(endpoint: Endpoint, session: bytes) -> tuple[Carrier, m.Welcome, int]:
    """Return a new connection's carrier, the server's welcome, and the descriptor of its arena, -1 for payload frames.

    session: names the connections of one object in this process. The caller closes the carrier and the descriptor.

    Raises:
        ServerUnavailable: no server answers; the text says why.
        ServerRefused: a server answers that cannot serve this engine.
        ConfigError: the key file of this process cannot be used.
    """
    who = (endpoint.instance, endpoint.role, endpoint.rank, os.getpid())
    hello = m.Hello(m.PROTOCOL_VERSION, __version__, *who, session=session)
    return (_through_socket if endpoint.is_unix else _through_port)(endpoint, hello)


def _through_socket(endpoint: Endpoint, hello: m.Hello) -> tuple[Carrier, m.Welcome, int]:
    place = socket_place(endpoint.address)
    named = place.startswith("\0")  # any user can take a name, so only this user's server is meant
    uids = () if named else endpoint.server_uids
    if not named and (why_not := _why_not_mine(place, uids)):
        raise ServerRefused(why_not) if os.path.exists(place) else NotThereYet(why_not)
    try:
        return _at_socket(place, hello, uids)
    except ServerUnavailable as error:
        if isinstance(error.__cause__, ConnectionRefusedError):
            raise NotThereYet("nobody listens there") from error
        raise


def _at_socket(place: str, hello: m.Hello, uids: tuple[int, ...]) -> tuple[Carrier, m.Welcome, int]:
    unix = UnixCarrier(place, hello, _CONNECT_SECONDS, uids)
    try:
        return unix, _welcome(unix.welcome), unix.descriptor
    except ServerRefused:
        if unix.descriptor >= 0:
            os.close(unix.descriptor)
        unix.close()
        raise


def _through_port(endpoint: Endpoint, hello: m.Hello) -> tuple[Carrier, m.Welcome, int]:
    door = ZmqCarrier(_reached(endpoint.address, _CONNECT_SECONDS), endpoint.auth_key_file)
    try:
        try:
            welcome = _welcome(door.exchange(hello, _CONNECT_SECONDS)[0])
        except ServerUnavailable as error:
            raise _explained(error, door, endpoint.auth_key_file, _CONNECT_SECONDS) from error
        by_payload = endpoint.transfer_mode == "payload"
        why_not = (
            "this engine asks for payload frames"
            if by_payload
            else _why_not_mine(welcome.socket_path, endpoint.server_uids)
        )
        if not why_not:
            at_socket = _at_socket(welcome.socket_path, hello, endpoint.server_uids)
            door.close()
            return at_socket
        try:
            with_key = endpoint.auth_key_file is not None  # CURVE ensures that both sides have the same key
            proof = b"" if with_key else prove(door, welcome, hello, endpoint.insecure_no_auth)
            door.trust()
            hello = msgspec.structs.replace(hello, payload=True, proof=proof)
            return door, _welcome(door.exchange(hello, _CONNECT_SECONDS)[0]), -1
        except ServerRefused as error:
            raise ServerRefused(f"{why_not}: {error}") from error
    except BaseException:
        door.close()
        raise


def probe(address: str, timeout_seconds: float) -> None:
    """Return if an LMCache server of any version answers at tcp://host:port.

    Raises:
        ServerUnavailable: no server answers; the text says why.
        ServerRefused: a server answers that accepts only another key, or that has no key while this process has one.
        ConfigError: the key file of this process cannot be used.
    """
    reached, key = _reached(address, timeout_seconds), key_file()
    carrier = ZmqCarrier(reached, key)
    try:
        carrier.exchange(m.Hello(m.PROTOCOL_VERSION, __version__, "", "probe", 0, os.getpid()), timeout_seconds)
    except ServerUnavailable as error:
        raise _explained(error, carrier, key, timeout_seconds) from error
    finally:
        carrier.close()


def _reached(address: str, timeout_seconds: float) -> str:
    """Return tcp://host:port with a numeric address of the host at which a process listens, for all that follows. TCP reports
    at once that no process listens; ZMQ does not report it.

    Raises:
        ServerUnavailable: no process listens; the text says why.
    """
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        with connect(host, int(port), timeout_seconds) as connection:
            return f"tcp://{in_url(connection.getpeername()[0])}:{port}"
    except OSError as error:
        raise Absent(str(error)) from error


def _explained(error: ServerUnavailable, door: ZmqCarrier, key: Path | None, timeout_seconds: float) -> LMCacheError:
    """Return why the hello had no answer, found by asking what listens there: ZMQ does not say."""
    try:
        listener = knock(door.host, door.port, timeout_seconds, "CURVE" if key else "NULL")
    except OSError as refusal:
        return Absent(str(refusal))
    if listener == "CURVE" and key is None:
        return ServerRefused(
            "it has a key file, and this engine has none: set LMCACHE_AUTH_KEY_FILE to a copy of the server's --auth-key-file"
        )
    if listener == "NULL" and key is not None:
        return ServerRefused(
            f"this engine has the key file {key}, and the server has none: start it with --auth-key-file and the same "
            "file, or unset LMCACHE_AUTH_KEY_FILE"
        )
    if listener in ("HTTP", "something else"):
        return Absent(
            f"port {door.port} speaks {listener}: give the engines' port, which is --port of `lmcache server`, 5555 by default"
        )
    if listener == "CURVE" and door.turned_away():
        return ServerRefused(f"its key is not this engine's: is {key} a copy of the server's --auth-key-file?")
    return ServerUnavailable(f"{error}, but the port is open")


def ask(carrier: Carrier, request: m.Message, expect: type[m.AnswerT]) -> m.AnswerT:
    """Send one request over a carrier whose connection is being made, and return the answer.

    Raises:
        ServerUnavailable, ServerRefused: as `Connection.call`.
    """
    answer, _ = carrier.exchange(request, _CONNECT_SECONDS)
    if isinstance(answer, expect):
        return answer
    raise refusal_in(answer)


def refusal_in(answer: m.Answer) -> ServerRefused:
    """Return the error for an answer of an unexpected kind. Its sender may be no LMCache server."""
    if isinstance(answer, m.Error):
        return ServerRefused(printable(answer.text))
    return ServerRefused(f"unexpected answer {type(answer).__name__}")


def _welcome(answer: m.Answer) -> m.Welcome:
    if not isinstance(answer, m.Welcome):
        raise refusal_in(answer)
    if answer.version != m.PROTOCOL_VERSION:
        raise ServerRefused(m.version_error(m.PROTOCOL_VERSION, __version__, answer.version, answer.software))
    if answer.chunk_tokens < 1 or not answer.arena:
        raise ServerRefused(
            f"its welcome is invalid: {answer.chunk_tokens}-token chunks and arena {answer.arena[:32]!r}"
        )
    return answer


def _why_not_mine(path: str, uids: tuple[int, ...]) -> str:
    """Return why this user cannot map the arena behind a socket, or "" if the socket exists and belongs to this user or one of
    `uids`."""
    shown, own = printable(path, _PATH_CHARACTERS), os.getuid()
    try:
        owner = os.stat(path).st_uid
    except (OSError, ValueError) as error:
        return f"user {own} cannot see its socket '{shown}' ({getattr(error, 'strerror', error)}){_folder_of_another(path)}"
    if owner == own or owner in uids:
        return ""
    return f"its socket {shown} is user {owner}'s, and this engine is user {own}'s{_way_for_two(owner)}"


def _folder_of_another(path: str) -> str:
    """Say whose folder a socket is in that this user may not look into; "" if it is this user's own, or there is none."""
    try:
        owner = os.stat(os.path.dirname(path)).st_uid
    except (OSError, ValueError):
        return ""
    return "" if owner == os.getuid() else f" in a folder of user {owner}{_way_for_two(owner)}"


def _way_for_two(owner: int) -> str:
    return f" (start the server with --allow-uid {os.getuid()}, and this engine with LMCACHE_ALLOW_SERVER_UID={owner})"
