"""An HTTP proxy for tests: between an S3 client and a real S3, which answers some requests itself, as a store in trouble does."""

from __future__ import annotations

import contextlib
import http.client
import socket
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_PIECE_BYTES = 64 << 10
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}


class HTTPProxy:
    """Forwards requests to `127.0.0.1:target`, head and body unchanged, Host included: signatures stay valid.

    Its *verbs* are the methods, but a GET of a listing is LIST, and a POST that deletes is DELETE.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.forwarded: Counter[str] = Counter()
        """Requests by verb that reached the target so far."""
        self.failed: Counter[str] = Counter()
        """Requests by verb that were answered here so far."""
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self._answers: dict[str, tuple[int, str, int | None]] = {}
        self._server = _Listener(self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def fail(self, verbs: str, status: int, code: str, times: int | None = None) -> None:
        """Answer these verbs ("PUT HEAD") with this status and S3's code from now on; `times`: the next so many of each."""
        with self.lock:
            self._answers |= dict.fromkeys(verbs.split(), (status, code, times))

    def heal(self) -> None:
        """Forward everything again."""
        with self.lock:
            self._answers.clear()

    def verdict(self, verb: str) -> tuple[int, str] | None:
        """What to answer a request with, None to forward it; counts it."""
        with self.lock:
            if verb not in self._answers:
                self.forwarded[verb] += 1
                return None
            status, code, times = self._answers[verb]
            if times == 1:
                del self._answers[verb]
            elif times:
                self._answers[verb] = status, code, times - 1
            self.failed[verb] += 1
            return status, code

    def close(self) -> None:
        """End everything, and wait for the threads."""
        self._server.shutdown()
        self._thread.join()
        with self.lock:
            for one in self.open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._server.server_close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # so that `server_close` waits for them
    request_queue_size = 128

    def __init__(self, proxy: HTTPProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Exchange)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client or the target that hangs up ends a connection and is no news."""
        if not isinstance(sys.exc_info()[1], OSError | http.client.RemoteDisconnected):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Exchange(BaseHTTPRequestHandler):
    """One connection of a client, and one to the target that goes with it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.target = http.client.HTTPConnection("127.0.0.1", self.server.proxy.target)
        with self.server.proxy.lock:
            self.server.proxy.open.add(self.connection)

    def finish(self) -> None:
        with self.server.proxy.lock:
            self.server.proxy.open.discard(self.connection)
        self.target.close()
        super().finish()

    def _exchange(self) -> None:
        """Bodies are small: a request is forwarded when all of it is here, an answer as it comes."""
        body = self._body()
        if answer := self.server.proxy.verdict(_verb(self.command, self.path)):
            self._refuse(*answer)
            return
        self.target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.target.putheader(name, value)
        chunked = "Transfer-Encoding" in self.headers
        if chunked:
            self.target.putheader("Transfer-Encoding", "chunked")
        pieces = (body[at : at + _PIECE_BYTES] for at in range(0, len(body), _PIECE_BYTES))
        self.target.endheaders(pieces if chunked else body, encode_chunked=chunked)
        with self.target.getresponse() as response:
            self._answer(response)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _exchange

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._exactly(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self._exactly(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return bytes(body)

    def _exactly(self, count: int) -> bytes:
        read = self.rfile.read(count)
        if len(read) < count:
            raise ConnectionError("the client hung up within a body")
        return read

    def _refuse(self, status: int, code: str) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, response: http.client.HTTPResponse) -> None:
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if response.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif response.will_close:
            self.send_header("Connection", "close")
        self.end_headers()
        while piece := response.read1(_PIECE_BYTES):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if response.chunked else piece)
        if response.chunked and self.command != "HEAD":
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _verb(method: str, path: str) -> str:
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if method == "GET" and query.keys() & {"list-type", "uploads", "delimiter"}:
        return "LIST"
    return "DELETE" if method == "POST" and "delete" in query else method
