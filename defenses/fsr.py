"""FSR, feature separation and recalibration (Kim et al., CVPR 2023): papers.md section 4.

One module late in the network. A separation net marks each activation as robust or not; a recalibration net mends the
non-robust part before it joins the robust one. The mask is random in training and deterministic in eval mode, so the
inner attack, which runs in eval mode, meets the mask of test time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.errors import ArenaError, unknown
from arena.inner import evaluating
from arena.specs import Value, text
from arena.stages import Adversary, Context, Usual, divergence
from arena.surface import Gate, Head, Knob, Surface
from arena.training import Stage

from .placement import deep

#: What the module may pass on: f+, f-, f~-, or their sum f+ + f~-.
READOUTS = ("full", "robust", "nonrobust", "recalibrated")


class Mask(nn.Module):
    """Turn relevance r into a mask in [0, 1] of the same shape.

    Training: sigmoid((r + l) / tau) with l ~ Logistic(0, 1), the closed form of a two-class Gumbel softmax over
    (log sigmoid(r), log sigmoid(-r)). Eval mode: sigmoid(r / tau).
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = tau
        self.detach = False

    def forward(self, r: Tensor) -> Tensor:
        if self.training:
            r = r + torch.rand_like(r).logit(eps=1e-7)
        m = torch.sigmoid(r / self.tau)
        return m.detach() if self.detach else m


def net(channels: int, hidden: int, last: str) -> nn.Sequential:
    """Build C -> hidden -> hidden -> C by 3x3 convolutions without bias; ``last`` is ``code`` (bare) or ``paper``
    (batch norm and ReLU behind the last one too)."""

    def conv(inside: int, outside: int) -> nn.Module:
        return nn.Conv2d(inside, outside, 3, padding=1, bias=False)

    layers = [conv(channels, hidden), nn.BatchNorm2d(hidden), nn.ReLU()]
    layers += [conv(hidden, hidden), nn.BatchNorm2d(hidden), nn.ReLU(), conv(hidden, channels)]
    if last == "paper":
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def auxiliary(channels: int, n_classes: int, kind: str) -> nn.Sequential:
    """Build h: global average pool and one linear layer, or for ``mlp`` a hidden layer of C units before it."""
    hidden = [nn.Linear(channels, channels), nn.ReLU()] if kind == "mlp" else []
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *hidden, nn.Linear(channels, n_classes))


class Recalibration(nn.Module):
    """f (N, C, H, W) -> f+ + f~-, with f+ = m f, f- = (1 - m) f, f~- = f- + (1 - m) R(f-), m = mask(S(f)).

    The auxiliary layer h scores f+, f-, f~- in this order, in every pass: the heads of the surface. Without
    ``separate`` all of f is recalibrated (m = 0, no f+): f + R(f). Without ``recalibrate`` f+ alone is passed on.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_classes: int,
        *,
        tau: float = 0.1,
        hidden: int = 64,
        rec_last: str = "code",
        aux: str = "linear",
        separate: bool = True,
        recalibrate: bool = True,
    ) -> None:
        super().__init__()
        self.separate, self.recalibrate = separate, recalibrate
        if separate:
            self.separation = net(shape[0], hidden, "code")
            self.mask = Mask(tau)
        if recalibrate:
            self.recalibration = net(shape[0], hidden, rec_last)
        self.aux = auxiliary(shape[0], n_classes, aux)
        self.readout = "full"

    def heads(self) -> list[str]:
        """Return what h scores, in the order of its calls."""
        return (["robust", "nonrobust"] if self.separate else []) + (["recalibrated"] if self.recalibrate else [])

    def forward(self, f: Tensor) -> Tensor:
        m = self.mask(self.separation(f)) if self.separate else torch.zeros_like(f)
        part = {"robust": m * f, "nonrobust": (1 - m) * f}
        part["full"] = part["robust"]
        if self.recalibrate:
            part["recalibrated"] = part["nonrobust"] + (1 - m) * self.recalibration(part["nonrobust"])
            part["full"] = part["robust"] + part["recalibrated"]
        for name in self.heads():
            self.aux(part[name])
        return part[self.readout]


def build(
    backbone: nn.Module,
    dataset: DatasetInfo,
    slot: Value = "auto",
    tau: Value = 0.1,
    hidden: Value = 64,
    rec_last: Value = "code",
    aux: Value = "linear",
    separation: Value = True,
    recalibration: Value = True,
    **options: Value,
) -> nn.Module:
    """Place the module in ``slot`` (``placement.deep``).

    Raises:
        ArenaError: no such slot, none at all, or both parts are switched off.
    """
    where = deep(backbone, dataset, "fsr", slot)
    if not (separation or recalibration):
        raise ArenaError("fsr: separation=false and recalibration=false leave nothing, expected at most one of them")
    module = Recalibration(
        slot_shapes(backbone, dataset.shape, (where,))[where],
        dataset.n_classes,
        tau=float(tau),
        hidden=int(hidden),
        rec_last=text(rec_last),
        aux=text(aux),
        separate=bool(separation),
        recalibrate=bool(recalibration),
    )
    draw(module, dataset.backbone)
    return place(backbone, {where: module})


def draw(module: nn.Module, backbone: str) -> None:
    """Draw the initial weights as the official code does (papers.md 4.1): in VGG16 and wide residual networks
    convolutions from N(0, 2 / (9 C_out)), in VGG16 linear layers from N(0, 0.01^2); elsewhere torch's own."""
    if backbone == "vgg16" or backbone.startswith("wrn"):
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(part, nn.Linear) and backbone == "vgg16":
                nn.init.normal_(part.weight, std=0.01)
                nn.init.zeros_(part.bias)


def find(model: nn.Module) -> tuple[str, Recalibration]:
    """Return path and module of a model's ``Recalibration``."""
    return next((p, m) for p, m in model.named_modules() if isinstance(m, Recalibration))


def apply(model: nn.Module, readout: Value = "full", test_tau: Value = 0.0, **options: Value) -> None:
    """Set what the module passes on and, unless 0, the mask's temperature.

    Raises:
        ArenaError: the model lacks the part that ``readout`` or ``test_tau`` speaks of.
    """
    _, module = find(model)
    has = ["full", *module.heads()]
    if text(readout) not in has:
        raise unknown("readout of this fsr model", text(readout), has)
    module.readout = text(readout)
    if test_tau:
        if not module.separate:
            raise ArenaError("fsr: test_tau is the temperature of a mask that separation=false leaves out")
        module.mask.tau = float(test_tau)


def surface(model: nn.Module) -> Surface:
    """Declare the scores of f+, f-, f~- as heads, the mask as a gate, its temperature and gradient as knobs."""
    path, module = find(model)
    heads = {
        name: Head(f"{path}.aux", call=i, answers=name != "nonrobust")  # f- is trained towards a wrong class
        for i, name in enumerate(module.heads())
    }
    if not module.separate:
        return Surface(heads=heads)
    return Surface(
        heads=heads,
        gates={"mask": Gate(f"{path}.mask", shape="element", clean=1)},
        knobs={
            "tau": Knob(f"{path}.mask", "tau", "temperature", (0.3, 1.0, 3.0, 10.0)),
            "detach": Knob(f"{path}.mask", "detach", "detach", (True,)),
        },
    )


@dataclass(frozen=True)
class Separating(Usual):
    """Main loss by ``recipe`` plus lam_sep (CE(h(f+), y) + CE(h(f-), y')) + lam_rec CE(h(f~-), y).

    y' is the highest-scoring wrong class of the main output in the same noisy pass. The inner attack climbs the main
    term alone, under the deterministic mask.
    """

    lam_sep: float = 1.0
    lam_rec: float = 1.0
    aux_on: str = "adversarial"
    """TRADES and MART: the auxiliary terms see ``adversarial`` or ``natural`` images; the paper does not say."""

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return projected gradient ascent on the main cross-entropy (TRADES: divergence), in eval mode."""

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with evaluating(model):
                objective: Callable[[Tensor], Tensor] = lambda z: F.cross_entropy(z, y, reduction="none")  # noqa: E731
                if self.recipe == "trades":
                    with torch.no_grad():
                        natural = model(x)
                    objective = lambda z: divergence(natural, z)  # noqa: E731
                start = "uniform" if self.recipe == "sat" else "normal"
                return ctx.climb(lambda point: objective(model(point)), x, start)

        return attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return main loss and weighted auxiliary terms."""
        assert ctx.x_adv is not None
        natural = ctx.read(x) if self.recipe != "sat" else None
        adversarial = ctx.read(ctx.x_adv)
        main = self._term(natural, adversarial, "", y)
        seen = natural if natural is not None and self.aux_on == "natural" else adversarial
        separation, recalibration = auxiliary_terms(seen.logits, seen.heads, y)
        log = {"main": main.detach(), "separation": separation.detach(), "recalibration": recalibration.detach()}
        return main + self.lam_sep * separation + self.lam_rec * recalibration, log


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """Return y', the highest-scoring class other than ``y``: logits (N, K), y (N,) -> int64 (N,)."""
    return logits.detach().scatter(1, y.view(-1, 1), -torch.inf).argmax(1)


def auxiliary_terms(logits: Tensor, heads: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (L_sep, L_rec), means over rows; a term whose part was left out is 0."""
    zero = logits.new_zeros(())
    separation = recalibration = zero
    if "robust" in heads:
        separation = F.cross_entropy(heads["robust"], y) + F.cross_entropy(heads["nonrobust"], runner_up(logits, y))
    if "recalibrated" in heads:
        recalibration = F.cross_entropy(heads["recalibrated"], y)
    return separation, recalibration


def _recipe(recipe: str, options: dict[str, Value]) -> Sequence[Stage]:
    return [
        Separating(
            recipe,
            beta=float(options.get("beta", 0.0)),
            lam_sep=float(options.get("lam_sep", 1.0)),
            lam_rec=float(options.get("lam_rec", 1.0)),
            aux_on=text(options.get("aux_on", "adversarial")),
        )
    ]


def sat(**options: Value) -> Sequence[Stage]:
    """FSR under standard adversarial training."""
    return _recipe("sat", options)


def trades(**options: Value) -> Sequence[Stage]:
    """FSR under TRADES."""
    return _recipe("trades", options)


def mart(**options: Value) -> Sequence[Stage]:
    """FSR under MART."""
    return _recipe("mart", options)
