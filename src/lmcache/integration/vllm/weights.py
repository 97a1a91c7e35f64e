"""A counter of the changes of this rank's weights since it began to serve.

RL loops load new weights into a running vLLM (`collective_rpc("reload_weights")`, weight transfer, `model.load_weights`). vLLM
does not report this to its connectors, but KV of the old weights must be neither served nor stored as that of the new weights.
Direct writes to the parameters, past all of these methods, are not noticed.

What the encoders have made of images, sounds ... stays in a cache of the rank. vLLM empties it when it reloads weights by itself
(since 0.32), and otherwise only if it is told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache.engine.wrapped import call_before, class_at, watch
from lmcache.observability.log import init_logger

logger = init_logger(__name__)
_OWNERS = {
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": ("reload_weights", "init_fp8_kv_scales"),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": ("reload_weights",),
    "vllm.v1.worker.gpu_worker.Worker": (
        "load_model",
        "reload_weights",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
        "reset_weights",
        "sleep",
    ),
}
"""Class -> its methods that change weights. The CPU runner and worker inherit them."""
_ENCODER_CACHES = ("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner")
_WITHOUT_SCALES = ("auto", "bfloat16", "float16")
_changes = _emptyings = 0


def weight_changes() -> int:
    """Return how often the weights of this process have changed since `watch_weights` was first called."""
    return _changes


def encoder_emptyings() -> int:
    """Return how often the encoder cache of this process has been emptied since `watch_weights` was first called."""
    return _emptyings


def watch_weights(vllm_config: Any) -> None:
    """Count from now on the changes of this process's weights. Call this after the model has been loaded."""
    owners: list[tuple[Any, Sequence[str]]] = [(class_at(path), names) for path, names in _OWNERS.items()]
    try:
        from vllm.model_executor.model_loader.utils import get_model_architecture

        owners.append((get_model_architecture(vllm_config.model_config)[0], ("load_weights",)))
    except Exception as error:  # an unknown release of vLLM, or a model made up by tests
        logger.debug("The model's class was not found: %r", error)
    watch(owners, _count, "vLLM")
    for path in _ENCODER_CACHES:
        if (owner := class_at(path)) is not None:
            call_before(owner, ("reset_encoder_cache",), _note_emptied)


def _note_emptied(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _emptyings
    _emptyings += 1


def _count(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    global _changes
    if name == "sleep" and kwargs.get("level", args[1] if len(args) > 1 else 1) == 1:
        return  # the weights are kept, and come back as they were
    if name == "init_fp8_kv_scales" and str(args[0].cache_config.cache_dtype) in _WITHOUT_SCALES:
        return  # releases before 0.32 call it whenever they wake up; it sets static scales of quantized KV to 1.0
    _changes += 1
