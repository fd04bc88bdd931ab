"""What a user may change about how a defense is trained; all of it is part of the model's identity."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from arena.errors import ArenaError, unknown
from arena.specs import DefenseSpec, Preset

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Schedule:
    """How to train, where it differs from the defense's own preset."""

    preset: str | None = None
    """Use the settings for this data set (``cifar10``, ``cifar10/wrn34_10``) instead of the one trained on."""
    epochs: int | None = None
    """Epochs instead of the preset's; milestones move in proportion."""
    precision: str = "fp32"
    """``fp32``, or ``bf16``: passes in mixed precision, weights in fp32."""
    patience: int = 0
    """Stop a stage after so many looks at the held-out images without a better one; 0: never."""

    def choose(self, owner: str, spec: DefenseSpec, dataset: str, backbone: str) -> Preset | None:
        """Return the training settings: for data set and backbone, else the data set, else ``*``, else None.

        Raises:
            ArenaError: a preset that the defense lacks, or epochs below 1.
        """
        if self.epochs is not None and self.epochs < 1:
            raise ArenaError(f"--epochs {self.epochs}: expected at least 1")
        if self.patience < 0:
            raise ArenaError(f"--patience {self.patience}: expected at least 0")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.preset is not None and self.preset not in spec.presets:
            raise unknown(f"preset of {owner}", self.preset, spec.presets)
        wanted = self.preset or dataset
        names = (f"{wanted}/{backbone}", wanted) if self.preset else (f"{wanted}/{backbone}", wanted, "*")
        found = next((spec.presets[name] for name in names if name in spec.presets), None)
        if found is None or self.epochs is None or found.epochs == 0:
            return found
        part = self.epochs / found.epochs
        return replace(found, epochs=self.epochs, milestones=tuple(round(m * part, 6) for m in found.milestones))

    def key(self, preset: Preset | None) -> dict[str, Any]:
        """Return what the training key says of it."""
        fields: dict[str, Any] = {"preset": None if preset is None else asdict(preset), "precision": self.precision}
        return {**fields, "patience": self.patience} if self.patience else fields

    def flags(self) -> list[str]:
        """Write it as options of ``arena train``."""
        words: list[str] = []
        for name in ("preset", "epochs", "precision", "patience"):
            value = getattr(self, name)
            if value != getattr(Schedule(), name):
                words += [f"--{name}", str(value)]
        return words
