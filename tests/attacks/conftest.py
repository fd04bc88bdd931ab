"""Opponents with known answers and a short way to drive an attack over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arena.attack import IteratedAttack, Setup
from arena.engine import Outcome, run_iterated
from arena.plugins import registry
from arena.rng import Stream
from arena.selection import Select
from arena.specs import complete, load
from arena.surface import Gate, Head, Knob, Selection, Surface
from arena.target import Target
from arena.threat import Threat


class Curved(nn.Module):
    """A small smooth network with one auxiliary head, random weights."""

    def __init__(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(shape[0], 8, 3, padding=1)
        self.early = nn.Linear(8, classes)
        self.last = nn.Linear(8 * shape[1] * shape[2], classes)
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(2 * self.conv(x - 0.5))
        self.early(hidden.mean((2, 3)))
        return self.last(hidden.flatten(1)) * 3


HEADED = Surface(heads={"early": Head("early")})


class Rich(nn.Module):
    """A small smooth network with a head, a mask of its two choices, a gate between two ways, a knob; random."""

    def __init__(self, shape: tuple[int, int, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(shape[0], 8, 3, padding=1)
        self.early = nn.Linear(8, classes)
        self.select, self.second = Select(), Select()
        self.gate = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0))
        self.one, self.two = nn.Linear(8, classes), nn.Linear(8, classes)
        self.tau = 0.5
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(2 * self.conv(x - 0.5)).mean((2, 3))
        scores = self.early(hidden)
        mask = self.select(scores, self.early.weight)
        rest = scores.masked_fill(nn.functional.one_hot(scores.argmax(1), scores.shape[1]).bool(), -torch.inf)
        hidden = hidden * (1 + mask + 0.5 * self.second(rest, self.early.weight))
        w = self.gate(hidden).unsqueeze(1)
        return torch.tanh((w * self.one(hidden) + (1 - w) * self.two(hidden)) / self.tau)


RICH = Surface(
    heads={"early": Head("early")},
    gates={"gate": Gate("gate")},
    selections={
        "mask": Selection("select", scores="early"),
        "second": Selection("second", scores="early", rank=2),
    },
    knobs={"tau": Knob("", "tau", values=(3.0,))},
)


def flat(shape: tuple[int, int, int], classes: int, seed: int = 0) -> nn.Sequential:
    """A linear model with random weights."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(shape[0] * shape[1] * shape[2], classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(torch.randn(classes, generator=generator) * 0.1)
    return nn.Sequential(nn.Flatten(), layer)


@dataclass
class Fight:
    """One attack against one model on fixed rows, labels being the model's own answers."""

    attack: IteratedAttack
    target: Target
    threat: Threat
    x: Tensor
    y: Tensor
    index: Tensor

    def run(self, rows: Tensor | None = None, **keywords: Any) -> Outcome:
        """Let the engine drive the attack over all or some rows."""
        rows = torch.arange(len(self.y)) if rows is None else rows
        return run_iterated(self.attack, self.target, self.x[rows], self.y[rows], self.index[rows], **keywords)

    def broken(self, outcome: Outcome) -> Tensor:
        """Tell which returned points the model misclassifies, bool (N,)."""
        return self.target.logits(outcome.x_adv).argmax(1) != self.y

    def margins(self, outcome: Outcome) -> Tensor:
        """Return max_{k != y} z_k - z_y at the returned points, (N,)."""
        z = self.target.logits(outcome.x_adv)
        return z.scatter(1, self.y[:, None], -torch.inf).amax(1) - z.gather(1, self.y[:, None]).squeeze(1)


@pytest.fixture
def fight():
    """Make a ``Fight``: ``fight("pgd", model, shape=..., eps=..., steps=5)``."""

    def make(
        name: str,
        model: nn.Module,
        *,
        shape: tuple[int, int, int] = (1, 8, 8),
        n: int = 12,
        norm: str = "Linf",
        eps: str = "0.05",
        surface: Surface | None = None,
        batch_size: int = 64,
        low: float = 0.0,
        high: float = 1.0,
        sources: dict[str, nn.Module] | None = None,
        **options: Any,
    ) -> Fight:
        threat = Threat.parse(norm, eps)
        surface = surface or Surface()
        x = low + (high - low) * torch.rand(n, *shape, generator=torch.Generator().manual_seed(3))
        target = Target(model, surface, 0, batch_size)
        logits = target.logits(x)
        target.n_classes = logits.shape[1]
        spec = registry().get("attack", name).spec
        stream = Stream.of(0, name)
        target.sources.update(sources or {})
        given = {"lend": lambda name: None} if sources else {}
        setup = Setup(threat, target.n_classes, surface, shape, stream, **given)
        attack = load(spec.iterate)(setup, **complete(name, spec.options, options))
        return Fight(attack, target, threat, x, logits.argmax(1), torch.arange(n) + 100)

    return make


@pytest.fixture
def models():
    """Return the opponents: ``flat`` (linear), ``curved`` (smooth, one head), ``rich`` (all kinds) and surfaces."""

    class Models:
        rich = staticmethod(Rich)
        full = RICH
        linear = staticmethod(flat)
        curved = staticmethod(Curved)
        headed = HEADED

    return Models


@pytest.fixture
def worst_case():
    """Return a function giving the exact largest margin of a linear model over ball and box, (N,).

    For L2 the images must be so far from the box's faces that the box does not bind.
    """

    def exact(fight: Fight) -> Tensor:
        layer, x = fight.target.model[1], fight.x.flatten(1)
        best = torch.full((len(fight.y),), -torch.inf)
        for k in range(layer.out_features):
            w = layer.weight[k] - layer.weight[fight.y]
            if fight.threat.norm == "Linf":
                lo, hi = (x - fight.threat.radius).clamp(0, 1), (x + fight.threat.radius).clamp(0, 1)
                reach = torch.where(w > 0, hi, lo)
            else:
                reach = x + fight.threat.radius * w / w.norm(dim=1, keepdim=True).clamp_min(1e-12)
                assert ((reach >= 0) & (reach <= 1)).all()
            value = (w * reach).sum(1) + layer.bias[k] - layer.bias[fight.y]
            best = best.maximum(value.where(fight.y != k, -torch.inf))
        return best

    return exact
