"""The description of SGLang's KV pools: the layout and identity of their KV, and where each token's KV lies.

A pool has a K and a V tensor [slot, head, dim] per layer (MLA: one latent [slot, 1, dim]). A page is `page_size` consecutive
slots of SGLang. Copies use pages as blocks; with page size 1 every slot is a block. Layers with sliding windows have a pool of
their own, with other slots for the same tokens. Recurrent layers have a pool of states: tensors [layer, slot, ...], where one
slot holds what all these layers know after a prefix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache.chunks import Group, Layout, shard_of_rank
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
    """The tensors of a group of layers in SGLang's pools.

    keys, values: [slot, head, dim] for each layer; values is () with MLA. dtype: the layout's name of the KV's dtype. layers:
    numbers of the layers in the model; () if the model has one kind of KV. reach_tokens: as in `Group`. state: which part of a
    recurrent layer's state `keys` hold, as [slot, ...]; "" for KV of tokens."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    dtype: str
    layers: tuple[int, ...] = ()
    reach_tokens: int = 0
    state: str = ""


@dataclass(frozen=True)
class WindowKV(ServedKV):
    """The KV of layers with a sliding window."""

    def layout(self, chunk_tokens: int) -> Layout:
        """As `ServedModel.layout`.

        Raises:
            LayoutError: SGLang never keeps the complete chunks that its window reaches into, so no prefix could be used.
        """
        reach = self.group.reach_tokens if self.group is not None else 0
        if chunk_tokens < reach and reach % chunk_tokens:
            raise LayoutError(
                f"chunks of {chunk_tokens} tokens do not fill the window of {reach} tokens that SGLang keeps: start the server "
                f"with --chunk-size {-(-reach // 16) * 16}, or with one that divides {reach}"
            )
        return super().layout(chunk_tokens)


def describe_rank(
    groups: Sequence[Buffers],
    model_config: Any,
    page_size: int,
    ranks: Ranks,
    *,
    model_id: str = "",
    engine_id: str = "",
    lossy_kv: str = "none",
) -> list[ServedKV]:
    """Describe one rank's KV, by groups. model_id: the user's name for the weights. engine_id: the same in all ranks of this
    engine only. lossy_kv: as in `Identity`.

    Raises:
        LayoutError: this KV cannot be cached; the message says why.
    """
    refuse_encoder_decoder(model_config)
    if ranks.pp_size > 1:
        raise LayoutError(f"pipelines (pp_size={ranks.pp_size}) are not supported with SGLang yet; use tensor parallel")
    _refuse_unsupported(model_config)
    digest = config_digest(model_config)
    described = [_describe_group(one, model_config, page_size, ranks, digest) for one in groups]
    weights = str(model_config.model_path), load_format(), model_config, engine_id
    identity = named(model_id) if model_id else weights_identity(*weights, REMEDY)
    return [replace(one, identity=identity.accepting(lossy_kv)) for one in described]


def _describe_group(one: Buffers, model_config: Any, page_size: int, ranks: Ranks, digest: str) -> ServedKV:
    """Describe one group, without the identity of the weights."""
    if one.state:
        layout, paged = _state_layout(one, ranks, digest), paged_states(one)
    else:
        layout, paged = _token_layout(one, model_config, ranks, digest), paged_kv(one, page_size)
    shard = shard_of_rank(layout, ranks.tp_rank, ranks.tp_size, 0, layout.num_layers)
    if shard.token_bytes(layout) != paged.token_bytes:
        raise LayoutError(f"the KV pool has {paged.token_bytes} bytes a token, the model {shard.token_bytes(layout)}")
    stores = stores_its_shard(layout, ranks.tp_rank, ranks.tp_size)
    group = Group(one.layers, one.reach_tokens) if one.layers else None
    served = WindowKV if one.reach_tokens and not one.state else ServedKV
    return served(named(""), layout, shard, paged, stores, group, page_size, only_last=bool(one.reach_tokens))


def _token_layout(one: Buffers, model_config: Any, ranks: Ranks, digest: str) -> Layout:
    mla, heads = not one.values, model_config.get_total_num_kv_heads()
    if one.layers and ranks.tp_size == 1:  # groups may have different heads
        heads = one.keys[0].shape[1]
    return Layout(
        model_id="",
        kv_dtype=one.dtype,
        num_layers=len(one.keys),
        num_kv_heads=1 if mla else heads,
        head_size=one.keys[0].shape[-1],
        chunk_tokens=1,
        kind="mla" if mla else "mha",
        config_digest=digest,
    )


def _state_layout(one: Buffers, ranks: Ranks, digest: str) -> Layout:
    """Return the layout of states, as bytes. What they mean depends on their shape and dtype."""
    first = one.keys[0]
    meaning = [one.state, list(first.shape[1:]), str(first.dtype), digest]
    return Layout(
        model_id="",
        kv_dtype="uint8",
        num_layers=len(one.keys),
        num_kv_heads=ranks.tp_size,
        head_size=_state_bytes(first),
        chunk_tokens=1,
        kind="state",
        config_digest=digest_of(meaning),
    )


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


def pool_groups(pool: Any, page_size: int, window: int = 0) -> list[Buffers]:
    """Return the groups of layers in SGLang's KV pool, those of full attention first. window: tokens of the sliding window, as
    SGLang counts them: without the token that looks back.

    Raises:
        LayoutError: the pool is of an unknown kind, or keeps more than plain K and V, or states that cannot be copied.
    """
    kind = type(pool).__name__
    if kind == "SWAKVPool":
        return _windows(pool, -(-window // page_size) * page_size)
    if kind == "HybridLinearKVPool":
        layers = tuple(pool.full_attention_layer_id_mapping)
        return [replace(_plain(pool.full_kv_pool), layers=layers), *_states(pool.mamba_pool)]
    return [_plain(pool)]


def _windows(pool: Any, reach_tokens: int) -> list[Buffers]:
    places = sorted(pool.layers_mapping.items())
    full, sliding = (tuple(layer for layer, (_, is_swa) in places if is_swa == side) for side in (False, True))
    if not full or not sliding:
        raise LayoutError("models whose layers all have sliding windows are not supported with SGLang yet")
    return [
        replace(_plain(pool.full_kv_pool), layers=full),
        replace(_plain(pool.swa_kv_pool), layers=sliding, reach_tokens=reach_tokens),
    ]


def _states(pool: Any) -> list[Buffers]:
    """The tensors of a pool of states, each as a group: the layers of one tensor are alike, as copies on a GPU need them."""
    if type(pool).__name__ != "MambaPool":
        raise LayoutError(f"a pool of states of kind {type(pool).__name__} is not supported")
    cache = pool.mamba_cache
    more = [name for name, value in vars(cache).items() if value is not None and name not in ("conv", "temporal")]
    more += [type(one).__name__ for one in pool._slot_siblings]
    if more:
        raise LayoutError(f"recurrent layers with more than a plain state ({', '.join(more)}) are not supported")
    named_tensors = {**{f"conv {at}": one for at, one in enumerate(cache.conv)}, "temporal": cache.temporal}
    layers = tuple(pool.mamba_layer_ids)
    return [
        Buffers(tuple(tensor), (), "uint8", layers, 1, name) for name, tensor in named_tensors.items() if tensor.numel()
    ]


def _plain(pool: Any) -> Buffers:
    """The tensors of a plain pool."""
    kind = type(pool).__name__
    if kind not in ("MHATokenToKVPool", "MLATokenToKVPool"):
        raise LayoutError(
            f"a KV pool of kind {kind} is not supported; full attention, sliding windows and Mamba states in plain pools are"
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


def paged_states(one: Buffers) -> PagedKV:
    """Where the states lie: a slot is a block of one token, and its elements are bytes.

    Raises:
        LayoutError: tensors of different shapes, or states that do not lie in one piece.
    """
    first = one.keys[0]
    if len({(tuple(t.shape), t.stride(), str(t.device)) for t in one.keys}) != 1 or not first[0].is_contiguous():
        raise LayoutError(f"states of shape {tuple(first.shape)} and strides {first.stride()} are of an unknown order")
    step = first.stride()[0] * first.element_size()
    planes = tuple(Plane.strided(tensor.data_ptr(), step, 0, 1, 0, _state_bytes(tensor), 1) for tensor in one.keys)
    return PagedKV(planes, 1, first.shape[0], 1, one.keys, str(first.device))


def _state_bytes(tensor: Any) -> int:
    """Bytes of one slot."""
    return int(tensor[0].numel() * tensor.element_size())


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
