"""How fast a search copy's bare passes are, and at which batch size: measured once a match, in 0.2 to 10 seconds.

Out of it come the batch size, the time told before the start (``arena.cost``), and the bare cost of an attack: what its
forwards and backwards would have taken with nothing around them. A result's seconds over its bare seconds is the
engine's overhead. Batch sizes change no outcome, so a timing may choose one.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from arena.batches import STEP, out_of_memory, padded
from arena.contender import seeded
from arena.target import DEFAULT_BATCH, Target

#: Batch sizes that are tried, in this order; before them one of ``STEP`` rows, which says what they will take.
SIZES = (32, 64, 128, 256, 512, 1024)
#: Timed pairs of passes a size, after one that is not: at least, and at most in ``A_SIZE`` seconds.
PASSES, MOST, A_SIZE = 2, 12, 0.01
#: In a long match those that may be the best are timed on, in turn, so that what else the machine does for a while
#: meets all alike: up to so many pairs a size.
TURNS = 6
#: Seconds in which all sizes are tried, or a share of what the match can take, up to so many seconds. What a first
#: batch of ``STEP`` rows takes is not among them.
ENOUGH, WORTH, TOO_LONG = 0.2, 0.002, 10.0
#: Seconds that an attack's and the engine's own work takes for each batch, as measured on digits with square; so a
#: small model's batches are large.
OWN = 1e-3
#: Where that time is over, a batch may have so many rows untried, as far as memory goes and a gradient of them takes no
#: longer than ``A_STEP``: up to there a row cost less in larger batches (ResNet-18: 9 % less at 128 rows than at 32).
UNTRIED = 128
#: Seconds that a row's gradient may add up to over all rows at work: between two steps nothing is kept and nobody looks
#: at the clock.
A_STEP = 2.0
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

    def shared(self, workers: int) -> Pace:
        """Return the pace of so many devices that are all as fast as this one."""
        return Pace(self.batch_size, self.forward / workers, self.both / workers)


def measure(target: Target, x: Tensor, batch_size: int | None = None, passes: tuple[int, int] = (0, 0)) -> Pace | None:
    """Measure a target's bare passes on images (N, C, H, W), at the given batch size or at the best.

    The best is the one with the most rows a second among ``SIZES`` up to N that fit into memory and into the time;
    where the time is over while sizes still gain, it is ``UNTRIED`` rows. The passes of the largest batch that was
    timed stand for those of a batch, chosen or given, that the time did not reach. Sets the target's batch size.
    Nothing is counted, and the global generator is left as it was. ``passes`` are the most forwards and backwards of
    the match: for a long one more sizes are tried.

    Returns:
        The pace; None for a model that cannot be measured, say because its gradient raises: it gets the default size.
    """
    wanted = None if batch_size is None else padded(batch_size)
    try:
        with seeded(0):
            found = _measured(target, x, wanted, passes)
    except Exception:  # the attacks will meet the same, and say so each for itself
        target.batch_size = wanted or DEFAULT_BATCH
        return None
    target.batch_size = found.batch_size
    return found


def _measured(target: Target, x: Tensor, wanted: int | None, passes: tuple[int, int]) -> Pace:
    most = min(padded(len(x)), wanted or SIZES[-1])
    small = _timed(target, x, STEP, ENOUGH, 0.0)
    enough = max(ENOUGH, min(WORTH * small.pace.bare(*passes), TOO_LONG))
    last, spent, full, over = small, 0.0, 0, False
    room = 0.0
    found: list[_Timed] = []
    for size in (*(s for s in SIZES if s < most), most):
        if wanted is None and found and found[-1].cost > HOPELESS * min(f.cost for f in found):
            break
        over = spent + (1 + PASSES) * size * (last.pace.forward + last.pace.both) > enough
        if over:
            break
        try:
            if wanted is None:
                room = room or _room(target, x)
            if wanted is None and size > room:
                full = size
                break
            last = _timed(target, x, size, enough, spent)
        except Exception as e:  # only a full memory is met here; all else goes on
            if not out_of_memory(e):
                raise
            full = size
            break
        found.append(last)
        spent += last.took
    if wanted is not None:
        while full and wanted >= full:
            wanted = padded(wanted // 2)
        return replace(last.pace, batch_size=wanted)
    if full and not found:  # the smallest does not fit
        return small.pace
    _go_on(target, x, found, enough - spent if enough > ENOUGH else 0.0)
    least = min((f.cost for f in found), default=0.0)
    best = ([f for f in found if f.cost <= least * NO_SLOWER] or [small])[-1]
    if over and best is last:
        rows = min(UNTRIED, most, int(A_STEP / best.pace.both))
        if rows > SIZES[0]:
            rows = int(min(rows, room or _room(target, x)))
        rows = rows if rows == most else rows // SIZES[0] * SIZES[0]
        return replace(best.pace, batch_size=max(best.size, min(SIZES[0], most), rows))
    return best.pace


def _room(target: Target, x: Tensor) -> float:
    """Return how many rows fit into the memory that a batch may take."""
    return SHARE * free_memory(target.device) / max(memory_of_a_row(target, x[:STEP]), 1.0)


@dataclass
class _Timed:
    """One size, timed."""

    size: int
    """Rows a pass."""
    times: dict[bool, list[tuple[float, float]]] = field(default_factory=lambda: {False: [], True: []})
    """Wall and CPU seconds of forwards, and of forwards with gradient and their backwards; the first of each does not
    count."""
    took: float = 0.0
    """Seconds that the timing took."""

    @property
    def cost(self) -> float:
        """CPU seconds a row of the fastest passes, which other work on the machine disturbs least: sizes are compared
        by it."""
        return (sum(min(work for _, work in t[1:]) for t in self.times.values()) + OWN) / self.size

    @property
    def pace(self) -> Pace:
        """What a row takes, by the medians."""
        forward, both = (statistics.median(wall for wall, _ in t[1:]) / self.size for t in self.times.values())
        return Pace(self.size, forward, both)

    @property
    def turns(self) -> int:
        """Pairs of passes that count."""
        return len(self.times[True]) - 1

    def turn(self, target: Target, x: Tensor) -> None:
        """Time a pair of passes on images (N, C, H, W), repeated where they are too few."""
        rows = x[torch.arange(self.size, device=x.device) % len(x)]
        for grad, kept in self.times.items():
            kept.append(_seconds(partial(bare_pass, target, rows, grad), x.device))


def _timed(target: Target, x: Tensor, size: int, enough: float, spent: float) -> _Timed:
    made, began = _Timed(size), time.perf_counter()
    for turn in range(1 + MOST):
        made.turn(target, x)
        made.took = time.perf_counter() - began
        if turn and made.took > A_SIZE and (turn >= PASSES or spent + made.took > enough):
            break
    return made


def _go_on(target: Target, x: Tensor, found: list[_Timed], left: float) -> None:
    """Time sizes that may be the best again while time is left."""
    least = min((f.cost for f in found), default=0.0)
    close = [f for f in found if f.cost <= HOPELESS * least]
    while len(close) > 1 and min(f.turns for f in close) < TURNS:
        left -= sum(f.size * (f.pace.forward + f.pace.both) for f in close)
        if left < 0:
            return
        for each in close:
            each.turn(target, x)


def bare_pass(target: Target, x: Tensor, grad: bool) -> None:
    """Run the model once on a batch, in the target's precision, with nothing around it; and once back."""
    leaf = x.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = target.bare(leaf)
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
