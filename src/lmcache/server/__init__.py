"""Floor 8: the daemon. One thread runs L1 and both wire faces; HTTP, pre-faulting and payload copies have their own.

`main` starts and ends it, `loop` waits for events, `service` answers requests for those whom
`sessions` knows, `payload` copies payload frames, `tiering` drives the tiers, `unix_endpoint` and `zmq_endpoint` carry them,
`http` is the face for people and their tools. May import every floor below.
"""
