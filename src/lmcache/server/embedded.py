"""The server as a child process of one engine: `python -m lmcache.server.embedded SOCKET LIFELINE [flags of lmcache server]`.

`lmcache.engine.embedded` starts it. SOCKET and LIFELINE are inherited descriptors: a listening Unix socket, and a descriptor that
becomes readable when the engine ends. The server opens no port for engines, and an HTTP port only if --http-port is given.
"""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from lmcache.config.load import add_flags, load
from lmcache.config.server import OPTIONS
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, set_format, set_level
from lmcache.server.main import Owner, serve
from lmcache.server.preflight import check_machine

logger = init_logger(__name__)


def main(argv: Sequence[str]) -> int:
    """Serve until the engine ends. The exit code is 2 if a setting is wrong or the machine has not enough memory."""
    parser = argparse.ArgumentParser("lmcache.server.embedded", allow_abbrev=False)
    parser.add_argument("socket", type=int)
    parser.add_argument("lifeline", type=int)
    add_flags(parser)
    arguments = parser.parse_args(argv)
    flags = {option.name: getattr(arguments, option.name) for option in OPTIONS}
    http = flags["http_port"] is not None
    listener = socket.socket(fileno=arguments.socket)
    try:
        config = load(flags).config
        set_level(config.log_level)
        set_format(config.log_format)
        config = check_machine(config, port=False, http=http)
        return serve(config, Owner(listener, arguments.lifeline, http))
    except ConfigError as error:
        logger.error("The LMCache server of this engine cannot start, so no KV is cached: %s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
