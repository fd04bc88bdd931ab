"""AFA, adaptive feature alignment: K batch norms in the place of each one, and a gate that mixes two of them.

A reconstruction: no official code was found. Branch k of every norm is trained on images attacked at strength k, all
other weights are shared (stage I). At test time each norm is x^ = W_0 BN_0(x) + (1 - W_0) BN_{K-1}(x), where the weight
generator WG makes one W_0 in (0, 1) an image: near 1 for clean images, near 0 for attacked ones (stage II trains WG
alone). Each branch keeps its own affine part. The stages are in ``afa_stages``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.specs import Value, text
from arena.surface import Gate, Knob, Surface

from .conversion import norms, replace

__all__ = ["Afa", "WeightGenerator", "apply", "build", "gates", "surface", "through"]


class Switch:
    """What the norms of one model share during a forward pass."""

    def __init__(self) -> None:
        self.branch: int | None = None
        """The branch to use; None: the mixture."""
        self.weight: Tensor | None = None
        """The newest W_0, (N,)."""


class WeightGenerator(nn.Module):
    """Make W_0 (N,) of a feature map (N, C, H, W): two conv-BN-ReLU, average pool, two linear layers, sigmoid."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside in (channels, hidden):
            layers += [nn.Conv2d(inside, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.first = nn.Linear(hidden, hidden)
        self.second = nn.Linear(hidden, 1)
        self.constant: float | None = None

    def forward(self, a: Tensor) -> Tensor:
        if self.constant is not None:
            return a.new_full((len(a),), self.constant)
        pooled = self.features(a).mean((2, 3))
        return torch.sigmoid(self.second(F.relu(self.first(pooled)))).squeeze(1)


class BranchNorm(nn.Module):
    """K copies of one batch norm; forward uses the switch's branch, or mixes the first and the last by W_0.

    A norm with a weight generator computes W_0 from its own input and leaves it in the switch for the norms after it.
    """

    def __init__(self, norm: _BatchNorm, k: int, switch: Switch, generator: WeightGenerator | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(copy.deepcopy(norm) for _ in range(k))
        self.gate = generator
        self.switch = switch

    def forward(self, a: Tensor) -> Tensor:
        if self.switch.branch is not None:
            found: Tensor = self.branches[self.switch.branch](a)
            return found
        if self.gate is not None:
            self.switch.weight = self.gate(a)
        assert self.switch.weight is not None, "the first norm holds a weight generator"
        w = self.switch.weight.view(-1, *[1] * (a.dim() - 1))
        mixed: Tensor = w * self.branches[0](a) + (1 - w) * self.branches[-1](a)
        return mixed


class Afa(nn.Module):
    """A converted backbone; forgets W_0 after each pass, so that copies of the model hold no graph."""

    def __init__(self, body: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.body = body
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        try:
            logits: Tensor = self.body(x)
        finally:
            self.switch.weight = None
        return logits


def build(
    backbone: nn.Module,
    dataset: DatasetInfo,
    k: Value = 5,
    gate: Value = "single",
    hidden: Value = 64,
    **options: Value,
) -> nn.Module:
    """Give every batch norm ``k`` branches, and a weight generator to the first of them (``single``) or to ``each``.

    The first norm's input is the stem convolution's output, so every norm of the network is mixed. A norm on vectors
    has no map to look at and takes the W_0 of the norm before it.

    Raises:
        ArenaError: the backbone has no batch norm, or the first one is not on a feature map.
    """
    switch, found = Switch(), norms("afa", backbone, dataset)
    for i, (path, norm) in enumerate(found.items()):
        on_map = isinstance(norm, nn.BatchNorm2d)
        if i == 0 and not on_map:
            raise ArenaError(f"afa: the first batch norm of backbone '{dataset.backbone}' is not on a feature map")
        wanted = on_map and (i == 0 or text(gate) == "each")
        generator = WeightGenerator(norm.num_features, int(hidden)) if wanted else None
        replace(backbone, path, BranchNorm(norm, int(k), switch, generator))
    return Afa(backbone, switch)


def surface(model: nn.Module) -> Surface:
    """Declare W_0: gates that are 1 on clean images, and a constant in their place as a knob."""
    paths = [path for path, module in model.named_modules() if isinstance(module, WeightGenerator)]
    names = ["w0"] if len(paths) == 1 else [f"w0_{i}" for i in range(1, len(paths) + 1)]
    return Surface(
        gates={name: Gate(path, clean=1) for name, path in zip(names, paths, strict=True)},
        knobs={
            name: Knob(path, "constant", kind="constant", values=(0.0, 0.25, 0.5, 0.75, 1.0))
            for name, path in zip(names, paths, strict=True)
        },
    )


def apply(model: nn.Module, w0: Value = -1.0) -> None:
    """Hold every gate at ``w0`` in [0, 1]; -1 leaves the gates to decide.

    Raises:
        ArenaError: a value between -1 and 0.
    """
    value = float(w0)
    if -1 < value < 0:
        raise ArenaError(f"afa: eval option 'w0': expected 0 to 1, or -1 for the trained gate, got '{value:g}'")
    for module in gates(model):
        module.constant = None if value == -1 else value


def gates(model: nn.Module) -> list[WeightGenerator]:
    """Return the model's weight generators, in forward order of their norms as far as these are registered so."""
    return [m for m in model.modules() if isinstance(m, WeightGenerator)]


@contextmanager
def through(model: nn.Module, branch: int | None) -> Iterator[None]:
    """Send the passes inside through one branch of every norm; None: through the gate, as at test time."""
    (switch,) = (m.switch for m in model.modules() if isinstance(m, Afa))
    before, switch.branch = switch.branch, branch
    try:
        yield
    finally:
        switch.branch = before
