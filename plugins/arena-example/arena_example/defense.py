"""``recall``: a module that guesses the class early and scales the channels by its guess."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.specs import Value
from arena.surface import Head, Surface
from arena.training import Stage, Usual


class Recall(nn.Module):
    """(N, C, H, W) -> the same, channel c scaled by 2 sigmoid(sum_k p_k gate_kc), p the auxiliary head's belief."""

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, n_classes)
        self.gate = nn.Linear(n_classes, channels)

    def forward(self, x: Tensor) -> Tensor:
        belief = torch.softmax(self.head(x.mean((2, 3))), dim=1)
        scale: Tensor = 2 * torch.sigmoid(self.gate(belief))
        return x * scale[:, :, None, None]


def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Place the module in the backbone's last slot."""
    shapes = slot_shapes(backbone, dataset.shape, dataset.slots)
    last = list(shapes)[-1]
    return place(backbone, {last: Recall(shapes[last][0], dataset.n_classes)})


def surface(model: nn.Module) -> Surface:
    """Declare the auxiliary head: an honest surface is what lets attackers try it."""
    (path,) = (path for path, module in model.named_modules() if isinstance(module, Recall))
    return Surface(heads={"recall": Head(f"{path}.head")})


def recipe(lam: Value = 0.5, **options: Value) -> Sequence[Stage]:
    """Cross-entropy on natural images: of the logits, plus ``lam`` times that of the head."""
    return [Usual("rt", lam=float(lam))]
