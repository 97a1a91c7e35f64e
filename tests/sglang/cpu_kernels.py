"""A part of SGLang 0.5.23's attention for CPUs, put right for layers with sliding windows. Nothing else of SGLang is replaced.

SGLang's looks for the KV of these layers at the slots of full attention, though they have a pool and slots of their own.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Put this attention in the place of SGLang's, in this process and its forks."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(Backend, name, _at_own_slots(getattr(Backend, name)))


def _at_own_slots(run: Any) -> Any:
    def at_own_slots(
        backend: Any, q: Any, o: Any, k: Any, v: Any, slots: Any, rows: Any, *rest: Any, **more: Any
    ) -> Any:
        if backend.use_sliding_window_kv_pool and more.get("sliding_window_size") is not None:
            slots = backend.token_to_kv_pool.translate_loc_from_full_to_swa(slots[rows])
            rows = torch.arange(len(rows))
        return run(backend, q, o, k, v, slots, rows, *rest, **more)

    return at_own_slots
