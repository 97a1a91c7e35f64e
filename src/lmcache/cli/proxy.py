"""`lmcache proxy`: a small router for disaggregated prefill. The work is in `lmcache.proxy`."""

from __future__ import annotations

import argparse
import ipaddress
import socket

from lmcache.cli.verbs import Verbs, add
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, set_level

_TEXT = """
Serve one OpenAI endpoint for engines that compute prompts (prefill) and engines that answer (decode). Each prompt
goes to a prefill engine for one token, then the whole request to a decode engine, which finds the KV of the prompt in
the LMCache server of this host. If a prefill fails, the decode engine computes the prompt itself.

examples:
  lmcache proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200 --port 8000
  lmcache proxy --prefill http://127.0.0.1:8100,http://127.0.0.1:8101 --decode http://127.0.0.1:8200 --port 8000
"""


def add_verb(verbs: Verbs) -> None:
    """Add `proxy` to the command line."""
    parser = add(verbs, "proxy", run, "route requests to prefill and decode engines", _TEXT)
    parser.add_argument("--prefill", required=True, metavar="URLS", help="The prefill engines, with commas between.")
    parser.add_argument("--decode", required=True, metavar="URLS", help="The decode engines, with commas between.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on. Default: 8000.")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="Seconds that an engine may send nothing. Default: 600."
    )
    parser.add_argument(
        "--max-connections", type=int, default=1024, help="More connections are answered 503. Default: 1024."
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    import uvicorn

    from lmcache.proxy.app import Proxy
    from lmcache.proxy.connections import Connection
    from lmcache.proxy.upstream import parse_engines

    for flag in ("port", "timeout", "max_connections"):
        if not 0 < getattr(arguments, flag) < (65536 if flag == "port" else 1 << 20):
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: must be positive, and smaller")
    prefill, decode = parse_engines("--prefill", arguments.prefill), parse_engines("--decode", arguments.decode)
    listener = _listen(arguments.host, arguments.port)
    set_level("INFO")
    where = f"http://{arguments.host}:{arguments.port}"
    init_logger(__name__).info("LMCache proxy: %s for %d prefill, %d decode engines", where, len(prefill), len(decode))
    server = uvicorn.Server(
        uvicorn.Config(
            Proxy(prefill, decode, arguments.timeout, local=_is_loopback(listener)),
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            limit_concurrency=arguments.max_connections,
            timeout_graceful_shutdown=30,
        )
    )
    server.run([listener])
    return 0 if server.started else 1


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128
        )
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen on {host}: {error.strerror}: pass another") from error
