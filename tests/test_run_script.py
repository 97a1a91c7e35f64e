"""./run, without its downloads: a copy of it in an empty folder, with stand-ins for the programs it calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from servers import PATIENCE, eventually

SCRIPT = Path(__file__).resolve().parents[1] / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script, and in `bin` what it finds first: this Python, and an `id` that says "not root"."""
    (tmp_path / "run").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "bin").mkdir()
    program(tmp_path, "id", "echo 1000")
    program(tmp_path, "python3", f'exec {sys.executable} "$@"')
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "PYTHON": str(folder / "bin" / "python3")}
    return subprocess.Popen(
        ["bash", str(folder / "run"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_hear_interrupts,
        text=True,
    )


def _hear_interrupts() -> None:
    """Tests that run in the background of a shell inherit that SIGINT is ignored, and no script could trap it then."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_help_names_every_command(folder: Path) -> None:
    run = command(folder)
    out, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0
    assert all(
        f"\n  {verb}" in out for verb in ("demo", "test", "sanitize", "lint", "wheel", "site", "bench", "setup", "help")
    )


def test_an_unknown_command_is_named(folder: Path) -> None:
    run = command(folder, "dmeo")
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    assert "error: unknown command 'dmeo'" in err


def test_a_missing_system_package_is_one_clear_line(folder: Path) -> None:
    program(folder, "python3", f'case "$*" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"')
    run = command(folder, "demo", "--engine", "numpy")
    _, err = run.communicate(timeout=PATIENCE)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert run.returncode == 1
    assert err.splitlines()[-1].startswith("error: missing system packages")
    assert f"sudo apt-get install -y python{version}-venv" in err
    assert not (folder / ".cache" / "venv").exists()


def test_a_failed_step_says_what_and_where_to_read_on(folder: Path) -> None:
    program(folder, "python3", f'case "$*" in *"-m venv"*) echo "no room"; exit 3 ;; esac; exec {sys.executable} "$@"')
    run = command(folder, "demo", "--engine", "numpy")
    _, err = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    assert "no room" in err
    assert ".cache/log/step" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_step_is_ended(folder: Path, number: signal.Signals) -> None:
    step = 'echo $$ > "$(dirname "$0")/pid.new"; mv "$(dirname "$0")/pid.new" "$(dirname "$0")/pid"; sleep 900; exit 0'
    program(folder, "python3", f'case "$*" in *"-m venv"*) {step} ;; esac; exec {sys.executable} "$@"')
    run = command(folder, "demo", "--engine", "numpy")
    pid_file = folder / "bin" / "pid"
    eventually(lambda: pid_file.exists() or run.poll() is not None)
    assert run.poll() is None
    os.killpg(run.pid, number)
    run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + number
    eventually(lambda: not alive(int(pid_file.read_text())))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
