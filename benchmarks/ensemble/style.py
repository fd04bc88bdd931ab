"""How arena plays an entry in the benchmark, and the way's name that says it: ``autoattack, bf16, compiled, on 2``."""

from __future__ import annotations

from dataclasses import dataclass

from arena.question import Running


@dataclass(frozen=True)
class Style:
    """How an entry is played."""

    precision: str = "fp32"
    compile: bool = False
    devices: tuple[str, ...] = ()
    """Share the points."""
    device: str = "cpu"
    """Not part of the way's name: what is compared was played on one."""

    def way(self, entry: str) -> str:
        """Name an entry played so; ``Style()`` adds nothing."""
        words = [entry]
        words += [self.precision] if self.precision != "fp32" else []
        words += ["compiled"] if self.compile else []
        words += [f"on {len(self.devices)}"] if self.devices else []
        return ", ".join(words)

    def running(self, shared: bool = True) -> Running:
        """Return how a match is to be run; unless ``shared``, by one process."""
        devices = self.devices if shared else ()
        return Running(
            device=self.device, precision=self.precision, compile=self.compile, audit="none", devices=devices
        )
