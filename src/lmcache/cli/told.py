"""What a server has told, read without trust: another version, or another program, may leave out or change anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


class Told:
    """A JSON object of a server. `missing` names what was asked for and is not there, or is of another kind, in order."""

    def __init__(self, told: object, path: str = "", missing: list[str] | None = None) -> None:
        self._told: Mapping[str, Any] = told if isinstance(told, dict) else {}
        self._path = path
        self.missing: list[str] = [] if missing is None else missing

    def number(self, name: str, default: float = 0.0) -> float:
        """Return a number; `default` if there is none."""
        value = self._told.get(name)
        if _is_number(value):
            return value
        self._lacks(name)
        return default

    def optional(self, name: str) -> float | None:
        """Return a number, or None where the server tells null."""
        return None if name in self._told and self._told[name] is None else self.number(name)

    def text(self, name: str) -> str:
        """Return a text or a number as text; `?` if there is none."""
        value = self._told.get(name)
        if isinstance(value, (str, int, float)):
            return str(value)
        self._lacks(name)
        return "?"

    def given(self, name: str) -> bool:
        """Return whether there is something that is not empty. Nothing is missing where there is not."""
        return bool(self._told.get(name))

    def numbers(self, name: str) -> list[float]:
        """Return the numbers of a list; none if there is no list."""
        found = self._told.get(name)
        if not isinstance(found, list):
            self._lacks(name)
            return []
        return [one for one in found if _is_number(one)]

    def names(self) -> list[str]:
        """Return what there is."""
        return list(map(str, self._told))

    def part(self, name: str) -> Told:
        """Return an object; an empty one if there is none."""
        if not isinstance(self._told.get(name), dict):
            self._lacks(name)
            return Told({})  # what it would have contained is not named as well
        return Told(self._told[name], f"{self._path}{name}.", self.missing)

    def rows(self, name: str) -> list[Told]:
        """Return the objects of a list; none if there is no list."""
        found = self._told.get(name)
        if not isinstance(found, list):
            self._lacks(name)
            return []
        return [Told(one, f"{self._path}{name}.", self.missing) for one in found]

    def lines(self, name: str) -> list[str]:
        """Return the texts of a list, which may be left out."""
        found = self._told.get(name)
        return [str(one) for one in found] if isinstance(found, list) else []

    def _lacks(self, name: str) -> None:
        if (said := self._path + name) not in self.missing:
            self.missing.append(said)


def _is_number(value: object) -> TypeGuard[int | float]:
    """Return whether it is a number that can be reckoned with: Python reads Infinity and NaN, too, which JSON does not have."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def lacking(told: Told, version: str) -> str:
    """Say what the server has not told; "" if that is nothing."""
    if not told.missing:
        return ""
    named = ", ".join(told.missing[:6]) + (f" and {len(told.missing) - 6} more" if len(told.missing) > 6 else "")
    return f"the server (version {version}) does not tell {named}: it is of another version, or something else answers there"
