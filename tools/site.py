"""MkDocs hooks: pages from outside docs/ and from the code, pictures in the page's colours, the switch of languages."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]  # the code of this tree, installed or not

from tools import reference  # noqa: E402

OUTSIDE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "deploy": "deploy-files.md",
}
"""File or folder of the repository -> its page."""
OTHER_LANGUAGE = {
    "index.md": "zh/index.md",
    "quickstart/index.md": "zh/quickstart.md",
    "quickstart/vllm.md": "zh/quickstart.md",
    "quickstart/sglang.md": "zh/quickstart.md",
    "how-it-works.md": "zh/how-it-works.md",
    "troubleshooting.md": "zh/troubleshooting.md",
}
"""English page -> the page that says the same in Chinese."""
_ENGLISH = {chinese: english for english, chinese in reversed(OTHER_LANGUAGE.items())}
_FENCES = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".conf": "ini", ".service": "ini", ".sysusers": "text"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=[)\s])")
_SHORT_CODE = re.compile(r"<code>(?=[^<\n]{1,28}</code>)")
_LONG_NAME = re.compile(r"<code>\w{24,}(?=</code>)")
_PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*?pictures/([\w-]+\.svg)"[^>]*/?>')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Keep the library that cuts Chinese into words, which the search uses, from logging as it loads."""
    import jieba

    jieba.setLogLevel("WARNING")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files below docs/."""
    made = reference.pages()
    for source, page in OUTSIDE.items():
        if source.endswith(".md") and source != "README.md":
            made[page] = (ROOT / source).read_text()
    made[OUTSIDE["deploy"]] = _deploy()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links of the repository's files lead to the pages of the site."""
    here = page.file.src_uri
    origin = next(
        (source for source, target in OUTSIDE.items() if target == here and here != "index.md"), f"docs/{here}"
    )

    def moved(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), found[1]))
        target = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None:
            return found[0]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (found[2] or "")

    return "".join(
        part if at % 2 else _LINK.sub(moved, part) for at, part in enumerate(re.split(r"(```[\s\S]*?```)", markdown))
    )


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put pictures into the page, where its style sheet colours them for light and dark."""

    def inline(found: re.Match[str]) -> str:
        svg = re.sub(
            r"<\?xml.*?\?>|<style>.*?</style>|<!--.*?-->",
            "",
            (ROOT / "docs/pictures" / found[2]).read_text(),
            flags=re.S,
        )
        return f'<span class="picture" role="img" aria-label="{found[1]}">{svg.strip()}</span>'

    html = _LONG_NAME.sub(lambda found: found[0].replace("_", "_<wbr>"), html)
    html = _SHORT_CODE.sub('<code class="short">', html)  # a flag is not broken behind its hyphens
    return _PICTURE.sub(inline, html)


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Any) -> dict[str, Any]:
    """Say which language the page is in, and where it stands in the other one."""
    here = page.file.src_uri
    chinese = here.startswith("zh/")
    config.theme["language"] = "zh" if chinese else "en"
    other = {"en": _ENGLISH.get(here, "index.md"), "zh": OTHER_LANGUAGE.get(here, "zh/index.md")}
    other["zh" if chinese else "en"] = here
    for one in config.extra["alternate"]:
        one["link"] = (
            posixpath.splitext(other[one["lang"]])[0] + ".html"
        )  # from the site's root; the theme makes it relative
    return context


def _deploy() -> str:
    out = [
        "# Files for deployment",
        "These are the files of `deploy/` in the repository. [Deployment](deployment.md) says how to use them.",
    ]
    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.is_file():
            fence = _FENCES.get(path.suffix, "docker" if path.name.startswith("Dockerfile") else "text")
            out += [f"## `{path.relative_to(ROOT)}`", f"````{fence}\n{path.read_text().rstrip()}\n````"]
    return "\n\n".join(out)


def on_post_build(config: MkDocsConfig) -> None:
    """The theme looks for the site map of each language beside its pages; an empty one lets the switch follow its own link."""
    empty = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"></urlset>\n'
    for folder in {page.parent for page in Path(config.site_dir).rglob("*.html")} - {Path(config.site_dir)}:
        (folder / "sitemap.xml").write_text(empty)
