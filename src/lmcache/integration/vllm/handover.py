"""Hand-overs: one engine computes a prompt, and another one goes on with it. What routers say of that in `kv_transfer_params`.

A hand-over needs no parameters: the second engine names the chunks of the prompt itself, and finds them under these names. So
what it is told is a hint, which can be stale, foreign or missing. It decides only whether the prompt's unfull chunk, too, is
stored or looked up. Nothing in it is dialled or read from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmcache.observability.log import init_logger

logger = init_logger(__name__)
VERSION = 1
"""The version of the object under `KEY`."""
KEY = "lmcache"
_IGNORED = "disagg_spec"
"""A key of the public LMCache's proxies, which tells the first engine where to send the KV."""
_MULTI = "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector"
_told = set[str]()


class HandOver(NamedTuple):
    """gives: the engine stores the whole prompt, for another one. takes: another engine has computed the prompt. first_token:
    the first engine's answer names the token that it has computed, which the second one gets as a part of the prompt."""

    gives: bool = False
    takes: bool = False
    first_token: bool = False

    @property
    def tail_leaves(self) -> int | None:
        """How many tokens at the prompt's end its tail leaves out. The second engine computes one token, which is the last one of
        its own prompt; with `first_token` that is not the first engine's."""
        return (0 if self.first_token and self.gives else 1) if self.gives or self.takes else None


def asked(params: object, *, loads: bool, stores: bool) -> HandOver:
    """Return what the request's `kv_transfer_params` ask for. loads, stores: what the engine's role allows. An engine that does
    one of the two hands over, or is handed, all of its prompts."""
    given: Mapping[str, Any] = params if isinstance(params, dict) else {}
    if _IGNORED in given and _IGNORED not in _told:
        _told.add(_IGNORED)
        logger.info(
            "kv_transfer_params %s is ignored: KV goes through the LMCache server, where the other engine finds it by itself",
            _IGNORED,
        )
    first_token = bool(given.get("ret_first_tok"))
    gives = stores and (not loads or first_token or bool(given.get("do_remote_decode")))
    takes = loads and (not stores or bool(given.get("do_remote_prefill")) or KEY in given)
    return HandOver(gives, takes and not gives, first_token)


def answer(params: object, tokens: int, output: list[int]) -> dict[str, Any] | None:
    """Return the parameters for the second engine, for a request of the first one that has ended well; None if nobody has asked.

    tokens: of the prompt that were stored. output: the computed tokens.
    """
    given: Mapping[str, Any] = params if isinstance(params, dict) else {}
    found: dict[str, Any] = {}
    if given.get("do_remote_decode"):
        found[KEY] = {"v": VERSION, "tokens": tokens}
        if (
            _MULTI not in sys.modules
        ):  # vLLM fails where two connectors return the same key, and others take it for theirs
            found |= {"do_remote_prefill": True, "do_remote_decode": False}
    if given.get("ret_first_tok"):
        if output:
            found["first_tok"] = output[0]
        else:
            logger.warning(
                "kv_transfer_params ret_first_tok: this request has ended without a token, so none is returned; "
                "let the first engine compute one (max_tokens 1)"
            )
    return found or None
