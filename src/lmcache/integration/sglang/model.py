"""The description of SGLang's KV pool: the layout and identity of its KV, and where each token's KV lies.

The pool has a K and a V tensor [slot, head, dim] per layer (MLA: one latent [slot, 1, dim]). A page is `page_size` consecutive
slots of SGLang. Copies use pages as blocks; with page size 1 every slot is a block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.chunks import Layout, shard_of_rank
from lmcache.engine.identity import digest_of, model_folder, named, plain
from lmcache.engine.load_formats import files_read, weights_identity
from lmcache.engine.served import ServedKV, kv_dtype, refuse_encoder_decoder, stores_its_shard
from lmcache.errors import LayoutError
from lmcache.transfer.paged import PagedKV, Plane

REMEDY = "set model_id in the LMCache config file to a name of yours"
ENGINE = "sglang"
"""Part of every layout's digest: engines round differently, and each reads a model's configuration in its own way."""

_CHANGE_NUMBERS = (
    "custom_weight_loader",
    "decrypted_config_file",
    "enable_w4a4_mxfp4_megamoe",
    "flashinfer_mxfp4_moe_precision",
    "forward_hooks",
    "kt_method",
    "kt_num_gpu_experts",
    "kt_weight_path",
    "model_impl",
    "modelopt_quant",
    "quantize_and_serve",
    "rl_quant_profile",
    "torchao_config",
)
"""Arguments of the server that change KV by more than rounding, and that SGLang's configuration of the model does not show."""
DTYPES = "use --kv-cache-dtype auto, fp8_e4m3 or fp8_e5m2"


@dataclass(frozen=True)
class Ranks:
    """The model's parallel split, and this process's rank in it."""

    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    @property
    def number(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank


@dataclass(frozen=True)
class Buffers:
    """The tensors of a KV pool. values: () with MLA. dtype: the layout's name of the KV's dtype."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    dtype: str


def describe_rank(
    buffers: Buffers, model_config: Any, page_size: int, ranks: Ranks, *, model_id: str = "", engine_id: str = ""
) -> ServedKV:
    """Describe one rank's KV. model_id: the user's name for the weights. engine_id: the same in all ranks of this engine only.

    Raises:
        LayoutError: this KV cannot be cached; the message says why.
    """
    refuse_encoder_decoder(model_config)
    if ranks.pp_size > 1:
        raise LayoutError(f"pipelines (pp_size={ranks.pp_size}) are not supported with SGLang yet; use tensor parallel")
    _refuse_unsupported(model_config)
    mla = not buffers.values
    layout = Layout(
        model_id="",
        kv_dtype=buffers.dtype,
        num_layers=len(buffers.keys),
        num_kv_heads=1 if mla else model_config.get_total_num_kv_heads(),
        head_size=buffers.keys[0].shape[-1],
        chunk_tokens=1,
        kind="mla" if mla else "mha",
        config_digest=config_digest(model_config),
    )
    shard = shard_of_rank(layout, ranks.tp_rank, ranks.tp_size, 0, layout.num_layers)
    paged = paged_kv(buffers, page_size)
    if shard.token_bytes(layout) != paged.token_bytes:
        raise LayoutError(f"the KV pool has {paged.token_bytes} bytes a token, the model {shard.token_bytes(layout)}")
    weights = str(model_config.model_path), load_format(), model_config, engine_id
    identity = named(model_id) if model_id else weights_identity(*weights, REMEDY)
    return ServedKV(identity, layout, shard, paged, stores_its_shard(layout, ranks.tp_rank, ranks.tp_size))


def _refuse_unsupported(model_config: Any) -> None:
    args = _server_args()
    if getattr(args, "quantization_param_path", None):
        raise LayoutError("KV scales from a file (--quantization-param-path) are not supported")
    if getattr(args, "dllm_algorithm", None):
        raise LayoutError("diffusion (--dllm-algorithm) is not supported: KV depends on tokens that come later")
    if '"longrope"' in json.dumps(plain(getattr(model_config, "hf_config", None))):
        raise LayoutError(
            "RoPE of type 'longrope' is not supported: SGLang turns keys by the longest prompt of the batch that they are in"
        )


def pool_buffers(pool: Any) -> Buffers:
    """The tensors of SGLang's KV pool.

    Raises:
        LayoutError: it is not one of the two plain pools, or keeps more than plain K and V.
    """
    kind = type(pool).__name__
    if kind not in ("MHATokenToKVPool", "MLATokenToKVPool"):
        raise LayoutError(
            f"a KV pool of kind {kind} is not supported; only models of full attention in a plain pool are"
        )
    for name in ("k_scale_buffer", "v_scale_buffer", "kv_scale_buffer"):
        if getattr(pool, name, None) is not None:
            raise LayoutError(f"KV with scales of its own is not supported; {DTYPES}")
    if getattr(pool, "kv_cache_layout", "nhd") != "nhd":
        raise LayoutError(f"a KV pool in the order {pool.kv_cache_layout!r} is not supported; use the default, nhd")
    mla = kind.startswith("MLA")
    keys = tuple(pool.kv_buffer) if mla else tuple(pool.k_buffer)
    return Buffers(keys, () if mla else tuple(pool.v_buffer), kv_dtype(pool.dtype, DTYPES))


def paged_kv(buffers: Buffers, page_size: int) -> PagedKV:
    """Where the tokens lie, with pages of `page_size` slots as blocks.

    Raises:
        LayoutError: tensors of different or unknown shapes.
    """
    first = buffers.keys[0]
    tensors: Sequence[Any] = buffers.keys
    if buffers.values:
        tensors = [tensor for pair in zip(buffers.keys, buffers.values, strict=True) for tensor in pair]
    if len(first.shape) != 3 or len({(tuple(t.shape), str(t.dtype), str(t.device)) for t in tensors}) != 1:
        shapes = ", ".join(sorted({str(tuple(t.shape)) for t in tensors}))
        raise LayoutError(f"KV tensors of shapes {shapes} are not supported; expected [slots, heads, dims], all alike")
    planes = tuple(Plane.of(tensor, "thd", page_size) for tensor in tensors)
    blocks = first.shape[0] // page_size
    return PagedKV(planes, page_size, blocks, first.element_size(), tuple(tensors), str(first.device))


def config_digest(model_config: Any) -> str:
    """A digest of whatever else changes the numbers, and of the engine's name.

    It covers the complete configuration. A harmless difference costs a miss, and no harmful difference causes a wrong answer.
    """
    args = _server_args()
    hf_config = getattr(model_config, "hf_config", None)
    commit, download_folder = getattr(hf_config, "_commit_hash", None), getattr(args, "download_dir", None)
    folder = model_folder(str(model_config.model_path), commit, download_folder)
    material = {
        "engine": ENGINE,
        "hf": plain(hf_config),
        "overrides": plain(getattr(model_config, "model_override_args", None)),
        "dtype": str(model_config.dtype),
        "quantization": plain(getattr(model_config, "quantization", None)),
        "load": files_read(load_format(), getattr(args, "model_loader_extra_config", None), folder),
        "arguments": {name: plain(value) for name in _CHANGE_NUMBERS if (value := getattr(args, name, None))},
    }
    return digest_of(material)


def load_format() -> str:
    """How this process has loaded its weights, "" where SGLang does not say."""
    return str(getattr(_server_args(), "load_format", ""))


def weights_are_backed_up() -> bool:
    """Return whether weights whose memory was released come back unchanged."""
    return bool(getattr(_server_args(), "enable_weights_cpu_backup", False))


def lora_enabled() -> bool:
    """Whether this engine may serve LoRA adapters."""
    return bool(getattr(_server_args(), "enable_lora", False) or getattr(_server_args(), "lora_paths", None))


def engine_page_size() -> int:
    """The page size that this engine was started with, 1 where SGLang does not say."""
    return int(getattr(_server_args(), "page_size", None) or 1)


def _server_args() -> Any:
    """What this engine was started with; None where no SGLang runs in this process, as in tests."""
    try:
        from sglang.srt.runtime_context import get_server_args
    except ImportError:  # SGLang 0.5.13 and older
        try:
            from sglang.srt.server_args import get_global_server_args as get_server_args
        except ImportError:
            return None
    try:
        return get_server_args()
    except (AttributeError, RuntimeError, ValueError):
        return None
