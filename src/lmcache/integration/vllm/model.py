"""The layout of the served model's KV, and the engines whose KV cannot be cached."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from lmcache.chunks import PER_TOKEN_HEAD, SCALE_BYTES, Group, Layout, Shard, shard_of_rank
from lmcache.chunks.layout import DTYPE_BYTES
from lmcache.engine.groups import shares
from lmcache.engine.identity import digest_of, named, plain
from lmcache.engine.served import ServedModel, refuse_encoder_decoder
from lmcache.errors import LayoutError
from lmcache.integration.vllm.identity import config_digest, draft_model_of, served_identity
from lmcache.integration.vllm.rules import refuse_what_vllm_rules_out

_FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec")
_WINDOW, _LOCAL, _STATE = "SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec"
_FP8_NAMES = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
_SHAPE = (
    "block_size",
    "num_kv_heads",
    "head_size",
    "head_size_v",
    "dtype",
    "cache_dtype_str",
    "cache_role",
    "shapes",
    "dtypes",
)
"""The attributes of a spec that say what the KV of a layer looks like."""
INDEXER_PARTS = {"values": ("fp8_e4m3", 0, 128), "scales": ("float32", 128, 4)}
"""What blocks of the KV of DeepSeek V3.2's indexers hold, one after the other and each for all tokens of the block: its dtype,
and for each token the bytes before it and of it. A scale is not with its values, so each part is a group of its own."""
_DRAFTS = ("draft_model", "eagle", "eagle3", "mtp")
"""vLLM's ways of drafting with layers that have KV of their own: KV of a token once the token has been computed, as the model's
layers have it. EAGLE and MTP compute it from the token and the one behind it."""
_HEADS_KEYS = ("kv_heads", "key_value_heads", "heads_in_group", "attention_groups")
_PLAIN_DTYPES = ("float32", "float16", "bfloat16")
_WITH_SCALES = {
    "int8_per_token_head": ("int8", 1),
    "fp8_per_token_head": ("fp8_e4m3", 1),
    "int4_per_token_head": ("uint8", 2),
}
"""vLLM's KV dtypes with a scale for each head of each token: the layout's dtype, and how many elements one of it holds."""


@dataclass(frozen=True)
class ModelKV(ServedModel):
    """The KV of a complete model, and its split among ranks. Of a model with several groups, this is the first one.

    block_tokens: tokens of a scheduler block. layer_names: this rank's layers, in the order of the extent. counts: how many
    layers each pipeline stage has. group: which group this is; None if the model has one kind of KV. number: vLLM's number of the
    group. local_tokens: as in `GroupTable`. part: the part of `INDEXER_PARTS` that this group holds of an indexer's KV, else "".
    others: the further groups."""

    block_tokens: int
    layer_names: tuple[str, ...]
    tp_size: int
    counts: tuple[int, ...]
    group: Group | None = None
    number: int = 0
    local_tokens: int = 0
    part: str = ""
    others: tuple[ModelKV, ...] = ()

    @property
    def groups(self) -> tuple[ModelKV, ...]:
        """All groups, this one first."""
        return self, *self.others

    @property
    def state_tokens(self) -> int:
        """For states: the tokens after which the engine has one; 0 for KV of tokens."""
        return self.block_tokens if self.model.kind == "state" else 0

    @property
    def fails_by_request(self) -> bool:
        """Whether vLLM has to compute a request from its start if a load fails: what is in reach of a shorter prefix was not
        loaded, and numbers of blocks do not say which group they belong to."""
        return any(one.reach_tokens or one.number != self.number for one in self.groups)

    @property
    def shares(self) -> list[float]:
        """Which part of the model's memory each group should hold."""
        tokens = [shard_of_rank(one.model, 0, 1, 0, one.model.num_layers).token_bytes(one.model) for one in self.groups]
        return shares([(size, one.reach_tokens) for size, one in zip(tokens, self.groups, strict=True)])

    def chunk_tokens(self, least: int) -> int:
        """Return the smallest size of chunks, of `least` tokens or more, that all groups can serve: every chunk ends where the
        engine has the windows and the states."""
        blocks = math.lcm(*(one.block_tokens for one in self.groups if one.reach_tokens))
        local = [one.local_tokens for one in self.groups if one.local_tokens]
        sizes = itertools.count(-(-least // blocks) * blocks, blocks)
        return next(size for size in sizes if all(size % one == 0 or one % size == 0 for one in local))

    @property
    def reach_tokens(self) -> int:
        return self.group.reach_tokens if self.group is not None else 0

    @property
    def ranks(self) -> int:
        """Number of this engine's workers."""
        return self.tp_size * len(self.counts)

    @property
    def stages(self) -> tuple[int, ...]:
        """The layer before which each pipeline stage with layers of this group ends; empty if there is only one."""
        ends = [sum(self.counts[: stage + 1]) for stage in self._holders]
        return tuple(ends) if len(ends) > 1 else ()

    @property
    def shards(self) -> int:
        """Number of shards of a chunk."""
        return self.shard(0, self._holders[0]).count

    def shard(self, tp_rank: int, pp_rank: int) -> Shard:
        """Return the shard that a rank holds which has layers of this group.

        Raises:
            LayoutError: the heads do not divide among the ranks.
        """
        first, holders = sum(self.counts[:pp_rank]), self._holders
        place = holders.index(pp_rank), len(holders)
        return shard_of_rank(self.model, tp_rank, self.tp_size, first, first + self.counts[pp_rank], *place)

    @property
    def _holders(self) -> list[int]:
        """The pipeline stages that have layers of this group."""
        return [stage for stage, count in enumerate(self.counts) if count]


Stages = Sequence[Sequence[Mapping[str, Any]]]
"""For each pipeline stage, the KV cache spec of each of its layers, by the layer's name, in each of vLLM's groups."""


def layer_specs(kv_cache_config: Any) -> list[dict[str, Any]]:
    """Return the spec of each layer of this rank, in each of vLLM's groups."""
    found = []
    for group in kv_cache_config.kv_cache_groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None) or dict.fromkeys(
            group.layer_names, group.kv_cache_spec
        )
        found.append({name: specs[name] for name in group.layer_names})
    return found


def needs_ranks(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Return whether `describe_model` needs what all ranks know: a rank knows of a group only the layers of its pipeline stage,
    and vLLM tells its scheduler of a group whose layers differ only the spec of the first one."""
    groups = getattr(kv_cache_config, "kv_cache_groups", ())  # `describe_model` refuses a release that tells no groups
    held = [set(getattr(tensor, "layers", ())) for tensor in getattr(kv_cache_config, "kv_cache_tensors", ())]
    if any(sum(not one.isdisjoint(group.layer_names) for one in held) > 1 for group in groups):
        return True  # vLLM places only layers with the same spec together
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return False
    return len(groups) > 1 or any(type(group.kv_cache_spec).__name__ not in _FULL_ATTENTION for group in groups)


def zeroes_first(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Return whether vLLM may write zeros to the blocks that it gives out before ranks settle the stores that read them. Its
    older model runner lets them settle first."""
    zeroes = bool(getattr(kv_cache_config, "needs_kv_cache_zeroing", False))
    return zeroes and bool(getattr(vllm_config, "use_v2_model_runner", True))


def describe_model(
    vllm_config: Any, kv_cache_config: Any, model_id: str = "", stages: Stages = (), lossy_kv: str = "none"
) -> ModelKV:
    """Describe the KV of the model that vLLM serves. stages: needed if the model `needs_ranks`. lossy_kv: as in `Identity`.

    Raises:
        LayoutError: this engine's KV cannot be cached; the message says why.
    """
    _refuse_unsupported(vllm_config)
    refuse_what_vllm_rules_out(vllm_config)
    told = stages or [layer_specs(kv_cache_config)]
    groups = _groups(told, kv_cache_config)
    kinds = len({one.number for one in groups})
    if not stages and (len(groups) > kinds or needs_ranks(vllm_config, kv_cache_config)):
        raise LayoutError(
            "models whose layers differ in the shape of their KV, and models with several kinds of KV on pipeline stages, need a "
            "later release of vLLM, LMCache's own connector class (unset LMCACHE_USE_UPSTREAM_MP), and the first place in "
            "MultiConnector; for several kinds of KV, --disable-hybrid-kv-cache-manager may help, too"
        )
    if kinds > 1 or groups[0].reach_tokens:
        _refuse_with_groups(vllm_config, groups)
    # The identity comes last: the weights of a refused engine need not be hashed.
    digest = config_digest(vllm_config)
    described = [_describe_group(vllm_config, one, groups, digest) for one in groups]
    identity = served_identity(vllm_config, model_id).accepting(lossy_kv)
    parts = [replace(one, identity=identity) for one in described]
    return replace(parts[0], others=tuple(parts[1:]))


class _Group(NamedTuple):
    """A group of ours: the layers of one of vLLM's groups whose KV has the same shape. number: the place of that group in vLLM's
    list. own: this rank's layers. stages: those of each pipeline stage. reach_tokens, local_tokens: as in `GroupTable`. part: as
    in `ModelKV`."""

    number: int
    own: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    spec: Any
    reach_tokens: int
    local_tokens: int
    part: str


def _describe_group(vllm_config: Any, one: _Group, groups: Sequence[_Group], digest: str) -> ModelKV:
    """Describe one of the model's groups, without the identity of the weights."""
    parallel, spec = vllm_config.parallel_config, one.spec
    tp_size, counts = parallel.tensor_parallel_size, tuple(len(names) for names in one.stages)
    if len(counts) < parallel.pipeline_parallel_size:
        counts = _even_counts(vllm_config)
    layers = sum(counts)
    if type(spec).__name__ == _STATE:
        layout = _state_layout(spec, layers, 1 if getattr(spec, "tp_replicated", False) else tp_size, digest)
    elif one.part:
        layout = _indexer_layout(one.part, layers, digest)
    else:
        layout = _token_layout(vllm_config, spec, layers, digest)
    group = None
    if len(groups) > 1 or one.reach_tokens:
        model = sorted({name for each in groups for names in each.stages for name in names}, key=_layer_order)
        group = Group(tuple(sorted(model.index(name) for names in one.stages for name in names)), one.reach_tokens)
    tables = group, one.number, one.local_tokens, one.part
    return ModelKV(named(""), layout, spec.block_size, one.own, tp_size, counts, *tables)


def _token_layout(vllm_config: Any, spec: Any, layers: int, digest: str) -> Layout:
    kind: Literal["mla", "mha"] = "mla" if type(spec).__name__ == "MLAAttentionSpec" else "mha"
    if kind == "mha" and getattr(spec, "head_size_v", None) not in (None, spec.head_size):
        raise LayoutError(
            f"keys of {spec.head_size} and values of {spec.head_size_v} elements a head are not supported yet"
        )
    kv_dtype, head_size, kv_scales = _elements(spec, vllm_config.cache_config)
    return Layout(
        model_id="",
        kv_dtype=kv_dtype,
        num_layers=layers,
        num_kv_heads=1 if kind == "mla" else _heads(vllm_config, spec),
        head_size=head_size,
        chunk_tokens=1,
        kind=kind,
        kv_scales=kv_scales,
        config_digest=digest,
    )


def _indexer_layout(part: str, layers: int, digest: str) -> Layout:
    dtype, _, size = INDEXER_PARTS[part]
    return Layout("", _fp8(dtype), layers, 1, size // DTYPE_BYTES[dtype], 1, kind="mla", config_digest=digest)


def _heads(vllm_config: Any, spec: Any) -> int:
    """Return the KV heads of all ranks together in layers of this spec, which has those of a rank. Some layers, as those of a
    draft model, may have another number than the model's configuration says. Where each rank has one head, nothing tells then
    which ranks have the same one, so all count as different."""
    heads, ranks = (
        int(vllm_config.model_config.get_total_num_kv_heads()),
        vllm_config.parallel_config.tensor_parallel_size,
    )
    usual = max(1, heads // ranks)
    own = int(getattr(spec, "num_kv_heads", usual))
    known = own == usual and (heads >= ranks or not _heads_differ(vllm_config, heads))
    return heads if known else own * ranks


def _heads_differ(vllm_config: Any, heads: int) -> bool:
    """Return whether layers may have different numbers of KV heads before a parallel split."""
    model, draft = vllm_config.model_config, draft_model_of(getattr(vllm_config, "speculative_config", None))
    named = set(_numbers_of_heads(plain(getattr(model, "hf_text_config", model.hf_config))))
    if draft is not None:
        named |= {heads, int(draft.get_total_num_kv_heads())}
    return len(named) > 1


def _numbers_of_heads(config: Any) -> Iterator[int]:
    """Yield every number of KV heads, or of heads that share one, in a model's configuration."""
    if isinstance(config, dict):
        for key, value in config.items():
            numbers = value if isinstance(value, list) else [value]
            if any(name in key for name in _HEADS_KEYS):
                yield from (number for number in numbers if isinstance(number, int))
            yield from _numbers_of_heads(value)
    elif isinstance(config, list):
        for item in config:
            yield from _numbers_of_heads(item)


def _state_layout(spec: Any, layers: int, ranks: int, digest: str) -> Layout:
    """Return the layout of states, as bytes. What they mean depends on shapes, dtypes and the kind of layer."""
    meaning = [[list(shape) for shape in spec.shapes], [str(one) for one in spec.dtypes], str(spec.mamba_type), digest]
    return Layout(
        model_id="",
        kv_dtype="uint8",
        num_layers=layers,
        num_kv_heads=ranks,
        head_size=spec.state_content_size_bytes,
        chunk_tokens=1,
        kind="state",
        config_digest=digest_of(meaning),
    )


def _even_counts(vllm_config: Any) -> tuple[int, ...]:
    """Return how many layers vLLM gives each pipeline stage of a model whose layers are all alike."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    ranges = [get_pp_indices(layers, rank, size) for rank in range(size)]
    return tuple(int(end - first) for first, end in ranges)


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise LayoutError(f"KV split by tokens over ranks ({name}={getattr(parallel, name)}) is not supported yet")
    refuse_encoder_decoder(model)
    if getattr(cache, "calculate_kv_scales", False):
        raise LayoutError(
            "KV scales that follow from the first request (--calculate-kv-scales) differ between engines; use scales of the "
            "checkpoint, or --kv-cache-dtype fp8_per_token_head"
        )
    if getattr(cache, "kv_sharing_fast_prefill", False):
        raise LayoutError("--kv-sharing-fast-prefill leaves KV of shared layers unwritten")


def _groups(stages: Stages, kv_cache_config: Any) -> list[_Group]:
    """Return the model's groups: those of full attention first.

    Raises:
        LayoutError: a group's kind of KV cannot be cached.
    """
    found = []
    for number, held in enumerate(zip(*stages, strict=True)):
        specs = {name: spec for stage in held for name, spec in stage.items()}
        alike: dict[tuple[str, ...], list[str]] = {}
        for name in sorted(specs, key=_layer_order):
            alike.setdefault(_shape(specs[name]), []).append(name)
        own = kv_cache_config.kv_cache_groups[number].layer_names
        for names in alike.values():
            spec = specs[names[0]]
            parts = tuple(tuple(name for name in names if name in stage) for stage in held)
            needed = _needed_tokens(spec)
            for part in _parts(spec):
                found.append(_Group(number, tuple(name for name in names if name in own), parts, spec, *needed, part))
    if not found:
        raise LayoutError("vLLM has no KV cache groups for this model")
    return sorted(found, key=lambda one: (one.reach_tokens > 0, one.number))


def _parts(spec: Any) -> tuple[str, ...]:
    """Return the parts of these layers' KV that are groups of their own: all `INDEXER_PARTS` of an indexer, else only "".

    Raises:
        LayoutError: it is an indexer whose KV has another order.
    """
    if getattr(spec, "cache_role", None) != "indexer":
        return ("",)
    dtype = str(spec.dtype).removeprefix("torch.")
    if (dtype, spec.head_size) != ("uint8", sum(size for _, _, size in INDEXER_PARTS.values())):
        raise LayoutError(f"KV of an indexer with {spec.head_size} elements of {dtype} a token is not supported")
    return tuple(INDEXER_PARTS)


def _shape(spec: Any) -> tuple[str, ...]:
    """Return what is equal for layers of one of vLLM's groups exactly if the shape of their KV is."""
    return type(spec).__name__, *(str(getattr(spec, name, None)) for name in _SHAPE)


def _needed_tokens(spec: Any) -> tuple[int, int]:
    """Return the `reach_tokens` and `local_tokens` of layers with this spec, as in `GroupTable`.

    Raises:
        LayoutError: this kind of KV cannot be cached.
    """
    kind = type(spec).__name__
    if kind not in (*_FULL_ATTENTION, _WINDOW, _LOCAL, _STATE):
        raise LayoutError(
            f"KV of kind {kind}; only full attention, sliding windows, chunked attention and Mamba states are supported yet"
        )
    if (kind != _STATE and getattr(spec, "tokens_per_state", 1) != 1) or getattr(spec, "non_causal", False):
        raise LayoutError("KV that does not hold one causal state a token is not supported")
    reach = local = getattr(spec, "attention_chunk_size", None) or 0 if kind == _LOCAL else 0
    if local % spec.block_size:
        raise LayoutError(f"chunks of attention of {local} tokens do not end where blocks of {spec.block_size} do")
    if kind == _WINDOW:  # vLLM keeps the blocks from the window's first token on
        seen = spec.sliding_window - 1 + getattr(spec, "extra_retained_tokens", 0)
        reach = max(1, -(-seen // spec.block_size)) * spec.block_size
    if kind == _STATE:
        if spec.mamba_cache_mode != "align":
            raise LayoutError(
                f"Mamba states kept in mode {spec.mamba_cache_mode!r}; start vLLM with --enable-prefix-caching "
                "--mamba-cache-mode align"
            )
        reach = 1
    return reach, local


def _refuse_with_groups(vllm_config: Any, groups: Sequence[_Group]) -> None:
    """Refuse what is supported only for models with one group of full attention.

    Raises:
        LayoutError: the engine uses one of these.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    kinds = "models with sliding windows or Mamba states"
    if not hasattr(base, "KVConnectorTransferResults") or not hasattr(base.KVConnectorBase_V1, "bind_gpu_block_pool"):
        raise LayoutError(f"{kinds} need a later release of vLLM, or --disable-hybrid-kv-cache-manager")
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and any(one.reach_tokens == 1 for one in groups):
        raise LayoutError(
            "with speculative decoding the states of Mamba layers do not end where chunks do; leave --speculative-config out"
        )
    if speculative is not None and draft_model_of(speculative) is not None and speculative.method not in _DRAFTS:
        raise LayoutError(
            f"{kinds} are not supported with drafts of method {speculative.method!r} yet; use one of ngram, suffix, "
            f"{', '.join(_DRAFTS)}"
        )


def _elements(spec: Any, cache_config: Any) -> tuple[str, int, str]:
    """Return the layout's `kv_dtype`, `head_size` and `kv_scales` of a group.

    The group's spec knows its dtype in PyTorch (uint8 for most of the quantized ones), and vLLM's configuration the name of the
    quantization ("auto", "fp8_e4m3" ...), which the layers of a group may be exempt from.
    """
    given = str(getattr(spec, "cache_dtype_str", None) or cache_config.cache_dtype)
    dtype = str(spec.dtype).removeprefix("torch.")
    exempt = bool(getattr(cache_config, "kv_cache_dtype_skip_layers", None))
    if dtype in _PLAIN_DTYPES and (exempt or given in ("auto", dtype, "half", "float")):
        return dtype, spec.head_size, ""
    if given in _FP8_NAMES and dtype not in _PLAIN_DTYPES:
        return _fp8(_FP8_NAMES[given]), spec.head_size, ""
    if given in _WITH_SCALES and dtype not in _PLAIN_DTYPES:
        name, packed = _WITH_SCALES[given]
        return _fp8(name), spec.head_size // packed + SCALE_BYTES, PER_TOKEN_HEAD
    raise LayoutError(
        f"KV dtype {given!r} (kept as {dtype}) is not supported; use --kv-cache-dtype bfloat16, float16, fp8, "
        "fp8_per_token_head or int8_per_token_head"
    )


def _fp8(name: str) -> str:
    """Return the name of a dtype as this platform has it: some GPUs of AMD have an e4m3 whose bits mean half as much."""
    if name != "fp8_e4m3":
        return name
    from vllm.platforms import current_platform

    return "fp8_e4m3fnuz" if current_platform.is_fp8_fnuz() else name


def _layer_order(name: str) -> tuple[int, str]:
    """Return a sort key: the first number in the name, as vLLM numbers its layers, then the name."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return number, name
