"""Speed of adversarial training: images a second, beside the bare cost of the same passes.

    python benchmarks/training.py [--device cuda] [--backbone 'resnet18(width=16)'] [--precision bf16] [-o FILE]

An epoch of PGD-10 training and its bare counterpart (as many forward and backward passes of the same network, on a
batch that is there already) take turns in one run; medians are told. What is not bare is augmentation, projection,
optimizer, the heads' losses and the loop itself. Made pictures: their content changes no time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import arena.training
from arena.datasets import Images
from arena.models import TrainedPlan, plan
from arena.plugins import registry
from arena.schedule import Schedule
from arena.threat import Threat
from arena.training import fit
from arena.watch import Silent


def main() -> None:
    """Measure and print one table row a defense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="resnet18(width=16)")
    parser.add_argument("--precision", default="fp32,bf16", help="one or more of fp32, bf16")
    parser.add_argument("--defenses", default="sat,fgaa_sat")
    parser.add_argument("--batches", type=int, default=4, help="batches an epoch that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    rows = [
        row(defense, precision, asked)
        for defense in asked.defenses.split(",")
        for precision in asked.precision.split(",")
    ]
    text = table(rows, asked)
    print(text)
    if asked.output:
        asked.output.write_text(text + "\n")


def row(defense: str, precision: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Time one epoch of training and its bare passes, in turns; returns medians."""
    device = torch.device(asked.device)
    batch = 128
    generator = torch.Generator().manual_seed(0)
    n = round(batch * asked.batches / (1 - arena.training.HELD_OUT))
    x = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    images = Images("made", x, torch.arange(n) % 10, x[:10], torch.arange(10), 10)
    found = plan(
        defense,
        dataset="npz:made.npz",
        images=images,
        backbone=asked.backbone,
        train_seed=0,
        threat=Threat("Linf", "8/255"),
        checkpoint=None,
        surface=None,
        registry=registry(),
        schedule=Schedule(preset="cifar10", epochs=1, precision=precision),
    )
    assert isinstance(found, TrainedPlan)
    assert found.preset is not None
    bare = bare_step(found, device, batch, found.preset.steps, precision)
    steps, times = [], []
    for turn in range(asked.rounds + 1):
        took, cost = epoch(found, device), clock(bare, device, asked.batches)
        if turn:  # the first warms up
            steps.append(took)
            times.append(cost)
    epoch_s, bare_s = statistics.median(steps), statistics.median(times)
    seen = batch * asked.batches
    return {
        "defense": defense,
        "precision": precision,
        "images_per_second": seen / epoch_s,
        "bare_images_per_second": seen / bare_s,
        "share_outside": statistics.median(1 - b / s for s, b in zip(steps, times, strict=True)),
    }


def epoch(found: TrainedPlan, device: torch.device) -> float:
    """Train for one epoch; returns its seconds without validation, as the log tells them."""
    model = found.make()
    assert found.preset is not None
    with tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            found.stages,
            found.images,
            found.preset,
            found.threat,
            name=found.name,
            surface=found.declared(model),
            train_seed=0,
            folder=Path(folder),
            device=device,
            watch=Silent(),
            schedule=found.schedule,
        )
        line = json.loads((Path(folder) / "train.jsonl").read_text().splitlines()[0])
    return float(line["seconds"])


def bare_step(found: TrainedPlan, device: torch.device, batch: int, steps: int, precision: str) -> Callable[[], None]:
    """Return a step's passes and nothing else: ``steps`` gradients of the images, one of the weights."""
    model = found.make().to(device).to(memory_format=torch.channels_last).eval()
    x = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.arange(batch, device=device) % 10
    passing = (lambda: torch.autocast(device.type, torch.bfloat16)) if precision == "bf16" else nullcontext

    def step() -> None:
        for _ in range(steps):
            point = x.detach().requires_grad_()
            with passing():
                loss = F.cross_entropy(model(point), y, reduction="sum")
            torch.autograd.grad(loss, point)
        model.zero_grad(set_to_none=True)
        with passing():
            loss = F.cross_entropy(model(x), y)
        loss.backward()

    return step


def clock(work: Callable[[], None], device: torch.device, times: int) -> float:
    """Return the seconds of ``times`` calls, the device's own work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def table(rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    """Write a markdown table with the machine it was measured on."""
    machine = torch.cuda.get_device_name() if asked.device.startswith("cuda") else platform.processor() or "CPU"
    where = f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    lines = [
        f"PGD-10 training, `{asked.backbone}`, 3x32x32, batches of 128, medians of {asked.rounds} pairs; {where}",
        "",
        "| defense | precision | images/s | images/s of the bare passes | time outside them |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| `{r['defense']}` | {r['precision']} | {r['images_per_second']:.0f} | "
            f"{r['bare_images_per_second']:.0f} | {100 * r['share_outside']:.1f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
