"""The search copy's passes as compiled code (``torch.compile``): the same sums with fewer trips to memory.

What is compiled is proven on the first images, at two batch sizes, against the copy that it was made of; where it
cannot be made or differs, passes stay eager, and the record says why. The passes of a surrogate, second looks in fp32,
wrapped libraries, the guard, the audit and the referee are eager always: a trace knows one mode and one precision.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from arena.attack import Answer, Query
from arena.cheaper import BF16_SHARE, BF16_TOLERANCE, GRADIENT_TOLERANCE, TOLERANCE, in_a_line
from arena.check import PROBE
from arena.comparing import apart
from arena.points import Rows
from arena.surface import Reader, Reading, Surface
from arena.target import PAD, Meter, Target, pad
from arena.threads import SMALL_IMAGE

#: In bf16 two roundings of one gradient may differ by this share of its length.
BF16_GRADIENT_TOLERANCE = 0.5


class Compiled:
    """Reads a model as its ``Reader`` does, by code of its own for passes with and without gradient."""

    def __init__(self, reader: Reader) -> None:
        def read(x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
            seen = reader(x)
            return seen.logits, seen.heads, seen.gates

        # Whole or not at all, so that no part of it is eager unseen. Without gradient, weights are packed beforehand.
        self._forward: Any = torch.compile(read, fullgraph=True, options={"freezing": True})
        self._both: Any = torch.compile(read, fullgraph=True)

    def __call__(self, x: Tensor) -> Reading:
        """Read images (N, C, H, W); from call to call only N may change."""
        x = x.contiguous()  # one layout, one trace
        torch._dynamo.mark_dynamic(x, 0)
        return Reading(*(self._both if x.requires_grad else self._forward)(x))


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
    x = pad(x[:PROBE])
    counted = target.meter
    target.meter = Meter()
    try:
        with _quietly():
            eager = _looks(target, x)
            target.compiled = Compiled(target.reader)
            made = _looks(target, x)
            why = _differ(eager, made, target.precision) or _uneven(made, _looks(target, x[:PAD]))
    except Exception as e:  # a compiler that is missing, or code that it does not take: then it is left alone
        why = in_a_line(getattr(e, "inner_exception", e))
    finally:
        target.meter = counted
    if why:
        target.compiled = None
    return why


def _looks(target: Target, x: Tensor) -> tuple[Answer, Answer]:
    """Return what an attacker sees of the first images, without gradient and with the sum of all heads'."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    weights = x.new_ones(len(x), 1 + len(target.surface.heads))
    counts = y.bool()
    plain, slope = (
        target.answer(Query(x.unsqueeze(1), "ce", weights, grad=grad, counts=counts), y) for grad in (False, True)
    )
    return plain, slope


def _differ(eager: tuple[Answer, Answer], made: tuple[Answer, Answer], precision: str) -> str:
    """Return by what compiled passes differ from eager ones, more than roundings do; empty if they do not."""
    for a, b in zip(eager, made, strict=True):
        gaps = apart(_scores(a), _scores(b))
        off = ~(gaps <= (TOLERANCE if precision == "fp32" else BF16_TOLERANCE))
        if float(off.float().mean()) > (0.0 if precision == "fp32" else BF16_SHARE):
            return f"compiled passes differ from the eager ones by {float(gaps.max()):.2g} of the scores' spread"
    slope, other = eager[1].grad, made[1].grad
    assert slope is not None
    assert other is not None
    turned = float((slope - other).double().norm() / slope.double().norm().clamp_min(1e-30))
    if not turned <= (GRADIENT_TOLERANCE if precision == "fp32" else BF16_GRADIENT_TOLERANCE):
        return f"the compiled gradient differs from the eager one by {turned:.2g} of its length"
    return ""


def _uneven(all_rows: tuple[Answer, Answer], first: tuple[Answer, Answer]) -> str:
    """Return whether rows come out otherwise in a batch of another size; empty if not."""
    for many, few in zip(all_rows, first, strict=True):
        n = len(few.values)
        pairs = [(many.logits, few.logits), (many.grad, few.grad), (many.scores, few.scores)]
        if any(a is not None and b is not None and not torch.equal(a[:n], b) for a, b in pairs):
            return "compiled passes give a row other last bits in another batch"
    return ""


def _scores(answer: Answer) -> Tensor:
    """Return all scores, (N * terms, K)."""
    seen = answer.logits if answer.scores is None else answer.scores[:, 0]
    return seen.flatten(0, 1)


@contextmanager
def _quietly() -> Iterator[None]:
    """Compile within this process, forget what was compiled before, and say nothing on the way."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes would hear Ctrl-C
    torch.compiler.reset()  # copies of earlier matches would count against the limit of recompilations
    speaker = logging.getLogger("torch")
    before = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        speaker.setLevel(before)
