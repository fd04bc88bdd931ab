"""Stages: what a recipe is made of, and the usual one, which trains main logits and weighted heads alike.

Losses are written once for one score vector; a defense with heads pays the same loss on each head, weighted. Heads are
read through ``arena.surface.Reader``, so a defense's ``forward`` returns logits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.inner import ascend, evaluating, step_of
from arena.selection import supervise
from arena.specs import Preset
from arena.surface import Reading, Surface
from arena.threat import Threat

#: (model, x, y) -> x_adv; called inside a training step.
Adversary = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """What a stage may know besides model and batch."""

    preset: Preset
    threat: Threat
    """The threat model trained against."""
    n_classes: int
    surface: Surface
    read: Callable[[Tensor], Reading]
    """Runs the model on (N, C, H, W) and returns logits, heads and gates."""
    generator: torch.Generator
    """Random numbers of this epoch, on the training device."""
    epoch: int = 0
    """Epoch within the stage, from 0."""
    x_adv: Tensor | None = field(default=None, repr=False)
    """The batch's adversarial images, where the stage has an adversary."""

    def climb(
        self,
        objective: Callable[[Tensor], Tensor],
        x: Tensor,
        start: str = "uniform",
        threat: Threat | None = None,
    ) -> Tensor:
        """Raise ``objective`` (points (N, C, H, W) -> values (N,)) by the preset's steps within ``threat``, by default
        the one trained against (``arena.inner.ascend``). The caller puts the model in eval mode."""
        within = threat or self.threat
        return ascend(
            objective,
            x,
            within,
            steps=self.preset.steps,
            step=step_of(within, self.preset.step_size),
            start=start,
            generator=self.generator,
        )


class Stage(Protocol):
    """One stage of a recipe. The loop (``arena.training.fit``) owns batches, schedule, checkpoints and resume.

    A class that derives from it says only what is different: by default all parameters are trained, by one SGD, for the
    preset's epochs, without an inner attack.
    """

    @property
    def start_from(self) -> str | None:
        """``None``: the model as it stands (fresh, or after the previous stage); else a defense's text whose weights
        are copied wherever name and shape agree."""
        return None

    @property
    def adversarial(self) -> bool:
        """Whether the stage trains against a threat model, which is then part of the model's training key."""
        return False

    def epochs(self, preset: Preset) -> int:
        """Return the stage's number of epochs."""
        return preset.epochs

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters this stage may change; all others are frozen."""
        return model.parameters()

    def optimizers(self, model: nn.Module, ctx: Context) -> list[torch.optim.Optimizer]:
        """Make the optimizers; the loop scales their rates by the preset's schedule."""
        p = ctx.preset
        return [torch.optim.SGD(self.trainable(model), lr=p.lr, momentum=p.momentum, weight_decay=p.weight_decay)]

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return the inner attack, or None; it runs inside a training step with the model in train mode."""
        return None

    @property
    def second_order(self) -> bool:
        """Whether the loss differentiates gradients, which takes fp32."""
        return False

    def score(self, entry: Mapping[str, Any]) -> tuple[float, ...]:
        """Return what the best epoch is chosen by, larger is better, of an epoch's losses and held-out accuracies."""
        return (entry.get("pgd", 0.0), entry["natural"])

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to lower and detached scalars to log. Runs inside a training step, in train mode; labels
        reach the model's ``Select`` only where the stage says ``with supervise(model, y)``."""
        ...


# -- losses on one score vector; z, z_adv are (N, K), natural and adversarial -----------------------------------------


def divergence(z: Tensor, z_adv: Tensor) -> Tensor:
    """Return KL(softmax z || softmax z_adv) per row, (N,); neither side is detached (papers.md 7)."""
    log_p, log_q = F.log_softmax(z, 1), F.log_softmax(z_adv, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def boosted_ce(z: Tensor, y: Tensor) -> Tensor:
    """Return MART's boosted cross-entropy (Wang et al., ICLR 2020), mean over rows.

    CE(z, y) - log(1.0001 - max_{k != y} softmax(z)_k + 1e-12).
    """
    p = F.softmax(z, 1)
    wrong = p.scatter(1, y.view(-1, 1), 0.0).amax(1)
    return F.cross_entropy(z, y) - (1.0001 - wrong + 1e-12).log().mean()


def trades(z: Tensor, z_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """Return the TRADES loss (Zhang et al., ICML 2019), mean over rows: CE(z, y) + beta KL(p || p_adv)."""
    return F.cross_entropy(z, y) + beta * divergence(z, z_adv).mean()


def mart(z: Tensor, z_adv: Tensor, y: Tensor, beta: float, confidence: Tensor) -> Tensor:
    """Return the MART loss, mean over rows: BCE(z_adv, y) + beta KL(p || p_adv) (1.0000001 - confidence).

    ``confidence`` (N,): natural probability of the true class, by the main logits or by the head itself.
    """
    return boosted_ce(z_adv, y) + beta * (divergence(z, z_adv) * (1.0000001 - confidence)).mean()


def probability(z: Tensor, y: Tensor) -> Tensor:
    """Return softmax(z)_y, (N,)."""
    return F.softmax(z, 1).gather(1, y.view(-1, 1)).squeeze(1)


@dataclass(frozen=True)
class Usual(Stage):
    """The usual stage: term(logits) + lam * mean over heads of term(head), term by ``recipe``.

    Natural and adversarial batches are separate forward passes.
    """

    recipe: str
    """``rt`` (natural), ``sat``, ``trades`` or ``mart``."""
    lam: float = 0.0
    """Weight of the heads' mean loss."""
    beta: float = 0.0
    """Weight of the divergence in TRADES and MART."""
    inner: str = "full"
    """Inner attack climbs ``full`` (logits and weighted heads) or ``aux`` (heads only)."""
    labels: str = "true"
    """Masks in the outer loss by the ``true`` label or the module's ``own`` argmax."""
    mask: str = "argmax"
    """Masks in the inner attack by ``argmax`` or by the true ``label``."""
    weight: str = "main"
    """MART's confidence in a head's term: of the ``main`` logits (FGAA, CAS) or the head's ``own`` (EWAS)."""
    start_from: str | None = None

    @property
    def adversarial(self) -> bool:
        """Whether there is an inner attack."""
        return self.recipe != "rt"

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return projected gradient ascent, in eval mode, on this recipe's objective (papers.md 2.3, 3.2, 7)."""
        if not self.adversarial:
            return None
        start = "uniform" if self.recipe == "sat" else "normal"

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with evaluating(model), self._labels(model, y, self.mask == "label"):
                natural = None
                if self.recipe == "trades":
                    with torch.no_grad():
                        natural = ctx.read(x)
                return ctx.climb(lambda point: self.objective(ctx.read(point), natural, y), x, start)

        return attack

    def objective(self, seen: Reading, natural: Reading | None, y: Tensor) -> Tensor:
        """Return what the inner attack climbs, (N,): cross-entropy, or for TRADES the divergence from ``natural``."""

        def term(name: str) -> Tensor:
            z = seen.heads[name] if name else seen.logits
            if natural is None:
                return F.cross_entropy(z, y, reduction="none")
            return divergence(natural.heads[name] if name else natural.logits, z)

        heads = [term(name) for name in seen.heads]
        if heads and self.inner == "aux":
            return torch.stack(heads).mean(0)
        main = term("")
        return main + self.lam * torch.stack(heads).mean(0) if heads and self.lam else main

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the outer loss; natural and adversarial images each get their own pass."""
        with self._labels(model, y, self.labels == "true"):
            natural = ctx.read(x) if self.recipe != "sat" else None
            seen = ctx.read(ctx.x_adv) if ctx.x_adv is not None else None
        return self.combine(natural, seen, y)

    def combine(
        self, natural: Reading | None, adversarial: Reading | None, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the terms of logits and heads. Pure: a function of the two readings and the labels."""
        some = natural or adversarial
        assert some is not None
        main = self._term(natural, adversarial, "", y)
        log = {"main": main.detach()}
        if not some.heads:
            return main, log
        heads = torch.stack([self._term(natural, adversarial, name, y) for name in some.heads]).mean()
        log["heads"] = heads.detach()
        return main + self.lam * heads, log

    def _term(self, natural: Reading | None, adversarial: Reading | None, name: str, y: Tensor) -> Tensor:
        def scores(reading: Reading | None) -> Tensor:
            assert reading is not None, f"recipe '{self.recipe}' lacks a forward pass"
            return reading.heads[name] if name else reading.logits

        if self.recipe == "rt":
            return F.cross_entropy(scores(natural), y)
        if self.recipe == "sat":
            return F.cross_entropy(scores(adversarial), y)
        if self.recipe == "trades":
            return trades(scores(natural), scores(adversarial), y, self.beta)
        if self.recipe == "mart":
            assert natural is not None
            judge = scores(natural) if self.weight == "own" else natural.logits
            return mart(scores(natural), scores(adversarial), y, self.beta, probability(judge, y))
        raise ValueError(f"recipe '{self.recipe}': expected rt, sat, trades or mart")

    @staticmethod
    def _labels(model: nn.Module, y: Tensor, given: bool) -> AbstractContextManager[None]:
        return supervise(model, y) if given else nullcontext()
