"""The search copy's passes as CUDA graphs: a pass is one launch, not one for each of its few hundred operations.

A replay is proven on the first images against the pass that it was made of, as compiled passes are: on an H100 the two
were seen to differ in last bits. A size of batch is recorded once it has come often enough to be worth it; what cannot
be recorded stays as it is, and the record says why. Never recorded are the passes of a surrogate, second looks in fp32,
wrapped libraries, random models, the guard, the audit and the referee.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from arena.cheaper import in_a_line
from arena.check import PROBE
from arena.looking import differ, looks, uncounted
from arena.surface import Reading
from arena.target import Target

#: A pass is recorded when it has been made so often. On an H100 ``quick`` in bf16 on a ResNet-18 takes 1.36 and 1.52
#: seconds so, 1.69 and 1.83 with 32, 1.69 and 1.75 where nothing is recorded.
OFTEN = 6
#: Passes that are kept recorded; those that have not been made for longest make room.
KEPT = 64


class Graphs:
    """Reads a model as the reader that it is given does, by recorded passes where a size of batch comes again."""

    def __init__(self, read: Callable[[Tensor], Reading]) -> None:
        self._read = read
        self._seen: Counter[tuple[int, bool]] = Counter()
        self._made: OrderedDict[tuple[int, bool], Callable[[Tensor], Any]] = OrderedDict()
        self._pool: Any = None
        self.often = OFTEN
        """Passes of a size after which it is recorded."""
        self.given_up = ""
        """Why no pass is recorded any more; empty while they are."""

    def __call__(self, x: Tensor) -> Reading:
        """Read images (N, C, H, W); from call to call only N may change."""
        return self._pass(x, self.often)

    def at_once(self, x: Tensor) -> Reading:
        """Read images, and record the pass if it is not yet recorded."""
        return self._pass(x, 1)

    def forget(self) -> None:
        """Give back the memory of all recorded passes."""
        self._made.clear()
        self._seen.clear()

    def _pass(self, x: Tensor, often: int) -> Reading:
        key = (len(x), x.requires_grad)
        if key not in self._made and not self.given_up:
            self._seen[key] += 1
            if self._seen[key] >= often:
                self._record(key, x)
        made = self._made.get(key)
        if made is None:
            return self._read(x)
        self._made.move_to_end(key)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(torch.clone)  # what is replayed is written where the last one was
        return Reading(*tree_map(torch.clone, made(x)))

    def _record(self, key: tuple[int, bool], x: Tensor) -> None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        sample = x.detach().clone().requires_grad_(x.requires_grad)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of autograd, about the stream on which passes are tried before
                self._made[key] = torch.cuda.make_graphed_callables(
                    lambda x: self._read(x).parts(), (sample,), allow_unused_input=True, pool=self._pool
                )
        except Exception as e:  # code that looks at its numbers, or a full memory: then passes go on as they were
            self.given_up = in_a_line(e)
            self._made.clear()
        while len(self._made) > KEPT:
            self._made.popitem(last=False)


def recordable(target: Target) -> bool:
    """Tell whether passes can be recorded: on a GPU, and where they draw nothing."""
    return torch.device(target.device).type == "cuda" and not target.surface.random


def record_passes(target: Target, x: Tensor) -> str:
    """Let a target's passes be recorded; return why they are not, empty if they are.

    Args:
        target: whose passes; ``graphs`` is set.
        x: clean images (N, C, H, W), of which ``PROBE`` are compared on.
    """
    with uncounted(target):
        try:
            plain = looks(target, x, PROBE)
            target.graphs = made = Graphs(target.compiled or target.reader)
            made.often = 1
            why = differ(plain, looks(target, x, PROBE), target.precision, "recorded") or made.given_up
            made.often = OFTEN
        except Exception as e:  # foreign code may mind; then passes stay as they are, and the record says why
            why = in_a_line(e)
    if why:
        target.graphs = None
    return why
