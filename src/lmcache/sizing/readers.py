"""Reads traces: our own, Mooncake's, the lookup logs of LMCache, and CSV. The first line of a file tells which it is.

    ours       `sizing.trace` describes it
    Mooncake   {"timestamp": ms, "input_length": N, "output_length": N, "hash_ids": [...]}, one id a block of 512 tokens
    LMCache    lookup_hashes_*.jsonl: {"timestamp": s, "chunk_hashes": [...], "chunk_size": N, "seq_len": N, "model_name": M}
    CSV        seconds,hash hash hash ...

In all of them a hash names a block together with everything before it. A bad line is an error that names file, line and remedy.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from lmcache.chunks import HASH_BYTES
from lmcache.errors import ConfigError
from lmcache.sizing.trace import FORMAT, Cleared, Lookup, Lost, Opened, Record, Replied, Stored, restored

BLOCK_TOKENS = 512
"""Of Mooncake's traces."""
_LONGEST_LINE = 64 << 20
_MOST_ANSWER_TOKENS = 1 << 31
T = TypeVar("T")
Parse = Callable[[bytes], "Record | None"]


class Progress(NamedTuple):
    """How much has been read, in bytes."""

    done: int
    total: int


class _Mooncake(msgspec.Struct):
    timestamp: float
    hash_ids: list[int | str]
    input_length: int = 0
    output_length: int = 0


class _Logged(msgspec.Struct):
    timestamp: float
    chunk_hashes: list[int | str]
    chunk_size: int
    seq_len: int
    model_name: str = ""


class _Own(msgspec.Struct):
    t: float = 0.0
    lookup: int = -1
    stored: int = -1
    replied: int = -1
    space: int = -1
    found: int = 0
    hashes: str = ""
    parent: str = ""
    last: str = ""
    tokens: int = 0
    model: str = ""
    chunk_bytes: int = 0
    cleared: bool = False
    lost: int = 0
    lmcache_trace: int = 0
    chunk_tokens: int = 0


class Trace:
    """The records of several files, one file after the other, which are read once.

    block_tokens: of a block, where the file does not tell; 0 for `BLOCK_TOKENS`.
    """

    def __init__(self, paths: Sequence[Path], block_tokens: int = 0) -> None:
        self._paths, self._given_tokens = paths, block_tokens
        self.block_tokens = block_tokens or BLOCK_TOKENS
        self.progress = Progress(0, sum(map(_size_of, paths)))
        self._spaces: dict[str, int] = {}
        """Model -> number of its space, where files have names of models only."""
        self._opened: Opened | None = None
        """To be given out before the record that needs it."""

    def __iter__(self) -> Iterator[Record]:
        for path in self._paths:
            parse: Parse | None = None
            for number, line in _lines(path):
                self.progress = self.progress._replace(done=self.progress.done + len(line))
                if not line.strip():
                    continue
                try:
                    if parse is None:
                        parse = self._format_of(line)
                    record = parse(line)
                except (ValueError, OverflowError, msgspec.MsgspecError) as error:
                    raise ConfigError(f"{path} line {number}: {error}") from None
                if self._opened is not None:
                    yield self._opened
                    self._opened = None
                if record is not None:
                    yield record

    def _format_of(self, line: bytes) -> Parse:
        """Return the function that parses this line and those after it."""
        if not line.lstrip().startswith(b"{"):
            if line.startswith(b"\x1f\x8b"):
                raise ValueError("this is compressed: unpack it first (gunzip)")
            self._one_space()
            return self._csv
        try:
            names = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        except msgspec.MsgspecError as error:
            raise ValueError(f"{error}: give JSON objects, one a line, or CSV") from None
        if "lmcache_trace" in names:
            return self._own
        if "hash_ids" in names:
            self._one_space()
            return self._mooncake
        if "chunk_hashes" in names:
            return self._logged
        raise ValueError(
            "this is no trace that replay knows: lines need hash_ids (Mooncake), chunk_hashes (LMCache's lookup log), or the "
            "first line of a file of `lmcache server --record-trace`; as CSV, `seconds,hash hash ...`"
        )

    def _one_space(self) -> None:
        self._opened = Opened(0, "", self.block_tokens, 0)

    def _mooncake(self, line: bytes) -> Record:
        found = _decoded(line, _MOONCAKE, "Mooncake's traces have timestamp, input_length and hash_ids")
        count, size = len(found.hash_ids), self.block_tokens
        tokens = found.input_length or count * size
        if not tokens // size <= count <= -(-tokens // size):
            better = next((one for one in (16, 32, 64, 128, 256, 512, 1024) if -(-tokens // one) == count), None)
            raise ValueError(
                f"{tokens} tokens in blocks of {size} are {-(-tokens // size)} blocks, not {count}: pass --block-tokens "
                + (f"{better}" if better else "with the size of the trace's blocks")
            )
        answer = min(max(found.output_length, 0), _MOST_ANSWER_TOKENS)
        return Lookup(found.timestamp / 1e3, 0, _joined(found.hash_ids), tokens, answer=answer)

    def _logged(self, line: bytes) -> Record:
        found = _decoded(line, _LOGGED, "lookup logs have timestamp, chunk_hashes, chunk_size and seq_len")
        if found.chunk_size < 1:
            raise ValueError(f"chunk_size is {found.chunk_size}; it must be at least 1")
        space = self._spaces.get(found.model_name)
        if space is None:
            space = self._spaces[found.model_name] = len(self._spaces)
            self._opened = Opened(space, found.model_name, found.chunk_size, 0)
        hashes = _joined(found.chunk_hashes)
        return Lookup(found.timestamp, space, hashes, max(found.seq_len, 0) or len(hashes) // 16 * found.chunk_size)

    def _csv(self, line: bytes) -> Record | None:
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise ValueError("this is neither JSON nor text: give a trace, one request a line") from None
        first, _, rest = text.partition(",")
        try:
            time = float(first)
        except ValueError:
            if first.lower() in ("time", "timestamp", "seconds", "t"):
                return None  # the names of the columns
            raise ValueError(f"{first[:40]!r} is no time: write `seconds,hash hash hash`, one request a line") from None
        ids = rest.replace(",", " ").replace(";", " ").replace('"', " ").split()
        return Lookup(time, 0, _joined(ids), len(ids) * self.block_tokens)

    def _own(self, line: bytes) -> Record | None:
        try:
            found = _OWN.decode(line)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{error}: the line is damaged, or the file was cut off; remove the line") from None
        if found.lmcache_trace:
            if found.lmcache_trace != FORMAT or found.chunk_tokens < 1:
                raise ValueError(
                    f"this is format {found.lmcache_trace} of traces, and this lmcache reads {FORMAT}: replay it with the "
                    "lmcache that wrote it"
                )
            self.block_tokens = found.chunk_tokens
            return None
        if found.space >= 0:
            return Opened(found.space, found.model, self.block_tokens, found.chunk_bytes)
        if found.lookup >= 0:
            hashes = restored(found.hashes)
            return Lookup(found.t, found.lookup, hashes, len(hashes) // HASH_BYTES * self.block_tokens, found.found)
        if found.stored >= 0:
            return Stored(found.t, found.stored, restored(found.parent), restored(found.hashes))
        if found.replied >= 0:
            last = restored(found.last)
            if len(last) != HASH_BYTES or not 0 <= found.tokens <= _MOST_ANSWER_TOKENS:
                raise ValueError("an answer has one hash, and a number of tokens: remove the line")
            return Replied(found.t, found.replied, last, found.tokens)
        if found.cleared:
            return Cleared(found.t)
        return Lost(found.lost)


_MOONCAKE, _LOGGED, _OWN = map(msgspec.json.Decoder, (_Mooncake, _Logged, _Own))


def _decoded(line: bytes, decoder: msgspec.json.Decoder[T], wanted: str) -> T:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{error}: {wanted}; repair or remove the line") from None


def _joined(ids: Sequence[int | str]) -> bytes:
    """Return 16 bytes for each id.

    Raises:
        ValueError: an id occurs twice, so it does not name a block together with all before it.
    """
    if len(set(ids)) != len(ids):
        place = next(at for at, one in enumerate(ids) if one in ids[:at])
        raise ValueError(
            f"block {place + 1} of the request has the hash of an earlier one: a hash must name a block together with all "
            "blocks before it, so hash each block with the hash before it"
        )
    try:
        whole = array("Q", bytes(HASH_BYTES * len(ids)))
        whole[::2] = array("Q", ids)  # type: ignore[arg-type, type-var]
        return whole.tobytes()
    except (TypeError, OverflowError):  # names, or large or negative numbers
        return b"".join(map(_key, ids))


def _key(one: int | str) -> bytes:
    if isinstance(one, int) and 0 <= one < 1 << 64:
        return one.to_bytes(HASH_BYTES, "little")
    name = str(one)
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: pass a trace that exists and can be read") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise ConfigError(f"{path} line {number}: longer than {_LONGEST_LINE >> 20} MiB: this is no trace")
                yield number, line
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: pass a trace that exists and can be read") from None
