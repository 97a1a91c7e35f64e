"""The messages of protocol version 1.

A request travels as msgpack `[sequence, request]`, its answer as `[sequence, answer]`. Every request has exactly one answer,
which is `Error` where the request failed. Fields are positional: new ones are only appended, with defaults, and `Hello` keeps
its first field for ever, so that any two versions can find out which side has to upgrade.

Hashes are 16-byte chunk hashes joined; extents are little-endian u32 sector numbers (byte offset in the arena /
`SECTOR_BYTES`), `NO_EXTENT` where there is none; both constants are those of `memory.slabs`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from lmcache.chunks import Group, Layout, Split
from lmcache.errors import LMCacheError, WireError
from lmcache.observability.log import printable

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 4 << 20
"""Bound of one request without payload frames; 100,000 chunk hashes fit."""
MAX_ANSWER_BYTES = 16 << 20
"""Bound of one answer without payload frames; the extents of a million tokens fit, in 16-token chunks of up to 63 shards."""
MAX_PAYLOAD_BYTES = 256 << 20
"""Bound of the payload frames of one message."""
_ROOM_FOR_THE_REST = 1 << 16
"""Bytes of a message that a lookup's hashes and extents leave to its other fields."""
_MOST_HASHES = (MAX_MESSAGE_BYTES - _ROOM_FOR_THE_REST) // 16
_EXTENTS_BYTES = MAX_ANSWER_BYTES - _ROOM_FOR_THE_REST
NONCE_BYTES = 32

MAX_GROUPS = 32
"""Bound of the groups of a model beside the first one."""
MAX_RESERVED_CHUNKS = 16384
"""Bound of the chunks in one `Reserve`. The server needs some ten milliseconds to allocate extents for so many."""
MAX_ASKED_CHUNKS = 512
"""Bound of the chunks in one `Has` or `Pull`, whose answer takes the server some 0.1 ms."""
MAX_PULLED_FRAMES = 64
"""Bound of the payload frames of one `Pulled`. Each takes the server's loop some 20 us."""
JOINED_BYTES = 1 << 16
"""Shards of fewer bytes travel in one payload frame."""
MAX_AGENT_BYTES = 1 << 16
"""Bound of what a library says about how to read a server's arena."""
COMING = 2
"""Of a chunk, in `Having`: a `Pull` of it waits for a short time until it is complete."""
PEER = "peer"
"""The role of a server in its hello to another server."""
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Space = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
"""The fingerprint of a layout with its split."""
Asked = Annotated[bytes, msgspec.Meta(max_length=16 * MAX_ASKED_CHUNKS)]
Leases = Annotated[list[int], msgspec.Meta(max_length=65536)]
Id = Annotated[bytes, msgspec.Meta(max_length=64)]
Software = Annotated[str, msgspec.Meta(max_length=200)]
HostPath = Annotated[str, msgspec.Meta(max_length=4096)]
"""A path on the peer's host, of at most the length that Linux allows."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """The base class of all messages: positional fields after an integer tag."""


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
    """True when the engine cannot map the arena and wants payload frames."""
    proof: bytes = b""
    """For a server without a key: the nonces of `Challenge` and `Proven` and the engine's `wire.auth.proof`; 96 bytes."""
    session: bytes = b""
    """Random, and kept over reconnections. A session that says hello again has given up its open reservations."""


class Ping(Message, frozen=True, tag=2):
    """Check that the server answers. Answered by `Ok`."""


class Register(Message, frozen=True, tag=3):
    """Open the space of `layout` split in `shards`. `shard_bytes` is the size of this rank's extents (0 from a scheduler)."""

    layout: Layout
    shards: int
    shard: int
    shard_bytes: int
    stages: Annotated[list[int], msgspec.Meta(max_length=4096)] = []
    """The end layer of each pipeline stage (`chunks.space_fingerprint`), since equal numbers of shards can be unequal splits."""
    group: Group | None = None
    """Which of the model's kinds of KV `layout` describes; None for a model with one."""
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Which part of the model's memory this group needs, as the engine expects."""
    main: int = -1
    """For a group with a reach: the space of the group without one, which has all of a prompt; -1 if there is none."""
    follows: bool = False
    """Whether the engine will ask with `TakeNews` what happens to chunks of this space."""


class Lookup(Message, frozen=True, tag=4):
    """Ask how many of these chunks, from the first on, are in L1, and lease them to the asking instance."""

    space: int
    hashes: bytes
    first_wanted: int = 0
    """Number of the first chunk to lease. Chunks before it are touched only, because the engine has them already."""
    prefill_rate: float = 0.0
    """Tokens per second that the engine was measured to compute, 0 if unknown. It decides whether a load from a tier pays."""
    request: str = ""
    """The engine's own id of the request as `request_name` gives it, for the record of what the tiers did for it."""
    others: Annotated[list[int], msgspec.Meta(max_length=MAX_GROUPS)] = []
    """The spaces of the model's other groups. Only a prefix that all groups can serve is a hit."""
    sisters: bool = False
    """Whether the engine can also load what ranks of another parallel split have stored (`Found.foreign`)."""
    engine: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """Names an engine that will compute and store the chunks that it does not find, the same in all of its ranks. Other engines
    may wait for them. "": it stores nothing."""
    halts: bool = False
    """Whether the engine computes nothing while it waits for what is `loading`."""
    again: bool = False
    """Whether the request, which still waits, has had an answer before. Hits and misses count once, for the first answer that
    does not say to ask again."""
    loads: bool = True
    """False: the engine loads nothing, and only says what it will compute and store. It names itself and wants no chunk
    (`first_wanted` is the number of hashes), and nothing is counted as a hit or a miss."""
    stores: int = -1
    """How many of the first chunks the engine will store if it does not find them; -1 for all."""
    tokens: int = 0
    """Tokens of the prompt, with those of its end that fill no chunk; 0 if the engine does not tell. With no hashes at all the
    prompt is shorter than a chunk, and the message only reports it."""
    text: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """A hash of the first chunk's tokens alone, so that the server can tell a new prompt from one of another model or salt."""
    trace: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """The W3C `traceparent` of the request where the engine has one, for spans."""
    passage: bool = False
    """Whether the chunks are those of a passage of a prompt. The prompt's own lookup accounts for its tokens, so this one counts
    as neither a hit nor a miss."""
    tenant: Annotated[bytes, msgspec.Meta(max_length=8)] = b""
    """Whose prompt it is: an id of its `cache_salt` (`chunks.tenant_of`), for the count of use by tenant. b"" without a salt."""


_Hash = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Release(Message, frozen=True, tag=5):
    """End these leases. `requests`: ids of requests that have ended, as in `Lookup`: they wait no longer, and store no more of
    what they looked up."""

    leases: Leases
    requests: Annotated[list[str], msgspec.Meta(max_length=65536)] = []
    blended: tuple[int, int, int, int] | None = None
    """What was done with passages of the first of the requests: the space, the passages whose KV was used, their tokens, and how
    many of these were computed again."""
    answered: tuple[int, _Hash, Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]] | None = None
    """How many tokens a prompt was answered with: the space, the last hash of the prompt's lookup, the tokens. Sent only to a
    server that said so (`Registered.answers`)."""


class Reserve(Message, frozen=True, tag=6):
    """Allocate extents for this rank's shard of the chunks that follow `parent` (the root before the first chunk)."""

    space: int
    shard: int
    parent: bytes
    root: bool
    hashes: Annotated[bytes, msgspec.Meta(max_length=16 * MAX_RESERVED_CHUNKS)]
    request: str = ""
    """The engine's own id of the request as `request_name` gives it, for events."""


class Commit(Message, frozen=True, tag=7):
    """Commit the filled extents of a reservation (`ok`), or give them back."""

    reservation: int
    ok: bool


class Copied(Message, frozen=True, tag=8):
    """Report a rank's finished load or store: the tokens copied, and the seconds of the copies without their queueing."""

    kind: Literal["load", "store"]
    tokens: int
    seconds: float
    shard: int
    ok: bool = True
    request: str = ""
    """The engine's own id of the request as `request_name` gives it, for the record of the request."""


class Fetch(Message, frozen=True, tag=9):
    """Payload mode: ask for the bytes of this shard of the leased chunks [first, first + count)."""

    lease: int
    shard: int
    first: int
    count: int
    part: int = 0
    """Which part of the lease: the number of the group, or the number of groups and a place in `Found.foreign`."""


class Fill(Message, frozen=True, tag=10):
    """Payload mode: send the bytes of reserved extents, one frame for each chunk from number `first` of the reservation on."""

    reservation: int
    first: int


class Clear(Message, frozen=True, tag=11):
    """Remove all chunks from L1."""


class Dropped(Message, frozen=True, tag=12):
    """Report that the engine could not store some chunks. The server counts them under `reason`."""

    chunks: int
    reason: str


class Bye(Message, frozen=True, tag=13):
    """Announce that this process touches no extent any more and sends nothing else. Its claims end now."""


class Hold(Message, frozen=True, tag=14):
    """List all leases that this session knows of. Its other leases, whose answers were lost on the way, end now."""

    leases: Leases


class Renew(Message, frozen=True, tag=15):
    """Renew the deadlines of these leases. Answered by `Ok` with the number of them that still exist."""

    leases: Leases


class Challenge(Message, frozen=True, tag=16):
    """Ask a server without a key to prove itself before payload frames are sent. Answered by `Proven`."""

    nonce: Nonce
    """The engine's nonce, made for this connection."""


class Declined(Message, frozen=True, tag=17):
    """Tell the server, for its log, who the engine is and why it does not use this server. Answered by `Ok`."""

    reason: str
    """One of `wire.auth.REASONS`."""
    instance: str = ""
    role: str = ""
    rank: int = 0
    pid: int = 0
    user: int = -1


class TakeNews(Message, frozen=True, tag=18):
    """Ask what has happened to the chunks of the space that this process follows, since it was asked last. Answered by `News`."""


class Differs(Message, frozen=True, tag=21):
    """Report that the prompt of a request that was looked up differs from the nearest one that the engine knows from this token
    on, counted from 0. For the record of the request; only for servers whose `Registered` takes positions."""

    request: str
    token: int


class Has(Message, frozen=True, tag=20):
    """From a peer: ask which of these chunks are complete in L1, in the space of this fingerprint and number of shards. Answered
    by `Having`."""

    space: Space
    shards: int
    hashes: Asked


class Pull(Message, frozen=True, tag=19):
    """From a peer: ask for one shard of these chunks. Answered by `Pulled`, with those that L1 has in payload frames, as soon as
    those that are coming are complete or come no longer. More than `MAX_PULLED_FRAMES` that are not joined are refused."""

    space: Space
    shards: int
    shard: int
    hashes: Asked
    mover: int = 0
    """Of what `Met` has told: the peer reads the shards from the arena by itself. Then the answer has their places in place of
    payload frames, unless the server has no such mover any more."""


class Meet(Message, frozen=True, tag=22):
    """From a peer: ask how to read from the arena without this connection. Only for servers whose `Welcome` says so. Answered by
    `Met`."""


# Answers


class Welcome(Message, frozen=True, tag=64):
    """Accepts a `Hello`. The sender may be a rogue, so all fields are bounded, and logs show them through `printable`."""

    version: int
    software: Software
    server: Id
    """Who serves: 16 random bytes, new at every start."""
    chunk_tokens: int
    socket_path: HostPath
    """The Unix socket where an engine on this host gets the arena; "" where the peer gets payload frames only."""
    arena: Id
    """Which memory it serves, which may outlive a server."""
    arena_bytes: int
    cookie_path: HostPath = ""
    claim_seconds: float = 0.0
    """How long a lease or reservation is a claim. 0: the server does not tell, and knows no `Renew`."""
    epoch: Id = b""
    """Names this server's time with this arena: a hit holds for one epoch. b"" from a server that has no epochs."""
    huge_pages: bool = True
    """Whether the engine asks the kernel for huge pages where it maps the arena."""
    meets: bool = False
    """Whether the server answers `Meet`."""

    @property
    def holds_for(self) -> bytes:
        """The epoch of hits; the arena of a server without epochs."""
        return self.epoch or self.arena


class Ok(Message, frozen=True, tag=65):
    count: int = 0


class Error(Message, frozen=True, tag=66):
    """`code` is for programs (version, malformed, refused, unknown, full ...), `text` is for people."""

    code: str
    text: str


class Registered(Message, frozen=True, tag=67):
    space: int
    followed: bool = False
    """Whether the server notes from now on what happens to chunks of the space, for `TakeNews`. Nothing is told of earlier."""
    positions: bool = False
    """Whether the server takes `Differs`."""
    answers: bool = False
    """Whether the server wants to know how long answers are (`Release.answered`): its eviction learns from that, or it records
    a trace."""


class Foreign(msgspec.Struct, frozen=True, array_like=True):
    """A part of a hit: chunks of one group from number `first` on, as a split has stored them that need not be the engine's.
    `extents` holds `split.count` first sectors for each."""

    group: int
    first: int
    split: Split
    extents: bytes


class Found(Message, frozen=True, tag=68):
    """`chunks` is the length of the hit from the prompt's start; `extents` holds `shards` first sectors for each leased chunk.

    `loading` more chunks are on their way from a tier or another engine, so the engine should soon ask the same again. Nothing is
    leased meanwhile.
    """

    chunks: int
    lease: int
    extents: bytes
    loading: int = 0
    others: Annotated[list[tuple[int, bytes]], msgspec.Meta(max_length=MAX_GROUPS)] = []
    """0 and extents in each of the other spaces: of the last chunks before the end of the hit, as many as the group needs. They
    are under the same lease. In older versions the number was a lease of each group, by which payload frames of another group
    would be fetched now. So their engines take a 0 for a miss, and today's engines any other number."""
    foreign: Annotated[list[Foreign], msgspec.Meta(max_length=65536)] = []
    """What follows these extents, up to the end of the hit, in each group; under the same lease."""


class Reserved(Message, frozen=True, tag=69):
    """One first sector for each chunk; `NO_EXTENT` where the chunk is stored, being filled, or (`refused`) got no extent."""

    reservation: int
    extents: bytes
    refused: int
    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


class Proven(Message, frozen=True, tag=71):
    """The server's proof that it knows the cookie, and its nonce for the engine's proof, which the next `Hello` contains."""

    nonce: Nonce
    """The server's nonce, made for this connection."""
    proof: Annotated[bytes, msgspec.Meta(max_length=NONCE_BYTES)]
    """The server's `wire.auth.proof`."""
    connection: Annotated[str, msgspec.Meta(max_length=200)] = ""
    """The connection as the server sees it (`wire.auth.connection_name`). The proof is valid for no other one."""


Change = Literal["stored", "removed", "written", "lost"]
"""What happened to chunks: they have become complete in L1, or were removed from it; a tier has them, or has lost them."""


class News(Message, frozen=True, tag=72):
    """What has happened to chunks of a followed space or its sisters, in order. Chunks that went from one of these spaces are
    `removed` even if another one has them."""

    changes: Annotated[list[tuple[Change, bytes]], msgspec.Meta(max_length=65536)]
    """The kind of each change, with the hashes of its chunks; b"": all chunks."""
    incomplete: bool = False
    """Whether the server had to drop what has happened before these changes. Then anything may be gone."""


class Having(Message, frozen=True, tag=73):
    """One byte for each chunk of a `Has`: 1 if L1 has it, `COMING` if an engine stores it at this moment, else 0."""

    present: Annotated[bytes, msgspec.Meta(max_length=MAX_ASKED_CHUNKS)]


class Pulled(Message, frozen=True, tag=74):
    """One header (`tiers.frame`) for each chunk of a `Pull`; b"" where L1 does not have the chunk. The others' payload
    follows in the same order: a frame for each, or one frame with all of them (`JOINED_BYTES`), or their places."""

    headers: Annotated[list[Annotated[bytes, msgspec.Meta(max_length=128)]], msgspec.Meta(max_length=MAX_ASKED_CHUNKS)]
    lease: int = 0
    """The lease under which the peer reads the shards; the peer ends it with `Release`. 0: none."""
    extents: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_ASKED_CHUNKS)] = b""
    """Of the lease, the sector of each shard."""


class Met(Message, frozen=True, tag=75):
    """How to read from the arena. mover: names the process to read from; 0 if there is none now. agent: what NIXL needs to reach
    it. address: of the arena's first byte there."""

    mover: int = 0
    agent: Annotated[bytes, msgspec.Meta(max_length=MAX_AGENT_BYTES)] = b""
    address: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0


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
    | TakeNews
    | Differs
    | Has
    | Pull
    | Meet
)
Answer = Welcome | Ok | Error | Registered | Found | Reserved | Proven | News | Having | Pulled | Met
AnswerT = TypeVar("AnswerT", bound=Message)

# Decoding raises these: msgspec's own errors, and those for invalid UTF-8, deep nesting and an invalid layout.
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LMCacheError)
_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(tuple[int, Request])
_envelopes = msgspec.msgpack.Decoder(tuple[int, msgspec.Raw])
_answers = msgspec.msgpack.Decoder(tuple[int, Answer])


def most_looked_up(first_wanted: int, shards: int) -> int:
    """Return the most chunks that one `Lookup` may name, so that its hashes and the extents of its `Found` fit."""
    answered = first_wanted + _EXTENTS_BYTES // (4 * shards)
    return answered if answered < _MOST_HASHES else _MOST_HASHES


def request_name(request_id: object) -> str:
    """Return an engine's id of a request as messages and records show it. Users may choose ids of any length and content."""
    text = str(request_id)
    return text if len(text) <= 200 and text.isprintable() else printable(text, 200)


def server_name(server_id: bytes) -> str:
    """Return the instance that a server is to other servers."""
    return f"server {server_id.hex()[:16]}"


def encode(sequence: int, message: Message) -> bytes:
    return _encoder.encode((sequence, message))


def decode_request(raw: bytes | bytearray | memoryview) -> tuple[int, Request]:
    """Decode a request. Raises WireError when it is malformed."""
    try:
        return _requests.decode(raw)
    except _UNREADABLE as error:
        raise WireError(f"malformed request of {len(raw)} bytes: {str(error)[:200]}") from None


def sequence_of(raw: bytes | bytearray | memoryview) -> int:
    """Return the sequence number of a message that cannot be decoded, for the error answer; 0 where it has none."""
    try:
        return _envelopes.decode(raw)[0]
    except _UNREADABLE:
        return 0


def decode_answer(raw: bytes | bytearray | memoryview) -> tuple[int, Answer]:
    """Decode an answer. Raises WireError when it is malformed."""
    try:
        return _answers.decode(raw)
    except _UNREADABLE as error:
        raise WireError(f"malformed answer of {len(raw)} bytes: {str(error)[:200]}") from None


def version_error(engine: int, engine_software: str, server: int, server_software: str) -> str:
    """Return one line that says which side to upgrade when two protocol versions meet."""
    older = "the engine's lmcache package" if engine < server else "the lmcache server"
    return (
        f"the engine speaks protocol {engine} (lmcache {printable(engine_software, 40)}), the server {server} "
        f"(lmcache {printable(server_software, 40)}): upgrade {older}"
    )
