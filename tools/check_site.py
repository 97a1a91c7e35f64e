"""Check a built site: no page fetches anything from elsewhere. `python -m tools.check_site FOLDER`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
_IN_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
_FETCHED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "use": ("href",),
    "image": ("href",),
}
"""Tag -> attributes that a browser fetches. A link that somebody has to click is none of them."""
_LAZY = ("mermaid", "katex", "arithmatex")
"""Classes for which the theme's script would fetch a library from elsewhere."""
_LEAST_PAGES = 20


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        fetched = [given[name] for name in _FETCHED.get(tag, ()) if name in given]
        if tag == "link" and given.get("rel", "") not in ("canonical", "prev", "next", "alternate"):
            fetched.append(given.get("href", ""))
        self.found += [one for one in fetched if _ELSEWHERE.match(one.strip())]
        self.found += _IN_CSS.findall(given.get("style", ""))
        self.found += [f"class {name}" for name in _LAZY if name in given.get("class", "").split()]


def fetched_from_elsewhere(name: str, text: str) -> list[str]:
    """Return what a browser would fetch from another place for this file. name: its suffix tells the kind."""
    if name.endswith(".css"):
        return _IN_CSS.findall(text)
    page = _Page()
    page.feed(text)
    return page.found + [
        one for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.S) for one in _IN_CSS.findall(style)
    ]


def check(folder: Path) -> Iterator[str]:
    """Yield a line for each thing that is wrong with the site."""
    pages = sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".css"))
    for path in pages:
        for one in fetched_from_elsewhere(path.name, path.read_text()):
            yield f"{path.relative_to(folder)}: fetches {one}"
    if sum(path.suffix == ".html" for path in pages) < _LEAST_PAGES:
        yield f"{folder}: fewer than {_LEAST_PAGES} pages"
    if not (folder / "search/search_index.json").is_file():
        yield f"{folder}: no search index"


if __name__ == "__main__":
    wrong = list(check(Path(sys.argv[1])))
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(bool(wrong))
