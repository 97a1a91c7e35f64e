"""The layout of the served model's KV in the engine's pool, and the engines whose KV cannot be cached."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcache.chunks import Layout, shard_of_rank
from lmcache.engine.identity import Identity, digest_of, named, path_identity, plain
from lmcache.engine.served import KV_DTYPES, ServedKV, refuse_length_dependent_rope, stores_its_shard
from lmcache.errors import LayoutError
from lmcache.transfer.paged import PagedKV, Plane

MODEL_ID_VARIABLE = "LMCACHE_MODEL_ID"
_FP8_NAMES = ("fp8", "fp8_e4m3")
_HEADS_OUTSIDE_TOKENS = "TRTLLM"
"""The attention backend whose blocks are [head][token][dim]. The pool's shape does not show the order of other backends."""


def describe_pool(llm_args: Any, pool: Any, rank: int, lossy_kv: str = "none") -> ServedKV:
    """Describe the pool [blocks, layers, 2 (1 for MLA), elements of a block] of a tensor-parallel rank. lossy_kv: as in
    `Identity`.

    Raises:
        LayoutError: this engine's KV cannot be cached; the message says why.
    """
    _refuse_unsupported(llm_args)
    folder = model_folder(llm_args)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    _refuse_windows(text)
    mla = "kv_lora_rank" in text and text["kv_lora_rank"] is not None
    heads, head_size = _heads(text, mla)
    tp_size = int(getattr(llm_args, "tensor_parallel_size", 1) or 1)
    layout = Layout(
        model_id="",
        kv_dtype=_kv_dtype(llm_args, pool),
        num_layers=pool.shape[1],
        num_kv_heads=heads,
        head_size=head_size,
        chunk_tokens=1,
        kind="mla" if mla else "mha",
        config_digest=_config_digest(llm_args, config),
    )
    shard = shard_of_rank(layout, rank, tp_size, 0, layout.num_layers)
    paged = _paged(pool, shard.end_head - shard.first_head, layout, _tokens_per_block(llm_args))
    identity = _identity(llm_args, folder).accepting(lossy_kv)
    return ServedKV(identity, layout, shard, paged, stores_its_shard(layout, rank, tp_size))


def model_folder(llm_args: Any) -> Path:
    """Where the model's files are: its folder, or for a name of a repository the snapshot that was downloaded.

    Raises:
        LayoutError: they are not on this machine.
    """
    name = str(llm_args.model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=getattr(llm_args, "revision", None), local_files_only=True))
    except (OSError, ValueError) as error:
        raise LayoutError(f"the files of model {name!r} are not on this machine: {error}") from None


def _identity(llm_args: Any, folder: Path) -> Identity:
    """The identity of the weights, or the user's own name for them.

    Raises:
        LayoutError: it cannot be found out; the message says what to set.
    """
    name, remedy = os.environ.get(MODEL_ID_VARIABLE, ""), f"set {MODEL_ID_VARIABLE} to a name of yours"
    if name:
        return named(name)
    load_format = getattr(llm_args, "load_format", "auto")
    if str(getattr(load_format, "name", load_format)).lower() != "auto":
        raise LayoutError(
            f"load_format {load_format!s} makes weights that are not those of the model's files; {remedy}"
        )
    if getattr(llm_args, "checkpoint_loader", None) is not None:
        raise LayoutError(f"a checkpoint_loader of yours may read weights from anywhere; {remedy}")
    identity = path_identity(str(folder), remedy)
    if identity is None:
        raise LayoutError(f"there is no directory {str(folder)!r}; {remedy}")
    return identity


def _refuse_unsupported(llm_args: Any) -> None:
    for name in ("pipeline_parallel_size", "context_parallel_size"):
        if int(getattr(llm_args, name, 1) or 1) > 1:
            raise LayoutError(f"{name}={getattr(llm_args, name)} is not supported")
    if getattr(llm_args, "enable_attention_dp", False):
        raise LayoutError("enable_attention_dp is not supported: its ranks hold KV of different requests")
    if int(getattr(llm_args, "max_beam_width", 1) or 1) > 1:
        raise LayoutError("beam search is not supported: beams share blocks")
    backend = str(getattr(llm_args, "attn_backend", _HEADS_OUTSIDE_TOKENS))
    if backend != _HEADS_OUTSIDE_TOKENS:
        raise LayoutError(f"attn_backend {backend} is not supported; leave it at {_HEADS_OUTSIDE_TOKENS}")
    if getattr(getattr(llm_args, "kv_cache_config", None), "max_attention_window", None):
        raise LayoutError("max_attention_window is not supported; only full attention is")


def _refuse_windows(text: Mapping[str, Any]) -> None:
    kinds = set(text.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise LayoutError(f"layers of kind {', '.join(sorted(kinds))} are not supported; only full attention is")
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        raise LayoutError(
            f"a sliding window of {text['sliding_window']} tokens is not supported; only full attention is"
        )
    refuse_length_dependent_rope(text)


def _heads(text: Mapping[str, Any], mla: bool) -> tuple[int, int]:
    """Return (KV heads of the complete model, elements of one head)."""
    if mla:
        return 1, int(text["kv_lora_rank"]) + int(text["qk_rope_head_dim"])
    queries = int(text["num_attention_heads"])
    size = text.get("head_dim") or int(text["hidden_size"]) // queries
    return int(text.get("num_key_value_heads") or queries), int(size)


def _kv_dtype(llm_args: Any, pool: Any) -> str:
    given = str(getattr(getattr(llm_args, "kv_cache_config", None), "dtype", "auto") or "auto").lower()
    found = KV_DTYPES.get(str(pool.dtype).removeprefix("torch."))
    if found is None and given in _FP8_NAMES and pool.element_size() == 1:
        return "fp8_e4m3"
    if found is None or given not in ("auto", found, *(_FP8_NAMES if found == "fp8_e4m3" else ())):
        raise LayoutError(f"KV of dtype {given!r} in a pool of {pool.dtype} is not supported; use auto or fp8")
    return found


def _config_digest(llm_args: Any, config: Any) -> str:
    """A digest of what changes the numbers: the model's configuration, and how this engine computes it."""
    names = (
        "dtype",
        "quant_config",
        "model_kwargs",
        "speculative_config",
        "sparse_attention_config",
        "checkpoint_format",
    )
    material = {name: plain(getattr(llm_args, name, None)) for name in names}
    scales = plain(getattr(getattr(llm_args, "kv_cache_config", None), "dtype", None))
    return digest_of(["tensorrt_llm", plain(config), material, scales])


def _tokens_per_block(llm_args: Any) -> int | None:
    given = getattr(getattr(llm_args, "kv_cache_config", None), "tokens_per_block", None)
    return int(given) if given else None


def _paged(pool: Any, heads: int, layout: Layout, told_tokens: int | None) -> PagedKV:
    """Planes of a pool whose blocks are [layer][K, V][head][token][dim]; the last three may be one axis."""
    sizes, row = tuple(pool.shape), heads * layout.head_size
    if len(sizes) not in (4, 6) or sizes[2] != layout.planes_per_layer:
        raise LayoutError(f"a KV pool of shape {sizes} with {heads} heads of {layout.head_size} is not understood")
    elements = math.prod(sizes[3:])
    tokens = elements // row
    if elements % row or told_tokens not in (None, tokens):
        raise LayoutError(
            f"a KV pool of shape {sizes} does not hold blocks of {told_tokens} tokens of {heads} heads of {layout.head_size}"
        )
    inner = heads, tokens, layout.head_size
    if len(sizes) == 6 and sizes[3:] != inner:
        raise LayoutError(f"a KV pool of shape {sizes} is not [blocks, layers, K and V, heads, tokens, dims]")
    blocks = pool if len(sizes) == 6 else pool.unflatten(3, inner)
    planes = tuple(Plane.of(blocks[:, layer, part], "bhtd") for layer in range(sizes[1]) for part in range(sizes[2]))
    return PagedKV(planes, tokens, sizes[0], pool.element_size(), pool, str(pool.device))
