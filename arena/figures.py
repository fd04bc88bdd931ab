"""Plots, drawn without a display. matplotlib is optional: ``pip install 'adversarial-arena[figures]'``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arena.errors import ArenaError
from arena.home import atomic_write

FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Refuse a file that no figure can be written to, before anything is drawn.

    Raises:
        ArenaError: an ending other than .png, .svg or .pdf, or matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ArenaError(f"-o {path}: expected a name that ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ArenaError("figures need matplotlib: pip install 'adversarial-arena[figures]'") from None


def training(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw training logs (name -> lines of ``arena.trace.read``): accuracies on held-out images above, loss below.

    Stages follow each other on one axis of epochs; a dotted line marks where one begins.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, (name, lines) in enumerate(logs.items()):
        color = f"C{number % 10}"
        epochs = range(1, len(lines) + 1)
        for key, style, label in (("natural", "-", "natural"), ("pgd", "--", "PGD")):
            seen = [(e, line[key]) for e, line in zip(epochs, lines, strict=True) if key in line]
            if seen:
                mark = "o" if len(seen) < 4 else None
                above.plot(*zip(*seen, strict=True), style, color=color, marker=mark, ms=3, label=f"{name}, {label}")
        below.plot(epochs, [line["loss"] for line in lines], color=color)
        for e in epochs[1:]:
            if lines[e - 1]["stage"] != lines[e - 2]["stage"]:
                for axis in (above, below):
                    axis.axvline(e - 0.5, color=color, ls=":", lw=1)
    above.set(ylabel="held-out accuracy, %", ylim=(0, 100))
    if above.get_legend_handles_labels()[0]:  # a training that has not been looked at yet has only a loss
        above.legend(frameon=False, fontsize="small")
    below.set(xlabel="epoch", ylabel="training loss")
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=150)
    atomic_write(path, buffer.getvalue())
