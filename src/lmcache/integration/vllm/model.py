"""The layout of the served model's KV, and the engines whose KV cannot be cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lmcache.chunks import Layout, Shard, shard_of_rank
from lmcache.engine.served import ServedModel, refuse_encoder_decoder
from lmcache.errors import LayoutError
from lmcache.integration.vllm.identity import config_digest, served_identity
from lmcache.integration.vllm.rules import refuse_what_vllm_rules_out

_FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec")
_FP8_NAMES = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"}
_PLAIN_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelKV(ServedModel):
    """The KV of a complete model, and its split among ranks.

    block_tokens: tokens of a scheduler block. layer_names: this rank's layers, in the order of the extent. stages: the layer
    before which each pipeline stage ends (empty without pipeline)."""

    block_tokens: int
    layer_names: tuple[str, ...]
    tp_size: int
    pp_size: int
    stages: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Number of this engine's workers."""
        return self.tp_size * self.pp_size

    @property
    def shards(self) -> int:
        """Number of shards of a chunk."""
        return self.shard(0, 0, (0, self.model.num_layers)).count

    def shard(self, tp_rank: int, pp_rank: int, layers: tuple[int, int]) -> Shard:
        """Return the shard that one rank holds.

        Raises:
            LayoutError: the heads do not divide among the ranks.
        """
        return shard_of_rank(self.model, tp_rank, self.tp_size, *layers, pp_rank=pp_rank, pp_size=self.pp_size)


def describe_model(vllm_config: Any, kv_cache_config: Any, model_id: str = "") -> ModelKV:
    """Describe the KV of the model that vLLM serves.

    Raises:
        LayoutError: this engine's KV cannot be cached; the message says why.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    _refuse_unsupported(vllm_config)
    refuse_what_vllm_rules_out(vllm_config)
    group, spec = _only_group(kv_cache_config)
    names = tuple(sorted(group.layer_names, key=_layer_order))
    kind: Literal["mla", "mha"] = "mla" if type(spec).__name__ == "MLAAttentionSpec" else "mha"
    if kind == "mha" and getattr(spec, "head_size_v", None) not in (None, spec.head_size):
        raise LayoutError(
            f"keys of {spec.head_size} and values of {spec.head_size_v} elements a head are not supported yet"
        )
    pp_size = parallel.pipeline_parallel_size
    layers = len(names) if pp_size == 1 else model.get_total_num_hidden_layers()
    layout = Layout(
        model_id="",
        kv_dtype=_kv_dtype(str(spec.dtype), str(vllm_config.cache_config.cache_dtype)),
        num_layers=layers,
        num_kv_heads=1 if kind == "mla" else model.get_total_num_kv_heads(),
        head_size=spec.head_size,
        chunk_tokens=1,
        kind=kind,
        config_digest=config_digest(vllm_config),
    )
    # The identity comes last: the weights of a refused engine need not be hashed.
    identity = served_identity(vllm_config, model_id)
    split = parallel.tensor_parallel_size, pp_size, _stages(layers, pp_size)
    return ModelKV(identity, layout, spec.block_size, names, *split)


def _stages(layers: int, pp_size: int) -> tuple[int, ...]:
    if pp_size == 1:
        return ()
    from vllm.distributed.utils import get_pp_indices

    return tuple(int(get_pp_indices(layers, rank, pp_size)[1]) for rank in range(pp_size))


def layer_range(vllm_config: Any, kv: ModelKV) -> tuple[int, int]:
    """Return (first, end) of the layers that this rank holds; `end` is excluded.

    Raises:
        LayoutError: the rank's layers are not those of its pipeline stage.
    """
    if kv.pp_size == 1:
        return 0, kv.model.num_layers
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    if end not in kv.stages or end - start != len(kv.layer_names):
        raise LayoutError(
            f"{len(kv.layer_names)} layers with KV on a rank of {end - start} layers are not supported with pipelines"
        )
    return start, end


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise LayoutError(f"KV split by tokens over ranks ({name}={getattr(parallel, name)}) is not supported yet")
    refuse_encoder_decoder(model)
    if getattr(cache, "calculate_kv_scales", False):
        raise LayoutError("KV scales computed at run time (--calculate-kv-scales) differ between engines")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        raise LayoutError("--kv-sharing-fast-prefill leaves KV of shared layers unwritten")


def _only_group(kv_cache_config: Any) -> tuple[Any, Any]:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups})) or "none"
        raise LayoutError(
            f"{len(groups)} KV cache groups ({kinds}); only models with one group of full attention are supported yet"
        )
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ not in _FULL_ATTENTION:
        raise LayoutError(f"KV of kind {type(spec).__name__}; only full attention is supported yet")
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "non_causal", False):
        raise LayoutError("KV that does not hold one causal state a token is not supported")
    return groups[0], spec


def _kv_dtype(dtype: str, cache_dtype: str) -> str:
    """Return the layout's name of the KV dtype, from torch's ("torch.bfloat16") and vLLM's ("auto", "fp8_e4m3" ...)."""
    if cache_dtype in _FP8_NAMES:
        return _FP8_NAMES[cache_dtype]
    plain = dtype.removeprefix("torch.")
    if plain not in _PLAIN_DTYPES or cache_dtype not in ("auto", plain, "half", "float"):
        raise LayoutError(f"KV dtype {cache_dtype!r} ({plain}) is not supported; use auto, bfloat16, float16 or fp8")
    return plain


def _layer_order(name: str) -> tuple[int, str]:
    """Return a sort key: the first number in the name, as vLLM numbers its layers, then the name."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return number, name
