"""A stand-in for Google Cloud Storage: so much of its XML interface as obstore uses, in memory, without credentials.

No emulator that can be installed speaks this interface for writes: fake-gcs-server answers PUT with "invalid uploadType".
"""

from __future__ import annotations

import json
import re
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from obstore.store import GCSStore

BUCKET = "kvbucket"
NO_CREDENTIALS = json.dumps({"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""})
"""A key of a service account that asks nobody for a token."""


class _Objects(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    there: ClassVar[dict[str, tuple[bytes, int, datetime]]]
    """Name -> bytes, generation, time."""
    uploads: ClassVar[dict[str, dict[int, bytes]]]
    lock: ClassVar[threading.Lock]
    generation: ClassVar[list[int]]

    def _asked(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        bucket, _, name = unquote(parts.path).lstrip("/").partition("/")
        query = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if bucket != BUCKET:
            self._say(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            raise ConnectionAbortedError
        return name, query

    def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _put(self, name: str, body: bytes) -> None:
        with self.lock:
            wanted, had = self.headers.get("x-goog-if-generation-match"), self.there.get(name)
            if wanted is not None and int(wanted) != (had[1] if had else 0):
                self._say(412, b"<Error><Code>PreconditionFailed</Code></Error>")
                return
            self.generation[0] += 1
            self.there[name] = body, self.generation[0], datetime.now(timezone.utc)
            number = str(self.generation[0])
        self._say(200, b"", ETag=f'"{number}"', x_goog_generation=number)

    def do_PUT(self) -> None:
        body = self._body()
        name, query = self._asked()
        if "uploadId" in query:
            with self.lock:
                self.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._say(200, b"", ETag=f'"{query["partNumber"]}"')
        else:
            self._put(name, body)

    def do_POST(self) -> None:
        self._body()
        name, query = self._asked()
        if "uploadId" in query:
            parts = self.uploads.pop(query["uploadId"])
            with self.lock:
                self.generation[0] += 1
                whole = b"".join(parts[number] for number in sorted(parts))
                self.there[name] = whole, self.generation[0], datetime.now(timezone.utc)
            said = f"<CompleteMultipartUploadResult><ETag>{self.generation[0]}</ETag></CompleteMultipartUploadResult>"
            self._say(200, said.encode())
        else:
            with self.lock:
                self.generation[0] += 1
                number = str(self.generation[0])
                self.uploads[number] = {}
            said = f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
            self._say(200, said.encode())

    def do_GET(self) -> None:
        name, query = self._asked()
        if not name:
            self._list(query)
            return
        found = self.there.get(name)
        if not found:
            self._say(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        body, number, when = found
        headers = {
            "ETag": f'"{number}"',
            "x_goog_generation": str(number),
            "Last_Modified": format_datetime(when, True),
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) >= len(body):
            self._say(416, b"<Error><Code>InvalidRange</Code></Error>")
        elif wanted:
            first, last = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            self._say(206, body[first : last + 1], **headers)
        else:
            self._say(200, body, **headers, Content_Length=str(len(body)))

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        name, _ = self._asked()
        with self.lock:
            gone = self.there.pop(name, None)
        self._say(204 if gone else 404, b"" if gone else b"<Error><Code>NoSuchKey</Code></Error>")

    def _list(self, query: dict[str, str]) -> None:
        found = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(body)}</Size><ETag>{number}</ETag>"
            f"<LastModified>{when.strftime('%Y-%m-%dT%H:%M:%S.%fZ')}</LastModified></Contents>"
            for name, (body, number, when) in sorted(self.there.items())
            if name.startswith(query.get("prefix", ""))
        )
        self._say(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode())

    def log_message(self, *words: object) -> None: ...


class GCSStandIn:
    """A bucket."""

    def __init__(self) -> None:
        state = {"there": {}, "uploads": {}, "lock": threading.Lock(), "generation": [0]}
        handler = type("Objects", (_Objects,), state)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def store(self) -> GCSStore:
        config = {"base_url": f"http://127.0.0.1:{self.port}", "service_account_key": NO_CREDENTIALS}
        return GCSStore(BUCKET, config=config, client_options={"allow_http": True, "timeout": timedelta(seconds=60)})

    def url(self, prefix: str, options: str = "", container: str = BUCKET) -> str:
        return f"gs://{container}/{prefix}?endpoint=http://127.0.0.1:{self.port}&timeout=60{options}"

    def end(self) -> None:
        self._server.shutdown()
        self._server.server_close()
