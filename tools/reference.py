"""The reference pages of the documentation, made from the code when the site is built. Nothing here lists what the code has.

`pages()` returns Markdown by path. `python -m tools.reference FOLDER` writes it into a folder, to look at it without the site.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import html
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lmcache.cache.losses import LOSSES
from lmcache.cache.reasons import REASONS
from lmcache.cache.reasons import Reason as Explained
from lmcache.cli.main import build_parser
from lmcache.config import engine as in_process
from lmcache.config.earlier import EARLIER_FLAGS
from lmcache.config.server import GROUPS, OPTIONS, ServerConfig
from lmcache.integration.vllm.settings import SETTINGS
from lmcache.server.http import HttpEndpoint
from lmcache.server.metrics import HELP, LABELS, kind_of
from lmcache.server.refused import EXPLAINED, Reason

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lmcache"
_LEAST_LETTERS = 7
"""A message with fewer letters of its own is made of others' words, and would say nothing here."""
_MADE = "<!-- Made by tools/reference.py: change the code instead. -->\n\n"
_MARKUP = re.compile(r"[*_\[\]|`~#$\\]")
_AREAS = {
    "config": "Settings",
    "cli": "Commands",
    "server": "The server",
    "cache": "The server's memory",
    "memory": "The server's memory",
    "tiers": "Tiers",
    "peers": "Other servers",
    "wire": "Connections",
    "engine": "Engines of every kind",
    "transfer": "Copies",
    "integration/vllm": "vLLM",
    "integration/sglang": "SGLang",
    "integration/transformers": "Transformers",
    "integration/tensorrt_llm": "TensorRT-LLM",
    "proxy": "The proxy for disaggregated prefill",
    "sizing": "Sizing and replay",
}
"""Folder -> the heading of its messages. Folders without a heading come last."""
_CODES = {
    "400": "a parameter is wrong; `reason` says which",
    "403": "the caller may not ask; `reason` says what it would need",
    "404, 405": "there is no such path or method; `reason` lists those that there are",
    "413": "the body is too large",
    "500": "an unexpected exception; the log has its traceback",
    "503": "the server is unhealthy or not ready, or a tier could not be emptied",
}
_LEVELS = {"warning": "warning", "error": "error", "exception": "error", "critical": "error"}


class Message(NamedTuple):
    """What the code may say: its area, the kind (an exception or a log level), and the text with … for what varies."""

    area: str
    kind: str
    text: str


def pages() -> dict[str, str]:
    """Return path below docs/ -> Markdown."""
    made = {
        "flags": flags(),
        "settings": settings(),
        "commands": commands(),
        "http": routes(),
        "metrics": metrics(),
        "reasons": reasons(),
        "messages": messages(),
    }
    return {f"reference/{name}.md": _MADE + text for name, text in made.items()}


def flags() -> str:
    out = [
        "# Flags of the server",
        "`lmcache server` takes each setting as a flag, as an environment variable, or as a key of the YAML file that `--config` "
        "names. A flag overrides the variable, the variable overrides the file, and the file overrides the default. The key in "
        "the file is the flag without `--`.",
    ]
    for group, title in GROUPS.items():
        out.append(f"## {title[0].upper()}{title[1:]}")
        for option in (one for one in OPTIONS if one.group == group):
            value = "" if option.is_switch else f" {option.metavar}"
            names = " or ".join(f"`{name}`" for name in (option.env, option.extra_env) if name)
            facts = [
                f"Default: {_text(option.default_text)}." if option.default_text else "No default.",
                f"Variable: {names}.",
            ]
            facts += ["May be given several times."] * option.repeat + ["Not in the file."] * (not option.in_file)
            out.append(f"### `{option.flag}{value}` {{#{option.key}}}\n\n{_text(option.help)}\n\n{' '.join(facts)}")
    out += [
        "## Flags of the public LMCache 0.5",
        "Charts and scripts pass them. A flag without an effect is answered with one line in the log.",
    ]
    answers = ((f"`{one.flag}`", "refused" if one.refused else "no effect", _text(one.said)) for one in EARLIER_FLAGS)
    return "\n\n".join([*out, _table(("flag", "answer", "why, and what to use instead"), answers)])


def settings() -> str:
    rows: dict[str, list[tuple[str, ...]]] = {"works": [], "none": [], "refused": []}
    for row in in_process.ROWS:
        name = f"`{row.name}`"
        if row.refusal:
            rows["refused"].append((name, _text(row.refusal)))
        elif row.effect.startswith("no effect"):
            rows["none"].append(
                (name, _text(row.effect.removeprefix("no effect").lstrip(": ")) or "it has no counterpart here")
            )
        else:
            meaning = f"{in_process.MEANING[row.name]} {_here(row.effect)}"
            rows["works"].append((name, f"`{row.variable}`", _value(row.default), _text(meaning)))
    daemon = (
        (f"`lmcache.mp.{name}`", _value(one.default), one.meaning.replace("|", "\\|")) for name, one in SETTINGS.items()
    )
    others = ((f"`LMCACHE_{name}`", _text(text)) for name, text in in_process.OTHERS.items())
    return "\n\n".join(
        [
            "# Settings of engines, and environment variables",
            "## vLLM with a daemon {#vllm}",
            "Keys of `kv_connector_extra_config` in `--kv-transfer-config`.",
            _table(("key", "default", "meaning"), daemon),
            "## Variables that everything reads {#variables}",
            _table(("variable", "meaning"), others),
            "The server's own variables begin with `LMCACHE_SERVER_`: [flags](flags.md) names one for each flag.",
            "## In process, SGLang, TensorRT-LLM {#in-process}",
            "An engine with a server of its own reads these from the file that `LMCACHE_CONFIG_FILE` names, from the variable, "
            "and under vLLM from `lmcache.NAME` in `kv_connector_extra_config`; the last one wins.",
            _table(("setting", "variable", "default", "meaning"), rows["works"]),
            "### Refused {#refused}",
            "Such a setting stops the engine's start with one line. Its default value is accepted.",
            _table(("setting", "what to do instead"), rows["refused"]),
            "### Without effect {#no-effect}",
            "The public project has these settings. They are accepted, and a warning says why nothing follows from them.",
            _table(("setting", "why"), rows["none"]),
        ]
    )


def commands() -> str:
    out = ["# Commands", "`lmcache VERB --help` prints the same."]
    for name, summary, parser in verbs():
        out.append(f"## `lmcache {name}` {{#{name}}}\n\n{summary[0].upper()}{summary[1:]}.")
        if parser.description:
            out.append(_text(" ".join(parser.description.split())))
        if name == "server":
            out.append("[Flags of the server](flags.md) lists its flags.")
        else:
            rows = [
                _argument(one)
                for one in parser._actions
                if one.help and one.help != argparse.SUPPRESS and one.dest != "help"
            ]
            out.append(_table(("argument", "meaning"), rows) if rows else "")
        if parser.epilog:
            out.append(f"```text\n{parser.epilog.strip()}\n```")
    return "\n\n".join(filter(None, out))


def verbs() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield name, summary and parser of each verb of the command line."""
    (subparsers,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    summaries = {one.dest: one.help or "" for one in subparsers._choices_actions}
    for name, parser in subparsers.choices.items():
        yield name, summaries.get(name, ""), parser


def routes() -> str:
    rows = []
    for path, methods, caller, text in http_routes():
        answer = text.removeprefix("Answer ").removeprefix("that ")
        rows.append(
            (
                f"`{' '.join(methods)} {path}`",
                _text(answer[:1].upper() + answer[1:]),
                caller or "everybody who reaches the port",
            )
        )
    return "\n\n".join(
        [
            "# HTTP routes",
            "The server answers at `--http-host` and `--http-port`, by default at port 8080 of all addresses. Every answer is "
            "JSON unless the table says otherwise. [Security](../security.md) says more about who may ask.",
            _table(("route", "answer", "for"), rows),
            _table(("code", "meaning"), _CODES.items()),
        ]
    )


def http_routes() -> Iterator[tuple[str, list[str], str, str]]:
    """Yield path, methods, who may ask ("": everybody) and description of each route of the server."""
    for route in HttpEndpoint(ServerConfig(l1_size_gb=1), None)._app().routes:  # type: ignore[arg-type]
        endpoint: Any = route.endpoint  # type: ignore[attr-defined]
        methods = sorted(set(route.methods) - {"HEAD"})  # type: ignore[attr-defined]
        yield route.path, methods, getattr(endpoint, "caller", ""), " ".join((endpoint.__doc__ or "").split())  # type: ignore[attr-defined]


def metrics() -> str:
    rows = []
    for name, text in HELP.items():
        labels = ", ".join(
            f"[`{one}`](reasons.md#{name})" if one == "reason" else f"`{one}`" for one in LABELS.get(name, ())
        )
        rows.append((f"`lmcache_{name}`", kind_of(name), labels, _text(text)))
    own = ((f"`vllm:lmcache_{name}`", "counter", "vLLM's own", _text(text)) for name, text in vllm_counters().items())
    return "\n\n".join(
        [
            "# Metrics",
            "`GET /metrics` of the server. [Observability](../observability.md) says how they add up and which ones to watch.",
            _table(("metric", "type", "labels", "meaning"), rows),
            "The server also exports `process_*`: CPU time, memory and descriptors of its process.",
            "## Metrics of vLLM {#vllm}",
            "`GET /metrics` of an engine with LMCache's connector also has these.",
            _table(("metric", "type", "labels", "meaning"), own),
        ]
    )


def vllm_counters() -> dict[str, str]:
    """Return the counters that vLLM exports for its connector, read from the source, since the module needs vLLM."""
    tree = ast.parse((SOURCE / "integration" / "vllm" / "stats.py").read_text())
    assigned = (
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COUNTERS"
    )
    found: dict[str, str] = ast.literal_eval(next(assigned).value)
    return found


def reasons() -> str:
    assert set(EXPLAINED) == set(get_args(Reason))
    out = [
        "# Reasons",
        "Every value of the label `reason`: what has happened, and what to do. `lmcache why --summary` says which cost most.",
        "## Tokens that were not found: `lmcache_missed_tokens_total` {#missed_tokens_total}",
        _explained(REASONS),
        "## Engines that were refused: `lmcache_refused_engines_total` {#refused_engines_total}",
        _explained({name: EXPLAINED[name] for name in get_args(Reason)}),
    ]
    for metric, table in LOSSES.items():
        out += [f"## `lmcache_{metric}` {{#{metric}}}", _text(HELP[metric]), _explained(table)]
    return "\n\n".join(out)


def messages() -> str:
    out = [
        "# Messages",
        "Every error and warning that LMCache may write, with … for what varies. Search this page for the words of a line that "
        "you have seen. Errors name the remedy themselves; [troubleshooting](../troubleshooting.md) explains the frequent ones.",
    ]
    found = sorted(set(all_messages()))
    areas = [*dict.fromkeys(_AREAS.values()), *sorted({one.area for one in found} - {*_AREAS.values()})]
    for area in areas:
        rows = [(one.kind, f"<code>{_literal(one.text)}</code>") for one in found if one.area == area]
        if rows:
            out += [f"## {area}", _table(("kind", "message"), rows)]
    return "\n\n".join(out)


def all_messages(levels: Mapping[str, str] = _LEVELS) -> Iterator[Message]:
    """Yield the messages of exceptions and what is logged at these levels, read from the source."""
    for path in sorted(SOURCE.rglob("*.py")):
        folders = path.relative_to(SOURCE).parts[:-1]
        area = _AREAS.get("/".join(folders[:2])) or _AREAS.get("/".join(folders[:1])) or "Others"
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            logged = re.search(r"log(ger)?\.\w+$", called) or called == "warn"
            kind = levels.get("warning" if called == "warn" else name) if logged else name if _is_error(name) else None
            texts = [text for text in map(_said, node.args) if sum(map(str.isalpha, text)) >= _LEAST_LETTERS]
            if kind and texts:
                yield Message(area, kind, " ".join(max(texts, key=len).split()))


def _is_error(name: str) -> bool:
    own = name.endswith("Error") and not hasattr(builtins, name)
    return own or name in ("Refusal", "Unproven", "ServerRefused", "ServerUnavailable")


def _said(node: ast.AST) -> str:
    """Return the text of a string expression, with … for every part that varies; "" if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d+)?[,\d.]*[sdrgf]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_said(one) if isinstance(one, ast.Constant) else "…" for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _said(node.left), _said(node.right)
        return (left or "…") + (right or "…") if left or right else ""
    return ""


# --- Markdown


def _explained(table: Mapping[str, Explained]) -> str:
    rows = ((f"`{name}`", _sentence(one.meaning), _sentence(one.remedy)) for name, one in table.items())
    return _table(("reason", "what has happened", "what to do"), rows)


def _sentence(text: str) -> str:
    return _text(f"{text[0].upper()}{text[1:]}" + ("" if text.endswith(".") else "."))


def _here(effect: str) -> str:
    return f"Here: {effect}." if effect and not effect.startswith("no effect") else ""


def _value(value: object) -> str:
    return "none" if value in (None, "") else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _argument(action: argparse.Action) -> tuple[str, str]:
    shown = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    choices = f" One of {', '.join(f'`{one}`' for one in action.choices)}." if action.choices else ""
    text = (action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    return f"`{names}{shown}`", _text(text) + choices


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ') for cell in line)} |" for line in lines)


def _text(text: str) -> str:
    """Escape plain text for Markdown. What stands between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part.replace("|", "\\|") if at % 2 else _literal(part) for at, part in enumerate(parts))


def _literal(text: str) -> str:
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


if __name__ == "__main__":
    for name, text in pages().items():
        path = Path(sys.argv[1]) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
