"""`lmcache kvcache clear`: the public project's spelling of `lmcache clear`."""

from __future__ import annotations

from lmcache.cli import clear
from lmcache.cli.verbs import Verbs, add

_TEXT = """
The spelling of the public LMCache project for `lmcache clear`.

examples:
  lmcache kvcache clear --url http://localhost:8080
"""


def add_verb(verbs: Verbs) -> None:
    """Add `kvcache` to the command line."""
    parser = add(verbs, "kvcache", clear.run, "kvcache clear: the same as clear", _TEXT)
    parser.add_argument("action", choices=("clear",), help="Empty the cache.")
    clear.add_to(parser)
