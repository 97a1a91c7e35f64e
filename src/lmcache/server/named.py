"""Which chunks a caller of the HTTP API means: a prompt as token ids, text or chunk hashes, of a model that engines have named.

The hashes of a prompt follow from its tokens and from the root of the model's layout. The server learns the layouts from its
engines and keeps each as long as L1 has the layout's space. Everything but `Models` may be used in any thread.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import msgspec

from lmcache.cache import L1
from lmcache.cache.managing import MOST_NAMED
from lmcache.chunks import HASH_BYTES, TokenChain, chunk_root
from lmcache.errors import ConfigError, LMCacheError, ServerRefused, ServerUnavailable
from lmcache.observability.log import redacted
from lmcache.wire import messages as m
from lmcache.wire.http_client import ask

MOST_TOKENS = 1 << 18
MOST_BODY_BYTES = 2 << 20
_MOST_TEXT = 1 << 20
_TOKENIZE_SECONDS = 5.0
_HASHES = re.compile(r"(?:[0-9a-fA-F]{32})*")
_Text = Annotated[str, msgspec.Meta(max_length=4096)]
_TokenId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


class Unknown(LMCacheError):
    """The caller has named a model, chunk, pin or prefetch that this server does not have."""


@dataclass(frozen=True)
class Model:
    """A model that an engine has registered with one layout and split. spaces: of its groups, the main one first."""

    name: str
    fingerprint: bytes
    spaces: tuple[int, ...]
    kv_dtype: str
    shards: int

    def described(self) -> dict[str, object]:
        """Return what tells the model from others, as JSON."""
        return {"model": self.name, "layout": self.fingerprint.hex(), "kv_dtype": self.kv_dtype, "shards": self.shards}


class Models:
    """The models whose spaces L1 has, by their main spaces."""

    def __init__(self, l1: L1) -> None:
        self._l1 = l1
        self._models: dict[int, Model] = {}

    def registered(self, request: m.Register, space: int) -> None:
        """Note what a scheduler has registered, which names all groups of its model, the main one first."""
        if request.shard >= 0:
            return
        if request.main < 0:
            known = self._models.get(space)
            layout = request.layout
            rest = [one for one in known.spaces[1:] if self._l1.space(one) is not None] if known is not None else []
            self._models[space] = Model(
                layout.model_id, layout.fingerprint, (space, *rest), layout.kv_dtype, request.shards
            )
            for gone in [one for one in self._models if self._l1.space(one) is None]:
                del self._models[gone]
        elif (main := self._models.get(request.main)) is not None and space not in main.spaces:
            spaces = *main.spaces, space
            self._models[request.main] = Model(main.name, main.fingerprint, spaces, main.kv_dtype, main.shards)

    def known(self) -> list[Model]:
        """Return the models that L1 has spaces of, with engines or without; of each layout the split that came last, since what
        the others have is found from there, too."""
        here = [one for one in self._models.values() if all(self._l1.space(space) is not None for space in one.spaces)]
        return list({one.fingerprint: one for one in here}.values())

    def name_of(self, space: int) -> str:
        """Return the name of the model that the space belongs to; "" if no scheduler has registered it."""
        for one in self._models.values():
            if space in one.spaces:
                return one.name
        return ""


class Prompt(msgspec.Struct, forbid_unknown_fields=True):
    """What a caller names: `tokens`, `text` or `hashes`, one of them, and what else the names of chunks depend on."""

    tokens: Annotated[list[_TokenId], msgspec.Meta(max_length=MOST_TOKENS)] | None = None
    text: Annotated[str, msgspec.Meta(max_length=_MOST_TEXT)] | None = None
    hashes: Annotated[list[_Text], msgspec.Meta(max_length=MOST_NAMED)] | None = None
    model: _Text = ""
    layout: _Text = ""
    """The fingerprint of a layout, for models that are served with several, such as two KV dtypes."""
    cache_salt: _Text = ""
    lora_name: _Text = ""
    lora_id: _Text = ""

    @property
    def is_named(self) -> bool:
        return any(one is not None for one in (self.tokens, self.text, self.hashes))


class Named(NamedTuple):
    """Chunks of a prompt in a model. tokens: of the prompt; 0 if only hashes were given. The last chunk may be an unfull one."""

    model: Model
    hashes: bytes
    tokens: int

    def tokens_of(self, chunks: int, chunk_tokens: int) -> int:
        """Return how many tokens the first `chunks` chunks have."""
        return min(chunks * chunk_tokens, self.tokens or chunks * chunk_tokens)


def named(prompt: Prompt, models: Sequence[Model], chunk_tokens: int, tokenizer: str) -> list[Named]:
    """Return the chunks of the prompt in each of these models that the prompt may mean.

    tokenizer: the address of an engine that turns text into tokens; "" if there is none.

    Raises:
        ConfigError: the prompt is named wrongly, or the server has no tokenizer.
        Unknown: no such model has been registered.
        ServerUnavailable, ServerRefused: the tokenizer does not answer, or not as an engine does.
    """
    if sum(one is not None for one in (prompt.tokens, prompt.text, prompt.hashes)) != 1:
        raise ConfigError('name the prompt by one of "tokens" (ids), "text" and "hashes" (32 hexadecimal digits each)')
    chosen = [one for one in models if not prompt.model or one.name == prompt.model]
    chosen = [one for one in chosen if not prompt.layout or one.fingerprint.hex() == prompt.layout.lower()]
    if not chosen:
        known = ", ".join(sorted({one.name for one in models})) or "none: an engine has to connect first"
        what = f"{prompt.model[:200]}: no engine has registered this model" if prompt.model else "no model is known"
        raise Unknown(f"{what}; known: {known}")
    if prompt.hashes is not None:
        text = "".join(prompt.hashes)
        if not _HASHES.fullmatch(text) or any(len(one) != 2 * HASH_BYTES for one in prompt.hashes) or not text:
            raise ConfigError('"hashes": each has 32 hexadecimal digits, and there is at least one')
        if len({one.lower() for one in prompt.hashes}) < len(prompt.hashes):
            raise ConfigError(
                '"hashes": one is there twice: name the chunks of a prompt once each, from its beginning on'
            )
        return [Named(one, bytes.fromhex(text), 0) for one in chosen]
    tokens = prompt.tokens if prompt.tokens is not None else _tokenized(prompt.text or "", tokenizer)
    found = [Named(one, _hashes_of(prompt, one, tokens, chunk_tokens), len(tokens)) for one in chosen]
    if not found[0].hashes:
        raise ConfigError("the prompt has no tokens, so there is no chunk of it")
    return found


def _hashes_of(prompt: Prompt, model: Model, tokens: list[int], chunk_tokens: int) -> bytes:
    root = chunk_root(model.fingerprint, prompt.cache_salt, prompt.lora_name, prompt.lora_id)
    chain = TokenChain(root, chunk_tokens)
    chain.extend(tokens)
    return chain.hashes + chain.tail(tokens)


def _tokenized(text: str, tokenizer: str) -> list[int]:
    """Return the tokens of a text, as the engine at the configured address says."""
    if not tokenizer:
        raise ConfigError(
            '"text" needs an engine that tokenizes it: start the server with --tokenizer-url http://ENGINE:8000, or send "tokens"'
        )
    try:
        status, answer = ask(tokenizer, "/tokenize", "POST", seconds=_TOKENIZE_SECONDS, content={"prompt": text})
    except ServerUnavailable:
        raise ServerUnavailable(
            f'--tokenizer-url {redacted(tokenizer)}: no engine answers there within {_TOKENIZE_SECONDS:g} s: send "tokens"'
        ) from None
    except ServerRefused:
        status, answer = 0, {}
    tokens = answer.get("tokens")
    whole = isinstance(tokens, list) and all(type(one) is int and 0 <= one <= 0xFFFFFFFF for one in tokens)
    if status != 200 or not isinstance(tokens, list) or not whole:
        raise ConfigError(
            f"--tokenizer-url {redacted(tokenizer)}: POST /tokenize answered{f' {status}' if status else ''} without token ids: "
            'send "tokens"'
        )
    if len(tokens) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(tokens)} tokens; at most {MOST_TOKENS} can be named")
    return tokens


def only(several: Sequence[Named]) -> Named:
    """Return the only one of these.

    Raises:
        ConfigError: there are several, so the caller has to name a model.
    """
    if len(several) > 1:
        names = ", ".join(sorted(f"{one.model.name} (layout {one.model.fingerprint.hex()})" for one in several))
        raise ConfigError(f'"model", or "layout": several fit, name one: {names}')
    return several[0]
