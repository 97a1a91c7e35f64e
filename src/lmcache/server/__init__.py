"""Floor 8: the daemon. One thread runs the heart and both wire faces; HTTP, pre-faulting and payload copies have their own.

`main` starts and ends it, `loop` waits for events, `service` answers requests, `unix_endpoint` and `zmq_endpoint` carry them,
`http` is the face for people and their tools. May import every floor below.
"""
