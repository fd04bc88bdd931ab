"""Writes docs/findings.md and its figures from what was measured."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from arena import __version__
from arena.home import atomic_write

from .figures import canvas, rendered
from .judging import Criterion, Data, Finding, Table, number, verdict

#: A cell of numbers: ``12``, ``-``, ``97.2 (96.5 to 98.0)``, ``1.2, 2.0``.
_NUMBERS = re.compile(r"[-\d.,() to]+")
_STATES = {"holds": "yes", "fails": "no", "open": "open"}


def sentence(finding: Finding, found: str, criteria: Sequence[Criterion]) -> str:
    """Return what the criteria say, and why the verdict is what it is."""
    if found == "not measured":
        if not finding.needs:
            return "nothing is known yet."
        return f"it needs the attack {', '.join(f'`{a}`' for a in finding.needs)}, which may not be there."
    total, names = len(criteria), {s: [c.says for c in criteria if c.state() == s] for s in ("holds", "fails", "open")}
    held, failed, opened = (len(names[s]) for s in ("holds", "fails", "open"))
    if held == total:
        said = "the criterion holds." if total == 1 else f"all {total} criteria hold."
    elif failed == total:
        said = "the opposite holds." if total == 1 else f"none of the {total} criteria holds, all fail."
    else:
        parts = [f"{held} of {total} criteria hold"]
        parts += [f"clearly not so: {'; '.join(names['fails'])}"] if failed else []
        parts += [f"open: {'; '.join(names['open'])}" if opened < 4 else f"{opened} are open"] if opened else []
        said = ", ".join(parts) + "."
    return f"{said} {finding.why.get(found, '')}".strip()


def criteria_table(criteria: Sequence[Criterion]) -> Table:
    """Lay out what was compared with what."""
    rows = [["criterion", "asked", "measured", "95 % interval", "by train seed", "holds"]]
    for c in criteria:
        low, high = c.interval()
        seeds = ", ".join(number(v, c.digits) for v in c.rows.mean(1))
        mean = number(c.rows.mean(), c.digits)
        asked = f"{'above' if c.above else 'below'} {c.bound:g}"
        interval = f"{number(low, c.digits)} to {number(high, c.digits)}"
        rows.append([c.says, asked, mean, interval, seeds, _STATES[c.state()]])
    return Table(rows)


def markdown(table: Table) -> list[str]:
    """Write a table; columns of numbers are set to the right."""
    head, *rest = table.rows
    right = [all(_NUMBERS.fullmatch(row[k]) for row in rest) for k in range(len(head))]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rest)]
    lines.insert(1, "|" + "|".join("---:" if r else "---" for r in right) + "|")
    return [*([table.note, ""] if table.note else []), *lines, ""]


def section(finding: Finding, data: Data, figures: Path, place: int) -> tuple[list[str], str]:
    """Write a finding; draws its figure. Returns its lines and its verdict."""
    criteria = finding.criteria(data) if data.seeds else []
    found = verdict(criteria)
    lines = [f"## {place}. {finding.title}", ""]
    lines += [f"**{found}**: {sentence(finding, found, criteria)}", ""]
    lines += [f"- Claimed or suspected: {finding.claim}", f"- Predicted: {finding.predicted}", f"- Done: {finding.how}"]
    if not criteria:
        return [*lines, ""], found
    lines += [f"- Points: {criteria[0].rows.shape[1]}, train seeds {', '.join(map(str, data.seeds))}.", ""]
    for table in finding.tables(data):
        lines += markdown(table)
    if finding.figure:
        drawn = canvas()
        finding.figure(drawn, data)
        name = f"{finding.name}.svg"
        atomic_write(figures / name, rendered(drawn, "svg"))
        lines += [f"![{finding.caption}](figures/{name})", "", f"*{finding.caption}*", ""]
    return [*lines, *markdown(criteria_table(criteria))], found


def write(
    out: Path,
    findings: Sequence[Finding],
    answers: Mapping[str, Mapping[int, Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """Write the page and its figures; ``answers`` are by finding and train seed. Returns the verdicts.

    A finding without answers is written as not measured.
    """
    body: list[str] = []
    verdicts: dict[str, str] = {}
    summary = [["finding", "predicted", "verdict"]]
    for place, finding in enumerate(findings, start=1):
        data = Data({seed: a["series"] for seed, a in answers.get(finding.name, {}).items()})
        lines, verdicts[finding.name] = section(finding, data, out.parent / "figures", place)
        body += lines
        summary.append([f"{place}. {finding.title}", finding.predicted, f"**{verdicts[finding.name]}**"])
    counts = {v: list(verdicts.values()).count(v) for v in dict.fromkeys(verdicts.values())}
    page = [
        "# Findings",
        "",
        "Five papers defend networks by acting on their features: FGAA, EWAS, FSR, AFA and DeepDefense. Reading "
        "them raises "
        "suspicions, and each suspicion predicts a number. Here the predictions meet small networks on `digits`. "
        "What holds "
        "here is a mechanism that can be seen at work, not a replication of the papers' tables, which need "
        "CIFAR-10 and "
        "large networks.",
        "",
        f"Made by `{settings['command']}`; do not edit. Verdicts are computed: "
        + ", ".join(f"{n} {v}" for v, n in counts.items())
        + ".",
        "",
        *markdown(Table(summary)),
        "## How to read this",
        "",
        f"- Accuracies are percent of {settings['n']} test images, those of `-n {settings['n']}`, or of all 600 where "
        "attacks are cheap, under Linf "
        f"eps {settings['eps']} unless said otherwise. After an attack, a point "
        "stands or is broken by the word of a referee with its own copy of the model.",
        "- `97.2 (96.5 to 98.0)` is the mean over train seeds, and the lowest and highest of them.",
        "- *95 % interval*: test images are drawn again, 2000 times, the same for all seeds and both sides of a "
        "difference. "
        "For single accuracies it is at least as wide as Wilson's. It does not cover the choice of train seed; for "
        "that "
        "each seed stands in its column.",
        "- A criterion **holds** where every train seed and the whole interval are on the predicted side, "
        "**fails** (no) where "
        "all of them are on the other side, and is **open** else.",
        "- A finding is **confirmed** where all criteria hold, **refuted** where one fails, **undecided** else.",
        "- Bounds such as 99 %, 5 % or 3 points were set with train seed 0 in view; the other seeds were then run "
        "once.",
        "",
        *body,
        *_settings(settings, answers),
    ]
    atomic_write(out, ("\n".join(page).rstrip() + "\n").encode())
    return verdicts


def _settings(settings: Mapping[str, Any], answers: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    distinct = {id(a): a for by_seed in answers.values() for a in by_seed.values()}
    taken = {(a["finding"], a["train_seed"]): a for a in distinct.values()}
    models = {(text, seed): i for (_, seed), a in taken.items() for text, i in a["models"].items()}
    versions = sorted({f"arena {a['arena']}, torch {a['torch']}" for a in taken.values()})
    lines = [
        "## Settings",
        "",
        f"- Data set `digits` (8x8 pixels, ten classes), {settings['n']} test points, backbone `cnn` unless named "
        f"after `@`; "
        f"default training presets, {len(models)} trained models; train seeds {settings['seeds']}, attack seed 0.",
        f"- Measured with {'; '.join(versions)}; written with arena {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, on one CPU thread, without a GPU.",
        f"- Measuring took {sum(a['seconds'] for a in taken.values()) / 60:.0f} minutes of processor time; "
        f"training is not "
        "in it.",
        "",
        "Models used, by the start of their `model.id`:",
        "",
    ]
    seeds = sorted({seed for _, seed in models})
    rows = [["model", *(f"train seed {s}" for s in seeds)]]
    for text in sorted({text for text, _ in models}):
        rows.append([f"`{text}`", *(f"`{models[text, s][:12]}`" if (text, s) in models else "-" for s in seeds)])
    return lines + markdown(Table(rows))
