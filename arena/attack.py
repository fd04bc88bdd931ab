"""The ask/tell protocol of iterated attacks.

An attack says which points it wants to see (``ask``), the engine makes the passes, and the attack digests the answer
(``tell``). The engine owns batching: rows of one attack at different iterations share a batch, done rows leave at once,
new ones enter. So an attack keeps every number that belongs to a row, its iteration counter included, in its state, a
dict of tensors whose first dimension is the rows, and never makes a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from arena.rng import Stream
from arena.surface import Surface
from arena.surrogate import Surrogate
from arena.threat import Threat

State = dict[str, Tensor]


def layout(state: State) -> dict[str, tuple[int, ...]]:
    """Return of what shape a row's numbers are, by key."""
    return {key: tuple(rows.shape[1:]) for key, rows in state.items()}


#: Share of wrong draws at which an attack may let a point of a random model go. At a bare majority of 20 draws it would
#: be a coin toss whether 20 others confirm it; and an attack looks often, so some looks are lucky.
SURE = 0.9


class Unsupported(Exception):  # noqa: N818 (named like the status it leads to)
    """Raised by an attack's factory: it cannot attack this defense or threat model; the status is ``unsupported``."""


def _nothing_to_lend(name: str) -> None:
    raise Unsupported(f"no other model is at hand, '{name}' neither")


@dataclass(frozen=True)
class Setup:
    """What is the same for all rows of one attack in one match."""

    threat: Threat
    n_classes: int
    surface: Surface
    shape: tuple[int, int, int]
    """(C, H, W)."""
    stream: Stream
    """Random numbers; always drawn for the rows' data-set indices, ``state["index"]``."""
    lend: Callable[[str], None] = _nothing_to_lend
    """Makes another defense's model ready as a surrogate's ``source``; raises ``Unsupported`` where it cannot."""

    def term(self, head: str) -> int:
        """Return the position of ``head`` among the terms of an objective: 0 is the logits, heads follow in order.

        ``head`` is a name; ``logits`` or an empty string mean the main output.

        Raises:
            Unsupported: the surface has no such head.
        """
        if head in ("", "logits"):
            return 0
        names = list(self.surface.heads)
        if head not in names:
            raise Unsupported(f"no head '{head}' on the surface (heads: {', '.join(names) or 'none'})")
        return 1 + names.index(head)

    @property
    def terms(self) -> int:
        """Number of score vectors: the logits and each head."""
        return 1 + len(self.surface.heads)


@dataclass(frozen=True)
class GateTerm:
    """What an objective wants of the gates: minus the binary cross-entropy between each gate and a wanted value.

    Gates stand in the surface's order. A gate with many values a row counts by the mean over them.
    """

    weights: Tensor
    """(N, G), not negative; 0 switches a gate off."""
    wanted: Tensor
    """(N, G) in [0, 1]."""
    tolerance: float = 0.0
    """A value within this distance of the wanted one is as good as it: its term is 0, without a gradient."""

    def rows(self, index: Tensor) -> GateTerm:
        """Return the term for a subset of rows."""
        return GateTerm(self.weights[index], self.wanted[index], self.tolerance)


@dataclass(frozen=True)
class Query:
    """Points an attack wants to see."""

    points: Tensor
    """(N, m, C, H, W): m points for each row."""
    objective: str | None = None
    """Function in ``arena.objectives``, or ``package.module:function``, to be increased; None: logits only."""
    weights: Tensor | None = None
    """(N, terms): the objective is summed over logits and heads with these weights; None: logits only."""
    target: Tensor | None = None
    """(N,) class for targeted objectives; (N, 2), a pair, for ``top_two``."""
    targets: Tensor | None = None
    """(N, m) classes, where a row's points aim at different ones; instead of ``target``."""
    grad: bool | Tensor = False
    """Whether a gradient of the objective with respect to the points is wanted; bool for all or a bool tensor (N,)."""
    draws: int = 1
    """Passes to average over, for random models."""
    looks: int = 1
    """Passes of the model itself to average ``Answer.logits`` over, under a surrogate; else those of ``draws``."""
    surrogate: Surrogate | None = None
    """Search on this surrogate of the model; costs forwards of the model itself beside, for ``Answer.logits``."""
    gates: GateTerm | None = None
    """Added to the objective."""
    heads_objective: str | None = None
    """Function for the heads, where it is another one than the logits'."""
    counts: Tensor | None = None
    """(N,) bool, rows for which a mistake counts, because their points lie in the ball; None: all. A search in lower
    precision looks at these mistakes once more in fp32."""

    def averaged(self, draws: int) -> Query:
        """Return the query with the model's own logits averaged over at least so many passes.

        A surrogate keeps its own number: whether a row is broken is not for it to say.
        """
        if self.surrogate:
            return replace(self, looks=max(self.looks, draws))
        return replace(self, draws=max(self.draws, draws))

    @property
    def climbs(self) -> bool:
        """Whether there is anything to increase."""
        return self.objective is not None or self.gates is not None

    @property
    def forwards(self) -> int:
        """Forwards that the query costs each row."""
        return self.points.shape[1] * (self.draws + (self.looks if self.surrogate else 0))

    @property
    def backwards(self) -> int:
        """Backwards that the query costs each row that wants a gradient."""
        return self.points.shape[1] * self.draws if self.climbs else 0


@dataclass(frozen=True)
class Answer:
    """What the passes showed, detached, in the rows' order.

    Under a surrogate, values, gradients, scores and gates are the surrogate's; logits and errors are always the model's
    own.
    """

    values: Tensor
    """(N, m) objective; zeros without one."""
    grad: Tensor | None
    """(N, m, C, H, W); zero for rows that asked for none; None if no row did."""
    logits: Tensor
    """(N, m, K) main logits, of the model itself."""
    errors: Tensor
    """(N, m) share of the model's own passes that misclassify the point, or whose logits are not finite: 0 or 1 unless
    the query has draws. In a search in lower precision a mistake that counts is fp32's word, and so is all but the
    gradient that is told of the point."""
    scores: Tensor | None = None
    """(N, m, terms, K) logits and heads, where the query's weights read heads."""
    gates: Tensor | None = None
    """(N, m, G) what each gate says, by mean, where the query has a gate term; held gates too say their own."""
    again: Tensor | None = None
    """(N,) forwards beyond the query's own, in fp32; None: none."""
    doubt: Tensor | None = None
    """(N, m) bool, mistakes that count and that fp32 has yet to look at (``arena.engine``); None: it has."""


class IteratedAttack(Protocol):
    """An attack as three pure steps. Made once per match by its spec's ``iterate(setup, **options)``.

    State keys the engine owns and adds: ``x`` (N, C, H, W), ``y`` (N,), ``index`` (N,) data-set indices. Keys the
    attack must set: ``done`` (N,) bool, the row is finished; ``best`` (N, C, H, W), the point to submit, which for a
    row that is not broken should still be the attack's strongest point. An attack may set ``claim`` (N,) bool; claims
    are checked, never believed. An attack that asks for points outside the ball may have a method
    ``counts(state)``, which says for which rows a mistake would count (``Query.counts``). One that passes over
    questions whose answer it knows may have a method ``reached(state)``, which says how many of the forwards of
    ``passes`` each row has behind it, made or not, (N,); a random model it must ask for all.

    ``tell`` changes no key and no row's shape: a snapshot in which these differ is of another version of the attack,
    and its rows begin again.
    """

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows. ``clean`` (N, terms, K): scores of the clean images. Must not depend on other rows.

        An attack with an attribute ``needs_clean = False`` gets none, (N, 0, 0), which saves a forward.
        """
        ...

    def ask(self, state: State) -> Query:
        """Say which points to see next."""
        ...

    def tell(self, state: State, answer: Answer) -> State:
        """Digest the answer; where a GPU searches in bf16, once more if the first answer was not yet the last word."""
        ...

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        ...


def bound(attack: IteratedAttack, draws: int) -> int:
    """Return the most forwards a row can cost; see ``most``."""
    return most(attack, draws)[0]


def most(attack: IteratedAttack, draws: int) -> tuple[int, int]:
    """Return the most (forwards, backwards) a row can cost where the model's logits are averaged over ``draws`` passes.

    An attack that searches on a surrogate says with ``surrogates()`` how many of its forwards are the surrogate's:
    these are not averaged, and neither are gradients, which are all the surrogate's then. One whose queries average
    over draws themselves says with ``draws`` over how many.
    """
    forwards, backwards = attack.passes()
    count: Callable[[], int] | None = getattr(attack, "surrogates", None)
    own = 0 if count is None else count()
    already = max(1, getattr(attack, "draws", 1))
    times = max(draws, already)
    return (forwards - own) // already * times + own, backwards if own else backwards // already * times
