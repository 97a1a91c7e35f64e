"""The message set, version 1.

A request travels as msgpack `[sequence, request]`, its answer as `[sequence, answer]`; every request has exactly one answer, an
`Error` where it could not be served. Fields are positional: new ones are only ever appended, with defaults, and `Hello` keeps
its first field for ever, so that any two versions can tell each other who has to upgrade.

Hashes are 16-byte chunk hashes joined; extents are little-endian u32 sector numbers (byte offset in the arena /
`SECTOR_BYTES`), `NO_EXTENT` where there is none; both constants are those of `memory.slabs`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from lmcache.chunks import Layout
from lmcache.errors import LMCacheError, WireError
from lmcache.observability.log import printable

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 4 << 20
"""Bound of one request without payload: 100,000 chunk hashes and to spare."""
MAX_ANSWER_BYTES = 16 << 20
"""Bound of one answer without payload: the extents of a million tokens, in 16-token chunks of up to 63 shards."""
MAX_PAYLOAD_BYTES = 256 << 20
"""Bound of the payload frames of one message."""
_ROOM_FOR_THE_REST = 1 << 16
"""Bytes of a message that a lookup's hashes and extents leave to its other fields."""
NONCE_BYTES = 32

MAX_RESERVED_CHUNKS = 16384
"""In one `Reserve`, which makes room for each: some ten milliseconds of the server's time."""
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Leases = Annotated[list[int], msgspec.Meta(max_length=65536)]
Id = Annotated[bytes, msgspec.Meta(max_length=64)]
Software = Annotated[str, msgspec.Meta(max_length=200)]
HostPath = Annotated[str, msgspec.Meta(max_length=4096)]
"""As long as Linux lets a path be."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Root of all messages: positional fields, an integer tag in front."""


# Requests


class Hello(Message, frozen=True, tag=1):
    """The first message of every connection. `instance` names the engine (its scheduler and all ranks share it)."""

    version: int
    software: str
    instance: str
    role: str
    rank: int
    pid: int
    payload: bool = False
    """The engine cannot map the arena, and wants payload frames."""
    proof: bytes = b""
    """Where the server has no key: the nonces of `Challenge` and `Proven`, and `wire.auth.proof` by the engine. 96 bytes."""
    session: bytes = b""
    """Random and kept over reconnections: a session that says hello again has forgotten what it was filling."""


class Ping(Message, frozen=True, tag=2):
    """Answered by `Ok`."""


class Register(Message, frozen=True, tag=3):
    """Open the space of `layout` split in `shards`. `shard_bytes` is the size of this rank's extents (0 from a scheduler)."""

    layout: Layout
    shards: int
    shard: int
    shard_bytes: int
    stages: Annotated[list[int], msgspec.Meta(max_length=4096)] = []
    """Where each pipeline stage ends (`chunks.space_fingerprint`): equal counts of shards need not be equal splits."""


class Lookup(Message, frozen=True, tag=4):
    """How many of these chunks, from the first on, are in L1? They are leased to the asking instance."""

    space: int
    hashes: bytes
    first_wanted: int = 0
    """Chunks before this one are touched but not leased: the engine has them already."""
    prefill_rate: float = 0.0
    """Tokens a second that the engine was seen to compute, 0 where it does not know: is a load from a tier worth its wait?"""
    request: str = ""
    """The engine's own id of the request, for the record of what tiers did for it."""


class Release(Message, frozen=True, tag=5):
    leases: Leases


class Reserve(Message, frozen=True, tag=6):
    """Room for this rank's shard of the chunks that follow `parent` (the root's hash before the first chunk)."""

    space: int
    shard: int
    parent: bytes
    root: bool
    hashes: Annotated[bytes, msgspec.Meta(max_length=16 * MAX_RESERVED_CHUNKS)]
    request: str = ""
    """The engine's own id of the request, for events."""


class Commit(Message, frozen=True, tag=7):
    """The reserved extents are filled (`ok`), or given back."""

    reservation: int
    ok: bool


class Copied(Message, frozen=True, tag=8):
    """A rank's finished load or store: tokens really copied, and the seconds of the copies (not of their submission)."""

    kind: Literal["load", "store"]
    tokens: int
    seconds: float
    shard: int
    ok: bool = True


class Fetch(Message, frozen=True, tag=9):
    """Payload mode: the bytes of this shard of leased chunks [first, first + count)."""

    lease: int
    shard: int
    first: int
    count: int


class Fill(Message, frozen=True, tag=10):
    """Payload mode: the bytes for reserved extents, one frame a chunk from number `first` of the reservation on."""

    reservation: int
    first: int


class Clear(Message, frozen=True, tag=11):
    """Empty L1."""


class Dropped(Message, frozen=True, tag=12):
    """The engine could not store some chunks, and says why: counted under that reason."""

    chunks: int
    reason: str


class Bye(Message, frozen=True, tag=13):
    """This process touches no extent any more and will send nothing else: its claims end now."""


class Hold(Message, frozen=True, tag=14):
    """All the leases this session knows of. Others that it took are answers that got lost on their way: they end now."""

    leases: Leases


class Renew(Message, frozen=True, tag=15):
    """These leases are still needed: their claims begin anew. Answered by `Ok` with how many of them there are."""

    leases: Leases


class Challenge(Message, frozen=True, tag=16):
    """Before payload frames without a key: the server is to prove itself first. Answered by `Proven`."""

    nonce: Nonce
    """Fresh for this connection."""


class Declined(Message, frozen=True, tag=17):
    """The engine does without this server, and says who it is and why, for the server's log. Answered by `Ok`."""

    reason: str
    """One of `wire.auth.REASONS`."""
    instance: str = ""
    role: str = ""
    rank: int = 0
    pid: int = 0
    user: int = -1


# Answers


class Welcome(Message, frozen=True, tag=64):
    """Whoever says so may be no server of ours: what it names is bounded here, and goes to a log as `printable` shows it."""

    version: int
    software: Software
    server: Id
    """Who serves: 16 random bytes, new at every start."""
    chunk_tokens: int
    socket_path: HostPath
    """Where an engine on this host gets the arena; "" where the peer gets payload frames only."""
    arena: Id
    """Which memory it serves, which may outlive a server."""
    arena_bytes: int
    cookie_path: HostPath = ""
    claim_seconds: float = 0.0
    """How long a lease or reservation is a claim. 0: the server does not tell, and knows no `Renew`."""
    epoch: Id = b""
    """Names this server's time with this arena: a hit holds for one epoch. b"" from a server that has no epochs."""

    @property
    def holds_for(self) -> bytes:
        """The epoch of hits; the arena of a server without epochs."""
        return self.epoch or self.arena


class Ok(Message, frozen=True, tag=65):
    count: int = 0


class Error(Message, frozen=True, tag=66):
    """`code` is for programs (version, malformed, refused, unknown, full ...), `text` for people."""

    code: str
    text: str


class Registered(Message, frozen=True, tag=67):
    space: int


class Found(Message, frozen=True, tag=68):
    """`extents` holds `shards` sectors a chunk, for the leased chunks; `chunks` counts from the prompt's start.

    `loading` chunks more are on their way from a tier: ask again, the same, soon. Nothing is leased meanwhile.
    """

    chunks: int
    lease: int
    extents: bytes
    loading: int = 0


class Reserved(Message, frozen=True, tag=69):
    """One sector a chunk: `NO_EXTENT` where the chunk is there already, or is being filled, or (`refused`) got no room."""

    reservation: int
    extents: bytes
    refused: int
    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Proven(Message, frozen=True, tag=71):
    """The server's proof that it knows the cookie, and its own nonce for the engine's proof, which the next hello brings."""

    nonce: Nonce
    """Fresh for this connection."""
    proof: Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)]
    """`wire.auth.proof` by the server."""
    place: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """The connection as the server sees it (`wire.auth.place`). The proof holds for no other."""


Request = (
    Hello
    | Ping
    | Register
    | Lookup
    | Release
    | Reserve
    | Commit
    | Copied
    | Fetch
    | Fill
    | Clear
    | Dropped
    | Bye
    | Hold
    | Renew
    | Challenge
    | Declined
)
Answer = Welcome | Ok | Error | Registered | Found | Reserved | Proven
AnswerT = TypeVar("AnswerT", bound=Message)

# What decoding raises: besides msgspec's own, text that is not UTF-8, nests too deep, and a layout that cannot be.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LMCacheError)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[int, Request])
_envelopes = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])
_answers = msgspec.msgpack.Decoder(tuple[int, Answer])


def most_looked_up(first_wanted: int, shards: int) -> int:
    """How many chunks one `Lookup` may name: as many as its own hashes and the extents of its `Found` have room for."""
    return min(
        (MAX_MESSAGE_BYTES - _ROOM_FOR_THE_REST) // 16,
        first_wanted + (MAX_ANSWER_BYTES - _ROOM_FOR_THE_REST) // (4 * shards),
    )


def encode(sequence: int, message: Message) -> bytes:
    return _encoder.encode((sequence, message))


def decode_request(raw: bytes | bytearray | memoryview) -> tuple[int, Request]:
    """Raises WireError: not one of our requests."""
    try:
        return _requests.decode(raw)
    except _UNREADABLE as error:
        raise WireError(f"malformed request of {len(raw)} bytes: {str(error)[:200]}") from None


def sequence_of(raw: bytes | bytearray | memoryview) -> int:
    """The sequence number of a message that cannot be decoded, so that its sender learns which; 0 where it has none."""
    try:
        return _envelopes.decode(raw)[0]
    except _UNREADABLE:
        return 0


def decode_answer(raw: bytes | bytearray | memoryview) -> tuple[int, Answer]:
    """Raises WireError: not one of our answers."""
    try:
        return _answers.decode(raw)
    except _UNREADABLE as error:
        raise WireError(f"malformed answer of {len(raw)} bytes: {str(error)[:200]}") from None


def version_error(engine: int, engine_software: str, server: int, server_software: str) -> str:
    """One line for people when two protocol versions meet."""
    older = "the engine's lmcache package" if engine < server else "the lmcache server"
    return (
        f"the engine speaks protocol {engine} (lmcache {printable(engine_software, 40)}), the server {server} "
        f"(lmcache {printable(server_software, 40)}): upgrade {older}"
    )
