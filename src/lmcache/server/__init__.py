"""Floor 9: the daemon. One thread runs L1 and both engine endpoints; other threads run HTTP, pre-faulting and payload copies.

`main` starts and stops the server, and `loop` waits for events. `unix_endpoint` and `zmq_endpoint` receive requests, `service`
answers those of the processes in `sessions`, `payload` copies payload frames, and `tiering` drives the tiers. `http` is the
endpoint for people and tools. This package may import every lower floor.
"""
