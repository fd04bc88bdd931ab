"""What the surface shows about a defense: do its heads decide, do its hard choices decide?

For class-conditional masks trained with true labels the prediction is close to the argmax of the first head, and
forcing the mask to class t makes the output t (papers.md 9.1). These two figures say so for the model at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from arena.points import Rows
from arena.referee import BATCH, exact
from arena.selection import Mode, Select, choosing
from arena.surface import Reader, Surface, selects


def diagnose(
    model: nn.Module, surface: Surface, x: Rows, y: Tensor, x_adv: Rows, n_classes: int
) -> dict[str, Any] | None:
    """Measure heads and selections on clean images (N, C, H, W) and on verified breaks (M, C, H, W).

    Returns:
        ``{"heads": {name: {"accuracy", "agreement_clean", "agreement_broken"}}, "selections": {name:
        {"forced_output", "forced_accuracy"}}}`` in percent, or None without heads and selections. ``forced_output``:
        how often the output is t when the choice is forced to t, over all images and classes; ``forced_accuracy``:
        accuracy when every choice is forced to one same class, averaged over classes (1/K: the choice alone decides).
        A selection that does not choose among classes is left out.
    """
    chosen = selects(model, surface)
    if not surface.heads and not chosen:
        return None
    with exact(), Reader(model, surface) as read:
        clean = _heads(read, surface, x)
        broken = _heads(read, surface, x_adv) if len(x_adv) else {}
        heads = {
            name: {
                "accuracy": _percent(guess == y),
                "agreement_clean": _percent(guess == clean[""]),
                "agreement_broken": _percent(broken[name] == broken[""]) if broken else None,
            }
            for name, guess in clean.items()
            if name
        }
        forced = {}
        for name in chosen:
            if _table(read, chosen[name], x) != n_classes:
                continue
            same, right = [], []
            for t in range(n_classes):
                out = _forced(read, chosen, name, x, t)
                same.append(out == t)
                right.append(out == y)
            forced[name] = {
                "forced_output": _percent(torch.cat(same)),
                "forced_accuracy": _percent(torch.cat(right)),
            }
    return {"heads": heads, "selections": forced}


def _heads(read: Reader, surface: Surface, x: Rows) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"": [], **{k: [] for k in surface.heads}}
    for start in range(0, len(x), BATCH):
        reading = read(x[start : start + BATCH])
        parts[""].append(reading.logits.argmax(1))
        for name, scores in reading.heads.items():
            parts[name].append(scores.argmax(1))
    return {k: torch.cat(v) for k, v in parts.items()}


def _table(read: Reader, module: Select, x: Rows) -> int:
    """Return among how many rows a selection chooses; 0 if it never fired."""
    sizes: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        sizes.append(len(named["table"] if "table" in named else inputs[1]))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        read(x[:1])
    finally:
        handle.remove()
    return sizes[0] if len(set(sizes)) == 1 else 0


def _forced(read: Reader, chosen: dict[str, Any], name: str, x: Rows, t: int) -> Tensor:
    guesses = []
    for start in range(0, len(x), BATCH):
        rows = x[start : start + BATCH]
        mode = Mode("forced", classes=torch.full((len(rows),), t, dtype=torch.int64, device=rows.device))
        with choosing({name: chosen[name]}, {name: mode}):
            guesses.append(read(rows).logits.argmax(1))
    return torch.cat(guesses)


def _percent(hits: Tensor) -> float:
    return round(100.0 * float(hits.float().mean()), 2) if len(hits) else 0.0
