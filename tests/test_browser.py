"""The status page in a real browser, beside a real server with engines, tiers, hits and misses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine_process import Engine
from servers import Server, eventually
from test_requests import CHUNK, Bed

api = pytest.importorskip("playwright.sync_api")
CACHE = Path(__file__).parents[1] / ".cache/browser"
BROWSER = next(
    filter(None, map(shutil.which, (str(CACHE / "bin/chromium-headless-shell"), "chromium-headless-shell"))), ""
)
AXE = CACHE / "package/axe.min.js"
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="no chromium-headless-shell here; `./run test` fetches it"),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = '<img src=x onerror="document.title=1">'
WIDTHS = 390, 1440
"""Pixels of a phone and of a monitor."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def busy(
    server: Callable[..., Server], engine: Callable[..., Engine], folders: Callable[[str], Path]
) -> tuple[Server, Bed]:
    """A server that has answered hits and misses, and whose engine has a name that is markup."""
    cache = server(chunk=CHUNK, flags=("--l2", f"disk://{folders('/tmp')}?max_gb=1"))
    bed = Bed(engine(cache, HOSTILE))
    for number in range(12):
        ids = [number % 4, *range(200)]
        request = bed.open(f"cmpl-{number}-{HOSTILE}")
        if not bed.load(request, ids):
            assert bed.store(request, ids)
        bed.requests.finish(request.id)
    eventually(lambda: cache.status()["prediction"] and len(cache.get("/requests")["requests"]) == 12)
    return cache, bed


def opened(browser: Any, cache: Server, width: int, scheme: str, faults: list[str]) -> Any:
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.on("console", lambda one: faults.append(one.text) if one.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"http://127.0.0.1:{cache.http_port}/")
    page.wait_for_selector("#all:not([hidden])")
    page.wait_for_selector("#requests table")
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_shows_what_the_server_says(busy: tuple[Server, Bed], browser: Any, width: int, scheme: str) -> None:
    cache, _ = busy
    faults: list[str] = []
    page = opened(browser, cache, width, scheme, faults)
    status = cache.status()
    counters = status["counters"]
    found = sum(value for name, value in counters.items() if name.startswith("lookup_tokens_total{"))
    shown = page.locator("#numbers > div").all_inner_texts()
    share = f"{100 * found / counters['requested_tokens_total']:.1f} %"
    assert any(one.startswith("tokens found") and one.endswith(share) for one in shown), (share, shown)
    assert page.inner_text("#health") == "The server is healthy." and status["version"] in page.inner_text("h1")
    assert page.locator("#tiers tbody tr").count() == len(status["tiers"]) == 1
    engines = page.inner_text("#engines")
    assert HOSTILE in engines and page.locator("#engines img").count() == 0, "names are text and never markup"
    sizes = status["prediction"]["sizes"]
    assert page.locator("#prediction tbody tr").count() == len(sizes) + 1
    (last, *_) = cache.get("/requests?limit=1")["requests"]
    first_row = page.locator("#requests tbody tr").first
    assert last["request"] in first_row.inner_text() and page.locator("#requests tbody tr").count() == 12
    first_row.locator("summary").click()
    assert json.loads(first_row.locator("pre").inner_text()) == last, "one click to the complete record"
    reasons = {name: value for name, value in counters.items() if name.startswith("missed_tokens_total{") and value}
    assert page.locator("#missing tbody tr").count() == len(reasons) > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    if folder := os.environ.get("LMCACHE_TEST_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page-{width}-{scheme}.png", full_page=True)
    assert not faults, faults
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_by_everybody(busy: tuple[Server, Bed], browser: Any, scheme: str) -> None:
    """axe-core finds nothing serious, with all details open."""
    if not AXE.exists():
        pytest.skip("no axe-core here; `./run test` fetches it where npm is")
    page = opened(browser, busy[0], 390, scheme, [])
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    # The page's policy lets no other script run, so axe comes by the debugger and not as an element of the page.
    page.evaluate(AXE.read_text("utf-8") + "; undefined")
    found = page.evaluate("axe.run()")
    grave = [
        (one["id"], one["help"], [node["target"] for node in one["nodes"][:3]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert found["passes"] and not grave, grave
    page.context.close()


def test_the_page_goes_on_without_its_server_and_says_so(busy: tuple[Server, Bed], browser: Any) -> None:
    cache, _ = busy
    page = opened(browser, cache, 1440, "light", [])
    cache.kill()
    page.evaluate("refresh()")
    page.wait_for_function("document.getElementById('health').textContent === 'The server is unreachable.'")
    assert "does not answer" in page.inner_text("#trouble")
    page.context.close()


def test_the_page_does_not_wait_for_ever_for_a_server_that_hangs(busy: tuple[Server, Bed], browser: Any) -> None:
    """It keeps no "healthy" on the screen, and shows the server again once that goes on."""
    cache, _ = busy
    page = opened(browser, cache, 1440, "light", [])
    page.evaluate("patience = 500")
    cache.signal(signal.SIGSTOP)
    try:
        page.evaluate("void refresh()")
        api.expect(page.locator("#health")).to_have_text("The server is unreachable.", timeout=60000)
        assert "does not answer" in page.inner_text("#trouble")
    finally:
        cache.signal(signal.SIGCONT)
    page.evaluate("patience = 60000")
    api.expect(page.locator("#health")).to_have_text("The server is healthy.", timeout=60000)
    page.context.close()
