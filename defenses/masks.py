"""The class-conditional mask that FGAA, EWAS, CAS, SAA and CSAA share: a linear classifier whose rows are masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.selection import Mode, Select, choosing
from arena.surface import Head, Selection, Surface

#: What a mask weighs: every element of the map, whole channels, or positions across channels.
OVER = ("elements", "channels", "positions")


class ClassMask(nn.Module):
    """Score the map (N, C, H, W) by a linear layer and multiply it with the weight row of one class.

    ``over`` elements (FGAA, EWAS) the layer sees the flattened map and a row is (C, H, W); over channels (CAS) it sees
    the mean over positions, a row is (C, 1, 1); over positions (SAA) the mean over channels, a row is (1, H, W).

    No normalisation, nothing detached: the weight gets gradient as classifier and as mask. The class is the layer's own
    argmax, in training the true label (``Select``). A convolution whose kernel is the whole map, as FGAA writes it, is
    this layer: same parameters, same initial distribution (uniform, bound 1 / sqrt(C H W)).
    """

    def __init__(self, shape: tuple[int, int, int], n_classes: int, bias: bool, over: str = "elements") -> None:
        super().__init__()
        c, h, w = shape
        if over not in OVER:
            raise ValueError(f"over '{over}': expected {', '.join(OVER)}")
        self.over = over
        self.shape = {"elements": shape, "channels": (c, 1, 1), "positions": (1, h, w)}[over]
        self.scores = nn.Linear(math.prod(self.shape), n_classes, bias=bias)
        self.select = Select()

    def forward(self, a: Tensor) -> Tensor:
        seen = a
        if self.over == "channels":
            seen = a.mean((2, 3))
        elif self.over == "positions":
            seen = a.mean(1)
        scores = self.scores(seen.flatten(1))
        mask = self.select(scores, self.scores.weight.view(-1, *self.shape))
        return a * mask


def fit_masks(
    backbone: nn.Module,
    dataset: DatasetInfo,
    slots: Sequence[str],
    make: Callable[[tuple[int, int, int]], nn.Module],
) -> nn.Module:
    """Put ``make(shape of the slot)`` in each slot and return the backbone, changed in place.

    Wide residual networks draw their own initial weights, masks included (papers.md 2.1, 3.1): a mask without bias is a
    convolution there, N(0, 2 / (H W K)); biases start at zero.
    """
    shapes = slot_shapes(backbone, dataset.shape, tuple(slots))
    modules = {slot: make(shapes[slot]) for slot in slots}
    if dataset.backbone.startswith("wrn"):
        for module in [m for made in modules.values() for m in made.modules() if isinstance(m, ClassMask)]:
            if module.scores.bias is not None:
                nn.init.zeros_(module.scores.bias)
            else:
                _, h, w = module.shape
                nn.init.normal_(module.scores.weight, 0.0, math.sqrt(2 / (h * w * dataset.n_classes)))
    return place(backbone, modules)


def surface(model: nn.Module) -> Surface:
    """Declare each mask's scores as a head and its choice as a selection, in forward order."""
    paths = [path for path, module in model.named_modules() if isinstance(module, ClassMask)]
    return Surface(
        heads={f"head{i}": Head(f"{path}.scores") for i, path in enumerate(paths, start=1)},
        selections={
            f"mask{i}": Selection(f"{path}.select", scores=f"head{i}") for i, path in enumerate(paths, start=1)
        },
        random=False,
    )


def follow(model: nn.Module, index: str = "own") -> None:
    """Let masks be chosen at test time by their ``own`` argmax or by the ``main`` logits' (FGAA's Algorithm 1).

    The main logits lie downstream of the masks, so ``main`` takes two passes: the first by own argmax, the second with
    all masks of the class that the first answers. That reading is arena's; the paper does not say how. Heads are those
    of the first pass. A ``Select`` that an attack softens or forces keeps its mode in both.
    """
    if index == "main":
        model.register_forward_hook(_again)


def _again(model: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
    if model.training:
        return logits
    chosen = Mode("forced", classes=logits.detach().argmax(1))
    hard = {path: m for path, m in model.named_modules() if isinstance(m, Select) and m.mode.kind == "hard"}
    with choosing(hard, dict.fromkeys(hard, chosen)):
        found: Tensor = model.forward(*inputs)
    return found
