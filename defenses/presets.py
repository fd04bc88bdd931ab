"""Training settings shared by the catalog. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from arena.specs import Preset

#: CIFAR-style settings of the baselines (papers.md 7); ``*`` serves data sets that have no table of their own.
PLAIN = {
    "rt": Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip"),
    "sat": Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip"),
    "trades": Preset(76, lr=0.1, weight_decay=2e-4, milestones=(75,), augment="crop_flip"),
    "mart": Preset(120, lr=0.01, weight_decay=3.5e-3, milestones=(75, 90, 100), augment="crop_flip"),
}
#: For 8x8 scans on two CPU cores; one cycle, chosen on held-out training images.
DIGITS = Preset(30, batch=64, lr=0.1, weight_decay=5e-4)


def presets(fallback: Preset, **more: Preset) -> Mapping[str, Preset]:
    """Return presets by data set: digits on two cores, ``fallback`` for CIFAR-10 and all else, ``more`` by name."""
    return {"digits": DIGITS, "cifar10": fallback, "*": fallback, **more}
