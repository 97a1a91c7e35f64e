"""`lmcache config check FILE`: print the settings that a server would have, and where they are from; `config import FILE`:
translate those of the public project."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from lmcache.cli.verbs import Verbs, add
from lmcache.config.engine import ROWS, EngineSettings, is_for_engines, load_engine
from lmcache.config.load import Settings, load
from lmcache.config.server import OPTIONS, shown
from lmcache.errors import ConfigError

_TEXT = """
Read a configuration file together with the environment, as its user would, and print every setting with its source.
The user is `lmcache server --config FILE`, or an engine with a server of its own (LMCACHE_CONFIG_FILE=FILE, in-process
mode) where the file has names such as max_local_cpu_size. Secrets are not printed. Exit code 2: something is wrong
with the file. import: write the settings of the public LMCache project (0.4, 0.5) as a file for `lmcache server`: an engine's
YAML file, the operator's LMCacheEngine, or a manifest with a container that runs `lmcache server`. What is left out stands
there as a comment with the reason. Passwords in URLs are kept, so an --output file is readable by its owner only.

examples:
  lmcache config check /etc/lmcache.yaml
  lmcache config check --in-process lmcache.yaml
  lmcache config import old-lmcache.yaml --output /etc/lmcache.yaml
"""


def add_verb(verbs: Verbs) -> None:
    """Add `config` to the command line."""
    parser = add(verbs, "config", run, "check or import a configuration file", _TEXT)
    parser.add_argument("action", choices=("check", "import"), help="check: print the result. import: translate.")
    parser.add_argument("file", metavar="FILE", help="YAML file with settings, one `key: value` a line.")
    parser.add_argument("--output", metavar="FILE", help="import: write a new FILE (0600) instead of printing.")
    parser.add_argument("--in-process", action="store_true", help="Read it as an engine's file, whatever its keys.")


def run(arguments: argparse.Namespace) -> int:
    """Print the name, the value and the source of each setting, and for an engine's those that are in effect or were given."""
    path = Path(arguments.file)
    if arguments.action == "import":
        return _import(path, arguments.output)
    settings: Settings | EngineSettings
    tiers: tuple[Sequence[str], Sequence[str]]
    if arguments.in_process or is_for_engines(path):
        settings = engine = load_engine(file=path)
        given = [row for row in ROWS if hasattr(engine.config, row.name) or engine.sources[row.name] != "default"]
        rows = [(row.name, engine.values[row.name], engine.sources[row.name], row.effect) for row in given]
        tiers, source = (engine.config.tiers, ()), str(path)
    else:
        settings = server = load({"config": arguments.file})
        values = ((option, shown(option, getattr(server.config, option.name))) for option in OPTIONS)
        rows = [(option.key, value, server.sources[option.name], "") for option, value in values]
        tiers, source = (server.config.tier_urls, server.config.l2_adapter), server.sources["l2"]
    _print_table([("setting", "value", "from", ""), *(_cells(*row) for row in rows)])
    for warning in settings.warnings:
        print(f"warning: {warning}")
    _check_tiers(*tiers, source)
    return 0


def _import(path: Path, output: str | None) -> int:
    from lmcache.cli import importing  # only this verb needs the import

    found = importing.read(path)
    text = "\n".join([f"# Made by `lmcache config import` from {path.name}.", *found.lines(), ""])
    if output is None:
        print(text, end="")
        return 0
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be made: {error.strerror}: name a new file") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    print(
        f"{output} has {len(found.settings)} settings; {len(found.dropped)} were left out, and stand there with the reasons."
    )
    print(f"Check it with `lmcache config check {output}`.")
    return 0


def _cells(name: str, value: object, source: str, effect: str) -> tuple[str, ...]:
    """Return one line of the table. A setting that does something else than its name says explains it where it was given."""
    text = str(value).lower() if isinstance(value, bool) else "-" if value in (None, "") else str(value)
    return name, text, source, effect if source != "default" else ""


def _check_tiers(l2: Sequence[str], l2_adapter: Sequence[str], source: str) -> None:
    """Check the tiers as their server would, without opening them."""
    from lmcache.tiers.registry import tiers_of  # only this verb needs the import

    try:
        tiers_of(l2, l2_adapter)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=True)).rstrip())
