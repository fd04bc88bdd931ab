"""The hooks a plugin may implement. A package offers them through an entry point of the group ``arena``.

Implementations may take a subset of the arguments; arguments may be added, never removed or renamed. Registration hooks
fire once, at discovery, and must not import torch: specs name code as text. The names of hooks and arguments are the
public interface.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable

    from arena.specs import AttackSpec, BackboneSpec, DatasetSpec, DefenseSpec, Entry, Indicator, RosterSpec
    from arena.surface import Surface
    from arena.threat import Threat

hookspec = pluggy.HookspecMarker("arena")
hookimpl = pluggy.HookimplMarker("arena")


@hookspec
def arena_register_defenses() -> Iterable[DefenseSpec]:  # type: ignore[empty-body]
    """Return the package's defenses."""


@hookspec
def arena_register_attacks() -> Iterable[AttackSpec | RosterSpec]:  # type: ignore[empty-body]
    """Return the package's attacks and rosters."""


@hookspec
def arena_register_datasets() -> Iterable[DatasetSpec]:  # type: ignore[empty-body]
    """Return the package's data sets."""


@hookspec
def arena_register_backbones() -> Iterable[BackboneSpec]:  # type: ignore[empty-body]
    """Return the package's backbones."""


@hookspec
def arena_adaptive_attacks(surface: Surface, threat: Threat, n_classes: int) -> Iterable[Entry]:  # type: ignore[empty-body]
    """Return attacks that a surface calls for, as (name, options); added to the roster ``adaptive`` of every match.

    :param surface: what the defense declares.
    :param threat: norm and radius.
    :param n_classes: number of classes K.
    """


@hookspec
def arena_audit(context: Any) -> Iterable[Indicator]:  # type: ignore[empty-body]
    """Return indicators for a finished match, before its verdict.

    :param context: ``arena.audit.AuditContext``: the attacks' records, the defense check's findings, and a
        probe to look with for oneself. Not called with ``--no-audit``.
    """


@hookspec
def arena_match_started(record: dict[str, Any]) -> None:
    """Fire when a match begins to attack. ``record`` is the result so far, a copy."""


@hookspec
def arena_attack_finished(record: dict[str, Any], attack: dict[str, Any]) -> None:
    """Fire after each attack is judged. ``attack`` is its row of the result, a copy."""


@hookspec
def arena_match_finished(record: dict[str, Any]) -> None:
    """Fire after the result is stored. ``record`` is the whole result, a copy."""


REGISTRATION = {
    "defenses": "arena_register_defenses",
    "attacks": "arena_register_attacks",
    "datasets": "arena_register_datasets",
    "backbones": "arena_register_backbones",
}
