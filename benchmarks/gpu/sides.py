"""Which engines are compared on a GPU, and how each is started: vLLM alone, with a connector that does nothing, with its own two
kinds of offloading, LMCache 0.5.3, PegaFlow, ours.

`--python` has vLLM and what our package needs; ours is on PYTHONPATH or installed. `--peer-path` is a folder that holds LMCache
0.5.3 and goes first on PYTHONPATH of its server and engine; `--pegaflow-path` is the same for PegaFlow. With `--model` a real
checkpoint is served, on whatever device vLLM finds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import Child, end_with_parent
from benchmarks.gpu.model import SHAPES
from benchmarks.run import machine
from benchmarks.sides import PROJECT, Server, Side, free_port

ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # `redraw` travels to the worker
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "DO_NOT_TRACK": "1",
}
NO_GPU = "no GPU"
SETTLE_SECONDS = 90
END_SECONDS = 60
"""For vLLM's own processes to end with it, and their GPU memory to be free."""
TITLES = {
    "alone": "vLLM alone",
    "alone-again": "vLLM alone, once more",
    "nothing": "a connector that does nothing",
    "native": "vLLM's own offloading",
    "simple": "vLLM's SimpleCPUOffloadConnector",
    "peer": "LMCache 0.5.3",
    "peer-in-process": "LMCache 0.5.3 in process",
    "ours": "ours",
    "ours-between": "ours, loads between steps",
    "in-process": "ours in process",
    "pegaflow": "PegaFlow",
    "nixl": "vLLM's NIXL connector",
}


class Engine(Child):
    """`benchmarks.gpu.engine` in a process of its own; `call` runs one of its methods there."""

    def __init__(self, name: str, side: Side, settings: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
        path = [side.path, str(PROJECT)]
        if side.name != "peer":  # which has our package's name
            path.append(os.environ.get("PYTHONPATH", ""))
        environment = os.environ | ENVIRONMENT | environment | {"PYTHONPATH": ":".join(filter(None, path))}
        command = [side.python, "-m", "benchmarks.gpu.engine", json.dumps(settings)]
        super().__init__(name, command, log, environment, log.parent)

    def first_token(self, prompt: list[int], pause: float = 0.05) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("first_tokens", prompts=[prompt], pause=pause)[0]
        return answer

    def settle(self) -> None:
        """Wait until the arena is registered with the GPU's driver, where there is one: copies are slower before."""
        limit = time.monotonic() + SETTLE_SECONDS
        while gpu_name() != NO_GPU and "of the arena with the GPU driver" not in self._log.read_text():
            if time.monotonic() > limit:
                said = [line for line in self._log.read_text().splitlines() if "LMCache WARNING" in line]
                raise RuntimeError(f"the arena is not registered after {SETTLE_SECONDS} s; the log says: {said[-1:]}")
            time.sleep(0.1)

    def forget(self) -> None:
        if not self.call("forget")["done"]:
            raise RuntimeError(f"{TITLES[self.name]} does not let its prefix cache go")


@dataclass(frozen=True)
class Hosts:
    """What all sides of a run share. `settings` are vLLM's own. paths: of rivals, the folder that goes first on PYTHONPATH."""

    python: str
    paths: dict[str, str]
    settings: dict[str, Any]
    cache_gb: float
    chunk_tokens: int
    directory: Path

    @contextlib.contextmanager
    def engine(
        self, name: str, server: Server | None = None, gpus: str = "", role: str = "kv_both", **more: Any
    ) -> Iterator[Engine]:
        """The engine `name` of `TITLES`, ready, with a server of its own where it needs one and none is given.

        gpus: those that it sees, as in CUDA_VISIBLE_DEVICES; default: all. role: `kv_role` of ours. more: settings of vLLM.
        """
        rival = name.partition("-")[0]
        peer = rival == "peer"
        side = Side("peer" if peer else "ours", self.python, self.paths.get(rival, ""), "gpu")
        settings, environment = self.settings | more, {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
        with contextlib.ExitStack() as stack:
            if name == "native":
                settings |= {"kv_offloading_size": self.cache_gb, "kv_offloading_backend": "native"}
            elif name == "simple":
                settings["kv_transfer_config"] = SIMPLE_CONFIG | {
                    "kv_connector_extra_config": {"cpu_bytes_to_use": int(self.cache_gb * 2**30)}
                }
            elif name == "nothing":
                settings["kv_transfer_config"] = NOTHING_CONFIG
            elif name.endswith("in-process"):
                settings["kv_transfer_config"] = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
                environment["LMCACHE_MAX_LOCAL_CPU_SIZE"] = str(self.cache_gb)
            elif name == "pegaflow":
                gpus = int(settings.get("tensor_parallel_size", 1))
                port = stack.enter_context(pegaflow(side, self.cache_gb, gpus, self.directory))
                settings["kv_transfer_config"] = PEGAFLOW_CONFIG
                environment |= {"PEGAFLOW_HOST": "http://127.0.0.1", "PEGAFLOW_PORT": str(port), "PYTHONHASHSEED": "0"}
            elif name == "nixl":
                settings["kv_transfer_config"] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
                environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_port())
            elif rival != "alone":
                server = server or stack.enter_context(side.serve(self.cache_gb, self.chunk_tokens))
                more_config = {"lmcache.mp.synchronous_loads": "never"} if name == "ours-between" else {}
                settings["kv_transfer_config"] = transfer_config(server.port, **more_config) | {"kv_role": role}
            engine = Engine(name, side, settings, self.directory / f"{name}-{time.time_ns()}.log", environment)
            stack.callback(engine.stop, END_SECONDS)
            engine.call("ready")
            if rival == "ours" and server is not None:
                server.settle()
            if rival in ("ours", "in"):
                engine.settle()
            yield engine


NOTHING_CONFIG = {
    "kv_connector": "NothingConnector",
    "kv_connector_module_path": "benchmarks.gpu.nothing",
    "kv_role": "kv_both",
}
SIMPLE_CONFIG = {"kv_connector": "SimpleCPUOffloadConnector", "kv_role": "kv_both"}
PEGAFLOW_CONFIG = {
    "kv_connector": "PegaKVConnector",
    "kv_connector_module_path": "pegaflow.connector",
    "kv_role": "kv_both",
}


@contextlib.contextmanager
def pegaflow(side: Side, cache_gb: float, gpus: int, directory: Path) -> Iterator[int]:
    """Run PegaFlow's server for an engine on so many GPUs; give its port."""
    port, http = free_port(), free_port()
    command = [str(Path(side.path) / "pegaflow" / "pegaflow-server-py"), "--addr", f"127.0.0.1:{port}"]
    command += [
        "--http-addr",
        f"127.0.0.1:{http}",
        "--devices",
        ",".join(map(str, range(gpus))),
        "--pool-size",
        f"{cache_gb:g}gb",
    ]
    with (directory / "pegaflow-server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": side.path}, preexec_fn=end_with_parent
        )
    try:
        limit = time.monotonic() + SETTLE_SECONDS
        while answers(f"http://127.0.0.1:{http}/health") != 200:
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(
                    f"PegaFlow does not answer: {(directory / 'pegaflow-server.log').read_text()[-2000:]}"
                )
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str) -> int:
    """The HTTP status of a GET; 0 where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except OSError:
        return 0


def transfer_config(port: int, **more: Any) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` for a server on this host. more: further settings of ours."""
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port} | more,
    }


def parser(program: str, about: str | None) -> argparse.ArgumentParser:
    """The arguments that all GPU benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{program}",
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--python", metavar="PATH", default=sys.executable, help="Python with vLLM and us; default: this one"
    )
    made.add_argument("--peer-path", metavar="DIR", default="", help="folder with LMCache 0.5.3, for its rows")
    made.add_argument("--model", metavar="DIR", type=Path, help="a checkpoint; default: random weights of --shape")
    made.add_argument("--shape", choices=[*SHAPES], default="qwen3-8b", help="of the model. Default: qwen3-8b")
    made.add_argument("--chunk-tokens", metavar="N", type=int, help="of our server; default: what fits the shape")
    made.add_argument("--pegaflow-path", metavar="DIR", default="", help="folder with PegaFlow, for its rows")
    made.add_argument("--set", metavar="JSON", type=json.loads, default={}, help="further settings of vLLM")
    made.add_argument("--cache-gb", metavar="N", type=float, default=40, help="memory of each cache. Default: 40")
    made.add_argument("--rounds", metavar="N", type=int, default=10, help="after one to warm up. Default: 10")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every sample there")
    return made


@contextlib.contextmanager
def hosts(options: argparse.Namespace, **settings: Any) -> Iterator[Hosts]:
    """What the arguments say."""
    with tempfile.TemporaryDirectory(prefix="lmcache-gpu-bench-") as name:
        directory = Path(name)
        shared: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "max_model_len": 40000,
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": True,
            "seed": 0,
            "redraw": options.model is None,
        }
        chunk_tokens = options.chunk_tokens
        if options.model is None:
            shape = SHAPES[options.shape]()
            shared |= {"model": str(shape.write(directory / options.shape)), "load_format": "dummy"}
            shared |= {"vocabulary": shape.vocabulary} | shape.settings
            chunk_tokens = chunk_tokens or shape.chunk_tokens
        else:
            config = json.loads((options.model / "config.json").read_text())
            shared |= {"model": str(options.model.resolve()), "vocabulary": config["vocab_size"]}
        paths = {"peer": options.peer_path, "pegaflow": options.pegaflow_path}
        yield Hosts(
            options.python, paths, shared | settings | options.set, options.cache_gb, chunk_tokens or 256, directory
        )


def prompt_bytes(options: argparse.Namespace, tokens: int) -> int:
    """KV of a prompt. For a checkpoint from its `config.json`, at the width of its `torch_dtype`."""
    if options.model is None:
        return SHAPES[options.shape]().kv_bytes(tokens)
    config = json.loads((options.model / "config.json").read_text())
    width = 4 if config["torch_dtype"] == "float32" else 2
    return int(tokens * config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * width)


def keep(path: Path | None, pcie: float, **found: Any) -> None:
    """What there is so far, as JSON: a run may be cut."""
    if path:
        path.write_text(json.dumps({"machine": machine(), "gpu": gpu_name(), "pcie": pcie, **found}) + "\n")


def measured_pcie() -> float:
    """GB/s to the device, in this process."""
    from benchmarks.gpu.pcie import pcie

    return pcie(1 << 30)["to_device"]


def gpu_name() -> str:
    try:
        import torch

        return str(torch.cuda.get_device_name())
    except (ImportError, RuntimeError, AssertionError):
        return NO_GPU
