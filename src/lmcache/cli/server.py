"""`lmcache server`: read the settings, check the machine, and serve until stopped."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs, add
from lmcache.config.earlier import add_earlier_flags, answers
from lmcache.config.load import add_flags, load
from lmcache.config.server import OPTIONS
from lmcache.observability.log import init_logger, set_format, set_level

_TEXT = """
Start the cache server of this host. It keeps the KV of text that engines have prefilled, in one memory file that
engines of this host read and write directly, and decides what to evict. It needs no GPU. Stop it with Ctrl-C or
SIGTERM.

examples:
  lmcache server --l1-size-gb 20 --eviction-policy LRU --chunk-size 16
  lmcache server --l1-size-gb 60 --eviction-policy LRU --max-workers 4 --port 6555
  LMCACHE_SERVER_L1_SIZE_GB=20 lmcache server --config /etc/lmcache.yaml
  lmcache server --l1-size-gb 20 --host 0.0.0.0 --auth-key-file key.txt     engines on other hosts too

Each setting has a flag, a variable (in brackets above) and a key in the file. A flag overrides the variable, which
overrides the file. Exit code 2: a setting is wrong, and nothing was created. SIGHUP reads the file again, and the
server uses a new log level, a new API token and other tiers at once; the log names what needs a restart.
"""


def add_verb(verbs: Verbs) -> None:
    """Add `server` to the command line."""
    parser = add(verbs, "server", run, "start the cache server of this host", _TEXT)
    add_flags(parser)
    add_earlier_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Start the server and return its exit code when it has ended."""
    earlier = list(answers(vars(arguments)))
    flags = {option.name: getattr(arguments, option.name) for option in OPTIONS}
    settings = load(flags)
    logger = init_logger(__name__)
    set_level(settings.config.log_level)
    set_format(settings.config.log_format)
    for warning in (*settings.warnings, *earlier):
        logger.warning("%s", warning)

    from lmcache.server.preflight import check_machine

    config = check_machine(settings.config)

    from lmcache.server.main import serve

    return serve(config, reload=lambda: load(flags).config)
