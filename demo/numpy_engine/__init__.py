"""A decoder-only transformer in NumPy with paged KV: a small but real engine that uses LMCache as a big one does.

`model.py` is the network (RMSNorm, RoPE, grouped-query attention, SwiGLU), `paged.py` its KV blocks in several memory
orders, `cached.py` the talk with LMCache, `engine.py` the request's way: look up, load, prefill the rest, store,
decode. `python -m demo.numpy_engine` serves requests as JSON lines, for those who want to kill it.
"""

from demo.numpy_engine.engine import Engine, EngineConfig, Result, UnfilledKV
from demo.numpy_engine.model import ModelConfig
from demo.numpy_engine.paged import KV_ORDERS, OutOfBlocks

__all__ = ["KV_ORDERS", "Engine", "EngineConfig", "ModelConfig", "OutOfBlocks", "Result", "UnfilledKV"]
