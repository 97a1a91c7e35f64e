"""What a server and its client process of a Mooncake Store say to each other: one message a packet, in MessagePack."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

MOST_KEYS = 512
"""The most keys of one packet."""
BYE = b"bye"
"""The server's last word on the first socket: leave the store in good order. Without it, the client ends at once."""


class Task(msgspec.Struct, array_like=True):
    """The command line of a client process: descriptors that it inherits, and what it gives to the store's `setup`.

    lanes: one socket for each call that may be under way. memory_bytes: size of the file `memory`, which both processes map.
    """

    parent: int
    control: int
    lanes: list[int]
    memory: int
    memory_bytes: int
    hostname: str
    metadata: str
    segment_bytes: int
    protocol: str
    devices: str
    master: str


class State(msgspec.Struct, array_like=True):
    """What the client says when it has joined the store, or cannot.

    code: 0, or the store's number of an error. text: why the store's library cannot be used, "" if it can. listens: `host:port`
    of each socket on which the client listens.
    """

    code: int
    text: str
    listens: list[str]


class Ask(msgspec.Struct, array_like=True):
    """One call. verb: a method of `client.Verbs`. at, sizes: offset in the common memory, and bytes, of each key's value."""

    verb: str
    keys: list[str]
    at: list[int]
    sizes: list[int]
    replicas: int


class Answer(msgspec.Struct, array_like=True):
    """One number for each key: what the store's method has returned. text: what was raised instead, "" if nothing was."""

    numbers: Sequence[int]
    text: str


encode = msgspec.msgpack.encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_state = msgspec.msgpack.Decoder(State).decode
encode_task = msgspec.json.encode
decode_task = msgspec.json.Decoder(Task).decode
