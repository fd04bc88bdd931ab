"""Exceptions that a user can fix: the command line prints them on one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArenaError(Exception):
    """Something the user can fix. The message names the culprit, what was expected and what came."""


class PluginError(ArenaError):
    """A plugin broke its contract; the message names plugin, distribution and the rule."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    known = sorted(known)
    lowered = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> ArenaError:
    """Build the error for an unknown ``kind`` called ``name``, with the nearest valid name or the list of them."""
    known = sorted(known)
    hint = nearest(name, known)
    if not hint:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        hint = f"; known: {shown or 'none'}"
    return ArenaError(f"unknown {kind} '{name}'{hint}")
