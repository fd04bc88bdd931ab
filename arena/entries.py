"""The little language of names with options: ``pgd(steps=100,restarts=5),autoattack``."""

from __future__ import annotations

import re
from fractions import Fraction

from arena.errors import ArenaError
from arena.specs import Value

_NAME = re.compile(r"[A-Za-z_][\w./:\-]*\Z")
_KEY = re.compile(r"[A-Za-z_]\w*\Z")
_BARE = re.compile(r"[A-Za-z_][\w.\-]*\Z")


def split(text: str) -> list[str]:
    """Split on commas outside brackets.

    Raises:
        ArenaError: unbalanced brackets or an empty entry.
    """
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            raise ArenaError(f"'{text}': ')' without '('")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise ArenaError(f"'{text}': '(' is never closed (brackets need quotes in a shell)")
    parts = [p.strip() for p in (*parts, text[start:])]
    if not all(parts):
        raise ArenaError(f"'{text}': an entry is empty")
    return parts


def parse(text: str) -> tuple[str, dict[str, Value]]:
    """Read ``name`` or ``name(option=value,...)``.

    Raises:
        ArenaError: malformed name, option or value, or an option given twice.
    """
    text = text.strip()
    name, bracket, rest = text.partition("(")
    name = name.strip()
    if not _NAME.match(name):
        raise ArenaError(f"'{text}': expected NAME or NAME(option=value,...)")
    options: dict[str, Value] = {}
    if not bracket:
        return name, options
    if not rest.endswith(")"):
        raise ArenaError(f"'{text}': expected ')' at the end")
    inner = rest[:-1].strip()
    for item in split(inner) if inner else []:
        key, equals, raw = (s.strip() for s in item.partition("="))
        if not equals or not _KEY.match(key):
            raise ArenaError(f"'{text}': expected option=value, got '{item}'")
        if key in options:
            raise ArenaError(f"'{text}': option '{key}' is given twice")
        options[key] = value(raw, text)
    return name, options


def value(raw: str, where: str) -> Value:
    """Read an int, float, fraction (``8/255``), ``inf``, ``true``/``false`` or a bare name.

    Raises:
        ArenaError: none of these.
    """
    lowered = raw.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("inf", "+inf", "-inf"):
        return float(lowered)
    for read in (int, float, Fraction):
        try:
            found = read(raw)
        except (ValueError, ZeroDivisionError):
            continue
        if found != found:
            break
        return found
    if _BARE.match(raw) and lowered != "nan":
        return raw
    raise ArenaError(f"'{where}': '{raw}' is no number, fraction, true/false or bare name")
