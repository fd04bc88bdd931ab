"""What the attacks of one match share, and how one of them is run on some points, in whatever process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arena.attack import Setup, bound
from arena.auditing.observing import Observed
from arena.contender import seeded
from arena.engine import Keeper, Outcome, run_iterated, run_plain
from arena.lineup import Planned
from arena.referee import DRAWS
from arena.rng import Stream
from arena.specs import load
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat

#: Makes another defense's model ready (``arena.attack.Setup.lend``).
Lend = Callable[[str], None]
#: A plain attack (``arena.engine.run_plain``).
Function = Callable[..., Any]


@dataclass(frozen=True)
class Ground:
    """What all attacks of a match share. Small, so that it can be sent to other processes."""

    threat: Threat
    n_classes: int
    """Width of the logits."""
    surface: Surface
    shape: tuple[int, int, int]
    """(C, H, W)."""
    seed: int
    """Of the question."""
    first: int
    """Data-set index of the match's first point: what random models draw from is seeded by it."""

    @property
    def draws(self) -> int:
        """Passes that the model's logits are averaged over at least."""
        return DRAWS if self.surface.random else 1

    def setup(self, planned: Planned, lend: Lend) -> Setup:
        """Return what an attack is made from."""
        stream = Stream.of(self.seed, planned.name)
        return Setup(self.threat, self.n_classes, self.surface, self.shape, stream, lend)

    def make(self, planned: Planned, lend: Lend) -> Observed:
        """Make an ask/tell attack.

        Raises:
            Unsupported: it does not work here.
            Exception: whatever its code raises.
        """
        spec = planned.spec.spec
        assert spec.iterate is not None
        # A minimal attack is nearly always at a mistake, so looking at each one would cost 8 % of its time.
        every = 8 if spec.kind == "minimal" else 1
        return Observed(load(spec.iterate)(self.setup(planned, lend), **planned.options), self.threat, every)

    def most(self, attack: Observed) -> int:
        """Return the most forwards a row can cost."""
        return bound(attack, self.draws)

    def climb(
        self,
        attack: Observed,
        planned: Planned,
        target: Target,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        keeper: Keeper,
        progress: Callable[[int, int], None],
        until: Callable[[], bool],
        shard: int = 0,
    ) -> Outcome:
        """Run an ask/tell attack on points x (N, C, H, W), y (N,), index (N,); see ``arena.engine.run_iterated``.

        A random model draws from the global generator: the same ``shard`` of the same match draws the same numbers.
        """
        seed = Stream.of(self.seed, planned.name).bits(torch.tensor([self.first]), 0, shard, 1)
        with seeded(int(seed[0, 0])):
            return run_iterated(attack, target, x, y, index, None, keeper, progress, until, self.draws)

    def load(self, planned: Planned) -> Function:
        """Load a plain attack.

        Raises:
            Exception: whatever its code raises.
        """
        assert planned.spec.spec.run is not None
        found: Function = load(planned.spec.spec.run)
        return found

    def call(
        self,
        function: Function,
        planned: Planned,
        target: Target,
        x: Tensor,
        y: Tensor,
        index: Tensor,
        keeper: Keeper,
        progress: Callable[[int, int], None],
        until: Callable[[], bool],
    ) -> Outcome:
        """Run a plain attack on points x (N, C, H, W), y (N,), index (N,); see ``arena.engine.run_plain``."""
        stream, options = Stream.of(self.seed, planned.name), dict(planned.options)
        return run_plain(
            function,
            target,
            x,
            y,
            index,
            self.threat,
            stream,
            options,
            keeper,
            progress,
            planned.spec.spec.chunk,
            until,
        )
