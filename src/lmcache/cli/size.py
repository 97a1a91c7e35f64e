"""`lmcache size`: how much KV a model makes, and how many tokens and conversations fit into L1."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache.cli.verbs import Verbs, add, size_text
from lmcache.errors import ConfigError

if TYPE_CHECKING:
    from lmcache.sizing.model_kv import Kind

_LOSSY_KV = ("none", "int8", "int8-l1", "k8v4-l1")
_TEXT = """
Compute from a model's config.json how many bytes of KV a token takes, and what fits into L1. MODEL is a model's folder, its
config.json, or the name of a model that is in the local Hugging Face cache; nothing is downloaded.

examples:
  lmcache size ./Qwen3-8B --l1-size-gb 60
  lmcache size Qwen/Qwen3-8B --context 32768 --users 50
  lmcache size config.json --kv-dtype fp8 --json
"""


def add_verb(verbs: Verbs) -> None:
    """Add `size` to the command line."""
    parser = add(verbs, "size", run, "how much KV a model makes, and what fits into L1", _TEXT)
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="", help="Folder, config.json, or name of a model."
    )
    parser.add_argument("--model", dest="named", metavar="MODEL", default="", help="The same.")
    parser.add_argument("--l1-size-gb", metavar="GB", default="", help="Say what fits into an L1 of so many GiB.")
    parser.add_argument(
        "--context", metavar="TOKENS", default="", help="Tokens of a conversation. Default: the model's most."
    )
    parser.add_argument("--users", metavar="N", default="", help="Say what so many conversations take.")
    parser.add_argument(
        "--chunk-size", metavar="TOKENS", default="256", help="The server's --chunk-size. Default: 256."
    )
    parser.add_argument(
        "--kv-dtype", metavar="NAME", default="auto", help="The engine's --kv-cache-dtype. Default: auto."
    )
    parser.add_argument("--lossy-kv", choices=_LOSSY_KV, default="none", help="The engine's lossy_kv. Default: none.")
    parser.add_argument("--block-size", metavar="TOKENS", default="16", help="The engine's block size. Default: 16.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")


def run(arguments: argparse.Namespace) -> int:
    """Print the sizes."""
    from lmcache.sizing.model_kv import kinds_of, kv_dtype_of

    if not arguments.model and not arguments.named:
        raise ConfigError("MODEL: pass a model's folder or its config.json")
    path = config_path(arguments.named or arguments.model)
    config = _read(path)
    try:
        dtype = kv_dtype_of(config, arguments.kv_dtype)
        kinds = kinds_of(config, arguments.kv_dtype, _whole("--block-size", arguments.block_size), arguments.lossy_kv)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{path}: {type(error).__name__}: {error}: this is no configuration of a language model"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    found = _sized(arguments, config, kinds) | {"kv_dtype": dtype, "lossy_kv": arguments.lossy_kv}
    print(json.dumps(found, indent=2)) if arguments.json else _print(found)
    return 0


def config_path(model: str) -> Path:
    """Return the path of a model's config.json.

    Raises:
        ConfigError: there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        cached = _cached(model)
        if cached is not None:
            return cached
        raise ConfigError(
            f"{model}: not in the local Hugging Face cache, and nothing is downloaded: run `hf download {model} config.json`, or "
            "pass the path of its config.json"
        )
    raise ConfigError(f"{model}: there is no config.json: pass a model's folder, or the file itself")


def _cached(name: str) -> Path | None:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = hub / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text().strip()
    except OSError:
        revision = "*"
    return next(iter(sorted(folder.glob(f"snapshots/{revision}/config.json"))), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: pass a file that can be read") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}): pass the config.json of a model") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a JSON object: pass the config.json of a model")
    return config


def _whole(flag: str, text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 10**9:
        raise ConfigError(f"{flag} {text}: must be a whole number from 1 to 1000000000")
    return int(text)


def _sized(arguments: argparse.Namespace, config: dict[str, Any], kinds: list[Kind]) -> dict[str, Any]:
    chunk = _whole("--chunk-size", arguments.chunk_size)
    chunk_bytes = sum(kind.chunk_bytes(chunk) for kind in kinds)
    found: dict[str, Any] = {
        "kinds": [
            {
                "kind": kind.name,
                "layers": kind.layers,
                "bytes_per_state" if kind.reach_tokens == 1 else "bytes_per_token": kind.bytes,
                "reach_tokens": kind.reach_tokens,
                "chunk_bytes": kind.chunk_bytes(chunk),
            }
            for kind in kinds
        ],
        "chunk_tokens": chunk,
        "chunk_bytes": chunk_bytes,
        "bytes_per_token": -(-chunk_bytes // chunk),
    }
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    longest = (text or config).get("max_position_embeddings")
    context = _whole("--context", arguments.context) if arguments.context else longest
    if isinstance(context, int) and context > 0:
        found |= {"context_tokens": context, "conversation_bytes": context // chunk * chunk_bytes}
    if arguments.users:
        if "conversation_bytes" not in found:
            raise ConfigError(
                "--users: pass --context, since the model's configuration does not tell how long a prompt may be"
            )
        users = _whole("--users", arguments.users)
        found |= {"users": users, "users_bytes": users * found["conversation_bytes"]}
    if arguments.l1_size_gb:
        from lmcache.config.options import l1_size

        try:
            size = l1_size(arguments.l1_size_gb)
        except ValueError as error:
            raise ConfigError(f"--l1-size-gb {arguments.l1_size_gb}: {error}") from None
        chunks = int(size * 2**30) // chunk_bytes
        found |= {"l1_bytes": int(size * 2**30), "l1_tokens": chunks * chunk}
        if found.get("conversation_bytes"):
            found["l1_conversations"] = chunks * chunk_bytes // found["conversation_bytes"]
    return found


def _print(found: dict[str, Any]) -> None:
    for one in found["kinds"]:
        unit = "state" if "bytes_per_state" in one else "token"
        reach = f", the last {one['reach_tokens']:,} tokens of a chunk at most" if one["reach_tokens"] > 1 else ""
        print(f"{one['layers']:>4} layers  {one['kind']}: {one[f'bytes_per_{unit}']:,} bytes a {unit}{reach}")
    rounded = f" with lossy_kv={found['lossy_kv']}" if found["lossy_kv"] != "none" else ""
    print(
        f"KV in {found['kv_dtype']}{rounded}, chunks of {found['chunk_tokens']} tokens: {size_text(found['chunk_bytes'])} a chunk"
    )
    print(f"{found['bytes_per_token']:,} bytes a token")
    if "conversation_bytes" in found:
        print(f"a conversation of {found['context_tokens']:,} tokens takes {size_text(found['conversation_bytes'])}")
    if "users_bytes" in found:
        print(
            f"{found['users']:,} of them take {size_text(found['users_bytes'])}: --l1-size-gb {found['users_bytes'] / 2**30:.1f}"
        )
    if "l1_tokens" in found:
        held = f", {found['l1_conversations']:,} such conversations" if "l1_conversations" in found else ""
        print(f"an L1 of {size_text(found['l1_bytes'])} holds {found['l1_tokens']:,} tokens{held}")
