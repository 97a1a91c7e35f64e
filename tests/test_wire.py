"""Messages, frames, carriers and proofs, without a server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import types
from typing import ClassVar

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lmcache.chunks import Layout
from lmcache.compiled import native
from lmcache.config import hosts
from lmcache.errors import ConfigError, ServerUnavailable, WireError
from lmcache.wire import auth, carriers
from lmcache.wire import messages as m
from lmcache.wire.carriers import UnixCarrier, ZmqCarrier
from lmcache.wire.frames import FrameReader, frame
from servers import PATIENCE, beside, free_port

PATIENT = 3600.0  # seconds; who has so many does not give up while a test runs
LAYOUT = Layout("m", "bfloat16", 2, 2, 16, 16)
REQUESTS = [
    m.Hello(1, "0.1", "i", "worker", 3, 77, True, b"p", b"s"),
    m.Ping(),
    m.Register(LAYOUT, 2, 1, 4096),
    m.Lookup(1, bytes(32), 1, 100.0, "request-1"),
    m.Lookup(1, bytes(32), 1, 100.0, "request-1", [2], True, "engine-1", True, True),
    m.Release([1, 2]),
    m.Release([], ["request-1"]),
    m.Release([], [], None, (1, bytes(16), 70)),
    m.Reserve(1, 0, bytes(16), False, bytes(16)),
    m.Commit(4, True),
    m.Copied("load", 16, 0.5, 0),
    m.Fetch(1, 0, 0, 4),
    m.Fill(1, 0),
    m.Clear(),
    m.Dropped(3, "why"),
    m.Bye(),
    m.Hold([1]),
    m.Renew([1, 2]),
    m.Challenge(bytes(32)),
    m.Declined("why", "i", "worker", 0, 7, 8),
    m.TakeNews(),
    m.Differs("chatcmpl-1", 37),
    m.Has(bytes(16), 1, bytes(32)),
    m.Pull(bytes(16), 2, 1, bytes(32), 3),
    m.Meet(),
]
ANSWERS = [
    m.Welcome(1, "0.1", b"s", 16, "/p", b"a", 4096, "/c"),
    m.Ok(3),
    m.Error("refused", "why"),
    m.Registered(2),
    m.Registered(2, False, True, True),
    m.Found(2, 1, bytes(8)),
    m.Reserved(1, bytes(8), 0, ""),
    m.Having(b"\1\0"),
    m.Pulled([bytes(128), b""], 7, bytes(4)),
    m.Met(3, b"agent", 1 << 46),
    m.Proven(bytes(32), bytes(32), "127.0.0.1:5555 in net:[1]"),
    m.News([("stored", bytes(32)), ("removed", b"")], True),
]


def test_every_message_comes_back_as_it_went():
    assert {type(one) for one in REQUESTS} == set(m.Request.__args__)
    assert {type(one) for one in ANSWERS} == set(m.Answer.__args__)
    for one in REQUESTS:
        assert m.decode_request(m.encode(7, one)) == (7, one)
    for one in ANSWERS:
        assert m.decode_answer(m.encode(7, one)) == (7, one)


def test_requests_are_no_answers_nor_the_other_way_round():
    for one in REQUESTS:
        with pytest.raises(WireError):
            m.decode_answer(m.encode(1, one))
    for one in ANSWERS:
        with pytest.raises(WireError):
            m.decode_request(m.encode(1, one))


def test_fields_that_a_later_version_appends_are_passed_over():
    """So that its hello can be answered with both versions."""
    raw = msgspec.msgpack.encode([1, [1, 2, "9.9", "i", "r", 0, 1, False, b"", b"", "new", {"er": 1}]])
    assert m.decode_request(raw)[1].version == 2


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(raw):
    for decode in (m.decode_request, m.decode_answer):
        try:
            decode(raw)
        except WireError as error:
            assert len(str(error)) < 300
    assert isinstance(m.sequence_of(raw), int)


@given(st.sampled_from(REQUESTS + ANSWERS), st.data())
def test_any_damage_is_a_message_or_a_wire_error(message, data):
    raw = bytearray(m.encode(5, message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    test_any_bytes_are_a_message_or_a_wire_error.hypothesis.inner_test(bytes(raw))


def test_bounds():
    welcome = m.Welcome(m.PROTOCOL_VERSION, "1.0", b"s" * 16, 16, "/run/s", b"a" * 16, 1 << 20, "/run/c.cookie")
    long = {
        "software": "1" * 201,
        "server": bytes(65),
        "socket_path": "/" * 4097,
        "arena": bytes(65),
        "cookie_path": "/" * 4097,
    }
    for name, value in long.items():
        with pytest.raises(WireError, match=r"malformed answer of \d+ bytes: Expected"):
            m.decode_answer(m.encode(1, msgspec.structs.replace(welcome, **{name: value})))
    for huge in (m.Release([1] * 70_000), m.Reserve(0, 0, b"", True, bytes(16 * (m.MAX_RESERVED_CHUNKS + 1)))):
        with pytest.raises(WireError):
            m.decode_request(m.encode(9, huge))
        assert m.sequence_of(m.encode(9, huge)) == 9
    with pytest.raises(WireError):
        m.decode_request(
            m.encode(1, m.Register(msgspec.structs.replace(LAYOUT), 1, 0, 1)).replace(b"bfloat16", b"bfloat99")
        )


@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 40)))
def test_frames_come_out_whole_however_the_stream_is_cut(payloads, cuts):
    stream, reader, out = b"".join(map(frame, payloads)), FrameReader(m.MAX_MESSAGE_BYTES), []
    for cut in [*cuts, len(stream)]:
        out += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert out == payloads


@pytest.mark.parametrize("first", [b"", b"\x01"])
def test_a_frame_beyond_the_bound_is_refused_before_it_is_awaited(first):
    announced = (m.MAX_MESSAGE_BYTES + 1).to_bytes(4, "little")
    reader = FrameReader(m.MAX_MESSAGE_BYTES)
    reader.feed(frame(b"x")[: len(first)])
    reader = FrameReader(m.MAX_MESSAGE_BYTES)
    reader.feed(announced[:2])
    with pytest.raises(WireError, match=str(m.MAX_MESSAGE_BYTES)):
        reader.feed(announced[2:])


# The carriers' ends


@pytest.fixture
def pairs(folders):
    """Unix carriers, each with the other side of its socket, which has said welcome: pairs()."""
    opened = []

    def make():
        path = str(folders("/tmp") / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            connecting = beside(lambda: UnixCarrier(path, REQUESTS[0], PATIENCE))
            other, _ = listener.accept()
        other.recv(4096)
        other.sendall(frame(m.encode(0, ANSWERS[0])))
        opened.append((connecting.result(PATIENCE), other))
        return opened[-1]

    yield make
    for carrier, other in opened:
        carrier.close()
        other.close()


@pytest.fixture
def pair(pairs):
    return pairs()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_server_of_another_user_is_not_spoken_to(folders):
    """It could lie about everything: no hello is sent to it, however its socket came to be where ours should be."""
    folder = folders("/tmp")
    folder.chmod(0o777)
    path = folder / "s"
    stranger = (
        "import os, socket, sys; os.setgid(65534); os.setuid(65534); one = socket.socket(socket.AF_UNIX)\n"
        "one.bind(sys.argv[1]); one.listen(); print(flush=True); print(one.accept()[0].recv(4096))"
    )
    with subprocess.Popen([sys.executable, "-c", stranger, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        with pytest.raises(ServerUnavailable, match="runs as user 65534"):
            UnixCarrier(str(path), REQUESTS[0], PATIENCE)
        assert process.stdout.read() == "b''\n"


def test_answers_to_posts_are_passed_over(pair):
    carrier, other = pair
    carrier.post(m.Ping())
    carrier.post(m.Ping())
    other.sendall(frame(m.encode(1, m.Ok(1))) + frame(m.encode(2, m.Ok(2)))[:3])
    other.sendall(frame(m.encode(2, m.Ok(2)))[3:] + frame(m.encode(3, m.Found(1, 2, b"abcd"))))
    assert carrier.exchange(m.Lookup(0, b""), PATIENCE) == (m.Found(1, 2, b"abcd"), [])


NONSENSE = [
    *(frame(b"junk"), b"\xff" * 9, frame(m.encode(8, m.Ok())), frame(m.encode(0, m.Ok()))),
    frame(m.encode(0, m.Error("x", "\x1b[2J" + "a" * 50_000))),
]


@pytest.mark.parametrize("says", NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_ends_a_carrier_at_once(pair, says):
    carrier, other = pair
    other.sendall(says)
    error = beside(lambda: carrier.exchange(m.Ping(), PATIENT)).exception(PATIENCE)
    assert isinstance(error, ServerUnavailable) and str(error).isprintable() and len(str(error)) < 1000


def test_silence_ends_a_carrier_at_the_deadline_of_its_call(pairs):
    """Neither earlier nor by any other: another call, to a server that is as silent and with a long deadline, goes on."""
    (carrier, _), (patient, other) = pairs(), pairs()
    waiting = beside(lambda: patient.exchange(m.Ping(), PATIENT))
    assert other.recv(4096)
    begin = time.monotonic()
    with pytest.raises(ServerUnavailable):
        carrier.exchange(m.Ping(), 0.3)
    assert time.monotonic() - begin >= 0.3 and not waiting.done()
    other.sendall(frame(m.encode(1, m.Ok(5))))
    assert waiting.result(PATIENCE) == (m.Ok(5), [])


class SlowSocket(socket.socket):
    """Each of its calls takes a quarter of a second, on a clock that only they move. `ends`: until when each may take."""

    now = 0.0
    ends: ClassVar[list[float]] = []

    def _take(self) -> None:
        timeout = self.gettimeout()
        assert timeout is not None
        SlowSocket.ends.append(SlowSocket.now + timeout)
        SlowSocket.now += 0.25

    def connect(self, *arguments):
        self._take()
        return super().connect(*arguments)

    def sendall(self, *arguments):
        self._take()
        return super().sendall(*arguments)

    def recv(self, *arguments):
        self._take()
        return super().recv(*arguments)

    def recvmsg(self, *arguments):
        self._take()
        return super().recvmsg(*arguments)


@pytest.fixture
def slow(monkeypatch):
    """Every socket of a carrier is a slow one, and the carriers' clock that of the slow sockets."""
    monkeypatch.setattr(carriers.socket, "socket", SlowSocket)
    clock = types.SimpleNamespace(monotonic=lambda: SlowSocket.now)
    monkeypatch.setattr(carriers, "time", clock)
    monkeypatch.setattr(hosts, "time", clock)  # which counts the seconds left
    SlowSocket.now, SlowSocket.ends = 0.0, []
    return SlowSocket


def test_a_connection_and_its_welcome_share_one_deadline(folders, slow):
    path, welcome = str(folders("/tmp") / "s"), frame(m.encode(0, ANSWERS[0]))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            with listener.accept()[0] as other:
                assert os.read(other.fileno(), 1 << 16)
                os.write(other.fileno(), welcome[:3])  # the rest comes too late

        beside(answer)
        with pytest.raises(ServerUnavailable, match="no answer within the deadline"):
            UnixCarrier(path, REQUESTS[0], 0.75)
    assert slow.ends == [0.75] * 3


def test_a_name_is_told_as_it_is_written():
    with pytest.raises(ServerUnavailable, match=r"^@nobody-here: ") as caught:
        UnixCarrier("\0nobody-here", REQUESTS[0], 1.0)
    assert "\0" not in str(caught.value)


def test_a_path_that_a_server_names_is_shown_cut_and_in_one_line():
    for path in ("/nowhere\nFORGED", "/" + "a" * 4000):
        with pytest.raises(ServerUnavailable) as caught:
            UnixCarrier(path, REQUESTS[0], 1.0)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def round_trip(connection: socket.socket, request: bytes, seconds: float) -> bytes:
    return native.exchange(connection.fileno(), request, 200, int(seconds * 1e6))


def test_a_round_trip_sends_all_of_a_request_and_returns_what_arrives_first():
    mine, other = socket.socketpair()
    with mine, other:
        big = os.urandom(4 << 20)  # more than the socket holds: the rest is sent while the other side reads
        read = bytearray()

        def answer():
            while len(read) < len(big):
                read.extend(other.recv(1 << 16))
            other.sendall(b"whole")

        thread = threading.Thread(target=answer)
        thread.start()
        assert round_trip(mine, big, PATIENCE) == b"whole"
        thread.join()
        assert read == big
        other.sendall(b"late")
        assert round_trip(mine, b"", PATIENCE) == b"late"
        other.close()
        assert round_trip(mine, b"", PATIENCE) == b""
        with pytest.raises(OSError, match="Broken pipe"):
            round_trip(mine, b"nobody reads this", PATIENCE)


def test_a_round_trip_ends_at_its_deadline_and_keeps_no_thread_from_running():
    mine, other = socket.socketpair()
    with mine, other:
        with pytest.raises(TimeoutError):
            round_trip(mine, b"x", 0.05)
        thread = threading.Thread(target=lambda: (other.recv(1), other.recv(1), other.sendall(b"y")))
        thread.start()
        assert round_trip(mine, b"x", PATIENCE) == b"y"  # the thread needed the GIL to say so
        thread.join()


def test_an_answer_in_drops_does_not_stretch_the_deadline(pair):
    """Of which there is no end."""
    carrier, other = pair
    stop = threading.Event()

    def drip():
        other.sendall((1 << 20).to_bytes(4, "little"))
        while not stop.wait(0.02):
            other.sendall(b"x")

    dripping = beside(drip)
    assert isinstance(beside(lambda: carrier.exchange(m.Ping(), 0.3)).exception(PATIENCE), ServerUnavailable)
    stop.set()
    dripping.result(PATIENCE)


def test_a_server_that_does_not_read_cannot_block_a_post(pair):
    carrier, _ = pair

    def post():
        for _ in range(1000):
            carrier.post(m.Lookup(0, bytes(64 << 10)))

    assert isinstance(beside(post).exception(PATIENCE), ServerUnavailable)


def test_posts_take_in_the_answers_to_earlier_ones(pair):
    """A socket that nobody reads holds some hundreds of them, and then its writer has to wait."""
    carrier, other = pair
    other.setblocking(False)
    for number in range(1, 3000):
        carrier.post(m.Ping())
        assert other.recv(1 << 16)
        other.sendall(frame(m.encode(number, m.Ok())))


def test_a_hang_up_is_seen(pair):
    carrier, other = pair
    assert not carrier.wait_for_end(0.01)
    other.close()
    assert carrier.wait_for_end(PATIENCE)
    with pytest.raises(ServerUnavailable):
        carrier.exchange(m.Ping(), 1.0)


def test_nobody_at_a_zmq_address_costs_the_deadline_of_the_call():
    """ZMQ does not try again, nor tell that it was refused."""
    carrier = ZmqCarrier(f"tcp://127.0.0.1:{free_port()}")
    begin = time.monotonic()
    error = beside(lambda: carrier.exchange(m.Ping(), 0.2)).exception(PATIENCE)
    assert isinstance(error, ServerUnavailable) and time.monotonic() - begin >= 0.2
    carrier.close()


def rogue(listener: socket.socket, says: bytes, times: int) -> None:
    """A server that says one thing again and again over ZMQ, until the other end hangs up."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(PATIENCE)
        ready = b"\5READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"ROUTER"
        connection.sendall(b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32))
        connection.sendall(bytes([4, len(ready)]) + ready)
        heard = b""
        while b"READY" not in heard:  # nothing may be said before
            heard += connection.recv(1 << 16)
        try:
            for _ in range(times):
                connection.sendall(says)
            while connection.recv(1 << 16):
                pass
        except ConnectionError:
            pass


def test_a_server_that_sends_a_message_without_end_is_hung_up_on_until_it_is_trusted():
    part = b"\3" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)  # and there is more of this message
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sending = beside(lambda: rogue(listener, part, 4))
        carrier = ZmqCarrier(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ServerUnavailable, match="has sent more than 1048576 bytes"):
            carrier.exchange(m.Ping(), PATIENCE)
        carrier.trust()
        with pytest.raises(ServerUnavailable, match="no answer within the deadline"):
            carrier.exchange(m.Ping(), 0.0)
        carrier.close()
        sending.result(PATIENCE)


def test_answers_that_nobody_asked_for_do_not_keep_a_post_waiting():
    class Flooded:
        """A socket of a connection on which answers arrive faster than they are read."""

        read, sent = 0, False

        def poll(self, *_):
            return zmq.POLLIN

        def recv_multipart(self, *_):
            self.read += 1
            assert self.read < 10_000
            return [b""]

        def send_multipart(self, *_, **__):
            self.sent = True

    carrier, flooded = ZmqCarrier("tcp://127.0.0.1:1"), Flooded()
    own, carrier._socket = carrier._socket, flooded
    try:
        carrier.post(m.Ping())
        assert flooded.read and flooded.sent
    finally:
        carrier._socket = own
        carrier.close()


# Proofs


def test_only_ones_own_private_cookie_is_read(tmp_path):
    path = tmp_path / "a.cookie"
    path.write_bytes(os.urandom(32))
    path.chmod(0o600)
    assert auth.read_cookie(str(path)) == path.read_bytes()
    (tmp_path / "b.cookie").symlink_to(path)
    (tmp_path / "c").write_bytes(bytes(32))
    (tmp_path / "d.cookie").write_bytes(bytes(31))
    (tmp_path / "d.cookie").chmod(0o600)
    os.mkfifo(tmp_path / "e.cookie", 0o600)
    path.chmod(0o640)
    reasons = {"c": auth.NO_FILE, "nowhere.cookie": auth.NO_FILE, "\0.cookie": auth.NO_FILE, "b.cookie": auth.NO_FILE}
    reasons |= dict.fromkeys(("a.cookie", "d.cookie", "e.cookie"), auth.UNSAFE_FILE)
    for name, reason in reasons.items():
        with pytest.raises(auth.Unproven) as error:
            auth.read_cookie(str(tmp_path / name))
        assert error.value.reason == reason and "\0" not in str(error.value), name
    path.chmod(0o600)
    if os.getuid() == 0:
        os.chown(path, 12345, 12345)
        with pytest.raises(auth.Unproven, match="is of user 12345, and this engine runs as 0"):
            auth.read_cookie(str(path))


def test_a_proof_holds_for_its_words_alone():
    words = (bytes(32), "server", b"id", b"n1", b"n2", "127.0.0.1:1 in net:[1]")
    others = (b"1" * 32, "engine", b"idn", b"1", b"n", "127.0.0.1:1 in net:[2]")
    proofs = {auth.proof(*words[:at], other, *words[at + 1 :]) for at, other in enumerate(others)}
    proofs |= {auth.proof(*words), auth.proof(*words[:2], b"i", b"dn1", *words[4:])}
    assert len(proofs) == 8


@pytest.mark.parametrize(("bound", "reached"), [("127.0.0.1", "127.0.0.1"), ("[::1]", "[::1]"), ("*", "127.0.0.1")])
def test_both_ends_name_a_connection_alike_and_no_other_so(bound, reached):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger, router.ipv6 = 0, True  # takes IPv4 on an IPv6 socket where it is bound to all
        try:
            port = router.bind_to_random_port(f"tcp://{bound}")
        except zmq.ZMQError as error:
            pytest.skip(f"no IPv6 here: {error}")
        named = []
        for carrier in (ZmqCarrier(f"tcp://{reached}:{port}"), ZmqCarrier(f"tcp://{reached}:{port}")):
            assert carrier.connection_name().startswith("an unknown connection"), "nothing has come yet"
            asked = beside(lambda carrier=carrier: carrier.exchange(m.Ping(), PATIENCE))
            name, _ = router.recv_multipart(copy=False)
            router.send_multipart([name.bytes, m.encode(1, m.Ok())])
            assert asked.result(PATIENCE) == (m.Ok(), [])
            named.append(carrier.connection_name())
            assert named[-1] == auth.connection_name(name, "server") and f" to {reached}:{port} in net:" in named[-1]
            carrier.close()
        assert named[0] != named[1] and auth.connection_name(zmq.Frame(), "server") != auth.connection_name(
            zmq.Frame(), "server"
        )


def test_a_key_file_that_is_no_good_is_named(tmp_path):
    good = tmp_path / "good"
    good.write_bytes(zmq.curve_keypair()[1] + b"\n")
    good.chmod(0o600)
    assert len(auth.read_key(good)) == 40
    open_one, short = tmp_path / "open", tmp_path / "short"
    open_one.write_bytes(good.read_bytes())
    open_one.chmod(0o644)
    short.write_bytes(b"too short")
    short.chmod(0o600)
    for path, word in ((open_one, "chmod 600"), (short, "40 characters"), (tmp_path / "none", "make one with")):
        with pytest.raises(ConfigError, match=word):
            auth.read_key(path)


def test_another_versions_name_forges_no_line_of_a_log() -> None:
    text = m.version_error(2, "9.9\n[2026-01-01] LMCache INFO: all is well" + "x" * 100, 1, "1.0")
    assert "\n" not in text and "9.9?[2026" in text and "x" * 41 not in text
