"""The referee: re-scores every point an attack hands over. Claims are never used.

It has a model of its own, rebuilt from factory and weights, and runs it eager, in fp32, without TF32 or gradients, in
batches of one fixed size. It never modifies a point: a point outside ball or box is a violation, counted by kind, and
no break. In one process this guards against error, not malice; ``arena verify`` re-scores in a fresh process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arena.objectives import best_other
from arena.tf32 import without_tf32
from arena.threat import Threat

#: Rows a batch; constant, so that a point's logits do not depend on how many others are scored.
BATCH = 128
#: Draws whose majority decides a point of a random model.
DRAWS = 20
#: Margins below this share of the logit scale may flip with another device's rounding.
BORDERLINE = 1e-4
#: Seed of the referee's own draws for random models.
DRAW_SEED = 4711


@dataclass(frozen=True)
class Scores:
    """What the referee saw on some points."""

    predicted: Tensor
    """(N,) int64 class; majority over draws for random models; -1 where logits are not finite."""
    margin: Tensor
    """(N,) float32: true logit minus best other, divided by the logits' spread; negative is misclassified."""
    agreement: Tensor
    """(N,) float32: share of draws that gave ``predicted``; 1 for deterministic models."""


@dataclass(frozen=True)
class Judgement:
    """The referee's word on what one attack returned."""

    broken: Tensor
    """(N,) bool: inside ball and box, and misclassified."""
    valid: Tensor
    """(N,) bool: inside ball and box, finite."""
    margin: Tensor
    """(N,) float32, of ``Scores``; +inf where invalid."""
    violations: dict[str, int]
    """Rows by kind of violation: ``nan, box, ball``."""
    borderline: int
    """Valid rows whose margin is within rounding of zero."""
    nonfinite: int = 0
    """Valid rows at which the model's logits are not finite."""


@dataclass
class Referee:
    """Scores points with a model that no attack has seen."""

    model: nn.Module
    """A fresh build, never shared with a target."""
    threat: Threat
    random: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    def score(self, x: Tensor, y: Tensor, index: Tensor) -> Scores:
        """Score images (N, C, H, W) against labels (N,).

        ``index`` (N,) are data-set indices: a random model's draws on a point belong to the point, so that scoring it
        again, alone or among others, gives the same word.
        """
        if not len(x):
            empty = x.new_zeros(0)
            return Scores(empty.long(), empty, empty)
        with exact():
            if self.random:
                drawn = [self._drawn(x[k], y[k], int(index[k])) for k in range(len(x))]
                return Scores(*(torch.stack(part) for part in zip(*drawn, strict=True)))
            logits = torch.cat([self._logits(x[k : k + BATCH]) for k in range(0, len(x), BATCH)])
        return Scores(_predict(logits), relative_margin(logits, y), torch.ones(len(x), device=x.device))

    def _logits(self, rows: Tensor) -> Tensor:
        fixed = torch.cat((rows, rows[-1:].expand(BATCH - len(rows), *rows.shape[1:])))
        out: Tensor = self.model(fixed.to(self.device))
        return out[: len(rows)].float()

    def _drawn(self, x: Tensor, y: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return one point's majority class, median margin and agreement over its own draws.

        A pass holds the point twice and one answer counts: a model may draw once for a whole batch, so one pass cannot
        hold several draws, and a batch of one loses its axis in models that squeeze.
        """
        batch = x.unsqueeze(0).expand(2, *x.shape).to(self.device)
        seen = []
        with torch.random.fork_rng():
            for draw in range(DRAWS):
                torch.manual_seed(DRAW_SEED + index * DRAWS + draw)
                seen.append(self.model(batch)[:1].float())
        logits = torch.cat(seen)
        votes = _predict(logits)
        winner = votes.mode().values
        margin = relative_margin(logits, y.expand(DRAWS)).median()
        return winner, margin, (votes == winner).float().mean()

    def judge(self, x: Tensor, x_adv: Tensor, y: Tensor, index: Tensor) -> Judgement:
        """Check each returned point (N, C, H, W) against its clean image and label; ``index`` as in ``score``.

        A point at which the logits are not finite is not classified correctly: it counts as broken.
        """
        finite = torch.isfinite(x_adv).flatten(1).all(1)
        box = ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)
        ball = self.threat.inside(x, x_adv.nan_to_num(nan=2.0))
        valid = finite & box & ball
        kinds = {"nan": ~finite, "box": finite & ~box, "ball": finite & box & ~ball}
        broken = torch.zeros_like(valid)
        margin = torch.full((len(x),), torch.inf, device=x.device)
        rows = valid.nonzero().squeeze(1)
        scores = self.score(x_adv[rows], y[rows], index[rows])
        broken[rows] = scores.predicted != y[rows]
        margin[rows] = scores.margin
        violations = {k: int(v.sum()) for k, v in kinds.items() if bool(v.any())}
        nonfinite = int((scores.predicted < 0).sum())
        return Judgement(broken, valid, margin, violations, int((margin.abs() < BORDERLINE).sum()), nonfinite)


def _predict(logits: Tensor) -> Tensor:
    finite = torch.isfinite(logits).all(1)
    return logits.argmax(1).masked_fill(~finite, -1)


def relative_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return (true logit - best other) / spread of the logits, (N,); the spread is max - min, at least 1e-12."""
    spread = (logits.amax(1) - logits.amin(1)).clamp_min(1e-12)
    return (logits.gather(1, y.view(-1, 1)).squeeze(1) - best_other(logits, y)) / spread


@contextmanager
def exact() -> Iterator[None]:
    """Score without gradients, TF32 or autocast."""
    with without_tf32(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield
