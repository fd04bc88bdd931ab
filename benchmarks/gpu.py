"""What a GPU gives: bare passes of large nets, and matches against that ceiling.

    python benchmarks/gpu.py --cifar FILE -o benchmarks/results/h100.json       FILE: npz, x_train, y_train, x_test, ...
    python benchmarks/gpu.py --cifar FILE -o FILE.json --nets resnet18 --ways fp32,bf16 --vs quick -n 500
    python benchmarks/gpu.py --page benchmarks/results/h100.json                prints the page of what was measured

The nets are ``sat``, trained here for a few epochs: what a match costs hangs on how many points stand. Each measurement
is written at once, and what the file holds is not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ensemble.cases import Case, Subject, subject
from ensemble.games import play, play_plainly
from ensemble.style import Style
from pairing import discordant
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from arena.batches import out_of_memory
from arena.entries import split
from arena.errors import ArenaError, unknown
from arena.home import atomic_write
from arena.pace import bare_pass
from arena.plugins import Registry, registry
from arena.results import device_name, unpacked
from arena.schedule import Schedule
from arena.search import Search
from arena.tf32 import without_tf32
from arena.watch import Silent

SIZES = (64, 256, 1024)
ROSTERS = ("quick", "autoattack")


def net(backbone: str, epochs: int) -> Case:
    """Return ``sat`` on a backbone, trained for so many epochs."""
    schedule = Schedule(preset="cifar10", epochs=epochs, precision="bf16")
    return Case(backbone, f"`sat` on `{backbone}`, {epochs} epochs", backbone=backbone, schedule=schedule, cifar=True)


NETS = {case.name: case for case in (net("resnet18", 6), net("wrn34_10", 2))}
STYLES = {s.way("")[2:] or "fp32": s for s in (Style(), Style("bf16"), Style("bf16", compile=True))}
#: A way too: a roster's attacks driven without arena's engine, eagerly, in fp32.
PLAIN = "plain"
PLAINLY = " *plain* is no match: the same attacks driven one after the other, eagerly, in fp32."


class Telling(Silent):
    """Says on the standard error what goes on."""

    def say(self, text: str) -> None:
        """One line."""
        print(f"  {text}", file=sys.stderr, flush=True)


def seconds(work: Callable[[], object], device: str, times: int = 7) -> float:
    """Return the median wall seconds of some work, the device waited for, after two that do not count."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    found = []
    for _ in range(2 + times):
        wait()
        began = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])


def card(device: str, size: int = 8192) -> dict[str, Any]:
    """Measure what a device does with two matrices, TFLOP/s."""
    found: dict[str, Any] = {"name": device_name(device)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        found[name] = round(2 * size**3 / seconds(partial(torch.matmul, a, b), device) / 1e12, 1)
    return found


def ceiling(held: Subject, style: Style) -> dict[str, Any]:
    """Time the bare passes of a search copy by batch size, rows a second; a size that memory does not hold ends it."""
    contender, x, device = held.obtain(), held.x.to(style.device), style.device
    met = torch.ones(len(x), dtype=torch.bool)
    began = time.perf_counter()
    search = Search(
        lambda: contender.build().to(device), contender.surface, held.images.n_classes, x, met, style.running()
    )
    made, rows = time.perf_counter() - began, []
    for size in SIZES:
        batch = x[torch.arange(size) % len(x)]
        try:
            forward, both = (seconds(partial(bare_pass, search.target, batch, grad), device) for grad in (False, True))
        except Exception as error:  # only a full memory is met here; all else goes on
            if not out_of_memory(error):
                raise
            break
        rows.append({"batch": size, "forward": round(size / forward, 1), "both": round(size / both, 1)})
    return {"rows": rows, "flops": flops(search, x), "search": search.cheaper.record(), "made": round(made, 1)}


def flops(search: Search, x: Tensor) -> float:
    """Count the operations of one picture's forward, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter, search.target.in_fp32(), torch.no_grad():
        search.target.bare(x[:16])
    return counter.get_total_flops() / 16


def measure(given: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Measure what is asked for and not there yet."""
    known = registry()
    if "card" not in found:
        found["card"] = card(given.device)
        found["settings"] = settings()
    for name in given.nets:
        case = NETS[name]
        if given.epochs:
            case = net(name, given.epochs)
        held = subject(case, 0, given.n, given.cifar, known, Telling(), device=given.device)
        for way in given.ways:
            asked = {"net": case.says, "way": way}
            if way == PLAIN:
                once = partial(plainly, held, given.device, known)
            else:
                style = replace(STYLES[way], device=given.device)
                add(found["ceilings"], asked, partial(ceiling, held, style), keep)
                once = partial(match, held, style, known)
            for entry in given.vs:
                asked = {**asked, "entry": entry, "n": given.n}
                add(found["matches"], asked, partial(once, entry), keep)


def add(
    rows: list[dict[str, Any]], asked: dict[str, Any], work: Callable[[], dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Add a row that is not there yet."""
    if not any(asked.items() <= row.items() for row in rows):
        rows.append({**asked, **work(), "date": time.strftime("%Y-%m-%d", time.gmtime())})
        keep()
        print(f"  {json.dumps(rows[-1])[:300]}", file=sys.stderr, flush=True)


def match(held: Subject, style: Style, known: Registry, entry: str) -> dict[str, Any]:
    """Play an entry once, whole, without its audit."""
    return play(held, entry, style, 0, torch.get_num_threads(), known, watch=Telling())


def plainly(held: Subject, device: str, known: Registry, entry: str) -> dict[str, Any]:
    """Drive a roster's attacks without arena's engine."""
    made = play_plainly(held, entry, 0, torch.get_num_threads(), known, device)
    del made["bare"]  # a look at bare passes does not wait for a GPU
    return made


def settings() -> dict[str, str]:
    """Say with what it was measured."""
    cuda = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), "torch": torch.__version__, **cuda}


def page(found: dict[str, Any]) -> str:
    """Write what was measured as Markdown."""
    head, told = found["card"], found["settings"]
    plain = PLAINLY if any(row["way"] == PLAIN for row in found["matches"]) else ""
    lines = [
        f"# {head['name']}",
        "",
        *wrapped(
            f"By `benchmarks/gpu.py`, {', '.join(sorted({r['date'] for r in found['ceilings'] + found['matches']}))}; "
            f"torch {told['torch']}, CUDA {told['cuda']}, cuDNN {told['cudnn']}, Python {told['python']}. A product of "
            f"two matrices of 8192 x 8192 runs at {head['fp32']} TFLOP/s in fp32 and {head['bf16']} in bf16. No TF32."
        ),
        "",
        "## Ceilings",
        "",
        *wrapped(
            "Bare passes of the search copy, pictures a second, medians of 7. The share is that of the product's "
            "rate, by the multiply-adds of a forward, each two operations."
        ),
        "",
        "| net | search | batch | forwards a second | forwards with backward | TFLOP/s of forwards | share |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["ceilings"]:
        for at in row["rows"]:
            rate = at["forward"] * row["flops"] / 1e12
            lines.append(
                f"| {row['net']} | {row['way']} | {at['batch']} | {at['forward']:,.0f} | {at['both']:,.0f} "
                f"| {rate:.1f} | {rate / head[row['way'][:4]]:.0%} |"
            )
    lines += [
        "",
        "## Matches",
        "",
        *wrapped(
            "One match each, the audit left out. *Stand* are points that no attack broke, of those that are naturally "
            "correct. *Share* is the time that the passes take at the ceiling (best batch), over the seconds of the "
            "attacks. Seconds per 1,000 points are those of the attacks over the naturally correct points; *whole* is "
            "the match with its check, timing, recording, compiling and referee." + plain
        ),
        "",
        "| net | search | entry | stand | forwards + backwards | passes a second | share | seconds | a 1,000 | whole |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["matches"]:
        natural, broken = (unpacked(row[key], row["n"]) for key in ("natural", "broken"))
        met, passes = int(natural.sum()), row["forwards"] + row["backwards"]
        lines.append(
            f"| {row['net']} | {row['way']} | `{row['entry']}` | {met - int(broken.sum())} of {met} "
            f"| {row['forwards']:,} + {row['backwards']:,} | {passes / row['seconds']:,.0f} "
            f"| {share(found, row)} | {row['seconds']:.1f} "
            f"| {1000 * row['seconds'] / met:.1f} | {row['whole']:.1f} |"
        )
    return "\n".join([*lines, "", *compared(found["matches"])])


def share(found: dict[str, Any], row: dict[str, Any]) -> str:
    """Return of a match's seconds the share that its passes take at the batch size at which they are fastest."""
    best = [r["rows"] for r in found["ceilings"] if (r["net"], r["way"]) == (row["net"], row["way"])]
    if not best:
        return "-"
    forward, both = (max(at[key] for at in best[0]) for key in ("forward", "both"))
    least = (row["forwards"] - row["backwards"]) / forward + row["backwards"] / both
    return f"{least / row['seconds']:.0%}"


def compared(matches: list[dict[str, Any]]) -> list[str]:
    """Compare the outcomes of ways with those of fp32, and ``quick``'s with ``autoattack``'s."""
    by = {(r["net"], r["way"], r["entry"], r["n"]): unpacked(r["broken"], r["n"]) for r in matches}
    pairs = [
        ((name, way, entry, n), (name, other, second, n))
        for name, way, entry, n in by
        if way != PLAIN
        for other, second in (("fp32", entry), (way, "autoattack"), (PLAIN, entry))
        if (name, other, second, n) in by and (way, entry) != (other, second)
    ]
    lines = [
        "## Outcomes",
        "",
        "| net | one | another | only one | only the other | p |",
        "|---|---|---|---:|---:|---:|",
    ]
    for one, other in pairs:
        first, second, p = discordant([(one[0], by[one], by[other])])
        lines.append(f"| {one[0]} | `{one[2]}`, {one[1]} | `{other[2]}`, {other[1]} | {first} | {second} | {p:.3f} |")
    return [*lines, ""] if pairs else []


def wrapped(text: str) -> list[str]:
    """Break a paragraph into lines."""
    return textwrap.wrap(text, 120)


def chosen(kind: str, text: str, known: Sequence[str] | dict[str, Any]) -> list[str]:
    """Read a list of names.

    Raises:
        ArenaError: one that is not known.
    """
    names = [part.strip() for part in text.split(";" if kind == "--ways" else ",")]
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cifar", metavar="FILE", type=Path, help="pictures: npz with x_train, y_train, x_test, y_test"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--ways", default=";".join(STYLES), help=f"how to search, joined by semicolons; also: {PLAIN}")
    parser.add_argument("--vs", default=",".join(ROSTERS))
    parser.add_argument("--epochs", type=int, help="of the training, instead of each net's own")
    parser.add_argument("-n", type=int, default=1000, help="points")
    parser.add_argument("-o", metavar="FILE", type=Path, help="keep what is measured here (JSON)")
    parser.add_argument("--page", metavar="FILE", type=Path, help="print the page of what a file holds")
    given = parser.parse_args(arguments)
    try:
        if given.page:
            print(page(json.loads(given.page.read_text())))
            return 0
        given.nets, given.ways = chosen("--nets", given.nets, NETS), chosen("--ways", given.ways, [*STYLES, PLAIN])
        given.vs = list(split(given.vs))
        found = {"ceilings": [], "matches": []}
        if given.o and given.o.exists():
            found = json.loads(given.o.read_text())

        def keep() -> None:
            if given.o:
                atomic_write(given.o, (json.dumps(found, indent=1) + "\n").encode())

        with without_tf32():
            measure(given, found, keep)
        print(page(found))
    except ArenaError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
