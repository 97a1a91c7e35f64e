"""LMCache for vLLM: its KV connector (`lmcache_mp_connector`), and the adapters that vLLM's own connector class calls.

vLLM dictates some names of modules and classes. A connector has two sides: `scheduler.py` translates vLLM's requests and steps
into those of `lmcache.engine.requests`, and `worker.py` translates a rank's copies. `plan.py` holds the messages between them,
`connector.py` what both of vLLM's classes share. `model.py` describes the KV of the served model, `identity.py` its weights, and
`paged.py` where its KV lies in memory. This package may import `lmcache.engine` and the floors below, vLLM and torch.
"""
