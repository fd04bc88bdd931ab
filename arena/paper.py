"""The protocol ``paper``: a paper's own evaluation replayed, its flaws named. Nothing here is robust accuracy.

Every attack meets all n points, the naturally misclassified ones too, and what it ends with counts, not its best. So an
attack can repair a point, and accuracy under attack can exceed natural accuracy. Breaks of naturally correct points
are breaks like any other: kept, counted, and merged into what is known of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from arena.audit import again
from arena.lineup import Group
from arena.models import Plan
from arena.results import Played, share
from arena.specs import Indicator
from arena.usermodels import OwnPlan

#: What the protocol itself does, whatever the attacks.
FLAWS = (
    "the point an attack ends at counts, not the best it met",
    "naturally misclassified points are attacked too, and may be repaired",
    "each attack stands alone: no minimum over attacks, point by point",
)


def paper_row(row: dict[str, Any], played: Played, correct: Tensor) -> dict[str, Any]:
    """Return an attack's row under this protocol; ``correct`` (n,) are the naturally correct points.

    ``paper_accuracy`` is the percentage of all n points that the attack leaves classified correctly, ``repaired`` how
    many of them were misclassified without it; both null unless the attack is ``ok``.
    """
    ok = played.status == "ok"
    return {
        **row,
        "robust_accuracy": None,
        "cumulative_accuracy": None,
        "ci95": None,
        "paper_accuracy": share(played.right)[0] if ok else None,
        "repaired": int((played.right & ~correct).sum()) if ok else None,
    }


def as_paper(record: dict[str, Any], rows: Sequence[Played], groups: Sequence[Group], plan: Plan) -> list[Indicator]:
    """Take every robust accuracy out of a record, put the block ``paper`` in, and return what may be doubted."""
    record["worst_case"] |= {"robust_accuracy": None, "ci95": None}
    record["rosters"] = [r | {"robust_accuracy": None, "ci95": None} for r in record["rosters"]]
    record["sweeps"] = []
    spec = None if isinstance(plan, OwnPlan) else plan.defense.spec
    own = any(g.roster and g.roster.spec.from_evaluation for g in groups)
    record["paper"] = {
        "accuracy": {r["name"]: r["paper_accuracy"] for r in record["attacks"]},
        "sweeps": _sweeps(record, rows),
        "published": dict(spec.published) if spec else {},
        "published_on": spec.published_on if spec else "",
        "flaws": [*FLAWS, *(spec.evaluation_flaws if spec and own else ())],
    }
    return [natural_below_attacked(record)]


def _sweeps(record: dict[str, Any], rows: Sequence[Played]) -> dict[str, float]:
    """Return the lowest accuracy over the rows of each sweep, as the papers take it: no minimum point by point."""
    found: dict[str, float] = {}
    for row, played in zip(record["attacks"], rows, strict=True):
        name, value = played.planned.spec.spec.sweep, row["paper_accuracy"]
        if name and value is not None:
            found[name] = min(value, found.get(name, value))
    return found


def natural_below_attacked(record: dict[str, Any]) -> Indicator:
    """Flag an attack after which more points are classified correctly than without it."""
    natural = record["natural"]["accuracy"]
    known = [r for r in record["attacks"] if r["paper_accuracy"] is not None]
    best = max(known, key=lambda r: r["paper_accuracy"], default=None)
    above = best["paper_accuracy"] - natural if best else 0.0
    flag = above > 1e-9
    evidence = remedy = ""
    if best and flag:
        evidence = (
            f"{best['name']} leaves {best['paper_accuracy']:.1f} % classified correctly, more than the {natural:.1f} % "
            f"without an attack: it repaired {best['repaired']} points and broke {best['broken']}"
        )
        usual = again({**record, "protocol": "standard"}, "autoattack,adaptive")
        remedy = f"the attack does not work against this model, ask what does: {usual}"
    return Indicator("natural_below_attacked", flag, above, 0.0, evidence, remedy)
