"""`lmcache config check FILE`: print the settings that a server would have, and the source of each value."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from lmcache.cli.verbs import Verbs, add
from lmcache.config.engine import ROWS, is_for_engines, load_engine
from lmcache.config.load import load
from lmcache.config.server import OPTIONS, shown
from lmcache.errors import ConfigError

_TEXT = """
Read a configuration file together with the environment, as its user would, and print every setting with its source.
The user is `lmcache server --config FILE`, or an engine with a server of its own (LMCACHE_CONFIG_FILE=FILE, in-process
mode) where the file has names such as max_local_cpu_size. Secrets are not printed. Exit code 2: something is wrong
with the file.

examples:
  lmcache config check /etc/lmcache.yaml
  lmcache config check --in-process lmcache.yaml
"""


def add_verb(verbs: Verbs) -> None:
    """Add `config` to the command line."""
    parser = add(verbs, "config", run, "check a configuration file", _TEXT)
    parser.add_argument("action", choices=("check",), help="Read the file and print the result.")
    parser.add_argument("file", metavar="FILE", help="YAML file with settings, one `key: value` a line.")
    parser.add_argument("--in-process", action="store_true", help="Read it as an engine's file, whatever its keys.")


def run(arguments: argparse.Namespace) -> int:
    """Print the name, the value and the source of each setting."""
    if arguments.in_process or is_for_engines(Path(arguments.file)):
        return _check_engine(Path(arguments.file))
    settings = load({"config": arguments.file})
    rows = [("setting", "value", "from")]
    for option in OPTIONS:
        value = shown(option, getattr(settings.config, option.name))
        rows.append((option.key, "-" if value in (None, "") else str(value), settings.sources[option.name]))
    _print_table(rows)
    _print_warnings(settings.warnings)
    _check_tiers(settings.config.l2, settings.config.l2_adapter, settings.sources["l2"])
    return 0


def _check_engine(path: Path) -> int:
    """Print the settings that have an effect or were given. Those that do something else than their name says explain it."""
    settings = load_engine(file=path)
    rows = [("setting", "value", "from", "")]
    for row in ROWS:
        source, value = settings.sources[row.name], settings.values[row.name]
        if source != "default" or hasattr(settings.config, row.name):
            text = str(value).lower() if isinstance(value, bool) else "-" if value in (None, "") else str(value)
            rows.append((row.name, text, source, row.effect if source != "default" else ""))
    _print_table(rows)
    _print_warnings(settings.warnings)
    _check_tiers(settings.config.tiers, (), str(path))
    return 0


def _check_tiers(l2: Sequence[str], l2_adapter: Sequence[str], source: str) -> None:
    """Check the tiers as their server would, without opening them."""
    from lmcache.tiers.registry import tiers_of  # only this verb needs the import

    try:
        tiers_of(l2, l2_adapter)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for *cells, last in rows:
        line = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True)) + last
        print(line.rstrip())


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}")
