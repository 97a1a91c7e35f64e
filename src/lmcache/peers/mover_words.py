"""What a server and its mover say to each other: one message a packet, in MessagePack."""

from __future__ import annotations

from typing import Annotated

import msgspec

from lmcache.wire.messages import MAX_AGENT_BYTES


class Task(msgspec.Struct, array_like=True):
    """The command line of a mover: descriptors that it inherits. memory: the arena's file. writes: whether the mover reads from
    other movers into this memory; else it can only be read from."""

    parent: int
    control: int
    memory: int
    memory_bytes: int
    writes: bool


class Ready(msgspec.Struct, array_like=True, tag=1):
    """The mover's first message. trouble: why it cannot work, "" if it can. agent: what other movers need to read from it.
    address: of the arena's first byte in the mover. listens: `host:port` of each TCP socket on which it listens."""

    trouble: str
    agent: Annotated[bytes, msgspec.Meta(max_length=MAX_AGENT_BYTES)] = b""
    address: int = 0
    listens: list[str] = []


class Ended(msgspec.Struct, array_like=True, tag=2):
    """The read of this number does not touch the arena any more. trouble: why nothing was read, "" if all bytes are there."""

    number: int
    trouble: str


class Failed(msgspec.Struct, array_like=True, tag=7):
    """The read of this number has failed. Bytes of it may still arrive, so the mover ends now."""

    number: int
    trouble: str


class Meeting(msgspec.Struct, array_like=True, tag=3):
    """To a mover: other movers may be read from under this name from now on. agent: what `Ready.agent` of that one was."""

    name: bytes
    agent: bytes


class Forget(msgspec.Struct, array_like=True, tag=4):
    """To a mover: nothing more is read from the mover of this name."""

    name: bytes


class Read(msgspec.Struct, array_like=True, tag=5):
    """To a mover: read. parts: (offset in this arena, address in the other mover, bytes) of each piece. Answered by `Ended`."""

    number: int
    name: bytes
    parts: list[tuple[int, int, int]]


class Serve(msgspec.Struct, array_like=True, tag=6):
    """To a mover: others read from it now, or do not, so that it need not look for their messages all the time."""

    on: bool


encode = msgspec.msgpack.encode
decode_said = msgspec.msgpack.Decoder(Ready | Ended | Failed).decode
decode_told = msgspec.msgpack.Decoder(Meeting | Forget | Read | Serve).decode
encode_task = msgspec.json.encode
decode_task = msgspec.json.Decoder(Task).decode
