"""``--time-limit``: how long a match's attacks may take, as a text and as a clock. Importing this imports no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from arena.errors import ArenaError

_NUMBER = r"(\d+(?:\.\d+)?)"
_TEXT = re.compile(rf"{_NUMBER}|(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?", re.ASCII)


def seconds_of(given: str | float) -> float:
    """Return the seconds of ``90``, ``90s``, ``10m`` or ``1h30m``.

    Raises:
        ArenaError: another text, or no time at all.
    """
    found = _TEXT.fullmatch(str(given).strip())
    if isinstance(given, bool) or not found or not any(found.groups()):
        raise ArenaError(f"--time-limit '{given}': expected a time such as 90, 90s, 10m or 1h30m")
    bare, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    total = bare + 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise ArenaError(f"--time-limit '{given}': expected more than 0 seconds")
    return total


def written(seconds: float) -> str:
    """Write a time the way the option takes it: ``1h30m``, ``10m``, ``0.5s``."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [f"{hours:.0f}h" if hours else "", f"{minutes:.0f}m" if minutes else "", f"{rest:g}s" if rest else ""]
    return "".join(parts)


class Limit:
    """A clock that runs from when it is made; without a limit it never ends.

    However short the limit is, the work begun after it was made gets one step: so the same command, given again and
    again, comes to its end.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._now, self._began = seconds, now, now()
        self._worked = False

    def after_step(self) -> bool:
        """Tell, after a step of work, whether the time is up."""
        self._worked = True
        return self.up

    @property
    def up(self) -> bool:
        """Whether the time is up and some work was done in it: no other may begin."""
        return self._worked and self.seconds is not None and self._now() - self._began >= self.seconds

    def __str__(self) -> str:
        return "no time limit" if self.seconds is None else f"the time limit of {written(self.seconds)}"
