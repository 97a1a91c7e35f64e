"""`lmcache demo`: a real vLLM with LMCache on this machine, and what a second prompt and a restart of the engine cost then."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from lmcache.cli.verbs import Verbs, add
from lmcache.errors import ConfigError, LMCacheError, ServerUnavailable
from lmcache.observability.log import printable
from lmcache.runtime import RUNTIME

_TEXT = """
Start `lmcache server` and `vllm serve MODEL` here, send long prompts, send them again, restart the engine and send them once
more. It prints the time to the first token of each, and checks that the answers are the same. vLLM's own prefix cache is off,
so what is found comes from LMCache. It needs vLLM in this environment, on a GPU or a CPU, and ends all that it has started.

examples:
  lmcache demo
  lmcache demo --model ./my-model --tokens 8000 --vllm '--max-model-len 16384'
"""
_MODEL = "Qwen/Qwen3-0.6B"
_INSTALL = (
    "vLLM is not installed in this environment: `pip install vllm` (GPU; a CPU build: docs.vllm.ai, Installation, CPU), then try "
    "again. Without vLLM, `lmcache server` and `lmcache bench` show what the cache itself gives"
)
_START_SECONDS, _STORED_SECONDS, _END_SECONDS = 1200.0, 20.0, 20.0
_PROMPTS, _ANSWER_TOKENS = 3, 8
_PR_SET_PDEATHSIG = 1


def add_verb(verbs: Verbs) -> None:
    """Add `demo` to the command line."""
    parser = add(verbs, "demo", run, "show with a real vLLM what LMCache gives", _TEXT)
    parser.add_argument(
        "--model", default=_MODEL, help=f"A model's name or folder. Default: {_MODEL}, which vLLM downloads."
    )
    parser.add_argument("--tokens", type=int, default=4000, help="Tokens of a prompt. Default: 4000.")
    parser.add_argument("--l1-size-gb", default="2", help="Memory for KV. Default: 2.")
    parser.add_argument("--vllm", default="", metavar="FLAGS", help="More flags for `vllm serve`, in quotes.")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo. The exit code is 1 if an answer differed, or nothing was found.

    Raises:
        ConfigError: vLLM is not installed, or a number is out of range.
        ServerUnavailable: a process did not start.
    """
    vllm = Path(sys.executable).with_name("vllm")
    if find_spec("vllm") is None or not (vllm.exists() or shutil.which("vllm")):
        raise ConfigError(_INSTALL)
    if not 256 <= arguments.tokens <= 1_000_000:
        raise ConfigError(f"--tokens {arguments.tokens}: must be from 256 to 1000000")
    command = [str(vllm) if vllm.exists() else "vllm", "serve", arguments.model, *arguments.vllm.split()]
    with tempfile.TemporaryDirectory(prefix="lmcache-demo-") as folder, ExitStack() as ends:
        before = signal.signal(signal.SIGTERM, _interrupted)
        ends.callback(signal.signal, signal.SIGTERM, before)
        return _show(arguments, command, Path(folder), ends)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _show(arguments: argparse.Namespace, command: list[str], folder: Path, ends: ExitStack) -> int:
    from lmcache.bench.workloads import Shape, prompt_of

    port, http_port, engine_port = _free_ports(3)
    flags = [
        "--l1-size-gb",
        arguments.l1_size_gb,
        "--port",
        str(port),
        "--http-host",
        "127.0.0.1",
        "--http-port",
        str(http_port),
    ]
    server = _Child([sys.executable, "-m", "lmcache.cli.main", "server", *flags], folder / "server.log", ends)
    server.wait(lambda: _answers(http_port, "/healthcheck"), "lmcache server")
    transfer = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}
    extra = {"kv_connector_extra_config": {"lmcache.mp.port": port}}
    command += [
        "--port",
        str(engine_port),
        "--no-enable-prefix-caching",
        "--kv-transfer-config",
        json.dumps(transfer | extra),
    ]
    prompts = [
        prompt_of(Shape(arguments.tokens, 512, int.from_bytes(os.urandom(4), "big")), one) for one in range(_PROMPTS)
    ]
    rows, answers = list[tuple[str, list[float]]](), list[list[list[int]]]()
    log = folder / "engine.log"
    for titles in (("computed", "from LMCache"), ("after a restart of the engine, from LMCache",)):
        print(f"starting {' '.join(command[:3])} (this takes a while; log: {log})", flush=True)
        engine = _Child(command, log, ends)
        engine.wait(lambda: _answers(engine_port, "/health"), "vllm serve")
        engine.wait(partial(_connected, log), "the engine's connection")
        _ask(engine_port, [[40] * 64])  # what happens once is not timed
        for title in titles:
            times, said = _ask(engine_port, prompts)
            if not rows:
                _settle(http_port, len(prompts) * (arguments.tokens // 256 - 1) * 256)
            rows.append((title, times))
            answers.append(said)
        engine.end()
    return _report(rows, answers, _counter(http_port, "retrieved_tokens_total"), arguments.tokens)


def _connected(log: Path) -> bool:
    """Return whether the engine's scheduler and a rank are connected: what is asked before is not stored."""
    return log.read_text(errors="replace").count("Connected to the LMCache server") >= 2


def _report(
    rows: Sequence[tuple[str, list[float]]], answers: Sequence[list[list[int]]], found: float, tokens: int
) -> int:
    width = max(len(title) for title, _ in rows)
    print(f"\nTime to the first token of {_PROMPTS} prompts of {tokens:,} tokens:")
    first = statistics.median(rows[0][1])
    for title, times in rows:
        middle = statistics.median(times)
        print(f"  {title:<{width}}  {1e3 * middle:9.1f} ms  {first / max(1e-9, middle):6.1f} x")
    same = all(one == answers[0] for one in answers)
    print(f"{found:,.0f} tokens came from LMCache. The answers {'are the same' if same else 'DIFFER'} in all rounds.")
    return 0 if same and found > 0 else 1


def _ask(port: int, prompts: list[list[int]]) -> tuple[list[float], list[list[int]]]:
    """Send prompts one after the other. Return seconds to the first token, and the tokens of the answers."""
    import anyio

    from lmcache.bench.serving import measured

    found = anyio.run(measured, f"http://127.0.0.1:{port}", prompts, _ANSWER_TOKENS)
    for sample, _ in found:
        if sample.failure:
            raise ServerUnavailable(f"the engine has not answered: {printable(sample.failure, 1000)}")
    return [sample.first_seconds for sample, _ in found], [answer for _, answer in found]


def _settle(port: int, tokens: int) -> None:
    """Wait until what was computed is stored."""
    deadline = RUNTIME.now() + _STORED_SECONDS
    while _counter(port, "stored_tokens_total") < tokens and RUNTIME.now() < deadline:
        RUNTIME.sleep(0.1)


def _counter(port: int, name: str) -> float:
    from lmcache.wire.http_client import ask

    _, status = ask(f"http://127.0.0.1:{port}", "/status")
    return float(status.get("counters", {}).get(name, 0.0))


def _answers(port: int, path: str) -> bool:
    from lmcache.wire.http_client import status_of

    with suppress(LMCacheError):
        return status_of(f"http://127.0.0.1:{port}", path) == 200
    return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Child:
    """A process in a group of its own, whose output goes to `log`; it is ended with `ends`."""

    def __init__(self, command: list[str], log: Path, ends: ExitStack) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        ends.callback(self.end)

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready`. Raises ServerUnavailable with the end of the log if the process ends, or the time is over."""
        until = RUNTIME.now() + _START_SECONDS
        while not ready():
            if self._process.poll() is not None or RUNTIME.now() > until:
                end = " | ".join(line for line in self.text().splitlines()[-8:] if line.strip())
                raise ServerUnavailable(f"{what} did not start: {printable(end, 3000)}")
            RUNTIME.sleep(0.2)

    def end(self) -> None:
        """End the process with all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
