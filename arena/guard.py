"""Notices when the search copy, which attacks may query, is no longer what it was."""

from __future__ import annotations

from torch import Tensor

from arena.batches import PAD
from arena.check import PROBE, came_again, changed_parts, drift, state_hash
from arena.target import Target


class Guard:
    """Knows what a search copy, folded or not, looked like when nothing had touched it."""

    def __init__(self, target: Target, x: Tensor) -> None:
        """Take it in: weights, buffers, flags, and what it returns for some of the images ``x`` (N, C, H, W)."""
        self.target, self.x = target, x[:PROBE]
        self.original = {k: v.detach().clone() for k, v in target.model.state_dict().items()}
        self.fingerprint = state_hash(target.model)
        self.probe = self._look()

    def _look(self) -> Tensor:
        """Return scores (N, terms, K), always in fp32 and in the smallest batches: the target's own size may shrink."""
        before, self.target.batch_size = self.target.batch_size, PAD
        try:
            with self.target.in_fp32():
                return self.target.clean(self.x)
        finally:
            self.target.batch_size = before

    def changed(self) -> str:
        """Name what is different now; empty if nothing is."""
        model = self.target.model
        if state_hash(model) != self.fingerprint:
            return changed_parts(model, self.original) or "some weight"
        if not self.target.surface.random:
            now = self._look()
            if not came_again(now, self.probe, drift(now.device)):
                return "what it returns for the same images"
        return ""
