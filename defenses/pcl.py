"""PCL, prototype conformity loss (papers.md 7): learnable class centers at two depths pull features or push them away.

The original reads ResNet-110's pooled last stage and a linear layer of 1024 behind it; here the two depths are the
pooled maps of the backbone's last two slots (reconstruction). Features pass through unchanged, so the centers act in
training alone; each depth's nearest-center scores are declared as a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.inner import evaluating
from arena.specs import Value
from arena.stages import Adversary, Context, Stage
from arena.surface import Head, Surface
from arena.threat import Threat

from .placement import last

#: Rates of the two kinds of centers in the original code.
CENTER_RATES = {"near": 0.5, "far": 1e-4}
#: Batch-wise radii of the original adversarial variant, as parts of its 8/255.
DRAWN = (0.02 * 255 / 8, 0.05 * 255 / 8)


class Scores(nn.Module):
    """Score features (N, D) by nearness to the centers (K, D): -||f - c_k||^2, (N, K)."""

    def forward(self, features: Tensor, centers: Tensor) -> Tensor:
        return -distances(features, centers)


class Centers(nn.Module):
    """Hand a map (N, C, H, W) through; hold centers for its pooled channels: ``near`` to pull to, ``far`` to push from.

    Both start as N(0, 1). They are separate parameters, trained at rates of their own.
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.near = nn.Parameter(torch.randn(n_classes, channels))
        self.far = nn.Parameter(torch.randn(n_classes, channels))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.scores = Scores()

    def forward(self, a: Tensor) -> Tensor:
        self.scores(self.pooled(a), self.near)
        return a


def distances(features: Tensor, centers: Tensor) -> Tensor:
    """Return squared distances (N, K) of features (N, D) to centers (K, D)."""
    return (features[:, None] - centers[None]).square().sum(2)


def proximity(features: Tensor, centers: Tensor, y: Tensor) -> Tensor:
    """Return the mean over rows of ||f - c_y||^2."""
    return (features - centers[y]).square().sum(1).mean()


def contrast(features: Tensor, centers: Tensor, y: Tensor) -> Tensor:
    """Return the mean over rows and wrong classes k of ||f - c_k||^2."""
    wrong = 1 - F.one_hot(y, len(centers)).to(features.dtype)
    return ((distances(features, centers) * wrong).sum(1) / wrong.sum(1).clamp_min(1)).mean()


def weighed(weight: float, term: Tensor, for_centers: Tensor) -> Tensor:
    """Return ``weight * term`` plus gradient, but no value, of ``for_centers``: centers learn at weight 1."""
    return weight * term + (for_centers - for_centers.detach())


@dataclass(frozen=True)
class Conforming(Stage):
    """CE + sum over depths of prox * proximity - contrast * contrast term; each kind of center has its own optimizer.

    Features get the weighted gradient; the centers' gradient is divided by the term's weight, as in the original code.
    """

    prox: float = 1.0
    contrast: float = 1e-4
    attacked: bool = False
    """On PGD images (climbing the cross-entropy of the logits) instead of natural ones."""
    radius: str = "fixed"
    """``fixed``: the threat model's eps; ``drawn``: each batch its own, from 0.64 to 1.6 of it."""
    start_from: str | None = "rt"

    @property
    def adversarial(self) -> bool:
        """Whether there is an inner attack."""
        return self.attacked

    def optimizers(self, model: nn.Module, ctx: Context) -> list[torch.optim.Optimizer]:
        """Make three SGDs: the network at the preset's rate, near centers at 0.5, far centers at 0.0001."""
        p, held = ctx.preset, depths(model)
        mine = {id(q) for d in held for q in d.parameters()}
        net = [q for q in model.parameters() if id(q) not in mine]
        made: list[torch.optim.Optimizer] = [
            torch.optim.SGD(net, lr=p.lr, momentum=p.momentum, weight_decay=p.weight_decay)
        ]
        for kind, rate in CENTER_RATES.items():
            made.append(torch.optim.SGD([getattr(d, kind) for d in held], lr=rate))
        return made

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return PGD from a uniform start on the cross-entropy of the logits, in eval mode."""
        if not self.attacked:
            return None

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            threat = ctx.threat
            if self.radius == "drawn":
                part = torch.rand((), generator=ctx.generator, device=x.device)
                factor = DRAWN[0] + (DRAWN[1] - DRAWN[0]) * float(part)
                threat = Threat(threat.norm, repr(min(threat.radius * factor, 1.0 if threat.norm == "Linf" else inf)))
            with evaluating(model):
                return ctx.climb(
                    lambda point: F.cross_entropy(ctx.read(point).logits, y, reduction="none"), x, threat=threat
                )

        return attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss on the natural or the attacked images; logs the means of the three terms."""
        held = depths(model)
        seen: list[Tensor] = []
        handles = [d.pooled.register_forward_hook(lambda _m, _i, out: seen.append(out)) for d in held]
        try:
            logits = ctx.read(x if ctx.x_adv is None else ctx.x_adv).logits
        finally:
            for handle in handles:
                handle.remove()
        task = F.cross_entropy(logits, y)
        loss, near, far = task, torch.zeros_like(task), torch.zeros_like(task)
        for d, f in zip(held, seen, strict=True):
            pull, push = proximity(f, d.near.detach(), y), contrast(f, d.far.detach(), y)
            loss = loss + weighed(self.prox, pull, proximity(f.detach(), d.near, y))
            loss = loss + weighed(-self.contrast, push, -contrast(f.detach(), d.far, y))
            near, far = near + pull.detach(), far + push.detach()
        return loss, {"task": task.detach(), "near": near, "far": far}


def depths(model: nn.Module) -> list[Centers]:
    """Return the model's ``Centers`` in the order of registration, which is that of the slots."""
    return [m for m in model.modules() if isinstance(m, Centers)]


def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Place centers in each of the backbone's last two slots.

    Raises:
        ArenaError: the backbone has fewer than two slots.
    """
    where = last(backbone, dataset, "pcl", 2)
    shapes = slot_shapes(backbone, dataset.shape, tuple(where))
    return place(backbone, {slot: Centers(shapes[slot][0], dataset.n_classes) for slot in where})


def surface(model: nn.Module) -> Surface:
    """Declare the nearest-center scores of each depth as a head."""
    paths = [path for path, m in model.named_modules() if isinstance(m, Centers)]
    return Surface(heads={f"near{i}": Head(f"{path}.scores") for i, path in enumerate(paths, start=1)})


def rt(prox: Value = 1.0, contrast: Value = 1e-4, start: Value = "rt", **options: Value) -> Sequence[Stage]:
    """PCL on natural images, from a network trained with cross-entropy."""
    stage = Conforming(float(prox), float(contrast))
    return [replace(stage, start_from=None if start == "none" else str(start))]


def sat(
    prox: Value = 1.0, contrast: Value = 1e-5, start: Value = "rt", radius: Value = "fixed", **options: Value
) -> Sequence[Stage]:
    """PCL on PGD images, from a network trained with cross-entropy."""
    stage = Conforming(float(prox), float(contrast), attacked=True, radius=str(radius))
    return [replace(stage, start_from=None if start == "none" else str(start))]
