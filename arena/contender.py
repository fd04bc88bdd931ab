"""A contender: one defense with its weights, ready to be built as often as anyone likes, always the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from arena.checkpoints import Weights, restore
from arena.specs import Value
from arena.surface import Surface


@dataclass(frozen=True)
class Contender:
    """A model with a name, an identity and a surface."""

    name: str
    """Canonical: ``fgaa_sat``, ``fgaa_sat(lam=1)``, ``my.py:factory``."""
    id: str
    """sha256 over weights, spec identity and eval options (``arena.checkpoints.model_id``)."""
    key: str
    """The plan's key."""
    backbone: str | None
    """Canonical, with options; None for a user's own model."""
    options: Mapping[str, Value]
    eval_options: Mapping[str, Value]
    trained: Mapping[str, Any]
    """Where the weights come from, for the record: preset, epochs, seconds, accuracies on held-out images."""
    parameters: int
    """Number of parameters."""
    twin: str
    """The defense without its module, or empty."""
    origin: str
    """``distribution version`` of the defense; empty for a user's own model."""
    surface: Surface
    factory: Callable[[], nn.Module] = field(repr=False)
    weights: Weights = field(repr=False)
    """Every parameter and buffer."""
    finish: Callable[[nn.Module], None] | None = field(default=None, repr=False)
    """Applies eval options."""

    def build(self) -> nn.Module:
        """Make a fresh module from factory and stored weights: on the CPU, in eval mode, its weights frozen."""
        with seeded(0):
            model = self.factory()
        restore(model, self.weights, self.name)
        if self.finish:
            self.finish(model)
        return model.eval().requires_grad_(False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a generator of this block's own; the caller's global one is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def digest(fields: Mapping[str, Any]) -> str:
    """Return the sha256 of a dict's canonical JSON."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())
