"""How fast a model's bare passes are, and at which batch size: measured once a match.

The bare cost of an attack is what its forwards and backwards would have taken with nothing around them; a result's
seconds over its bare seconds is the engine's overhead. Batch sizes change no outcome, so a timing may choose one.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from arena.target import DEFAULT_BATCH, PAD, Target, out_of_memory, padded

#: Batch sizes that are tried, in this order.
SIZES = (32, 64, 128, 256, 512, 1024)
#: Timed pairs of passes a size, after one that is not: at least, and at most in ``A_SIZE`` seconds.
PASSES, MOST, A_SIZE = 3, 12, 0.1
#: Seconds in which all sizes are tried.
ENOUGH = 1.0
#: Seconds that an attack's and the engine's own work takes for each batch, as measured on digits with square; so a
#: small model's batches are large.
OWN = 1e-3
#: A larger batch counts as no slower up to here.
NO_SLOWER = 1.05
#: From here on a larger batch is not tried.
HOPELESS = 1.2
#: Share of the free memory that a batch may take.
SHARE = 0.25


@dataclass(frozen=True)
class Pace:
    """What bare passes of a model cost."""

    batch_size: int
    """Rows a pass."""
    forward: float
    """Seconds a row of a forward without gradient, median."""
    both: float
    """Seconds a row of a forward with gradient and its backward, median."""

    def bare(self, forwards: int, backwards: int) -> float:
        """Return the seconds that so many forwards and backwards cost with nothing around them."""
        return max(forwards - backwards, 0) * self.forward + backwards * self.both


def measure(target: Target, x: Tensor, batch_size: int | None = None) -> Pace:
    """Measure a target's bare passes on images (N, C, H, W), at the given batch size or at the best.

    The best is the one with the most rows a second among ``SIZES`` up to N that fit into memory. Sets the target's
    batch size. A model that cannot be measured, say because its gradient raises, gets the default size and no costs.
    Random models draw numbers here; put the generator back if that matters.
    """
    try:
        found = _best(target, x) if batch_size is None else _fitting(target, x, padded(batch_size))
    except Exception:  # the attacks will meet the same, and say so each for itself
        found = Pace(padded(batch_size or DEFAULT_BATCH), 0.0, 0.0)
    target.batch_size = found.batch_size
    return found


def _best(target: Target, x: Tensor) -> Pace:
    most = min(padded(len(x)), SIZES[-1])
    limit, a_row = SHARE * free_memory(target.device), 0.0
    found: list[tuple[float, Pace]] = []
    began = time.perf_counter()
    for size in (*(s for s in SIZES if s < most), most):
        if found:
            least, last = min(f[0] for f in found), found[-1][1]
            spent = time.perf_counter() - began + (last.forward + last.both) * size * (1 + PASSES)
            if spent > ENOUGH or found[-1][0] > least * HOPELESS or a_row * size > limit:
                break
        try:
            a_row = a_row or memory_of_a_row(target, x[:PAD])
            found.append(_timed(target, x, size))
        except Exception as e:
            if not out_of_memory(e):
                raise
            break
    if not found:  # not even the smallest fits
        return _fitting(target, x, SIZES[0])
    least = min(f[0] for f in found)
    return [pace for fastest, pace in found if fastest <= least * NO_SLOWER][-1]


def _fitting(target: Target, x: Tensor, size: int) -> Pace:
    """Measure at a size, or at the next half that fits into memory."""
    while True:
        try:
            _, found = _timed(target, x, min(size, padded(len(x))))
        except Exception as e:
            if not out_of_memory(e) or size == PAD:
                raise
        else:
            return replace(found, batch_size=size)
        size = padded(size // 2)


def _timed(target: Target, x: Tensor, size: int) -> tuple[float, Pace]:
    """Return what a row costs at a size, to compare sizes by, and the median seconds of passes.

    What sizes are compared by is the fastest pass, in CPU seconds: these two other work on the machine disturbs least.
    """
    rows = x[torch.arange(size, device=x.device) % len(x)]
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    began = time.perf_counter()
    for turn in range(1 + MOST):
        for grad, kept in times.items():
            kept.append(_seconds(partial(bare_pass, target, rows, grad), x.device))
        spent = time.perf_counter() - began
        if spent > (ENOUGH if turn < PASSES else A_SIZE) and turn:
            break
    forward, both = (statistics.median(wall for wall, _ in t[1:]) / size for t in times.values())
    return (sum(min(work for _, work in t[1:]) for t in times.values()) + OWN) / size, Pace(size, forward, both)


def bare_pass(target: Target, x: Tensor, grad: bool) -> None:
    """Run the model once on a batch, in the target's precision, with nothing around it; and once back."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=target.precision == "bf16"):
        leaf = x.detach().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            out = target.model(leaf)
    if grad and out.requires_grad:
        torch.autograd.grad(out.sum(), leaf, allow_unused=True)


def _seconds(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the wall seconds of some work, and its CPU seconds, which on a GPU are wall seconds too."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if gpu:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - wall
    return took, took if gpu else time.process_time() - cpu


def memory_of_a_row(target: Target, x: Tensor) -> float:
    """Return the bytes that a row's forward keeps for its backward."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        kept[place] = max(kept.get(place, 0), tensor.nbytes)
        return tensor

    own = {p.untyped_storage().data_ptr() for p in (*target.model.parameters(), *target.model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        leaf = x.detach().requires_grad_(True)
        out = target.model(leaf)  # noqa: F841 - holds the graph until the sum is made
    return sum(size for place, size in kept.items() if place not in own) / len(x)


def free_memory(device: str) -> float:
    """Return the free bytes of a device; infinite where nobody says."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
