"""OAT, once-for-all adversarial training (Wang et al., NeurIPS 2020): one network for every weight of robustness.

The network is told the weight lambda that it was asked for: each batch norm becomes two, BN_c for lambda = 0 and BN_a
for all others, followed by FiLM, an affine map per channel made from a code of lambda. Training draws lambda an image
and lowers (1 - lambda) CE(clean) + lambda CE(adversarial); at test time lambda is the user's knob, known to attackers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arena.backbones import DatasetInfo
from arena.inner import evaluating
from arena.specs import Value, text
from arena.stages import Context, Stage
from arena.surface import Knob, Surface

from .conversion import norms, replace

__all__ = ["LAMBDAS", "Conditioned", "Oat", "apply", "build", "conditioned", "surface", "train"]

#: The values of lambda that the network knows; the i-th is coded by row i of the encoding matrix.
LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
#: Length of a code.
CODE = 128
#: Norms on a shortcut get no FiLM.
SHORTCUTS = {"shortcut", "downsample"}


class Condition:
    """What the norms of one model share during a forward pass."""

    def __init__(self) -> None:
        self.code: Tensor | None = None
        """(N, 128), or (1, 128) for all rows alike."""
        self.clean = 0
        """So many rows, the first ones, use BN_c."""


class Conditioned(nn.Module):
    """Two batch norms and FiLM: h -> scale * h + shift, both LeakyReLU of a two-layer network of the code."""

    def __init__(self, norm: _BatchNorm, condition: Condition, film: bool) -> None:
        super().__init__()
        self.clean, self.attacked = norm, copy.deepcopy(norm)
        wide = 2 * norm.num_features
        self.film = nn.Sequential(nn.Linear(CODE, wide), nn.LeakyReLU(), nn.Linear(wide, wide)) if film else None
        self.condition = condition

    def forward(self, a: Tensor) -> Tensor:
        n = self.condition.clean
        norms_ = ((self.clean, a[:n]), (self.attacked, a[n:]))
        h = torch.cat([norm(rows) for norm, rows in norms_ if len(rows)])
        if self.film is None:
            return h
        assert self.condition.code is not None
        made = F.leaky_relu(self.film(self.condition.code))
        scale, shift = made.view(*made.shape, *[1] * (a.dim() - 2)).chunk(2, dim=1)
        return scale * h + shift


class Oat(nn.Module):
    """A converted backbone that knows its lambda, and the matrix that codes it."""

    encoding: Tensor

    def __init__(self, body: nn.Module, condition: Condition) -> None:
        super().__init__()
        self.body = body
        self.condition = condition
        # A buffer, hence saved with the weights: another matrix would be another network.
        self.register_buffer("encoding", nn.init.orthogonal_(torch.empty(CODE, CODE)))
        self.lam = 1.0
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is not None:
            code, clean = self.encoding[self.rows], int((self.rows == 0).sum())
        else:
            index = LAMBDAS.index(float(self.lam))
            code, clean = self.encoding[index : index + 1], len(x) if index == 0 else 0
        self.condition.code, self.condition.clean = code, clean
        try:
            logits: Tensor = self.body(x)
        finally:
            self.condition.code = None
        return logits


def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Make every batch norm conditional; those on shortcuts get two norms but no FiLM.

    Raises:
        ArenaError: the backbone has no batch norm.
    """
    condition = Condition()
    for path, norm in norms("oat", backbone, dataset).items():
        replace(backbone, path, Conditioned(norm, condition, film=not SHORTCUTS & set(path.split("."))))
    return Oat(backbone, condition)


def surface(model: nn.Module) -> Surface:
    """Declare lambda as a knob: an attacker may search under another one than the user's."""
    return Surface(knobs={"lam": Knob("", "lam", kind="constant", values=LAMBDAS)})


def apply(model: nn.Module, lam: Value = "1") -> None:
    """Set lambda for every image."""
    _oat(model).lam = float(text(lam))


@contextmanager
def conditioned(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Give each row of the passes inside its own lambda, by index (N,); rows with lambda = 0 come first."""
    if bool(((rows == 0)[1:] & (rows != 0)[:-1]).any()):
        raise ValueError("rows with lambda = 0 come first")
    oat = _oat(model)
    oat.rows = rows
    try:
        yield
    finally:
        oat.rows = None


def _oat(model: nn.Module) -> Oat:
    (found,) = (m for m in model.modules() if isinstance(m, Oat))
    return found


@dataclass(frozen=True)
class OnceForAll(Stage):
    """The only stage. Loss and attack share the batch's draw of lambda, so the attack is made inside the loss."""

    adversarial: bool = True

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of (1 - lambda) CE(clean) + lambda CE(adversarial).

        One pass over the clean images and the attacked copies of those with lambda > 0; both copies of such an image
        use BN_a.
        """
        rows = torch.randint(len(LAMBDAS), (len(x),), generator=ctx.generator, device=x.device)
        return self.given(model, x, y, ctx, rows)

    def given(
        self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, rows: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss for a given draw, indices (N,) into ``LAMBDAS``."""
        if int((rows == 0).sum()) == 1:
            rows = rows.clamp_min(1)  # one row alone has no batch statistics
        order = (rows > 0).to(torch.int64).argsort(stable=True)
        x, y, rows = x[order], y[order], rows[order]
        n = int((rows == 0).sum())
        x_adv = x[n:]
        if len(x_adv):
            with evaluating(model), conditioned(model, rows[n:]):
                x_adv = ctx.climb(lambda point: F.cross_entropy(model(point), y[n:], reduction="none"), x[n:])
        with conditioned(model, torch.cat((rows, rows[n:]))):
            z = model(torch.cat((x, x_adv)))
        lam = torch.tensor(LAMBDAS, device=x.device)[rows]
        clean = F.cross_entropy(z[: len(x)], y, reduction="none")
        attacked = F.cross_entropy(z[len(x) :], y[n:], reduction="none")
        loss = (((1 - lam) * clean).sum() + (lam[n:] * attacked).sum()) / len(x)
        return loss, {"clean": clean.mean().detach(), "attacked": attacked.sum().detach() / max(len(x) - n, 1)}


def train(**options: Value) -> Sequence[Stage]:
    """Once-for-all adversarial training."""
    return [OnceForAll()]
