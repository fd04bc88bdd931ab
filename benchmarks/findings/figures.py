"""How figures look: Okabe and Ito's colors, which the color-blind tell apart, markers and line styles beside them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

BLACK, BLUE, ORANGE, GREEN, RED, SKY, PINK = (
    "#000000",
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
)


def canvas(width: float = 7.0, height: float = 3.6) -> Any:
    """Return an empty matplotlib figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def axis(figure: Any, xlabel: str, ylabel: str, place: int = 111) -> Any:
    """Add an axis without clutter."""
    made = figure.add_subplot(place)
    made.set(xlabel=xlabel, ylabel=ylabel)
    made.grid(alpha=0.25)
    made.spines[["top", "right"]].set_visible(False)
    return made


def dots(figure: Any, names: Sequence[str], series: Sequence[tuple[str, Sequence[Any], str, str]], label: str) -> Any:
    """Draw values of categories, a dot for each seed: series are (label, values by name, color, marker)."""
    made = axis(figure, "", label)
    for k, (what, values, color, marker) in enumerate(series):
        shift = (k - (len(series) - 1) / 2) * 0.24
        for i, each in enumerate(values):
            seen = what if i == 0 else None
            made.plot([i + shift] * len(each), each, marker, color=color, ms=6, mfc="none", mew=1.5, label=seen)
    made.set_xticks(range(len(names)), names, fontsize="small")
    made.legend(frameon=False, fontsize="small")
    return made


def lines(
    made: Any, x: Sequence[float], values: Sequence[Any], label: str, color: str, marker: str, style: str = "-"
) -> None:
    """Draw the mean over seeds with a band from lowest to highest: values are one array of seeds for each x."""
    made.plot(x, [v.mean() for v in values], style, color=color, marker=marker, ms=5, label=label)
    if len(values[0]) > 1:
        made.fill_between(x, [v.min() for v in values], [v.max() for v in values], color=color, alpha=0.15, lw=0)


def rendered(figure: Any, kind: str) -> bytes:
    """Return the file's bytes; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "arena", "svg.fonttype": "none"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
