"""The class-conditional mask that FGAA and EWAS share: a linear classifier on a feature map whose rows are masks."""

from __future__ import annotations

from torch import Tensor, nn

from arena.backbones import DatasetInfo, slot_shapes
from arena.selection import Select
from arena.surface import Head, Selection, Surface


class ClassMask(nn.Module):
    """Score the map (N, C, H, W) by a linear layer and multiply it with the weight row of one class.

    No normalisation, nothing detached: the weight gets gradient as classifier and as mask. The class is the layer's own
    argmax, in training the true label (``Select``). A convolution whose kernel is the whole map, as FGAA writes it, is
    this layer: same parameters, same initial distribution (uniform, bound 1 / sqrt(C H W)).
    """

    def __init__(self, shape: tuple[int, int, int], n_classes: int, bias: bool) -> None:
        super().__init__()
        c, h, w = shape
        self.shape = shape
        self.scores = nn.Linear(c * h * w, n_classes, bias=bias)
        self.select = Select()

    def forward(self, a: Tensor) -> Tensor:
        scores = self.scores(a.flatten(1))
        mask = self.select(scores, self.scores.weight.view(-1, *self.shape))
        return a * mask


def fitting(backbone: nn.Module, dataset: DatasetInfo, slots: list[str], bias: bool) -> dict[str, nn.Module]:
    """Make a ``ClassMask`` for each slot, of the slot's shape."""
    shapes = slot_shapes(backbone, dataset.shape, tuple(slots))
    return {slot: ClassMask(shapes[slot], dataset.n_classes, bias) for slot in slots}


def surface(model: nn.Module) -> Surface:
    """Declare each mask's scores as a head and its choice as a selection, in forward order."""
    paths = [path for path, module in model.named_modules() if isinstance(module, ClassMask)]
    names = [f"head{i}" for i in range(1, len(paths) + 1)]
    return Surface(
        heads={name: Head(f"{path}.scores") for name, path in zip(names, paths, strict=True)},
        selections={
            f"mask{i}": Selection(f"{path}.select", scores=f"head{i}") for i, path in enumerate(paths, start=1)
        },
        random=False,
    )
