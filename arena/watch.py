"""What long work tells whoever is watching. The command line draws it; the engine only calls it."""

from __future__ import annotations

from typing import Any, Protocol


class Watch(Protocol):
    """Receives progress. Calls are cheap and never raise."""

    def phase(self, name: str, total: int, unit: str) -> None:
        """A piece of work begins: ``total`` steps of ``unit`` (``epochs``, ``forwards``, ``points``)."""

    def advance(self, done: int, note: str = "") -> None:
        """``done`` steps of the current phase are finished; ``note`` is a short figure to show."""

    def ahead(self, own: float | None, after: float, more: bool) -> None:
        """Of the current phase: the seconds it may take if they can be told, those of all that comes after it, and
        whether that is ``more`` than anyone can tell."""

    def say(self, text: str) -> None:
        """One line worth keeping."""

    def row(self, attack: dict[str, Any]) -> None:
        """An attack was judged: its row of the result."""


class Silent:
    """Watches nothing."""

    def phase(self, name: str, total: int, unit: str) -> None: ...
    def advance(self, done: int, note: str = "") -> None: ...
    def ahead(self, own: float | None, after: float, more: bool) -> None: ...
    def say(self, text: str) -> None: ...
    def row(self, attack: dict[str, Any]) -> None: ...
