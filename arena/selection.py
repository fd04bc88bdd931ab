"""``Select``: the one way a hard choice, and the one way a true label, enters a model.

FGAA, EWAS, CAS and their kin choose a mask by the true label in training and by their own argmax at test time. With the
choice in a module of its own, the attack side can soften it, pass gradients through it or force it, and nothing else in
the model ever sees a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_training: ContextVar[bool] = ContextVar("arena_training_step", default=False)


@dataclass(frozen=True)
class Mode:
    """How a ``Select`` chooses; set by the target on its own copy of the model, never global."""

    kind: str = "hard"
    """``hard`` (argmax), ``soft`` (softmax mixture), ``straight_through`` (hard forward, soft backward), ``forced``."""
    temperature: Tensor | float = 1.0
    """For soft and straight_through: a number or one per row, (N,)."""
    classes: Tensor | None = None
    """For forced: the class of each row, int64 (N,)."""

    def rows(self, index: Tensor) -> Mode:
        """Return the mode for a subset of rows."""
        t = self.temperature[index] if isinstance(self.temperature, Tensor) else self.temperature
        return Mode(self.kind, t, None if self.classes is None else self.classes[index])


HARD = Mode()


class Select(nn.Module):
    """Choose one row of a table for each example by its scores.

    ``forward(scores (N, K), table (K, ...)) -> (N, ...)``. The argmax carries no gradient; the chosen rows of ``table``
    do. Under ``supervise(model, y)`` in a training step the choice is the true label.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = HARD
        self.labels: Tensor | None = None

    def forward(self, scores: Tensor, table: Tensor) -> Tensor:
        if self.labels is not None:
            if not _training.get():
                raise RuntimeError("labels reached a model outside a training step")
            if self.labels.shape[0] != scores.shape[0]:
                raise RuntimeError(f"supervise: {self.labels.shape[0]} labels for {scores.shape[0]} examples")
            return table.index_select(0, self.labels)
        mode = self.mode
        if mode.kind == "hard":
            return table.index_select(0, scores.argmax(1))
        if mode.kind == "forced":
            if mode.classes is None:
                raise ValueError("Select: mode 'forced' needs the class of each row")
            return table.index_select(0, mode.classes)
        t = mode.temperature.view(-1, 1) if isinstance(mode.temperature, Tensor) else mode.temperature
        soft = torch.softmax(scores / t, dim=1)
        if mode.kind == "straight_through":
            hard = torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).to(soft.dtype)
            soft = hard + (soft - soft.detach())  # in this order the forward value is exactly the hard one
        elif mode.kind != "soft":
            raise ValueError(f"Select: unknown mode '{mode.kind}'")
        return torch.tensordot(soft.to(table.dtype), table, dims=1)  # under autocast the softmax is in fp32


@contextmanager
def training_step() -> Iterator[None]:
    """Mark the code inside as a step of training: the only place where ``supervise`` works."""
    token = _training.set(True)
    try:
        yield
    finally:
        _training.reset(token)


@contextmanager
def supervise(model: nn.Module, y: Tensor) -> Iterator[None]:
    """Let every ``Select`` in ``model`` choose by the true labels ``y`` (N,).

    Raises:
        RuntimeError: outside a training step.
    """
    if not _training.get():
        raise RuntimeError("supervise: labels may reach a model only inside a training step")
    modules = [m for m in model.modules() if isinstance(m, Select)]
    for m in modules:
        m.labels = y
    try:
        yield
    finally:
        for m in modules:
            m.labels = None


@contextmanager
def choosing(selects: Mapping[str, Select], modes: Mapping[str, Mode]) -> Iterator[None]:
    """Set modes on the named ``Select`` modules for the duration of one pass."""
    chosen = [(selects[name], mode) for name, mode in modes.items()]
    for module, mode in chosen:
        module.mode = mode
    try:
        yield
    finally:
        for module, _ in chosen:
            module.mode = HARD
