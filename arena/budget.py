"""Keeps a roster within a number of passes an example: what does not fit is left out and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from arena.attack import Setup, most
from arena.lineup import Group, LeftOut, Planned
from arena.specs import load
from arena.threat import Threat

#: Tells the most passes of an attack an example can cost; None where nobody knows.
Cost = Callable[[Planned], int | None]


def most_passes(planned: Planned, setup: Setup, draws: int) -> tuple[int, int] | None:
    """Return the most (forwards, backwards) an example can cost; None for plain attacks, which nobody can ask.

    An attack that cannot be made costs nothing.

    Args:
        planned: an attack.
        setup: what it is made for.
        draws: passes that the logits of a random model are averaged over; 1 otherwise.
    """
    spec = planned.spec.spec
    if not spec.iterate:
        return None
    try:
        return most(load(spec.iterate)(setup, **planned.options), draws)
    except (Exception, SystemExit):  # it will fail again where it is played, and be named there
        return 0, 0


class Prices:
    """What attacks can cost in one match; each is asked once."""

    def __init__(self, setup: Callable[[Planned], Setup], draws: int, looks: int = 1) -> None:
        """Args: ``setup`` gives what an attack is made for; ``draws`` as for ``most_passes``; ``looks`` is how often an
        ask/tell attack's point may be looked at: twice by a search in bf16 (``arena.target``)."""
        self._setup, self._draws, self._looks = setup, draws, looks
        self._known: dict[str, tuple[int, int] | None] = {}

    def passes(self, planned: Planned) -> tuple[int, int] | None:
        """Return ``most_passes`` of an attack."""
        if planned.name not in self._known:
            self._known[planned.name] = most_passes(planned, self._setup(planned), self._draws)
        return self._known[planned.name]

    def cost(self, planned: Planned) -> int | None:
        """Return forwards and backwards together, without second looks: a budget is the same in both precisions."""
        passes = self.passes(planned)
        return None if passes is None else sum(passes)

    def played(self, planned: Planned, threat: Threat) -> tuple[int, int] | None:
        """Return what an attack can cost under this threat model, all looks: nothing where it is not played."""
        norms = planned.spec.spec.norms
        if threat.radius == 0 or (norms and threat.norm not in norms):
            return 0, 0
        passes = self.passes(planned)
        return None if passes is None else (self._looks * passes[0], passes[1])


def within(group: Group, given: int | None, cost: Cost) -> Group:
    """Return a roster with only the attacks that fit into its budget, in its order; a single attack as it is.

    An attack that does not fit is left out, and the next is tried. Attacks whose cost nobody knows are played. What a
    ``given`` budget leaves out of a roster that its own would play makes it incomplete.

    Args:
        group: one entry of ``--vs``.
        given: the user's budget, passes an example; None: the roster's own.
        cost: tells an attack's cost.
    """
    if group.roster is None:
        return group
    own = group.roster.spec.budget or None
    limit = own if given is None else given
    if limit is None:
        return group
    costs = [cost(planned) or 0 for planned in group.attacks]
    kept = _fitting(costs, limit)
    if len(kept) == len(costs):
        return replace(group, budget=limit)
    usual = range(len(costs)) if own is None else _fitting(costs, own)
    return replace(
        group,
        attacks=tuple(group.attacks[k] for k in kept),
        budget=limit,
        left_out=tuple(
            LeftOut(p.name, c) for k, (p, c) in enumerate(zip(group.attacks, costs, strict=True)) if k not in kept
        ),
        cut=not set(usual) <= set(kept),
    )


def said(group: Group) -> str:
    """Say what a roster has no room for; nothing if it has room for all."""
    names = ", ".join(f"{one.name} ({one.passes})" for one in group.left_out)
    return names and f"{group.name}: no room in {group.budget} passes an example for {names}"


def _fitting(costs: list[int], limit: int) -> list[int]:
    """Return the places of what fits, taken in order."""
    kept, spent = [], 0
    for k, one in enumerate(costs):
        if spent + one <= limit:
            kept.append(k)
            spent += one
    return kept
