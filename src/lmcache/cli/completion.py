"""`lmcache completion SHELL`: a script that lets a shell complete verbs, flags and fixed values, made from the parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from lmcache.cli.verbs import Verbs, add

_TEXT = """
Print a script with which a shell completes `lmcache`. Put it where your shell looks for it, or evaluate it in its start-up file.

examples:
  lmcache completion bash > ~/.local/share/bash-completion/completions/lmcache
  lmcache completion zsh > "${fpath[1]}/_lmcache"
  lmcache completion fish > ~/.config/fish/completions/lmcache.fish
"""


class Words(NamedTuple):
    """What may follow a verb. choices: flag -> its values, "" for words without a flag."""

    verb: str
    summary: str
    flags: dict[str, str]
    choices: dict[str, list[str]]


def add_verb(verbs: Verbs) -> None:
    """Add `completion` to the command line."""
    parser = add(verbs, "completion", run, "print a script for your shell's completion", _TEXT)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="For which shell.")


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    from lmcache.cli.main import build_parser

    words = list(words_of(build_parser()))
    print("\n".join({"bash": _bash, "zsh": _zsh, "fish": _fish}[arguments.shell](words)))
    return 0


def words_of(parser: argparse.ArgumentParser) -> Iterator[Words]:
    """Yield what a parser with verbs knows of each. Flags without a help are left out."""
    verbs = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    summaries = {one.dest: one.help or "" for one in verbs._choices_actions}
    for verb, of_verb in verbs.choices.items():
        flags, choices = dict[str, str](), dict[str, list[str]]()
        for action in of_verb._actions:
            if action.help == argparse.SUPPRESS:
                continue
            for flag in action.option_strings or [""]:
                if flag:
                    flags[flag] = " ".join((action.help or "").replace("%%", "%").split()).partition(". ")[0]
                if action.choices:
                    choices[flag] = [str(one) for one in action.choices]
        yield Words(verb, summaries.get(verb, ""), flags, choices)


def _bash(words: list[Words]) -> Iterator[str]:
    yield "# Completion of lmcache for bash, made by `lmcache completion bash`."
    yield "_lmcache() {"
    yield '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" list='
    yield '    if [ "$word" = = ]; then word=  # bash makes three words of --flag=value'
    yield '    elif [ "$before" = = ]; then before="${COMP_WORDS[COMP_CWORD-2]}"; fi'
    yield '    if [ "$COMP_CWORD" -eq 1 ]; then'
    yield f'        list="{" ".join(one.verb for one in words)} --help --version"'
    yield '    else case "${COMP_WORDS[1]} $before" in'
    for one in words:
        for flag, values in one.choices.items():
            if flag:
                yield f'        "{one.verb} {flag}") list="{" ".join(values)}" ;;'
    yield '        *) case "${COMP_WORDS[1]}" in'
    for one in words:
        yield f'            {one.verb}) list="{" ".join([*one.choices.get("", []), *one.flags])}" ;;'
    yield "        esac ;;"
    yield "    esac; fi"
    yield '    COMPREPLY=($(compgen -W "$list" -- "$word"))'
    yield "}"
    yield "complete -o default -F _lmcache lmcache"


def _zsh(words: list[Words]) -> Iterator[str]:
    yield "#compdef lmcache"
    yield "# Completion of lmcache for zsh, made by `lmcache completion zsh`."
    yield "_lmcache() {"
    yield "    local -a list"
    yield "    if (( CURRENT == 2 )); then"
    yield "        list=("
    for one in words:
        yield f"            {_quoted(f'{one.verb}:{one.summary}')}"
    yield "        )"
    yield "        _describe verb list"
    yield "        return"
    yield "    fi"
    yield '    local before="$words[CURRENT-1]" value='
    yield '    if [[ "$words[CURRENT]" == --*=* ]] && compset -P 1 "*="; then before="${IPREFIX%=}" value=1; fi'
    yield '    case "$words[2] $before" in'
    for one in words:
        for flag, values in one.choices.items():
            if flag:
                yield f"        {_quoted(f'{one.verb} {flag}')}) compadd -- {' '.join(values)}; return ;;"
    yield "    esac"
    yield '    if [ -n "$value" ]; then _files; return; fi'
    yield '    case "$words[2]" in'
    for one in words:
        yield f"        {one.verb})"
        if values := one.choices.get("", []):
            yield f"            compadd -- {' '.join(values)}"
        yield "            list=("
        for flag, summary in one.flags.items():
            yield f"                {_quoted(flag + ':' + summary.replace(':', ' '))}"
        yield "            ) ;;"
    yield "    esac"
    yield "    _describe flag list"
    yield "    _files"
    yield "}"
    yield 'if [ "$funcstack[1]" = _lmcache ]; then _lmcache "$@"; else compdef _lmcache lmcache; fi'


def _fish(words: list[Words]) -> Iterator[str]:
    yield "# Completion of lmcache for fish, made by `lmcache completion fish`."
    yield "function __lmcache_verb  # whether the line has this verb; with a number, and so many words before the cursor's"
    yield "    set -l words (commandline -opc)"
    yield '    test "$words[2]" = $argv[1]; and test (count $argv) -lt 2 -o (count $words) -eq "$argv[2]"'
    yield "end"
    for one in words:
        yield f"complete -c lmcache -n '__lmcache_verb \"\" 1' -f -a {one.verb} -d {_quoted(one.summary)}"
    for one in words:
        condition = _quoted(f"__lmcache_verb {one.verb}")
        if values := one.choices.get("", []):
            first = _quoted(f"__lmcache_verb {one.verb} 2")
            yield f"complete -c lmcache -n {first} -f -a {_quoted(' '.join(values))}"
        for flag, summary in one.flags.items():
            name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            fixed = one.choices.get(flag, [])
            more = f" -x -a {_quoted(' '.join(fixed))}" if fixed else ""
            yield f"complete -c lmcache -n {condition} {name}{more} -d {_quoted(summary)}"


def _quoted(text: str) -> str:
    """Return a word for any of the shells. Quotes within it become typographic ones, since the shells escape them differently."""
    return "'" + text.replace("\\", "/").replace("'", "’") + "'"
