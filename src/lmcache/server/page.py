"""The status page for people: one file without a build step, which loads nothing from elsewhere.

It is the same for everybody and contains no state of the server. Its script asks for /overview, which is made once a second at
most, however many look, and for /healthcheck where it may not read that. The browser runs no other script, because the policy
names the hash of this one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

HTML = Path(__file__).with_name("page.html").read_text("utf-8")


def _hash_of(element: str) -> str:
    found = re.search(f"<{element}>(.*?)</{element}>", HTML, re.DOTALL)
    assert found is not None
    return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()


POLICY = (
    f"default-src 'none'; style-src 'sha256-{_hash_of('style')}'; script-src 'sha256-{_hash_of('script')}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy."""
