"""What each defense costs over the plain network: parameters, FLOPs a forward pass, time of a training step.

    python benchmarks/overheads.py                       parameters and FLOPs, a second or two
    python benchmarks/overheads.py --steps 5             training time too
    python benchmarks/overheads.py --steps 20 --device cuda --only resnet18,vgg16 -o overheads.md

FLOPs: one 32x32 picture, eval mode, two for each multiply-add of convolutions and matrix products, which is all that is
counted (torch.utils.flop_counter). FSR's Table 7 counts this way, EWAS's Table 12 counts a multiply-add as one.

Time: one training step of the module's recipe (inner attack, loss, backward, SGD) against one of its twin, the same
recipe without the module, on the same batch. The two take turns; each turn gives one ratio, the median is reported.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import arena
from arena.backbones import DatasetInfo
from arena.errors import ArenaError, nearest
from arena.home import atomic_write
from arena.plugins import registry
from arena.schedule import Schedule
from arena.selection import training_step
from arena.specs import complete, load
from arena.stages import Context
from arena.surface import Reader, Surface
from arena.threat import Threat
from arena.training import settings

SHAPE, CLASSES, DATASET, THREAT = (3, 32, 32), 10, "cifar10", Threat("Linf", "8/255")


@dataclass(frozen=True)
class Row:
    """A defense on a backbone of its paper."""

    defense: str
    backbone: str
    published: str = ""
    """What the paper says of it, in its own units."""


_FSR, _EWAS = "FSR Table 7", "EWAS Table 12"
#: Backbones as the papers pair them (papers' tables); regularizers stand for defenses that leave the network as it is.
ROWS = (
    Row("fgaa_sat", "resnet18"),
    Row("fgaa_trades", "resnet18"),
    Row("fgaa_mart", "resnet18"),
    Row("ewas_sat", "resnet18", f"{_EWAS}: 0.55665 to 0.55673 GMACs; training 4.04 to 4.30 h"),
    Row("cas_sat", "resnet18"),
    Row("saa_sat", "resnet18"),
    Row("csaa_sat", "resnet18"),
    Row("cifs_sat", "resnet18"),
    Row("fsr_sat", "resnet18", f"{_FSR}: 11.17 to 12.43 M; 1.1133 to 1.1535 GFLOPs; epoch 114 to 120 s"),
    Row("fd_sat", "resnet18"),
    Row("sap_sat", "resnet18"),
    Row("pcl_rt", "resnet18"),
    Row("pcl_sat", "resnet18"),
    Row("fsr_sat", "vgg16", f"{_FSR}: 15.25 to 16.52 M; 0.6299 to 0.6701 GFLOPs"),
    Row("fgaa_sat", "vgg16"),
    Row("cas_sat", "vgg16"),
    Row("oat_sat", "resnet34"),
    Row("oat_sat", "wrn16_8"),
    Row("afa_sat", "wrn16_8"),
    Row("afa_sat", "wrn28_10"),
    Row("ewas_sat", "wrn28_10"),
    Row("cas_sat", "wrn28_10"),
    Row("cifs_sat", "wrn28_10"),
    Row("ewas_sat", "wrn32_10"),
    Row("fgaa_sat", "wrn34_10"),
    Row("cas_sat", "wrn34_10"),
    Row("fsr_sat", "wrn34_10"),
    Row("gfafirst_rt", "deepdefense_cnn"),
    Row("gfadeep_rt", "deepdefense_cnn"),
    Row("gaie_rt", "deepdefense_cnn"),
    Row("gnr_rt", "deepdefense_cnn"),
    Row("denoise_rt", "deepdefense_cnn"),
)


def build(defense: str, backbone: str) -> nn.Module:
    """Build a defense with its defaults for CIFAR-10 on the default device."""
    spec, base = (registry().get(kind, name).spec for kind, name in (("defense", defense), ("backbone", backbone)))
    inner = load(base.build)(shape=SHAPE, n_classes=CLASSES, **complete(backbone, base.options, {}))
    info = DatasetInfo(DATASET, SHAPE, CLASSES, backbone, tuple(base.slots))
    model: nn.Module = load(spec.build)(inner, info, **complete(defense, spec.options, {}))
    return model


def twin(defense: str) -> str:
    """Return the name of the same recipe without the module."""
    found: str = registry().get("defense", defense).spec.twin
    return found


def size(defense: str, backbone: str) -> tuple[int, int]:
    """Return (parameters, FLOPs of one picture's forward pass in eval mode). Allocates nothing."""
    with torch.device("meta"):
        model = build(defense, backbone).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, *SHAPE))
    return sum(p.numel() for p in model.parameters()), int(counter.get_total_flops())


def trainer(defense: str, backbone: str, batch: int, device: torch.device) -> tuple[Callable[[], None], Reader]:
    """Return a function that makes one training step of the recipe's first stage, and the reader to close after use.

    Every call sees the same random batch.
    """
    spec = registry().get("defense", defense).spec
    torch.manual_seed(0)
    with device:
        model = build(defense, backbone).train()
    surface = load(spec.surface)(model) if spec.surface else Surface()
    stage = load(spec.recipe)(**complete(defense, spec.options, {}))[0]
    preset = Schedule().choose(defense, spec, DATASET, backbone)
    assert preset is not None
    generator = torch.Generator(device).manual_seed(0)
    x = torch.rand(batch, *SHAPE, generator=generator, device=device)
    y = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    read = Reader(model, surface)
    ctx = Context(settings(stage, preset), THREAT, CLASSES, surface, read, generator)
    wanted = {id(p) for p in stage.trainable(model)}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
    optimizers = stage.optimizers(model, ctx)
    adversary = stage.adversary(ctx)

    def step() -> None:
        with training_step():
            x_adv = adversary(model, x, y) if adversary else None
            loss, _ = stage.loss(model, x, y, replace(ctx, x_adv=x_adv))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    return step, read


def ratios(plain: Callable[[], None], changed: Callable[[], None], steps: int, wait: Callable[[], None]) -> list[float]:
    """Return the ratios of their times, changed over plain, turn by turn; a turn starts with the other one each time.

    ``wait`` returns when the device has done all it was asked for. One step of each goes first, unmeasured.
    """

    def seconds(step: Callable[[], None]) -> float:
        wait()
        begun = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - begun

    plain()
    changed()
    found = []
    for turn in range(steps):
        pair = (plain, changed) if turn % 2 == 0 else (changed, plain)
        times = {step: seconds(step) for step in pair}
        found.append(times[changed] / times[plain])
    return found


def timed(row: Row, steps: int, batch: int, device: torch.device) -> str:
    """Time one row; a cell for the table."""
    if registry().get("defense", row.defense).spec.module == "sap":
        return "trains nothing"
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    (plain, one), (changed, other) = (
        trainer(name, row.backbone, batch, device) for name in (twin(row.defense), row.defense)
    )
    with closing(one), closing(other):
        found = ratios(plain, changed, steps, wait)
    return f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def table(rows: Sequence[Row], steps: int, batch: int, device: torch.device, say: Callable[[str], None]) -> str:
    """Make the report: a line on how it was measured and a Markdown table."""
    lines = [
        "| defense | backbone | parameters, M | GFLOPs a forward | training step, ratio | published |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        (p0, f0), (p1, f1) = size(twin(row.defense), row.backbone), size(row.defense, row.backbone)
        say(f"{row.defense} on {row.backbone}")
        cells = [
            f"`{row.defense}`",
            f"`{row.backbone}`",
            f"{p0 / 1e6:.3f} to {p1 / 1e6:.3f}",
            f"{f0 / 1e9:.4f} to {f1 / 1e9:.4f}",
            timed(row, steps, batch, device) if steps else "not measured",
            row.published,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    head = [textwrap.fill(line, 120) for line in _settings(steps, batch, device)]
    return "\n".join([*head, "", *lines, ""])


def _settings(steps: int, batch: int, device: torch.device) -> list[str]:
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found = [
        "# What each defense costs",
        "",
        "Each against its twin, the same recipe without the module, on 3x32x32 pictures and 10 classes; made by "
        "`benchmarks/overheads.py`. FLOPs are of one picture in eval mode, two for each multiply-add of convolutions "
        "and matrix products. EWAS's paper counts a multiply-add as one. FSR's counts two; its totals are 0.2 to 0.4 % "
        "above these, its differences the same.",
        "",
    ]
    if steps:
        n = torch.get_num_threads()
        threads = "" if device.type == "cuda" else f", {n} thread{'s' * (n > 1)}"
        found += [
            f"Training step: median (least to most) of {steps} pairs that take turns, after one of each unmeasured; "
            f"batch {batch}, each recipe's own inner attack and settings for CIFAR-10, fp32 without TF32; "
            f"{machine}{threads}. Of AFA stage I.",
            "",
        ]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    found.append(f"arena {arena.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {today}.")
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def chosen(only: str) -> list[Row]:
    """Return the rows named by defense, backbone or ``defense@backbone``, all for an empty text.

    Raises:
        ArenaError: a name that no row has.
    """
    names = {n for n in only.split(",") if n}
    known = {row: (row.defense, row.backbone, f"{row.defense}@{row.backbone}") for row in ROWS}
    for name in sorted(names.difference(*known.values())):
        raise ArenaError(f"--only: no row is called '{name}'{nearest(name, {n for k in known.values() for n in k})}")
    return [row for row in ROWS if not names or names & set(known[row])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="pairs of training steps to time; 0: no timing")
    parser.add_argument("--batch", type=int, default=32, help="images a training step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only", default="", help="rows by defense, backbone or DEFENSE@BACKBONE, joined by commas")
    parser.add_argument("-o", metavar="FILE", type=Path, help="write the table there, else print it")
    given = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        rows = chosen(given.only)
        report = table(rows, given.steps, given.batch, torch.device(given.device), lambda s: print(s, file=sys.stderr))
    except ArenaError as e:
        print(e, file=sys.stderr)
        return 2
    if given.o:
        atomic_write(given.o, report.encode())
    else:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
