"""How AFA is trained: stage I gives each branch its strength of attack, stage II teaches the gate. A reconstruction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.inner import evaluating
from arena.specs import Preset, Value, text
from arena.stages import Adversary, Context, Stage, divergence, mart, probability, trades
from arena.threat import Threat

from .afa import gates, through
from .iat import draw

#: Stage II has a fifth of stage I's epochs and a tenth of its rate, and drops the rate halfway (20, 0.01 and 10).
SHARE, SLOWER = 5, 10
#: Stage II's rate under short presets without milestones: at a tenth of digits' rate, W_0 was seen to stay at 0.5.
CYCLE_RATE = 0.1


def strengths(k: int) -> list[Fraction]:
    """Return the branches' strengths as shares of eps: 0, 1, 2, 4, 8 eighths for five, else evenly from 0 to 1."""
    if k == 5:
        return [Fraction(n, 8) for n in (0, 1, 2, 4, 8)]
    return [Fraction(n, k - 1) for n in range(k)]


def weaker(threat: Threat, share: Fraction) -> Threat:
    """Return the threat model at a share of its radius."""
    return Threat(threat.norm, str(threat.fraction * share))


@dataclass(frozen=True)
class Branches(Stage):
    """Stage I: per batch one update on the sum over branches, everything but the gates.

    CE(z_0(x), y) + sum over k >= 1 of L_adv, where z_k is the network through branch k and x_k is made through it, at
    strength k. Natural images have strength 0, so wherever L_adv has a natural term, they pass through branch 0:
    sat: CE(z_k(x_k)); trades: CE(z_0(x)) + beta KL(z_0(x) || z_k(x_k)); mart likewise; iat: half the mixup CE of
    natural images, half the mixup CE of x_k.
    """

    recipe: str
    """``sat``, ``trades``, ``mart`` or ``iat``."""
    k: int = 5
    beta: float = 0.0
    decay: float = 0.1
    """Factor on the rate at each milestone."""
    adversarial: bool = True

    def preset(self, preset: Preset) -> Preset:
        """Return the preset with this stage's decay."""
        return replace(preset, decay=self.decay)

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Train all but the gates."""
        frozen = {id(p) for gate in gates(model) for p in gate.parameters()}
        return [p for p in model.parameters() if id(p) not in frozen]

    def adversary(self, ctx: Context) -> Adversary:
        """Return the attack: for each branch from 1 its images, (K - 1) N of them, branch after branch."""
        start = "uniform" if self.recipe in ("sat", "iat") else "normal"

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            made = []
            with evaluating(model):
                with torch.no_grad(), through(model, 0):
                    natural = model(x) if self.recipe == "trades" else None

                def objective(point: Tensor) -> Tensor:
                    z = model(point)
                    return F.cross_entropy(z, y, reduction="none") if natural is None else divergence(natural, z)

                for branch, share in enumerate(strengths(self.k)[1:], start=1):
                    threat = weaker(ctx.threat, share)
                    with through(model, branch):
                        made.append(ctx.climb(objective, x, start, threat))
            return torch.cat(made)

        return attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over branches; one natural pass serves all of them."""
        assert ctx.x_adv is not None
        with through(model, 0):
            natural = model(x)
            mixed = self._mixed(model, x, y, ctx) if self.recipe == "iat" else None
        clean = F.cross_entropy(natural, y)
        total, log = clean, {"clean": clean.detach()}
        for branch, x_adv in enumerate(ctx.x_adv.split(len(x)), start=1):
            with through(model, branch):
                if mixed is not None:
                    term = (mixed + self._mixed(model, x_adv, y, ctx)) / 2
                else:
                    term = self._term(natural, model(x_adv), y)
            total = total + term
            log[f"branch{branch}"] = term.detach()
        return total, log

    def _term(self, z: Tensor, z_adv: Tensor, y: Tensor) -> Tensor:
        if self.recipe == "sat":
            return F.cross_entropy(z_adv, y)
        if self.recipe == "trades":
            return trades(z, z_adv, y, self.beta)
        if self.recipe == "mart":
            return mart(z, z_adv, y, self.beta, probability(z, y))
        raise ValueError(f"recipe '{self.recipe}': expected sat, trades, mart or iat")

    @staticmethod
    def _mixed(model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        mix = draw(len(x), 1.0, ctx.generator)
        return mix.cross_entropy(model(mix.images(x)), y)


@dataclass(frozen=True)
class Weighing(Stage):
    """Stage II: cross-entropy of the gated network on images of mixed strengths; only the gates learn.

    Each image of a batch draws its strength, which only decides how it is attacked: no label says it. All norms but
    the gates' own stand in eval mode, so the branches keep their statistics.
    """

    k: int = 5
    made: str = "gate"
    """Attacks go through the ``gate``, as at test time, or through the ``branch`` of the image's strength."""
    decay: float = 0.1
    """Factor on the rate halfway."""
    adversarial: bool = True

    def preset(self, preset: Preset) -> Preset:
        """Return stage II's settings: a tenth of the rate, dropped halfway; without milestones one cycle to 0.1."""
        if not preset.milestones:
            return replace(preset, lr=CYCLE_RATE)
        halfway = self.epochs(preset) / 2
        return replace(preset, lr=preset.lr / SLOWER, milestones=(halfway,), decay=self.decay)

    def epochs(self, preset: Preset) -> int:
        """Return a fifth of the preset's epochs, at least one if it has any."""
        return max(1, preset.epochs // SHARE) if preset.epochs else 0

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Train the gates."""
        return [p for gate in gates(model) for p in gate.parameters()]

    def adversary(self, ctx: Context) -> Adversary:
        """Return the attack: each image at a strength drawn for it, strength 0 leaving it as it is."""

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            drawn = torch.randint(self.k, (len(x),), generator=ctx.generator, device=x.device)
            made = x.clone()
            with evaluating(model):
                for branch, share in enumerate(strengths(self.k)[1:], start=1):
                    rows = (drawn == branch).nonzero().squeeze(1)
                    if not len(rows):
                        continue

                    def objective(point: Tensor, rows: Tensor = rows) -> Tensor:
                        return F.cross_entropy(model(point), y[rows], reduction="none")

                    with through(model, branch if self.made == "branch" else None):
                        made[rows] = ctx.climb(objective, x[rows], threat=weaker(ctx.threat, share))
            return made

        return attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy through the gate, the gates in train mode and all else in eval mode."""
        assert ctx.x_adv is not None
        with evaluating(model):
            for gate in gates(model):
                gate.train()
            loss = F.cross_entropy(model(ctx.x_adv), y)
        return loss, {"gated": loss.detach()}


def _stages(recipe: str, options: Mapping[str, Value]) -> Sequence[Stage]:
    k, decay = int(options.get("k", 5)), float(options.get("decay", 0.1))
    first = Branches(recipe, k, float(options.get("beta", 0.0)), decay)
    return [first, Weighing(k, text(options.get("made", "gate")), decay)]


def afa_sat(**options: Value) -> Sequence[Stage]:
    """AFA over adversarial training."""
    return _stages("sat", options)


def afa_trades(**options: Value) -> Sequence[Stage]:
    """AFA over TRADES."""
    return _stages("trades", options)


def afa_mart(**options: Value) -> Sequence[Stage]:
    """AFA over MART."""
    return _stages("mart", options)


def afa_iat(**options: Value) -> Sequence[Stage]:
    """AFA over IAT, interpolated adversarial training."""
    return _stages("iat", options)
