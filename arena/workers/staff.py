"""The workers of a match as they are reached: which there are, and how one talks to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from arena.question import Running
from arena.workers.messages import Lost


class Staff(Protocol):
    """The workers as they are reached: processes of this machine, or actors of a cluster."""

    engine: str
    """``local`` or ``ray``."""
    size: int
    """Workers that there should be."""

    def begin(self, order: bytes) -> None:
        """Take in what every worker is told first."""

    def hire(self) -> int:
        """Start one more worker and return its number."""

    def send(self, worker: int, message: bytes) -> None:
        """Send a message; one to a lost worker is dropped."""

    def receive(self, timeout: float) -> list[tuple[int, bytes | Lost]]:
        """Return what workers said, in order, waiting at most ``timeout`` seconds; ``Lost`` is the last of one."""

    def close(self) -> None:
        """End all workers, whatever they are at."""


@contextmanager
def engaged(running: Running) -> Iterator[Staff | None]:
    """Give the workers that a match is to have, not begun yet, and end them after it; None: this process does it all.

    Raises:
        ArenaError: they cannot be had.
    """
    staff = _staff(running)
    try:
        yield staff
    finally:
        if staff is not None:
            staff.close()


def _staff(running: Running) -> Staff | None:
    if running.engine == "ray":
        from arena.workers.actors import Actors

        return Actors(running.ray_address, running.workers, (*running.devices, "auto")[0])
    if len(running.devices) > 1:
        from arena.workers.processes import Processes

        return Processes(running.devices)
    return None
