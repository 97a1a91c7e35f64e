"""How `lmcache bench engine` reaches an engine: certificates, the API key, its model, and what to do when a call fails."""

from __future__ import annotations

import json
import os
import ssl
from pathlib import Path

import anyio
import h11

from lmcache.config.given import check_secret_file
from lmcache.errors import ConfigError, ServerRefused, ServerUnavailable
from lmcache.proxy.upstream import FAILURES, Engine, call

KEY_VARIABLE = "OPENAI_API_KEY"
_MODEL_SECONDS = 10.0
_MOST_MODELS_BYTES = 1 << 20


def context_of(ca_file: str) -> ssl.SSLContext:
    """Return the settings of TLS: certificates are checked against the system's authorities, or those of this file alone.

    Raises:
        ConfigError: the file cannot be read, or holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--ca-file {ca_file}: {why}: pass a file with certificates in PEM") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def key_of(file: str) -> str:
    """Return the engine's API key: from this file, or from the environment; "" for none. No error contains it.

    Raises:
        ConfigError: the file cannot be read, others may read it, or what it holds cannot be a key.
    """
    said = f"--engine-key-file {file}" if file else KEY_VARIABLE
    if file:
        check_secret_file(Path(file), "--engine-key-file")
    try:
        key = (Path(file).read_text() if file else os.environ.get(KEY_VARIABLE, "")).strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{said}: is no text: write the key into it, on one line") from None
    if not (key.isascii() and key.isprintable()) or " " in key or (file and not key):
        raise ConfigError(f"{said}: must hold one API key, on one line and without spaces")
    return key


def headers_of(key: str) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def without(key: str, text: str) -> str:
    """Return the text without the key, which engines may repeat in their errors."""
    return text.replace(key, "***") if key else text


def why_failed(engine: Engine, error: Exception) -> str:
    """Return what is wrong with a call that raised one of `FAILURES`, and what to do where that is known."""
    other = f"pass --url {'http' if engine.tls else 'https'}://{engine.address}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message}): pass --ca-file FILE with the certificate of the authority "
            "that has signed it (its own, if it is self-signed), and --url with a name that the certificate is for"
        )
    if isinstance(error, ssl.SSLError):
        return f"it does not speak TLS as expected ({error.reason or error}): if it speaks HTTP without TLS, {other}"
    if isinstance(error, h11.RemoteProtocolError) and engine.tls is None:
        return f"it does not speak HTTP ({error}): if it speaks TLS, {other}"
    if isinstance(error, anyio.BrokenResourceError):
        return "it has ended the connection" + ("" if engine.tls else f": if it speaks TLS, {other}")
    return str(error) or type(error).__name__


async def model_of(engine: Engine, key: str) -> str:
    """Return the name of the first model that the engine serves.

    Raises:
        ServerUnavailable, ServerRefused: there is no OpenAI-compatible engine, or its certificate or the key is not accepted.
    """
    place, body = f"{engine}/v1/models", b""
    try:
        async with call(engine, "GET", "/v1/models", headers_of(key), b"", _MODEL_SECONDS) as said:
            status = said.status
            async for part in said.parts():
                body += part
                if len(body) > _MOST_MODELS_BYTES:
                    break
    except FAILURES as error:
        why = why_failed(engine, error)
        raise ServerUnavailable(
            f"no engine answers at {place}: {why}: start it (`vllm serve MODEL`), or pass --url"
        ) from None
    if status in (401, 403):
        raise ServerRefused(
            f"{place} answered HTTP {status}: write the engine's API key into a file (0600) and pass --engine-key-file, or set "
            f"{KEY_VARIABLE}"
        )
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    models = answer.get("data") if isinstance(answer, dict) else None
    if status != 200 or not isinstance(models, list) or not models or not isinstance(models[0], dict):
        raise ServerRefused(f"{place} answered HTTP {status} and no list of models: pass the --url of an engine")
    return str(models[0].get("id"))
