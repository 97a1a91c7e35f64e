"""Floor 5: what engines and the server say to each other, and the two carriers: a Unix socket for this host, ZMQ for any.

May import: `chunks`, `memory`, and the ground floor. Every message is a bounded msgspec struct;
nothing is ever unpickled or evaluated. A carrier moves bytes and raises `WireError`; it decides nothing.
"""
