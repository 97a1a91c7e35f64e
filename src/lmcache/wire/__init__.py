"""Floor 5: the messages between engines and the server, and their two transports: a Unix socket on one host, ZMQ between hosts.

May import: `chunks`, `memory`, and floor 0. Every message is a bounded msgspec struct; nothing is ever unpickled or evaluated.
A carrier sends and receives bytes and raises `WireError`; it makes no decisions.
"""
