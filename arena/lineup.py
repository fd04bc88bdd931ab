"""Turns the entries of ``--vs`` into attacks: rosters expanded, options checked, canonical names given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from arena.entries import parse
from arena.errors import ArenaError, unknown
from arena.plugins import Registered, Registry
from arena.specs import AttackSpec, RosterSpec, Value, canonical, chosen, complete, expand, load
from arena.surface import Surface
from arena.threat import Threat

#: Entries that name a class of a wrapped library: ``foolbox:LinfPGD(steps=40)``.
FOREIGN = {"foolbox": "foolbox:LinfPGD(steps=40)", "art": "art:SquareAttack"}


@dataclass(frozen=True)
class Planned:
    """One attack of a match."""

    name: str
    """Canonical name with the options that differ from the defaults."""
    spec: Registered[AttackSpec]
    options: dict[str, Value]
    """All options."""

    @property
    def standalone(self) -> bool:
        """Never cascaded."""
        return self.spec.spec.standalone


@dataclass(frozen=True)
class LeftOut:
    """An attack of a roster that its budget has no room for."""

    name: str
    passes: int
    """The most it could cost an example, forwards and backwards."""


@dataclass(frozen=True)
class Group:
    """One entry of ``--vs``: a roster with its attacks, or a single attack."""

    name: str
    roster: Registered[RosterSpec] | None
    attacks: tuple[Planned, ...]
    problems: tuple[str, ...] = ()
    """What of the roster could not be made, in words; such a roster is never complete."""
    budget: int | None = None
    """Most passes (forwards and backwards) an example may cost; None: no limit."""
    left_out: tuple[LeftOut, ...] = ()
    """What the budget has no room for."""
    cut: bool = False
    """The user's budget left out what the roster's own would have played: such a roster is not complete."""


def check_entries(entries: tuple[str, ...], registry: Registry) -> tuple[str, ...]:
    """Check names and options before anything is trained; return the entries in canonical form.

    Raises:
        ArenaError: nothing to play, unknown name or option (nearest given), bad value, an entry twice.
    """
    if not entries:
        raise ArenaError("--vs: expected at least one attack or roster")
    names = []
    for entry in entries:
        name, given = parse(entry)
        if registry.has("roster", name):
            if given:
                raise ArenaError(f"roster '{name}' takes no options, got '{entry}'")
            names.append(name)
        else:
            names.append(_attack(name, given, registry).name)
    for name in names:
        if names.count(name) > 1:
            raise ArenaError(f"--vs: '{name}' is given twice")
    return tuple(names)


def _attack(name: str, given: Mapping[str, Value], registry: Registry) -> Planned:
    library, colon, cls = name.partition(":")
    if colon:
        if library not in FOREIGN:
            raise unknown("library", library, FOREIGN)
        found = registry.get("attack", library)
        check = load(found.spec.run.rpartition(":")[0] + ":check") if found.spec.run else None
        if check:
            check(library, cls, dict(given))
        return Planned(canonical(name, given), found, {"cls": cls, **given})
    if name in FOREIGN:
        raise ArenaError(f"attack '{name}' needs a class of the library, such as {FOREIGN[name]}")
    if not registry.has("attack", name) and not registry.has("roster", name):
        known = [n for n in registry.names("attack") + registry.names("roster") if "/" not in n]
        raise unknown("attack", name, [n for n in known if n not in FOREIGN])
    found = registry.get("attack", name)
    options = complete(f"attack '{name}'", found.spec.options, given)
    return Planned(canonical(name, chosen(found.spec.options, options)), found, options)


def check_evaluation(defense: str, evaluation: tuple[str, ...], entries: tuple[str, ...], registry: Registry) -> None:
    """Check, before anything is trained, the attacks that a roster takes from the defense's own evaluation.

    Raises:
        ArenaError: the defense declares none, or one that is no attack.
    """
    for name in entries:
        if registry.has("roster", name) and registry.get("roster", name).spec.from_evaluation:
            if not evaluation:
                raise ArenaError(
                    f"roster '{name}': '{defense}' declares no evaluation of its own; name attacks in --vs"
                )
            for entry in evaluation:
                _attack(*parse(entry), registry)


def line_up(
    entries: tuple[str, ...],
    registry: Registry,
    surface: Surface,
    threat: Threat,
    n_classes: int,
    evaluation: tuple[str, ...] = (),
) -> list[Group]:
    """Expand entries for one defense; ``evaluation`` is what it declares as its own (``DefenseSpec.evaluation``).

    Raises:
        ArenaError: as ``check_entries``; or a roster that cannot be played under this threat model.
    """
    groups = []
    for entry in entries:
        name, given = parse(entry)
        if not registry.has("roster", name):
            groups.append(Group(entry, None, (_attack(name, given, registry),)))
            continue
        roster = registry.get("roster", name)
        own = evaluation if roster.spec.from_evaluation else ()
        attacks = {planned.name: planned for planned in (_attack(*parse(e), registry) for e in own)}
        for attack, options in expand(roster.spec, surface, threat, n_classes):
            planned = _attack(attack, options, registry)
            attacks.setdefault(planned.name, planned)
        problems: list[str] = []
        if roster.spec.from_surface:
            known = len(registry.problems)
            for made in registry.adaptive(surface, threat, n_classes):
                try:
                    attack, options = made
                    planned = _attack(attack, options, registry)
                except (ArenaError, TypeError, ValueError, AttributeError) as e:
                    problems.append(f"a plugin's arena_adaptive_attacks gave {made!r}: {e}")
                    continue
                attacks.setdefault(planned.name, planned)
            problems += map(str, registry.problems[known:])
        groups.append(Group(name, roster, tuple(attacks.values()), tuple(problems)))
    return groups


def describe(entries: tuple[str, ...], registry: Registry, evaluation: tuple[str, ...] = ()) -> list[list[str]]:
    """Return what a question's key holds of its entries: canonical names, and the versions of what they come from.

    ``evaluation`` as in ``line_up``: a roster made of it is another one when it changes.
    """
    rows = []
    for entry in entries:
        name, given = parse(entry)
        if registry.has("roster", name):
            roster = registry.get("roster", name)
            rows.append([entry, roster.origin, roster.spec.version])
            if roster.spec.from_evaluation:
                rows += describe(evaluation, registry)
            if roster.spec.from_surface:
                rows += [
                    [entry, p.distribution, p.version] for p in registry.plugins if "arena_adaptive_attacks" in p.hooks
                ]
        else:
            found = _attack(name, given, registry).spec
            rows.append([entry, found.origin, f"{found.spec.version} {_library_version(found.spec.name)}".strip()])
    return rows


def _library_version(attack: str) -> str:
    package = {"foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}.get(attack)
    return metadata.version(package) if package else ""
