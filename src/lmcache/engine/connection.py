"""The connection of one engine process to the server: a thread keeps it up, and the first missed deadline closes it.

While there is no connection every call fails at once. So a dead server costs an engine one deadline, and a missing one nothing.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lmcache import __version__
from lmcache.config.hosts import connect, in_url
from lmcache.config.options import switch
from lmcache.engine.proofs import prove
from lmcache.engine.runtime import RUNTIME, Runtime
from lmcache.errors import IdentityUnknown, LMCacheError, ServerRefused, ServerUnavailable
from lmcache.observability.log import init_logger, printable
from lmcache.wire import messages as m
from lmcache.wire.carriers import Carrier, UnixCarrier, ZmqCarrier
from lmcache.wire.knock import knock
from lmcache.wire.sockets import UNIX, socket_place

logger = init_logger(__name__)

TRANSFER_MODES = ("auto", "engine_driven", "lmcache_driven", "payload")
_BACKOFF_SECONDS = (0.2, 0.5, 1.0, 2.0)
_USELESS_BACKOFF_SECONDS = (0.2, 1.0, 10.0)
"""Pauses between attempts where a server answers but cannot serve this engine until one of the two has been restarted."""
_SOCKET_SECONDS = 0.1
"""Seconds between checks for something that is expected soon: a server's socket, or the identity of the weights. A check costs
microseconds, and the first prompt must find the connection ready."""
_STARTING_SECONDS = 60.0
"""How long the socket of an expected server may be missing before that is logged: ranks are ready before schedulers are."""
START_SECONDS = 10.0
"""How long the start of an engine waits for a server that listens and has not answered the hello: a busy server is slow."""
OWN_START_SECONDS = 30.0
"""How long the start of an engine waits for a server of its own, which starts at the same time; a busy machine needs seconds."""
_CONNECT_SECONDS = 1.0
_LOOK_SECONDS = 1.0
"""The longest time between two checks for due heartbeats and renewals. The end of a connection is noticed at once."""
GONE_SECONDS = 10.0
"""A server that ended and is not back after this time is taken for gone. Loads that were planned before have ended by then."""
_PATH_CHARACTERS = 200
"""The log shows at most this many characters of a path that a server names."""
RENEWALS = 4
"""How often a lease is renewed within the life of a claim: one late or lost renewal does no harm."""
MOST_DEADLINE_SECONDS = 3600.0
MOST_HEARTBEAT_SECONDS = 10.0
"""A server forgets an engine with payload frames after 30 s without a message."""


def server_address(host: str = "tcp://localhost", port: int = 5555) -> str:
    """Return tcp://host:port for a host with or without the scheme. An IPv6 address gets its brackets.

    Raises:
        ValueError: another scheme than tcp, or a port out of range.
    """
    scheme, _, bare = host.rpartition("://")
    if scheme not in ("", "tcp"):
        raise ValueError(f"host {host!r}: only tcp:// is spoken")
    if not 0 < int(port) < 65536:
        raise ValueError(f"port {port!r}: give one between 1 and 65535")
    return f"tcp://{in_url(bare)}:{port}"


def given_address(text: str) -> str:
    """Return tcp://host:port for one text that gives host and port.

    Raises:
        ValueError: host or port is missing, the scheme is not tcp, or the port is out of range.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise ValueError(f"address {text!r}: give tcp://host:port, such as tcp://localhost:5555")
    return server_address(host or "localhost", int(port))


@dataclass(frozen=True)
class Endpoint:
    """The server's address and the identity of the process that connects. An engine's scheduler and ranks share one `instance`.

    address: tcp://host:port, or for a server on this host unix:///path/of/its/socket or unix://@name.
    """

    address: str
    instance: str
    role: str
    rank: int = 0
    deadline_seconds: float = 2.0
    heartbeat_seconds: float = 10.0
    transfer_mode: str = "auto"
    auth_key_file: Path | None = field(default_factory=lambda: _key_file())
    insecure_no_auth: bool = field(default_factory=lambda: _insecure())
    """Without a key, send payload frames even to a server that has not proved itself. Default: LMCACHE_INSECURE_NO_AUTH."""

    def __post_init__(self) -> None:
        if self.transfer_mode not in TRANSFER_MODES:
            raise ValueError(f"transfer mode {self.transfer_mode!r}: give one of {', '.join(TRANSFER_MODES)}")
        if self.transfer_mode == "payload" and _is_unix(self):
            raise ValueError(f"payload frames do not travel over {self.address}: leave the transfer mode at auto")
        if not 0 < self.deadline_seconds < MOST_DEADLINE_SECONDS:
            raise ValueError(
                f"deadline of {self.deadline_seconds} seconds: give one between 0 and {MOST_DEADLINE_SECONDS:g}"
            )


class _Absent(ServerUnavailable):
    """Nothing listens at the port, or something that is no LMCache server."""


class _NotThereYet(ServerUnavailable):
    """Nothing listens at the Unix socket."""


_connections: set[Connection] = set()
"""The connections of this process. What one of them has logged, another one to the same server does not repeat."""
_logging = threading.Lock()
"""Guards `_connections` and what they have logged."""


class Connection:
    """Connects to the server and reconnects, in a thread of its own, which runs the callbacks.

    on_welcome: registers through the carrier of a new connection, before any other use of it; raises LMCacheError if this server
    cannot serve; must close the arena's descriptor unless it is -1. before_hello: runs while there is no connection and returns
    once this process fills no extent any more, as the hello states; IdentityUnknown makes the thread try again, without a log
    line. held: returns the leases of this process, renewed `RENEWALS` times within the life of a claim. on_gone: runs at each
    attempt to connect that fails `GONE_SECONDS` or more after the server of a mapped arena has ended."""

    def __init__(
        self,
        endpoint: Endpoint,
        on_welcome: Callable[[Carrier, m.Welcome, int], None],
        before_hello: Callable[[], object] = lambda: None,
        held: Callable[[], list[int]] = list,
        on_gone: Callable[[], None] = lambda: None,
        runtime: Runtime = RUNTIME,
    ) -> None:
        self.endpoint, self._now = endpoint, runtime.now
        self._on_gone = on_gone
        self._ended_at = math.inf
        """When the server closed the connection. A server does so when it ends, and not while it is frozen."""
        self._before_hello, self._held = before_hello, held
        self._session = secrets.token_bytes(16)
        self._on_welcome = on_welcome
        self._carrier: Carrier | None = None
        self._lock = threading.Lock()
        self._closed, self._goodbye = False, True
        self._wake = threading.Event()
        self._connected = threading.Event()
        self._settled = threading.Event()
        """There is a connection, or the last attempt has found no server, or none that can serve this engine."""
        self._welcomed = False
        """A server has answered the hello, and `on_welcome` has not returned yet."""
        self._logged = ""
        """Why no server serves this process, as last logged; "" since the last connection."""
        self._lost = False
        self._since = self._now()
        self._payload = False
        self._renewal_seconds = self._renewed = math.inf
        with _logging:
            _connections.add(self)
        self._thread = runtime.start(self._keep_up, f"lmcache-link-{endpoint.role}")

    @property
    def connected(self) -> bool:
        return self._carrier is not None

    def wait_connected(self, timeout_seconds: float) -> bool:
        return self._connected.wait(timeout_seconds)

    def wait_for_server(self, seconds: float | None = None) -> None:
        """Wait for the first connection, at most until `seconds` after this object was made. Return at once when it is known that
        no server listens, or none that can serve this engine. None: `START_SECONDS`, or `OWN_START_SECONDS` at a Unix socket."""
        if seconds is None:
            seconds = OWN_START_SECONDS if _is_unix(self.endpoint) else START_SECONDS
        until = self._since + seconds
        self._settled.wait(max(0.0, until - self._now()))

    def wait_welcomed(self) -> None:
        """If a server has answered the hello and `on_welcome` still runs, wait for its end, at most one deadline."""
        if self._welcomed:
            self._connected.wait(self.endpoint.deadline_seconds)

    def call(
        self, request: m.Message, expect: type[m.AnswerT], frames: Sequence[bytes | memoryview] = ()
    ) -> tuple[m.AnswerT, list[bytes]]:
        """Send one request and return its answer and payload frames.

        Raises:
            ServerUnavailable: no connection, or no answer within the deadline, which closes the connection.
            ServerRefused: the server understood the request and declined it.
        """
        with self._lock:
            carrier = self._carrier
            if carrier is None:
                raise ServerUnavailable(f"no server at {self.endpoint.address}")
            try:
                answer, payload = carrier.exchange(request, self.endpoint.deadline_seconds, frames)
            except ServerUnavailable as error:
                self._give_up(str(error))
                raise
            except BaseException:
                # Ctrl-C: the answer, which may grant a lease, is lost. The next connection reports the leases that are held.
                self._give_up("a call was interrupted")
                raise
            if isinstance(answer, m.Error) and answer.code == "hello":
                self._give_up("it has forgotten this engine")
        if isinstance(answer, expect):
            return answer, payload
        raise _refusal(answer)

    def post(self, request: m.Message) -> None:
        """Send a message without waiting. It is lost if there is no connection."""
        with self._lock:
            if self._carrier is None:
                return
            try:
                self._carrier.post(request)
            except ServerUnavailable as error:
                self._give_up(str(error))
            except BaseException:  # a part of the message may have been sent
                self._give_up("a call was interrupted")
                raise

    def close(self, goodbye: bool = True) -> None:
        """Close the connection and end the thread. Without `goodbye` the server keeps this process's claims until it ends."""
        self._closed, self._goodbye = True, goodbye
        self._wake.set()
        self._hang_up()
        self._thread.join(5.0)
        with _logging:
            _connections.discard(self)

    def _give_up(self, why: str) -> None:
        """Close the carrier. The caller holds the lock."""
        if self._carrier is not None:
            if isinstance(self._carrier, UnixCarrier) and self._carrier.wait_for_end(0.0):
                self._ended_at = self._now()
            self._carrier.close()
            self._carrier = None
            self._connected.clear()
            with _logging:
                is_known, self._lost = any(other._lost for other in self._others()), True
            if not is_known:
                address = self.endpoint.address
                logger.warning("Lost the LMCache server at %s (%s); the engine goes on without it", address, why)
        self._wake.set()

    # The connection's thread

    def _keep_up(self) -> None:
        attempt = 0
        while not self._closed:
            carrier = self._carrier
            if carrier is None:
                try:
                    self._connect()
                    attempt = 0
                    continue
                except Exception as error:  # the edge of the thread: no message of a server may end it
                    starting = self._now() - self._since < _STARTING_SECONDS
                    coming = isinstance(error, IdentityUnknown) or (isinstance(error, _NotThereYet) and starting)
                    if not coming:
                        self._log_once(error)
                    if isinstance(error, _Absent) or not (coming or _is_away(error)):
                        self._settled.set()
                    if not isinstance(error, (LMCacheError, OSError)):
                        logger.debug("Unexpected error while connecting", exc_info=True)
                    if self._now() - self._ended_at >= GONE_SECONDS:
                        self._on_gone()
                    backoff = _BACKOFF_SECONDS if _is_away(error) else _USELESS_BACKOFF_SECONDS
                    self._wake.wait(_SOCKET_SECONDS if coming else backoff[min(attempt, len(backoff) - 1)])
                    self._wake.clear()
                    attempt += 1
            else:
                self._watch(carrier)
        self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            if self._carrier is not None:
                if self._goodbye:
                    try:
                        self._carrier.post(m.Bye())
                    except ServerUnavailable as error:
                        logger.debug("The goodbye was not sent: %s", error)
                self._carrier.close()
                self._carrier = None

    def _watch(self, carrier: Carrier) -> None:
        """Wait until the connection ends, or a heartbeat or a renewal is due, and send what is due."""
        if self._payload:
            self._wake.wait(min(self.endpoint.heartbeat_seconds, self._renewal_seconds))
            self._wake.clear()
            try:
                if not self._closed:
                    self.call(m.Ping(), m.Ok)
            except LMCacheError as error:
                logger.debug("A heartbeat failed: %s", error)
        elif carrier.wait_for_end(min(_LOOK_SECONDS, self._renewal_seconds)) and not self._closed:
            with self._lock:
                if self._carrier is carrier:
                    self._give_up("it has hung up")
        now = self._now()
        if now - self._renewed >= self._renewal_seconds and not self._closed:
            self._renewed = now
            if held := self._held():
                self.post(m.Renew(held))

    def _connect(self) -> None:
        endpoint = self.endpoint
        who = (endpoint.instance, endpoint.role, endpoint.rank, os.getpid())
        hello = m.Hello(m.PROTOCOL_VERSION, __version__, *who, session=self._session)
        self._before_hello()
        carrier, welcome, descriptor = self._through_socket(hello) if _is_unix(endpoint) else self._through_port(hello)
        self._payload = not isinstance(carrier, UnixCarrier)
        self._welcomed = True
        self._renewal_seconds = welcome.claim_seconds / RENEWALS if welcome.claim_seconds > 0 else math.inf
        self._renewed = self._now()
        try:
            self._on_welcome(carrier, welcome, descriptor)
            with self._lock:
                self._carrier = carrier
            self._logged, self._lost, self._ended_at = "", False, math.inf
            self._connected.set()
            self._settled.set()
        except BaseException:
            carrier.close()
            raise
        finally:
            self._welcomed = False
        how = "payload frames" if self._payload else "the mapped arena"
        logger.info(
            "Connected to the LMCache server at %s (%d-token chunks, %s)", endpoint.address, welcome.chunk_tokens, how
        )

    def _through_socket(self, hello: m.Hello) -> tuple[Carrier, m.Welcome, int]:
        """Return the carrier, the welcome, and the arena's descriptor."""
        place = socket_place(self.endpoint.address)
        if not place.startswith("\0") and (why_not := _why_not_mine(place)):
            raise ServerRefused(why_not) if os.path.exists(place) else _NotThereYet(why_not)
        try:
            unix = UnixCarrier(place, hello, _CONNECT_SECONDS)
        except ServerUnavailable as error:
            if isinstance(error.__cause__, ConnectionRefusedError):
                raise _NotThereYet("nobody listens there") from error
            raise
        try:
            return unix, _welcome_with(unix), unix.descriptor
        except LMCacheError:
            unix.close()
            raise

    def _through_port(self, hello: m.Hello) -> tuple[Carrier, m.Welcome, int]:
        """As `_through_socket`; the descriptor is -1 where payload frames are to be used."""
        endpoint = self.endpoint
        door = ZmqCarrier(_reached(endpoint.address, _CONNECT_SECONDS), endpoint.auth_key_file)
        carrier: Carrier = door
        try:
            try:
                welcome = _welcome(door.exchange(hello, _CONNECT_SECONDS)[0])
            except ServerUnavailable as error:
                raise _explained(error, door, endpoint.auth_key_file, _CONNECT_SECONDS) from error
            unix, why_not = self._unix(welcome, hello)
            if unix is not None:
                carrier = unix
                door.close()
                return unix, _welcome_with(unix), unix.descriptor
            try:
                with_key = endpoint.auth_key_file is not None  # CURVE ensures that both sides have the same key
                proof = b"" if with_key else prove(door, welcome, hello, endpoint.insecure_no_auth)
                door.trust()
                hello = msgspec.structs.replace(hello, payload=True, proof=proof)
                return door, _welcome(door.exchange(hello, _CONNECT_SECONDS)[0]), -1
            except ServerRefused as error:
                raise ServerRefused(f"{why_not}: {error}") from error
        except BaseException:
            carrier.close()
            door.close()
            raise

    def _unix(self, welcome: m.Welcome, hello: m.Hello) -> tuple[UnixCarrier | None, str]:
        """Return the carrier over the Unix socket, or None and the reason."""
        if self.endpoint.transfer_mode == "payload":
            return None, "this engine asks for payload frames"
        why_not = _why_not_mine(welcome.socket_path)
        return (None, why_not) if why_not else (UnixCarrier(welcome.socket_path, hello, _CONNECT_SECONDS), "")

    def _others(self) -> list[Connection]:
        """Return this process's other connections to the same server."""
        return [one for one in _connections if one is not self and one.endpoint.address == self.endpoint.address]

    def _log_once(self, error: Exception) -> None:
        why = str(error) or type(error).__name__
        with _logging:
            is_known = why == self._logged or any(other._logged == why for other in self._others())
            self._logged = why
        if is_known:
            return
        what = (
            "No LMCache server at %s yet" if _is_away(error) else "The LMCache server at %s is of no use to this engine"
        )
        logger.warning(f"{what} (%s); prompts are computed without it", self.endpoint.address, why)


def _is_away(error: Exception) -> bool:
    """Whether the error means that no server answers, as opposed to one that cannot serve this engine."""
    return isinstance(error, (ServerUnavailable, OSError))


def probe(address: str, timeout_seconds: float) -> None:
    """Return if an LMCache server of any version answers at tcp://host:port.

    Raises:
        ServerUnavailable: no server answers; the text says why.
        ServerRefused: a server answers that accepts only another key, or that has no key while this process has one.
        ConfigError: the key file of this process cannot be used.
    """
    reached, key = _reached(address, timeout_seconds), _key_file()
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
        raise _Absent(str(error)) from error


def _explained(error: ServerUnavailable, door: ZmqCarrier, key: Path | None, timeout_seconds: float) -> LMCacheError:
    """Return why the hello had no answer, found by asking what listens there: ZMQ does not say."""
    try:
        listener = knock(door.host, door.port, timeout_seconds, "CURVE" if key else "NULL")
    except OSError as refusal:
        return _Absent(str(refusal))
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
        return _Absent(
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
    raise _refusal(answer)


def _refusal(answer: m.Answer) -> ServerRefused:
    """Return the error for an answer of an unexpected kind. Its sender may be no LMCache server."""
    if isinstance(answer, m.Error):
        return ServerRefused(printable(answer.text))
    return ServerRefused(f"unexpected answer {type(answer).__name__}")


def _welcome(answer: m.Answer) -> m.Welcome:
    if not isinstance(answer, m.Welcome):
        raise _refusal(answer)
    if answer.version != m.PROTOCOL_VERSION:
        raise ServerRefused(m.version_error(m.PROTOCOL_VERSION, __version__, answer.version, answer.software))
    if answer.chunk_tokens < 1 or not answer.arena:
        raise ServerRefused(
            f"its welcome is invalid: {answer.chunk_tokens}-token chunks and arena {answer.arena[:32]!r}"
        )
    return answer


def _welcome_with(unix: UnixCarrier) -> m.Welcome:
    try:
        return _welcome(unix.welcome)
    except ServerRefused:
        if unix.descriptor >= 0:
            os.close(unix.descriptor)
        raise


def _key_file() -> Path | None:
    name = os.environ.get("LMCACHE_AUTH_KEY_FILE", "")
    return Path(name) if name else None


def _insecure() -> bool:
    text = os.environ.get("LMCACHE_INSECURE_NO_AUTH") or "false"
    try:
        return switch(text)
    except ValueError as error:
        raise ValueError(f"LMCACHE_INSECURE_NO_AUTH is {text!r}: it {error}") from None


def _is_unix(endpoint: Endpoint) -> bool:
    return endpoint.address.startswith(UNIX)


def _why_not_mine(path: str) -> str:
    """Return why this user cannot map the arena behind a socket, or "" if the socket exists and belongs to this user."""
    shown = printable(path, _PATH_CHARACTERS)
    try:
        owner = os.stat(path).st_uid
    except (OSError, ValueError) as error:
        return f"user {os.getuid()} cannot see its socket '{shown}' ({getattr(error, 'strerror', error)})"
    return (
        "" if owner == os.getuid() else f"its socket {shown} is user {owner}'s, and this engine is user {os.getuid()}'s"
    )
