"""The demo of `./run demo`: it times an engine with and without LMCache, side by side.

`processes.py` starts, awaits and ends processes; `show.py` prints the table and the plots; `numpy_engine.py` and
`vllm_engine.py` are the two demos; `model.py` writes the small model that vLLM serves. Uses the command line `lmcache`
and the engines as a user would: nothing here imports the inside of the package.
"""
