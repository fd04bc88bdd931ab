"""Arena's attacks as the reference AutoAttack would run them: without arena's engine, its batches and its search copy.

The model is eager and in fp32, batches are the survivors in their order, and no batch is refilled. A row that is broken
stays in its batch, and its passes are made and counted, until the run is over for all; broken rows are dropped where
the reference drops them: between attacks, restarts and targets, and inside Square at each query. Square asks for every
proposal, known or not (``asking_all``). Every number an attack uses is a row's own, so each point's outcome is what the
engine finds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from arena_attacks.square import Square
from torch import Tensor

from arena.attack import IteratedAttack, State
from arena.errors import ArenaError
from arena.target import Target

#: Rows a batch: the reference's default.
BATCH = 250
#: Attacks whose reference queries only what still stands.
DROPS_AT_ONCE = ("square",)


@dataclass
class Driven:
    """What a plain run handed over, by row."""

    x_adv: Tensor
    """(N, C, H, W)."""
    forwards: int = 0
    """Rows, those of broken points that stayed in their batch among them."""
    backwards: int = 0
    finished: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """(N,) bool."""


def asking_all(attack: IteratedAttack) -> IteratedAttack:
    """Let Square ask for proposals whose answer it knows, too, as the reference does; other attacks do already."""
    if isinstance(attack, Square):
        attack.memory = None
    return attack


def drive(attack: IteratedAttack, name: str, target: Target, x: Tensor, y: Tensor, index: Tensor) -> Driven:
    """Drive an attack whose rows move in step over points (N, C, H, W), ``BATCH`` at a time.

    Args:
        attack: of runs of equal length: Auto-PGD, FAB, Square.
        name: the attack's registered name.
        target: the eager model.
        x: clean images in [0, 1].
        y: labels (N,).
        index: data-set indices (N,), keys of the random streams.

    Raises:
        ArenaError: an attack that has no runs.
    """
    made = Driven(x.clone(), finished=torch.zeros_like(y, dtype=torch.bool))
    runs, length = shape(attack, name)
    for rows in torch.arange(len(y), device=y.device).split(BATCH):
        at, state = rows, _begin(attack, target, x[rows], y[rows], index[rows])
        for _ in range(runs):
            for _ in range(length):
                state = _step(attack, target, state, at, made)
                if name in DROPS_AT_ONCE:
                    at, state = _survivors(at, state, made)
                    if not len(at):
                        break
            at, state = _survivors(at, state, made)
            if not len(at):
                break
    return made


def shape(attack: IteratedAttack, name: str) -> tuple[int, int]:
    """Return of how many runs an attack is made, and of how many asks each.

    Raises:
        ArenaError: it has no runs.
    """
    runs = getattr(attack, "runs", None) or getattr(attack, "restarts", None)
    if not isinstance(runs, int):
        raise ArenaError(f"attack '{name}': the plain driver knows attacks made of runs: apgd_*, fab_t, square")
    return runs, attack.passes()[0] // runs


def _begin(attack: IteratedAttack, target: Target, x: Tensor, y: Tensor, index: Tensor) -> State:
    return {**attack.start(index, x, y, target.clean(x)), "x": x, "y": y, "index": index}


def _step(attack: IteratedAttack, target: Target, state: State, at: Tensor, made: Driven) -> State:
    query = attack.ask(state)
    answer = target.answer(query, state["y"])
    made.forwards += query.forwards * len(at)
    if answer.grad is not None:
        wanting = int(query.grad.sum()) if isinstance(query.grad, Tensor) else len(at)
        made.backwards += query.backwards * wanting
    state = {**attack.tell(state, answer), "x": state["x"], "y": state["y"], "index": state["index"]}
    first = state["done"] & ~made.finished[at]
    if bool(first.any()):
        made.x_adv[at[first]] = state["best"][first]
        made.finished[at[first]] = True
    return state


def _survivors(at: Tensor, state: State, made: Driven) -> tuple[Tensor, State]:
    keep = (~made.finished[at]).nonzero().squeeze(1)
    return at[keep], {k: v.index_select(0, keep) for k, v in state.items()}
