"""LMCache for vLLM: its KV connector (`lmcache_mp_connector`), and the adapters that vLLM's own connector class calls.

Names of modules and classes are vLLM's. A connector has two halves: `scheduler.py` decides what to load and store,
`worker.py` lets a rank's session do it; `plan.py` is what travels between them, `model.py` says what the KV of the
served model looks like, `identity.py` what its weights are, `paged.py` where its KV lies. May import `lmcache.engine`
and the floors below, and vLLM and torch.
"""
