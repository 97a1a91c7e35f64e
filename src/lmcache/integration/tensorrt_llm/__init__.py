"""LMCache for TensorRT-LLM: the presets `lmcache` (a server of the engine's own) and `lmcache-mp` (a daemon).

`tensorrt_adapter` and `tensorrt_mp_adapter` hold the classes that the engine looks for, `connector.py` is what they share. Their
two sides: `scheduler.py` decides what to load and store, `worker.py` lets a rank's session do it; `model.py` says what the KV
looks like. The engine itself was never run here: the tests drive the classes as its executor does (docs/tensorrt-llm.md). May
import `lmcache.engine` and the floors below, torch, and from the engine only the two base classes and its MPI calls.
"""
