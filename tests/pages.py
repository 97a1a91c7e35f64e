"""The pages of the documentation as their readers use them: blocks of commands, run by a shell in their order."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ports import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NEEDS_ENGINE = {"vllm": "Run by our tests with real vLLM", "sglang": "Run by our tests with real SGLang"}
NEEDS_ENGINE["transformers"] = "Run by our tests with real Transformers"
_FENCE = re.compile(r"^( *)```(\w+)(?: title=\"([^\"]*)\")?[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_PATIENCE_SECONDS = 280


class Block(NamedTuple):
    """One fenced block: its language, what the page says about it ("" for nothing), and its text."""

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page below docs/, in order."""
    found = _FENCE.finditer((DOCS / page).read_text())
    return [Block(one[2], one[3] or "", textwrap.dedent(one[4])) for one in found]


def commands(page: str, *titles: str) -> list[Block]:
    """The blocks of commands without a title, and those whose titles begin with one of these."""
    return [
        one
        for one in blocks(page)
        if one.language == "bash" and (not one.title or one.title.startswith(titles or ("\0",)))
    ]


class Shell:
    """A reader's shell in an empty folder, with ports of its own: `run` executes blocks and returns what they have printed.

    What differs from the page: the ports, a small L1, and the flags of engines that make them start on a CPU.
    """

    def __init__(self, folder: Path, folders: Callable[[str], Path], **variables: str) -> None:
        self.folder, self.port, self.http_port, self.engine_port = folder, free_port(), free_port(), free_port()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMCACHE_", "VLLM_"))}
        self._environment = {
            **kept,
            "PYTHONPATH": str(ROOT / "src"),
            "PY": sys.executable,
            "HTTP_PORT": str(self.http_port),
            "ENGINE_PORT": str(self.engine_port),
            "LMCACHE_SERVER_PORT": str(self.port),
            "LMCACHE_SERVER_HTTP_PORT": str(self.http_port),
            "LMCACHE_SERVER_HTTP_HOST": "127.0.0.1",
            "LMCACHE_SERVER_SOCKET_DIR": str(folders("/tmp")),
            "LMCACHE_SERVER_ARENA_DIR": str(folders("/dev/shm")),
            "ENGINE_PYTHON": sys.executable,
            "ENGINE_FLAGS": "",
            **variables,
        }

    def run(self, parts: list[str], seconds: float = _PATIENCE_SECONDS) -> str:
        """Run these texts as one script, which ends at the first command that fails."""
        script = "\n".join([_PRELUDE, *map(self._here, parts)])
        child = subprocess.Popen(
            [shutil.which("bash") or "bash", "-c", script],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            text=True,
        )
        watch = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGTERM))
        watch.start()
        try:
            said, _ = child.communicate()
        finally:
            watch.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        assert child.returncode == 0, f"exit code {child.returncode}:\n{said[-5000:]}"
        return said

    def _here(self, text: str) -> str:
        text = re.sub(r"--l1-size-gb [14]\b", "--l1-size-gb 0.2", text)
        text = text.replace("mp_port: 5555", f"mp_port: {self.port}").replace(
            "localhost:8080", f"127.0.0.1:{self.http_port}"
        )
        text = re.sub(r"localhost:(8000|30000)", f"127.0.0.1:{self.engine_port}", text)
        extra = f'"kv_role":"kv_both","kv_connector_extra_config":{{"lmcache.mp.port":{self.port}}}'
        return text.replace('"kv_role":"kv_both"', extra)


def _end_with_parent() -> None:
    """A test run that is killed leaves no shell behind, nor what its trap ends (PR_SET_PDEATHSIG is 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def server_in_use() -> str:
    """For pages whose reader has a server already, which engines have asked."""
    return "lmcache server --l1-size-gb 1 &\nlmcache ping --wait 60\nlmcache bench --rounds 1"


def stored() -> str:
    """Wait until the server has complete chunks; the reader of a page takes longer than that anyway."""
    return "until curl -s localhost:8080/metrics | grep -q 'lmcache_complete_chunks [1-9]'; do sleep 0.1; done"


def found_in_l1(said: str) -> int:
    """The tokens that the last `lmcache why --summary` reports as found in L1."""
    counts: Iterator[str] = (one.replace(",", "") for one in re.findall(r"([\d,]+)  found in L1", said))
    return int([*counts, "0"][-2] if "found in L1" in said else 0)


_PRELUDE = r"""
set -e
trap 'status=$?; trap - EXIT; kill $(jobs -p) 2>/dev/null || true; wait || true; exit $status' EXIT
lmcache() {
  if [ "$1" = server ] && [ "$BASHPID" != $$ ]; then exec "$PY" -m lmcache.cli.main "$@"; fi # `kill %1` reaches it
  case $1 in
    ping | status | describe | why | doctor | predict | clear | bench | kvcache)
      "$PY" -m lmcache.cli.main "$@" --url "http://127.0.0.1:$HTTP_PORT" ;;
    *) "$PY" -m lmcache.cli.main "$@" ;;
  esac
}
python() {
  if [ "$2" = sglang.launch_server ]; then engine "$ENGINE_PYTHON" "$@"; else "$ENGINE_PYTHON" "$@"; fi
}
python3() { python "$@"; }
vllm() { engine "${ENGINE_PYTHON%/*}/vllm" "$@"; }
engine() { # the reader has another terminal for it
  last_engine=("$@")
  "$@" $ENGINE_FLAGS --port "$ENGINE_PORT" &
  engine_job=$!
  until curl -sf -o /dev/null "http://127.0.0.1:$ENGINE_PORT/health"; do
    kill -0 "$engine_job"
    sleep 0.2
  done
}
restart_engine() {
  kill "$engine_job" # the same to an engine as Ctrl-C, which what runs in the background does not hear
  wait "$engine_job" || true
  engine "${last_engine[@]}"
}
"""
