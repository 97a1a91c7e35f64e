"""`lmcache coordinator` and `lmcache_controller`: the controller of the public project, in front of running servers."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence

from lmcache.cli.verbs import Verbs, add, add_token, token_of
from lmcache.config.options import http_urls
from lmcache.config.server import ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, set_level
from lmcache.wire.http_client import DEFAULT_URL

_TEXT = """
Answer the routes of the public project's controller (/lookup, /pin, /clear, /move, /health, /query_instance, /check_finish,
/instances, /directory/lookup) by asking running servers over HTTP. It holds no KV and keeps nothing but the moves that it
has begun. Servers need not register: --servers names them. `lmcache server --control-peers` answers the same routes without
this process.

examples:
  lmcache coordinator --servers http://10.0.0.7:8080,http://10.0.0.8:8080 --api-token-file token.txt
  lmcache_controller --host localhost --port 9000 --monitor-port 9001
"""


def add_verb(verbs: Verbs) -> None:
    """Add `coordinator` to the command line."""
    _add_to(
        add(verbs, "coordinator", run, "answer the public project's controller API for several servers", _TEXT), 9300
    )


def _add_to(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument("--port", type=int, default=port, help=f"Port to listen on. Default: {port}.")
    parser.add_argument(
        "--servers",
        metavar="URL,...",
        default=DEFAULT_URL,
        help=f"HTTP addresses of the servers. Default: {DEFAULT_URL}.",
    )
    add_token(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lmcache_controller`, which takes the public project's flags."""
    from lmcache.cli.main import main as lmcache

    words = list(sys.argv[1:] if argv is None else argv)
    kept, at = [], 0
    while at < len(words):
        name, _, value = words[at].partition("=")
        if re.fullmatch(r"--monitor-ports?", name):
            print(f"{name}: has no effect: servers do not register, --servers names them", file=sys.stderr)
            at += 1 if value else 2
            continue
        kept.append(words[at])
        at += 1
    if not any(one.split("=")[0] == "--port" for one in kept):
        kept += ["--port", "9000"]
    return lmcache(["coordinator", *kept])


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    from lmcache.server.controller import Controller, There
    from lmcache.server.http import HttpEndpoint

    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port {arguments.port}: must be from 0 to 65535")
    try:
        urls = http_urls(arguments.servers)
    except ValueError as error:
        raise ConfigError(f"--servers {arguments.servers}: {error}") from None
    token, host = token_of(arguments), "127.0.0.1" if arguments.host == "localhost" else arguments.host
    if not urls:
        raise ConfigError("--servers: names no server")
    set_level("INFO")
    control = _Controlling(Controller([There(url, lambda: token) for url in urls]))
    endpoint = HttpEndpoint(
        ServerConfig(http_host=host, http_port=arguments.port, api_token=token),
        control,  # type: ignore[arg-type]  # of `Control`, only what its routes need
        whole=False,
    )
    ending = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)  # before there are threads, which inherit it
    endpoint.start()
    init_logger(__name__).info("LMCache controller: http://%s:%d for %s", host, endpoint.port, ", ".join(urls))
    signal.sigwait(ending)
    endpoint.stop()
    return 0


class _Controlling:
    """As much of `Control` as a controller's routes need."""

    def __init__(self, controller: object) -> None:
        self.controller = controller

    def health(self) -> tuple[bool, str]:
        """Return that it serves."""
        return True, ""


if __name__ == "__main__":
    sys.exit(main())
