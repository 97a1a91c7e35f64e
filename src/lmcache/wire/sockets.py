"""Listening Unix sockets: at a path in a directory that belongs to this user alone, or under an abstract name.

An address is `unix:///path` or `unix://@name`. A name in Linux's abstract namespace leaves no file behind, however its owner
ends. Any user of the host may connect to it, so both ends check the other's credentials, as they do for paths.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from lmcache.errors import ConfigError, plainly

UNIX = "unix://"
_BACKLOG = 128


def socket_place(address: str) -> str:
    """Return the socket address to connect to for `unix:///path` or `unix://@name`."""
    place = address.removeprefix(UNIX)
    return "\0" + place[1:] if place.startswith("@") else place


def listen_named(name: str) -> socket.socket:
    """Listen at `unix://@name`.

    Raises:
        ConfigError: another process listens under that name.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind("\0" + name)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"another server listens at {UNIX}@{name} ({error.strerror}): give its engine another name"
        ) from error
    return listener


def listen_unix(path: Path, others: bool = False, group: int = -1) -> socket.socket:
    """Listen at `path`, mode 0600. The directory is created (0700) if missing, and sockets of dead servers there are removed.

    others: let other users connect, whom the caller then has to judge by their credentials: members of `group` only (0710, 0660)
    or, without one, everybody (0711, 0666).

    The path appears only once the socket listens, so no client that finds it is refused.

    Raises:
        ConfigError: the directory cannot be created or others may write to it, the path is too long for a socket, or another
            server listens there.
    """
    directory, made = path.parent, path.with_suffix(".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sweep(directory)
        status = directory.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ConfigError(f"--socket-dir {directory}: others may write there; chmod 700 it, or name another")
        made.unlink(missing_ok=True)
        listener.bind(str(made))
        os.chmod(made, 0o600)
        if others:
            for one, mode in ((directory, 0o700), (made, 0o600)):
                if group >= 0:
                    os.chown(one, -1, group)
                x_or_rw = 0o010 if one is directory else 0o060
                os.chmod(one, mode | x_or_rw | (0 if group >= 0 else x_or_rw >> 3))
        listener.listen(_BACKLOG)
        try:
            os.link(made, path)
        finally:
            made.unlink()
    except FileExistsError as error:
        listener.close()
        raise ConfigError(f"another server listens at {path}: stop it, or give this one another name") from error
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--socket-dir {directory}: cannot listen there: {plainly(error)}: pass another directory"
        ) from error
    except ConfigError:
        listener.close()
        raise
    return listener


def _sweep(directory: Path) -> None:
    """Remove the sockets and cookies of dead servers."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(0.2)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
                path.with_suffix(".cookie").unlink(missing_ok=True)
            except OSError:
                pass  # the server does not answer, the socket is another user's, or it is gone
