"""LMCache for vLLM: its KV connector (`lmcache_mp_connector`), and the adapters that vLLM's own connector class calls.

Names of modules and classes are vLLM's. A connector has two sides: `scheduler.py` puts vLLM's requests and steps in the terms
of `lmcache.engine.requests`, `worker.py` does so for a rank's copies; `plan.py` is what travels between them, `connector.py` what
both of vLLM's classes share. `model.py` says what the KV of the served model looks like, `identity.py` what its weights are,
`paged.py` where its KV lies. May import `lmcache.engine` and the floors below, and vLLM and torch.
"""
