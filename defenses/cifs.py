"""CIFS, channel-wise importance-based feature selection (Yan et al., ICML 2021), in FGAA's places.

A probe network classifies the features; a channel's weight is the softmax of how much the two top scores rise with it.
The relevance is computed from a detached copy, so the main loss reaches the features past the mask, never through it.
The attacker's knob ``detach`` undoes that on the search copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.selection import Select
from arena.specs import Value, canonical
from arena.surface import Head, Knob, Reading, Selection, Surface
from arena.training import Stage, Usual

from .placement import late

#: Hidden units of a probe, and the sharpness of its softplus.
HIDDEN, SHARPNESS = 128, 5.0


class ByRank(Select):
    """A choice by rank, in training too: labels pass it by."""

    def forward(self, scores: Tensor, table: Tensor) -> Tensor:
        self.labels = None
        return super().forward(scores, table)


class ImportanceMask(nn.Module):
    """Weigh channels of a map (N, C, H, W) by ``scale`` times the softmax of their relevance.

    With z(v) the probe's scores of the channel means v, the relevance is ds/dv of s = z_first + z_second: first is the
    top score's class, in training the true one; second is the class of rank two, even where that is the true one. As
    the probe sees means, ds/dv is the sum over positions of the derivative by the map. It is written out, not
    differentiated, so it works without gradients, and its graph reaches the probe's weights.
    """

    def __init__(self, channels: int, n_classes: int, hidden: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.probe: nn.Module = nn.Linear(channels, n_classes)
        if hidden:
            self.probe = nn.Sequential(
                nn.Linear(channels, hidden), nn.Softplus(beta=SHARPNESS), nn.Linear(hidden, n_classes)
            )
        self.scale = scale
        self.detach = True
        self.first = Select()
        self.second = ByRank()

    def forward(self, a: Tensor) -> Tensor:
        means = a.mean((2, 3))
        scores = self.probe(means)
        if self.detach:
            means, seen = means.detach(), scores.detach()
        else:
            seen = scores
        unit = torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
        top = F.one_hot(seen.argmax(1), seen.shape[1]).bool()
        chosen = self.first(seen, unit) + self.second(seen.masked_fill(top, -torch.inf), unit)
        mask = self.scale * F.softmax(self.relevance(means, chosen), dim=1)
        return a * mask[:, :, None, None]

    def relevance(self, means: Tensor, chosen: Tensor) -> Tensor:
        """Return d(sum of ``chosen`` (N, K) times the probe's scores)/d ``means`` (N, C), ``chosen`` held fixed."""
        if isinstance(self.probe, nn.Sequential):
            first, _, last = self.probe
            assert isinstance(first, nn.Linear)
            assert isinstance(last, nn.Linear)
            slope = torch.sigmoid(SHARPNESS * first(means))
            return (chosen @ last.weight * slope) @ first.weight
        assert isinstance(self.probe, nn.Linear)
        return chosen @ self.probe.weight


def build(
    backbone: nn.Module, dataset: DatasetInfo, slots: Value = "auto", scale: Value = 1.0, **options: Value
) -> nn.Module:
    """Place a mask in each of ``slots`` (``placement.late``); the last probe is linear, the others have a hidden layer.

    Raises:
        ArenaError: no such slot, or the backbone has fewer than two.
    """
    where = late(backbone, dataset, "cifs", slots)
    shapes = slot_shapes(backbone, dataset.shape, tuple(where))
    modules: dict[str, nn.Module] = {
        slot: ImportanceMask(
            shapes[slot][0], dataset.n_classes, hidden=0 if slot == where[-1] else HIDDEN, scale=float(scale)
        )
        for slot in where
    }
    return place(backbone, modules)


def surface(model: nn.Module) -> Surface:
    """Declare the probes as heads, both choices of each mask, and the detached copy as a knob."""
    paths = [path for path, module in model.named_modules() if isinstance(module, ImportanceMask)]
    selections = {}
    for i, path in enumerate(paths, start=1):
        selections[f"first{i}"] = Selection(f"{path}.first", scores=f"probe{i}")
        selections[f"second{i}"] = Selection(f"{path}.second", scores=f"probe{i}", rank=2)
    return Surface(
        heads={f"probe{i}": Head(f"{path}.probe") for i, path in enumerate(paths, start=1)},
        selections=selections,
        knobs={f"detach{i}": Knob(path, "detach", "detach", (False,)) for i, path in enumerate(paths, start=1)},
    )


@dataclass(frozen=True)
class Joint(Usual):
    """The usual loss times 3 / (lam + 1): CIFS keeps the sum of the weights at 3."""

    def combine(
        self, natural: Reading | None, adversarial: Reading | None, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the terms of logits and probes, scaled."""
        loss, log = super().combine(natural, adversarial, y)
        return loss * 3 / (self.lam + 1), log


def rt(lam: Value = 2.0, labels: Value = "true", **options: Value) -> Sequence[Stage]:
    """Regular training by the joint loss."""
    return [Joint("rt", lam=float(lam), labels=str(labels))]


def sat(lam: Value = 2.0, labels: Value = "true", warm: Value = False, **options: Value) -> Sequence[Stage]:
    """Train adversarially by the joint loss, inside and out; ``warm``: start from the model that ``rt`` trains."""
    same: dict[str, Value] = {"lam": lam, "labels": labels}
    same |= {k: options[k] for k in ("slots", "scale") if k in options}
    start = canonical("cifs_rt", same) if warm else None
    return [Joint("sat", lam=float(lam), labels=str(labels), start_from=start)]
