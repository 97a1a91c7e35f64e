"""`lmcache proxy`: an example of a router for disaggregated prefill. One engine computes a prompt, another one answers.

It needs nothing of LMCache. The second engine finds by itself what the first one has stored, whatever the router tells it.
"""
