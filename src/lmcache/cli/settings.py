"""`lmcache config check FILE`: what a server would be set to, and where each value comes from."""

from __future__ import annotations

import argparse

from lmcache.cli.verbs import Verbs, add
from lmcache.config.load import load
from lmcache.config.server import OPTIONS, shown

_TEXT = """
Read a configuration file as `lmcache server --config FILE` would, environment included, and print every setting
with its source. Secrets are not printed. Exit code 2 when something is wrong with it.

examples:
  lmcache config check /etc/lmcache.yaml
"""


def add_verb(verbs: Verbs) -> None:
    """Add `config` to the command line."""
    parser = add(verbs, "config", run, "check a configuration file", _TEXT)
    parser.add_argument("action", choices=("check",), help="Read it and print the outcome.")
    parser.add_argument("file", metavar="FILE", help="YAML file with settings, one `key: value` a line.")


def run(arguments: argparse.Namespace) -> int:
    """Print setting, value, source."""
    settings = load({"config": arguments.file})
    rows = [("setting", "value", "from")]
    for option in OPTIONS:
        value = shown(option, getattr(settings.config, option.name))
        rows.append((option.key, "-" if value in (None, "") else str(value), settings.sources[option.name]))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for key, value_text, source in rows:
        print(f"{key:<{widths[0]}}  {value_text:<{widths[1]}}  {source}")
    for warning in settings.warnings:
        print(f"warning: {warning}")
    return 0
