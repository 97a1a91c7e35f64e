"""SIGHUP: the settings are read again, and those that can change while the server runs are put into effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lmcache.config.server import OPTIONS, ServerConfig
from lmcache.errors import ConfigError
from lmcache.observability.log import init_logger, set_format, set_level

if TYPE_CHECKING:
    from lmcache.server.attaching import Attaching
    from lmcache.server.http import HttpEndpoint

logger = init_logger(__name__)
_TIERS = ("peers", "peer_address", "peer_keep", "l2", "l2_adapter")
_CHANGEABLE = ("log_level", "log_format", "api_token", "api_token_file", *_TIERS)


class Reloading:
    """What SIGHUP does in one server. Wrong settings are logged and change nothing.

    Args:
        config: the settings in force, with the sizes and ports that the server has chosen.
        reload: reads the settings again.
        http: the HTTP endpoint, whose token may change.
        attaching: what attaches and removes tiers.
        urls_of: returns the URLs of all tiers of a configuration, nearest first.
    """

    def __init__(
        self,
        config: ServerConfig,
        reload: Callable[[], ServerConfig],
        http: HttpEndpoint | None,
        attaching: Attaching,
        urls_of: Callable[[ServerConfig], Sequence[str]],
    ) -> None:
        self._reload, self._http, self._attaching, self._urls_of = reload, http, attaching, urls_of
        try:
            self._given = reload()
        except ConfigError:  # the file has changed since the start
            self._given = config

    def run(self) -> None:
        """Read the settings again and use what can be used. Call it in the loop's thread."""
        try:
            new = self._reload()
            urls = self._urls_of(new)
        except ConfigError as error:
            logger.error("SIGHUP: the settings are wrong, so nothing changes: %s", error)
            return
        changed = [option for option in OPTIONS if getattr(new, option.name) != getattr(self._given, option.name)]
        later = [option.key for option in changed if option.name not in _CHANGEABLE]
        set_level(new.log_level)
        set_format(new.log_format)
        if self._http is not None:
            self._http.use_token(new.api_token)
        if any(option.name in _TIERS for option in changed) or self._attaching.failed:
            self._attaching.change(self._urls_of(self._given), urls)
        self._given = new
        used = ", ".join(option.key for option in changed if option.name in _CHANGEABLE)
        logger.info("SIGHUP: the settings were read again; in effect now: %s", used or "nothing new")
        if later:
            logger.warning(
                "SIGHUP: these settings have changed, too, and need a restart of the server: %s", ", ".join(later)
            )
