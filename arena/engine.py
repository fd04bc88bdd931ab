"""Runs attacks: a queue of rows, compaction, refill, exact costs, snapshots.

An iterated attack's rows enter from a queue, share batches at different iterations, and leave the moment they are done.
Outcomes do not depend on the batch size, because every number a row uses is its own (``arena.attack``, ``arena.rng``).
"""

from __future__ import annotations

import operator
import random
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arena.attack import IteratedAttack, State, Unsupported, bound, layout
from arena.errors import ArenaError, PluginError
from arena.rng import Stream
from arena.target import Target
from arena.threat import Threat

#: State keys the engine owns beside ``x, y, index``: passes made for each row.
FORWARDS, BACKWARDS = "_forwards", "_backwards"
#: And forwards made once more in fp32 by a search in lower precision, which are not among the others.
AGAIN = "_again"
#: More rows than a batch are at work only as long as the points they ask for hold at most so many numbers.
NUMBERS = 2**22
#: Optional state key (N,) bool: some query for the row was a break (``arena.auditing.observing``).
SEEN = "_seen"


@dataclass
class Outcome:
    """What an attack handed over, by row of what it was given; nothing here is believed yet."""

    x_adv: Tensor
    """(N, C, H, W); the clean image where the attack gave nothing."""
    attempted: Tensor
    """(N,) bool: the attack finished the row."""
    forwards: Tensor
    """(N,) int64."""
    backwards: Tensor
    """(N,) int64."""
    claim: Tensor
    """(N,) int8: 1 claimed broken, 0 claimed not, -1 nothing claimed."""
    seen: Tensor
    """(N,) bool: the row was finished, and a query was seen to break it."""
    again: Tensor
    """(N,) int64: forwards that were made once more in fp32, beside ``forwards``."""
    moved: bool = False
    """Some query, or some returned point, differed from x."""
    malformed: dict[str, int] | None = None
    """Rows that are no images at all, by kind (wrong shape or dtype)."""
    most: int = 0
    """Most forwards of a row of an ask/tell attack; 0 for plain attacks."""
    gives_up: bool = False
    """The attack may leave a row earlier though it saw no break (``AttackSpec.gives_up``)."""
    error: str = ""
    """Why the attack stopped, if it crashed."""
    trace: str = ""
    """Traceback of the crash, for the plugin's author."""

    @classmethod
    def empty(cls, x: Tensor) -> Outcome:
        """Make an outcome in which nothing has happened yet."""
        zeros = torch.zeros(len(x), dtype=torch.int64)
        claim = torch.full((len(x),), -1, dtype=torch.int8)
        return cls(x.clone(), zeros.bool(), zeros.clone(), zeros.clone(), claim, zeros.bool(), zeros.clone())

    def enter(self, place: Mapping[int, int], rows: Mapping[int, Row]) -> None:
        """Put in finished rows by data-set index, those that ``place`` gives a position."""
        found = [(place[i], *row) for i, row in rows.items() if i in place]
        if not found:
            return
        places, x_adv, *numbers = zip(*found, strict=True)
        k = torch.tensor(places)
        self.x_adv[k.to(self.x_adv.device)] = torch.stack(x_adv).to(self.x_adv)
        self.attempted[k] = True
        every = (self.forwards, self.backwards, self.claim, self.seen, self.again)
        for kept, row in zip(every, numbers, strict=True):
            kept[k] = torch.tensor(row).to(kept.dtype)

    @property
    def early(self) -> Tensor:
        """(N,) bool, on the CPU: left before their passes were spent, because a break was seen.

        Or, where the model is not random, because an attack knew what the rest would show (``IteratedAttack``).
        """
        early = self.forwards.cpu() < self.most
        return early & self.seen.cpu() if self.gives_up else early


class Keeper(Protocol):
    """Keeps finished rows and snapshots of one attack, so that a killed run goes on (``arena.journal``)."""

    def restore(self) -> tuple[dict[int, Any], State | None, bool]:
        """Return finished rows by data-set index, the last snapshot, and whether a query had left x."""

    def finished(self, rows: dict[int, Any], moved: bool) -> None:
        """Keep finished rows; may buffer until the next snapshot."""

    def due(self) -> bool:
        """Tell whether a snapshot should be taken now."""

    def snapshot(self, state: State | None, moved: bool) -> None:
        """Write finished rows and the state of active ones."""


class Forgetful:
    """Keeps nothing."""

    def restore(self) -> tuple[dict[int, Any], State | None, bool]:
        return {}, None, False

    def finished(self, rows: dict[int, Any], moved: bool) -> None: ...

    def due(self) -> bool:
        return False

    def snapshot(self, state: State | None, moved: bool) -> None: ...


#: Called with (forwards so far, rows finished so far).
Progress = Callable[[int, int], None]
#: Seconds between two calls of it.
TELL_EVERY = 0.2

#: One finished row: (x_adv (C, H, W), forwards, backwards, claim, seen, again).
Row = tuple[Tensor, int, int, int, int, int]


def run_iterated(
    attack: IteratedAttack,
    target: Target,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    clean: Tensor | None = None,
    keeper: Keeper | None = None,
    progress: Progress | None = None,
    until: Callable[[], bool] | None = None,
    draws: int = 1,
) -> Outcome:
    """Drive an ask/tell attack over rows.

    Args:
        attack: made by its spec's factory.
        target: the search copy.
        x: clean images (N, C, H, W) in [0, 1].
        y: labels (N,).
        index: data-set indices (N,), keys of the random streams.
        clean: scores of the clean images (N, terms, K); computed, uncounted, if not given and needed.
        keeper: where progress is kept.
        progress: called a few times a second with (forwards, rows finished); a finished row counts as having cost the
            most a row can cost, so that forwards over ``len(x) * bound(attack, draws)`` is the share done.
        until: asked now and then; True stops the run with what is known.
        draws: passes that the model's logits are averaged over at least; above 1 for random models, so that no row
            leaves at one lucky draw.

    Returns:
        An ``Outcome``; an exception in the attack is contained and named there.
    """
    keeper = keeper or Forgetful()
    if clean is None and getattr(attack, "needs_clean", True):
        clean = target.clean(x)
    elif clean is None:
        clean = x.new_empty(len(x), 0, 0)
    outcome = Outcome.empty(x)
    place = {int(i): k for k, i in enumerate(index.tolist())}
    finished, state, outcome.moved = keeper.restore()
    outcome.enter(place, finished)
    if state is not None:
        state = {k: v.to(x.device) for k, v in state.items()}
        state.setdefault(AGAIN, torch.zeros_like(state["index"]))  # a snapshot of before it was counted
        if not _fits(state, attack, index[:1], x[:1], y[:1], clean[:1]):
            state = None  # another version of the attack left it: its rows begin again
    if state is not None:
        live = torch.tensor([i in place and i not in finished for i in state["index"].tolist()], dtype=torch.bool)
        state = _keep(state, live.to(x.device)) if bool(live.any()) else None
    most, told = bound(attack, draws), time.monotonic()
    outcome.most = most
    active = set(state["index"].tolist()) if state is not None else set()
    queue = [k for i, k in place.items() if i not in finished and i not in active]
    done = len(finished)
    counts: Callable[[State], Tensor] | None = getattr(attack, "counts", None) if target.precision != "fp32" else None
    reached: Callable[[State], Tensor] = operator.itemgetter(FORWARDS)
    if draws == 1:
        reached = getattr(attack, "reached", reached)
    width = 0
    try:
        while queue or state is not None:
            size = 0 if state is None else len(state["y"])
            if queue and not width:
                width = _width(attack, target, index[:1], x[:1], y[:1], clean[:1])
            # Refill when an eighth of the places is free: starting rows one by one costs more than it saves.
            if queue and (size == 0 or width - size >= max(width // 8, 1)):
                rows = torch.tensor(queue[: width - size])
                queue = queue[width - size :]
                fresh = _begin(attack, index[rows], x[rows], y[rows], clean[rows])
                state = fresh if state is None else _merge(state, fresh)
            assert state is not None
            query = attack.ask(state)
            if draws > 1:
                query = query.averaged(draws)
            if counts is not None:
                query = replace(query, counts=counts(state))
            if not outcome.moved:
                outcome.moved = bool((query.points != state["x"].unsqueeze(1)).any())
            answer = target.guessed(query, state["y"])
            # To wait for a GPU costs more than to tell an attack twice: there it is told first what is not yet settled.
            new = attack.tell(state, answer) if target.lazy else None
            if new is None or (answer.doubt is not None and bool(answer.doubt.any())):
                answer = target.settled(query, state["y"], answer)
                new = attack.tell(state, answer)
            forwards, backwards = state[FORWARDS] + query.forwards, state[BACKWARDS]
            if answer.grad is not None:
                backwards = backwards + query.backwards * (query.grad if isinstance(query.grad, Tensor) else 1)
            again = state[AGAIN] if answer.again is None else state[AGAIN] + answer.again
            owned = {"x": state["x"], "y": state["y"], "index": state["index"], AGAIN: again}
            state = {**new, **owned, FORWARDS: forwards, BACKWARDS: backwards}
            leaving = state["done"]
            if bool(leaving.any()):
                rows_done = _finish(state, leaving)
                outcome.enter(place, rows_done)
                keeper.finished(rows_done, outcome.moved)
                done += len(rows_done)
                state = _keep(state, ~leaving) if len(rows_done) < len(leaving) else None
            if progress and time.monotonic() - told >= TELL_EVERY:
                told = time.monotonic()
                progress(done * most + (0 if state is None else int(reached(state).sum())), done)
            if keeper.due():
                keeper.snapshot(state, outcome.moved)
            if until and until():
                break
        keeper.snapshot(state, outcome.moved)
    except KeyboardInterrupt:
        keeper.snapshot(state, outcome.moved)
        raise
    except Unsupported:
        raise
    except ArenaError as e:
        outcome.error = str(e)
    except (Exception, SystemExit) as e:  # the attack's code or the defense's: contained and named
        outcome.error, outcome.trace = f"{type(e).__name__}: {e}", traceback.format_exc()
    return outcome


def _begin(attack: IteratedAttack, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
    zeros = torch.zeros(len(y), dtype=torch.int64, device=x.device)
    made = attack.start(index, x, y, clean)
    passes = {key: zeros.clone() for key in (FORWARDS, BACKWARDS, AGAIN)}
    return {**made, "x": x, "y": y, "index": index, **passes}


def _fits(state: State, attack: IteratedAttack, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> bool:
    """Tell whether rows of a snapshot are of this version of the attack, by one row begun anew."""
    try:
        fresh = _begin(attack, index, x, y, clean)
    except (Exception, SystemExit):  # the attack's code; its rows begin again, where the same error is met and named
        return False
    return layout(state) == layout(fresh)


def _width(attack: IteratedAttack, target: Target, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> int:
    """Return how many rows are at work at a time: more than a batch, so that many survivors make whole batches.

    How many points a row asks for is seen by one row's first question.
    """
    points = attack.ask(_begin(attack, index, x, y, clean)).points
    return max(target.batch_size, min(target.live, NUMBERS // max(points.numel(), 1)))


def _merge(state: State, fresh: State) -> State:
    if state.keys() != fresh.keys():
        odd = sorted(state.keys() ^ fresh.keys())
        raise PluginError(f"the attack's state changed its keys between start and tell: {', '.join(odd)}")
    return {k: torch.cat((v, fresh[k])) for k, v in state.items()}


def _keep(state: State, mask: Tensor) -> State:
    rows = mask.nonzero().squeeze(1)
    return {k: v.index_select(0, rows) for k, v in state.items()}


def _finish(state: State, leaving: Tensor) -> dict[int, Row]:
    rows = leaving.nonzero().squeeze(1)
    best = state["best"].index_select(0, rows)
    if best.shape[1:] != state["x"].shape[1:] or not best.is_floating_point():
        raise PluginError(
            f"state['best'] is {best.dtype} {tuple(best.shape[1:])}, expected float {tuple(state['x'].shape[1:])}"
        )
    claims = state["claim"][rows].to(torch.int8).tolist() if "claim" in state else [-1] * len(rows)
    seen = state[SEEN][rows].int().tolist() if SEEN in state else [0] * len(rows)
    numbers = zip(
        state["index"][rows].tolist(),
        state[FORWARDS][rows].tolist(),
        state[BACKWARDS][rows].tolist(),
        claims,
        seen,
        state[AGAIN][rows].tolist(),
        strict=True,
    )
    return {i: (best[k], *row) for k, (i, *row) in enumerate(numbers)}


def run_plain(
    function: Callable[..., Any],
    target: Target,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    threat: Threat,
    stream: Stream,
    options: dict[str, Any],
    keeper: Keeper | None = None,
    progress: Progress | None = None,
    chunk: int = 128,
    until: Callable[[], bool] | None = None,
) -> Outcome:
    """Call a plain attack ``function(target, x, y, threat, budget, rng, **options)`` a chunk of rows at a time.

    It may return ``x_adv`` or ``(x_adv, claims)``. Global random generators are seeded for each chunk and restored,
    since wrapped libraries draw from them. Rows of a chunk share its passes: costs are exact in total, spread evenly by
    row. ``until`` is asked after each chunk; True stops the run with what is known.
    """
    keeper = keeper or Forgetful()
    outcome = Outcome.empty(x)
    place = {int(i): k for k, i in enumerate(index.tolist())}
    finished, _, outcome.moved = keeper.restore()
    outcome.enter(place, finished)
    waiting = [k for i, k in place.items() if i not in finished]
    done = len(finished)
    for start in range(0, len(waiting), chunk):
        rows = torch.tensor(waiting[start : start + chunk])
        clean = x[rows]
        before = (target.meter.forwards, target.meter.backwards)
        target.module.expect(clean)
        try:
            with _seeded(stream, int(index[rows[0]])):
                made = function(target, clean.clone(), y[rows].clone(), threat, None, stream, **options)
        except Unsupported:
            raise
        except ArenaError as e:
            outcome.error = str(e)
            break
        except (Exception, SystemExit) as e:  # a plugin's code: contained and named
            outcome.error, outcome.trace = f"{type(e).__name__}: {e}", traceback.format_exc()
            break
        x_adv, claims = made if isinstance(made, tuple) else (made, None)
        outcome.moved = outcome.moved or target.module.moved
        spent = (target.meter.forwards - before[0], target.meter.backwards - before[1])
        if not isinstance(x_adv, Tensor) or x_adv.shape != clean.shape or not x_adv.is_floating_point():
            got = f"{x_adv.dtype} {tuple(x_adv.shape)}" if isinstance(x_adv, Tensor) else type(x_adv).__name__
            outcome.malformed = {"shape": (outcome.malformed or {}).get("shape", 0) + len(rows)}
            outcome.error = f"returned {got}, expected float {tuple(clean.shape)}"
            break
        if claims is not None and len(claims) != len(rows):
            outcome.error = f"returned {len(claims)} claims for {len(rows)} points"
            break
        x_adv = x_adv.detach().to(clean.device, torch.float32)
        outcome.moved = outcome.moved or bool((x_adv != clean).any())
        taken: dict[int, Row] = {}
        for j, k in enumerate(rows.tolist()):
            cost = [s // len(rows) + (j < s % len(rows)) for s in spent]
            claim = -1 if claims is None else int(bool(claims[j]))
            taken[int(index[k])] = (x_adv[j], cost[0], cost[1], claim, 0, 0)
        outcome.enter(place, taken)
        keeper.finished(taken, outcome.moved)
        keeper.snapshot(None, outcome.moved)
        done += len(rows)
        if progress:
            progress(target.meter.forwards, done)
        if until and until():
            break
    return outcome


class _seeded:  # noqa: N801 - a context manager, used like a function
    """Seed the global generators from a stream, and put them back."""

    def __init__(self, stream: Stream, row: int) -> None:
        self.seed = int(stream.bits(torch.tensor([row]), 0, 0, 1)[0, 0])

    def __enter__(self) -> None:
        self.before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        random.setstate(self.before[0])
        np.random.set_state(self.before[1])
        torch.set_rng_state(self.before[2])
