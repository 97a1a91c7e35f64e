"""Questions of vLLM's production stack to its controller, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LookupMsg:
    """Where is the beginning of this prompt?"""

    tokens: list[int]
    event_id: str = ""


@dataclass
class LookupRetMsg:
    """layout_info: instance -> (location, tokens), the most tokens first."""

    event_id: str = ""
    layout_info: dict[str, tuple[str, int]] = field(default_factory=dict)


@dataclass
class QueryInstMsg:
    """Which instance is at this address?"""

    ip: str
    event_id: str = ""


@dataclass
class QueryInstRetMsg:
    """instance_id: None if no server has the address."""

    event_id: str = ""
    instance_id: str | None = None
