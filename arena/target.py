"""The handle through which attacks see a defense: queries in, answers out, every pass counted.

The target works on its own copy of the model, the search copy; the referee has another. Rows are evaluated in physical
batches padded to a multiple of 8, because smaller and odd batches take other code paths in the linear algebra libraries
and give other last bits (measured on CPU, fp32: batches of 1, 2, 7 and 9 differ, multiples of 8 do not).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arena.attack import Answer, Query
from arena.objectives import objective
from arena.selection import choosing
from arena.surface import Reader, Surface, selects

PAD = 8
DEFAULT_BATCH = 256


@dataclass
class Meter:
    """Rows passed through the model; padding is not counted."""

    forwards: int = 0
    """Rows of forward passes."""
    backwards: int = 0
    """Rows of gradient calls."""


def padded(rows: int) -> int:
    """Return the physical size of a batch of ``rows``: the next multiple of 8."""
    return max(PAD, -(-rows // PAD) * PAD)


def pad(x: Tensor) -> Tensor:
    """Repeat the last row until the batch has a physical size."""
    missing = padded(x.shape[0]) - x.shape[0]
    return torch.cat((x, x[-1:].expand(missing, *x.shape[1:]))) if missing else x


@dataclass
class Target:
    """A search copy of a model, its surface, and a meter."""

    model: nn.Module
    """In eval mode; the target switches off gradients of its parameters."""
    surface: Surface
    n_classes: int
    batch_size: int = DEFAULT_BATCH
    """Largest physical batch, rows; rounded up to a multiple of 8."""
    device: str = "cpu"
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self.batch_size = padded(self.batch_size)
        self.model.eval().requires_grad_(False)
        self._reader = Reader(self.model, self.surface)
        self._selects = selects(self.model, self.surface)
        self.module = CountedModule(self)

    def logits(self, x: Tensor) -> Tensor:
        """Return main logits (N, K) of images (N, C, H, W), without gradient."""
        return self.answer(Query(x.unsqueeze(1)), x.new_zeros(len(x), dtype=torch.int64)).logits[:, 0]

    def clean(self, x: Tensor) -> Tensor:
        """Return logits and head scores (N, terms, K), without gradient and without counting."""
        before = Meter(self.meter.forwards, self.meter.backwards)
        weights = x.new_ones(len(x), 1 + len(self.surface.heads))
        answer = self.answer(Query(x.unsqueeze(1), weights=weights), x.new_zeros(len(x), dtype=torch.int64))
        self.meter = before
        return answer.logits if answer.scores is None else answer.scores[:, 0]

    def answer(self, query: Query, y: Tensor) -> Answer:
        """Make the passes a query asks for.

        Args:
            query: points (N, m, C, H, W) and what is wanted of them.
            y: true labels (N,).
        """
        n, m = query.points.shape[:2]
        wants = query.grad
        if isinstance(wants, Tensor) and query.objective is not None:
            some, every = bool(wants.any()), bool(wants.all())
            if some and not every:
                return self._mixed(query, y, wants)
            wants = some
        rows = torch.arange(n, device=y.device).repeat_interleave(m) if m > 1 else None
        flat = query.points.flatten(0, 1)
        parts = [
            self._batch(query, flat, y, rows, slice(i, i + self.batch_size), bool(wants))
            for i in range(0, n * m, self.batch_size)
        ]
        values, logits, grads, scores = (_joined([p[k] for p in parts]) for k in range(4))
        assert values is not None
        assert logits is not None
        return Answer(
            values.view(n, m),
            None if grads is None else grads.view_as(query.points),
            logits.view(n, m, -1),
            None if scores is None else scores.view(n, m, *scores.shape[1:]),
        )

    def _mixed(self, query: Query, y: Tensor, wants: Tensor) -> Answer:
        """Answer a query some of whose rows want a gradient: two groups, so that no gradient is wasted."""
        n = len(query.points)
        grad = torch.zeros_like(query.points)
        merged: dict[str, Tensor | None] = {"values": None, "logits": None, "scores": None}
        for group, with_grad in ((wants, True), (~wants, False)):
            index = group.nonzero().squeeze(1)
            answer = self.answer(_rows(query, index, with_grad), y[index])
            for key in merged:
                part = getattr(answer, key)
                if part is None:
                    continue
                whole = merged[key]
                if whole is None:
                    whole = part.new_zeros(n, *part.shape[1:])
                whole[index] = part
                merged[key] = whole
            if answer.grad is not None:
                grad[index] = answer.grad
        assert merged["values"] is not None
        assert merged["logits"] is not None
        return Answer(merged["values"], grad, merged["logits"], merged["scores"])

    def _batch(
        self, query: Query, flat: Tensor, y: Tensor, rows: Tensor | None, cut: slice, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        points = flat[cut]
        count = points.shape[0]
        index = torch.arange(cut.start, cut.start + count, device=y.device) if rows is None else rows[cut]
        x = pad(points)
        index = pad(index)
        grad = grad and query.objective is not None
        modes = {k: mode.rows(index) for k, mode in (query.modes or {}).items()}
        labels = y[index]
        target = None if query.target is None else query.target[index]
        weights = None if query.weights is None else query.weights[index]
        totals: list[Tensor | None] = [None, None, None, None]
        for _ in range(query.draws):
            with torch.set_grad_enabled(grad), choosing(self._selects, modes):
                leaf = x.detach().requires_grad_(grad)
                reading = self._reader(leaf)
                scores = reading.scores() if weights is not None and reading.heads else None
                value = self._value(query, reading.logits, scores, labels, target, weights)
                gradient = None
                if grad:
                    if not value.requires_grad:  # the objective does not depend on x: a gradient of exact zeros
                        gradient = torch.zeros_like(leaf)
                    else:
                        gradient = torch.autograd.grad(value.sum(), leaf)[0]
            self.meter.forwards += count
            self.meter.backwards += count if grad else 0
            for k, part in enumerate((value, reading.logits, gradient, scores)):
                if part is not None:
                    part = part.detach()[:count]
                    before = totals[k]
                    totals[k] = part if before is None else before + part
        if query.draws > 1:
            totals = [None if t is None else t / query.draws for t in totals]
        values, logits = totals[0], totals[1]
        assert values is not None
        assert logits is not None
        return values, logits, totals[2], totals[3]

    def _value(
        self,
        query: Query,
        logits: Tensor,
        scores: Tensor | None,
        y: Tensor,
        target: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        if query.objective is None:
            return logits.new_zeros(logits.shape[0])
        function = objective(query.objective)
        if scores is None or weights is None:
            value = function(logits, y, target)
            return value if weights is None else value * weights[:, 0]
        terms = scores.shape[1]
        many = scores.flatten(0, 1)
        labels = y.repeat_interleave(terms)
        targets = None if target is None else target.repeat_interleave(terms)
        each = function(many, labels, targets).view(-1, terms)
        # A weight of 0 switches a term off, also where its value is infinite.
        return (each * weights).masked_fill(weights == 0, 0.0).sum(1)


def _rows(query: Query, index: Tensor, grad: bool) -> Query:
    return Query(
        query.points[index],
        query.objective,
        None if query.weights is None else query.weights[index],
        None if query.target is None else query.target[index],
        grad,
        query.draws,
        None if query.modes is None else {k: mode.rows(index) for k, mode in query.modes.items()},
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [p for p in parts if p is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)


class CountedModule(nn.Module):
    """The search copy as a plain module, for wrapped libraries: counts rows and notices whether any query left x.

    The model is deliberately not registered as a submodule: ``parameters()`` is empty, so a library's optimizer or
    ``train()`` call does not reach it.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        object.__setattr__(self, "_target", target)
        self.moved = False
        self._clean: set[bytes] = set()
        self.eval()

    def expect(self, x: Tensor) -> None:
        """Forget earlier queries; ``x`` (N, C, H, W) are the clean images."""
        self.moved = False
        self._clean = {row.tobytes() for row in x.detach().cpu().numpy()}

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        target: Target = self._target  # type: ignore[assignment]
        if not self.moved:
            self.moved = any(row.tobytes() not in self._clean for row in x.detach().float().cpu().numpy())
        count = x.shape[0]
        target.meter.forwards += count
        out: Tensor = target.model(pad(x.float()))[:count]
        if out.requires_grad:

            def counted(_grad: Tensor) -> None:
                target.meter.backwards += count

            out.register_hook(counted)
        return out
