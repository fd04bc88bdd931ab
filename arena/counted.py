"""The meter, and the search copy as a plain module, for libraries that are wrapped: what they ask of it is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from arena.batches import pad


@dataclass
class Meter:
    """Rows passed through the model; padding is not counted."""

    forwards: int = 0
    """Rows of forward passes."""
    backwards: int = 0
    """Rows of gradient calls."""


class Queried(Protocol):
    """What is asked and keeps count (``arena.target.Target``)."""

    model: nn.Module
    meter: Meter


def plainly(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) in fp32 whose gradient will be contiguous.

    That of a channels-last model is not, and code that was not written for one takes views of it.
    """
    seen = x.float().view_as(x)
    if seen.requires_grad:
        seen.register_hook(lambda grad: grad.contiguous())
    return seen


class CountedModule(nn.Module):
    """The search copy as a plain module, for wrapped libraries: counts rows and notices whether any query left x.

    The model is deliberately not registered as a submodule: ``parameters()`` is empty, so a library's optimizer or
    ``train()`` call does not reach it.
    """

    def __init__(self, target: Queried) -> None:
        super().__init__()
        object.__setattr__(self, "_target", target)
        self.moved = False
        self._clean: set[bytes] = set()
        self.eval()

    def expect(self, x: Tensor) -> None:
        """Forget earlier queries; ``x`` (N, C, H, W) are the clean images."""
        self.moved = False
        self._clean = {row.tobytes() for row in x.detach().cpu().numpy()}

    def note(self, x: Tensor) -> None:
        """Note whether a query (N, C, H, W) differs from every clean image."""
        if not self.moved:
            self.moved = any(row.tobytes() not in self._clean for row in x.detach().float().cpu().numpy())

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        target: Queried = self._target  # type: ignore[assignment] # mypy takes a module's attributes for its parts
        self.note(x)
        count = x.shape[0]
        target.meter.forwards += count
        out: Tensor = target.model(pad(plainly(x)))[:count]
        if out.requires_grad:

            def counted(_grad: Tensor) -> None:
                target.meter.backwards += count

            out.register_hook(counted)
        return out
