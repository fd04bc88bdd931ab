"""The search copy's passes as compiled code (``torch.compile``): the same sums with fewer trips to memory.

What is compiled is proven on the first images, in batches of several sizes, against the copy that it was made of; where
it cannot be made or differs, passes stay eager, and the record says why. Eager always are the passes of a surrogate,
second looks in fp32, wrapped libraries, the guard, the audit and the referee: a trace knows one mode and one precision.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arena.batches import PAD
from arena.cheaper import in_a_line
from arena.check import PROBE
from arena.looking import differ, looks, uncounted
from arena.points import Rows
from arena.surface import Reader, Reading, Surface
from arena.target import Target
from arena.threads import SMALL_IMAGE

#: Rows of the batches that a row must come out of bit for bit alike; what vectors of 16 leave over is among them.
SIZES = (PAD, 24, 40, 72)


class Compiled:
    """Reads a model as its ``Reader`` does, by code of its own for passes with and without gradient."""

    def __init__(self, reader: Reader) -> None:
        def read(x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            return reader(x).parts()

        self._eager = reader
        self.given_up = ""
        """Why passes are eager from some pass on; empty while they are not."""
        # Whole or not at all, so that no part of it is eager unseen. Without gradient, weights are packed beforehand.
        self._forward: Any = torch.compile(read, fullgraph=True, options={"freezing": True})
        self._both: Any = torch.compile(read, fullgraph=True)

    def __call__(self, x: Tensor) -> Reading:
        """Read images (N, C, H, W); from call to call only N may change.

        Code that has to be compiled anew and cannot be does not end an attack: it goes on eagerly.
        """
        if self.given_up:
            return self._eager(x)
        x = x.contiguous()  # one layout, one trace
        torch._dynamo.mark_dynamic(x, 0)
        try:
            return Reading(*(self._both if x.requires_grad else self._forward)(x))
        except torch._dynamo.exc.TorchDynamoException as e:
            self.given_up = in_a_line(getattr(e, "inner_exception", e))
            return self._eager(x)


def unfit(surface: Surface, x: Tensor | Rows) -> str:
    """Return why a model's passes on images (N, C, H, W) are not worth a try; empty if they are."""
    if surface.random:
        return "the model is random"
    first = x[:1]
    if first.device.type == "cpu" and first.numel() <= SMALL_IMAGE:
        return f"pictures of up to {SMALL_IMAGE} numbers take no less time so"
    return ""


def compile_passes(target: Target, x: Tensor) -> str:
    """Compile a target's passes; return why they stay eager, empty if they do not.

    Args:
        target: whose passes; ``compiled`` is set.
        x: clean images (N, C, H, W), of which ``PROBE`` are compared on.
    """
    if why := unfit(target.surface, x):
        return why
    with uncounted(target), _quietly():
        try:
            eager = looks(target, x, PROBE)
            target.compiled = Compiled(target.reader)
            why = differ(eager, looks(target, x, PROBE), target.precision, "compiled") or uneven(target, x, SIZES)
            why = why or target.compiled.given_up
        except Exception as e:  # a compiler that is missing, or code that it does not take: then it is left alone
            why = in_a_line(e)
    if why:
        target.compiled = None
    return why


def uneven(target: Target, x: Tensor, sizes: tuple[int, ...]) -> str:
    """Return in which of these batch sizes compiled passes give a row other bits than in one of ``PROBE``, if in any.

    Where eager passes do so too, it is the model: a sigmoid of one number a row is computed in another way where the
    batch fills no vector.
    """
    with uncounted(target), _unrecorded(target):
        for size in sizes:
            if not _even(target, x, size):
                compiled, target.compiled = target.compiled, None
                try:
                    model_is_even = _even(target, x, size)
                finally:
                    target.compiled = compiled
                if model_is_even:
                    return f"compiled passes give a row other last bits in a batch of {size}"
    return ""


def _even(target: Target, x: Tensor, size: int) -> bool:
    usual, other = looks(target, x, PROBE), looks(target, x, size)
    rows = torch.arange(size, device=x.device) % PROBE
    return all(torch.equal(a[rows], b) for a, b in zip(usual.parts(), other.parts(), strict=True))


@contextmanager
def _unrecorded(target: Target) -> Iterator[None]:
    """Make passes that are not replayed ones."""
    graphs, target.graphs = target.graphs, None
    try:
        yield
    finally:
        target.graphs = graphs


@contextmanager
def _quietly() -> Iterator[None]:
    """Compile within this process, forget what was compiled before, and say nothing on the way."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # a pool of processes would hear Ctrl-C
    torch.compiler.reset()  # copies of earlier matches would count against the limit of recompilations
    speaker = logging.getLogger("torch")
    before = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about itself; what it made is proven
            yield
    finally:
        speaker.setLevel(before)
