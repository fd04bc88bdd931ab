"""One registered item in full, for ``arena list NAME``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from arena.cli.console import cell, table

if TYPE_CHECKING:
    from rich.console import Console

    from arena.plugins import Registered
    from arena.specs import Exposed, Option


def draw(console: Console, kind: str, registered: Registered[Any]) -> None:
    """Print summary, paper, facts, options with default, range and help, and an example."""
    spec = registered.spec
    console.print(cell(f"{registered.name} · {kind} · {registered.origin}", style="bold"))
    console.print(cell(spec.summary))
    if getattr(spec, "paper", ""):
        console.print(cell(f"paper: {spec.paper}"))
    for line in _facts(kind, spec):
        console.print(cell(line))
    declared = {**getattr(spec, "options", {}), **getattr(spec, "eval_options", {})}
    if declared:
        console.print()
        made = table("=option", "=default", "values", "help")
        for name, option in declared.items():
            made.add_row(name, cell(_default(option)), cell(values(option)), cell(option.help))
        console.print(made)
    console.print()
    console.print(cell(f"example: {example(kind, registered.name, declared)}"), soft_wrap=True)


def _facts(kind: str, spec: Any) -> list[str]:
    if kind == "attack":
        goal = "looks for the nearest break" if spec.kind == "minimal" else "stays in the ball"
        return [f"norms: {', '.join(spec.norms)}; {spec.knowledge}; {goal}"]
    if kind == "dataset":
        return [f"default threat model: {spec.norm} eps {spec.eps}; default backbone: {spec.backbone}"]
    if kind == "backbone":
        return [f"slots for modules: {', '.join(spec.slots)}"]
    if kind == "roster":
        return [
            f"version {spec.version}"
            + (f"; at most {spec.budget} passes an example, unless --budget says otherwise" if spec.budget else "")
            + ("; the list depends on the defense's surface" if spec.from_surface else "")
            + ("; the list is the defense's own evaluation" if spec.from_evaluation else "")
        ]
    lines = [f"module: {spec.module or 'none'}; recipe: {spec.recipe_name}", *_surface(spec.exposed)]
    if spec.presets:
        lines.append(f"trains on: {', '.join('any other' if p == '*' else p for p in spec.presets)}")
    if spec.twin:
        lines.append(f"beside: {spec.twin}, the same recipe without the module; its result is shown with this one's")
    if spec.published:
        where = f" ({spec.published_on})" if spec.published_on else ""
        lines.append(f"published{where}: " + ", ".join(f"{k} {v:g} %" for k, v in spec.published.items()))
    if spec.evaluation:
        lines.append(f"its paper's evaluation (--protocol paper): {', '.join(spec.evaluation)}")
    return lines


def _surface(exposed: Exposed | None) -> list[str]:
    """Say what attacks may use: every part by name."""
    if exposed is None:
        return ["exposed to attacks: the author does not say; a match shows it"]
    parts = [
        f"{kind} {', '.join(names)}"
        for kind in ("heads", "gates", "selections", "knobs")
        if (names := getattr(exposed, kind))
    ]
    if exposed.random:
        parts.append("random at test time")
    if not parts:
        return ["exposed to attacks: the logits alone"]
    return [f"exposed to attacks, besides the logits (default options, on digits): {'; '.join(parts)}"]


def _default(option: Option) -> str:
    from arena.specs import text

    return text(option.default) or "(none)"


def values(option: Option) -> str:
    """Write what an option takes: its choices, ``1 to 10``, ``at least 0``, or its type."""
    if isinstance(option.default, bool):
        return "true or false"
    if option.choices:
        return ", ".join(option.choices)
    if isinstance(option.default, str):
        return "a name"
    low, high = math.isfinite(option.low), math.isfinite(option.high)
    if low and high:
        return f"{option.low:g} to {option.high:g}"
    if low or high:
        return f"at least {option.low:g}" if low else f"at most {option.high:g}"
    return "a whole number" if isinstance(option.default, int) else "a number"


def example(kind: str, name: str, declared: dict[str, Option]) -> str:
    """Write a command line that uses the item."""
    chosen = next((f"({k}={_default(o)})" for k, o in declared.items() if _default(o) != "(none)"), "")
    text = f"'{name}{chosen}'" if chosen else name
    return {
        "defense": f"arena match {text} --vs autoattack,adaptive",
        "attack": f"arena match fgaa_sat --vs {text}",
        "roster": f"arena match fgaa_sat --vs {name}" + (" --protocol paper" if name == "papers" else ""),
        "dataset": f"arena match fgaa_sat --dataset {name}",
        "backbone": f"arena match fgaa_sat --backbone {text}",
    }[kind]
