"""``arena train``: train a defense and keep its weights."""

from __future__ import annotations

import os
import shlex
import sys

import click

from arena.cli import options
from arena.cli.answer import spoken


@click.command("train")
@click.argument("defense")
@options.question
@options.train_seed
@click.option("--preset", metavar="NAME", help="Settings for another data set: cifar10.  [default: this one's]")
@click.option("--epochs", type=int, metavar="N", help="Epochs; milestones move in proportion.  [default: the preset's]")
@click.option(
    "--precision", type=click.Choice(("fp32", "bf16")), default="fp32", help="Of the passes.  [default: fp32]"
)
@click.option(
    "--patience",
    type=int,
    default=0,
    metavar="N",
    help="Stop when N looks at the held-out images brought no better one; about 20 looks a stage.  [default: never]",
)
@options.device
@click.option("--devices", metavar="N,N,...", help="Share each batch among these CUDA devices: 0,1.")
@options.retrain
@options.quiet
def command(
    defense: str,
    dataset: str | None,
    backbone: str | None,
    norm: str | None,
    eps: str | None,
    train_seed: int | None,
    preset: str | None,
    epochs: int | None,
    precision: str,
    patience: int,
    device: str,
    devices: str | None,
    retrain: bool,
    quiet: bool,
) -> int:
    """Train a defense and keep its weights.

    Recipes with an inner attack train against the threat model; it is part of the model's identity, and a match finds
    such a model by --train-norm and --train-eps. Models of another --preset, --epochs, --precision or --patience are
    others too; a match takes them by --checkpoint. A model that is kept already is reported, not trained again; a
    training that was stopped goes on. Several devices: --devices, or 'torchrun -m arena train ...'.

    \b
    Examples:
      arena train fgaa_sat
      arena train 'ewas_sat(lam=0.05)' --train-seed 1
      arena train sat --dataset cifar10 --precision bf16 --devices 0,1
      arena train sat --dataset npz:own.npz --preset cifar10 --epochs 30
    """
    from arena.errors import ArenaError

    if ":" in defense.partition("(")[0]:
        raise ArenaError(
            f"'{defense}' is a model of your own: arena trains listed defenses only; see 'arena list defenses'"
        )
    options.refuse_bare_file(defense)
    if devices is not None:
        return _spread(devices)
    from arena import distributed
    from arena.arrangement import threat_model
    from arena.cli.console import cell, clock, foreign, installed, out, percent
    from arena.cli.progress import watching
    from arena.datasets import describe, open_images
    from arena.models import TrainedPlan, plan
    from arena.schedule import Schedule
    from arena.trace import LOG

    name = dataset or "digits"
    schedule = Schedule(preset, epochs, precision, patience)
    with distributed.joined(options.resolve(device)) as (world, own):
        found = installed()
        threat = threat_model(describe(name, found), norm, eps)
        with spoken(), foreign(), watching(quiet or not world.first) as watch:
            images = open_images(name, found)
            threat.check_shape(images.shape)
            planned = plan(
                defense,
                dataset=name,
                images=images,
                backbone=backbone,
                train_seed=train_seed or 0,
                threat=threat,
                checkpoint=None,
                surface=None,
                registry=found,
                schedule=schedule,
            )
            assert isinstance(planned, TrainedPlan)
            folder = planned.folder
            kept = planned.cached() and not retrain
            contender = planned.obtain(train=True, retrain=retrain, device=own, watch=watch, world=world)
        if not world.first:
            return 0
    trained = contender.trained
    held = trained.get("held_out") or {}
    console = out()
    console.print(
        cell(f"{contender.name} · {name} · {contender.backbone} · {contender.parameters:,} parameters", "bold")
    )
    if kept:
        console.print("kept already; --retrain trains again")
    if "seconds" in trained:
        ran = f"{trained.get('epochs')} epochs, the best is {trained.get('best_epoch')}"
        console.print(f"trained     {ran}, {clock(trained['seconds'])} on {trained.get('device')}")
    if held:
        marks = [f"{k} {percent(held[k])} %" for k in ("natural", "pgd") if held.get(k) is not None]
        console.print(f"validation  {', '.join(marks)} on {held.get('images')} held-out training images")
    console.print(f"weights     {folder / 'best.safetensors'}", soft_wrap=True)
    if (folder / LOG).exists():
        console.print(f"log         {folder / LOG}", soft_wrap=True)
    console.print(f"model.id    {contender.id}", soft_wrap=True)
    if schedule != Schedule():
        words = ["arena", "match", contender.name, "--dataset", name, "--backbone", planned.backbone_name]
        words += ["--norm", threat.norm, "--eps", threat.eps]
        line = shlex.join([*words, "--checkpoint", str(folder / "best.safetensors")])
        console.print(f"match it    {line}", soft_wrap=True)
    return 0


def _spread(devices: str) -> int:
    """Run this very command once a device; each finds its own by its rank."""
    import torch

    from arena.distributed import launch, parse

    numbers = parse(devices, torch.cuda.device_count())
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    visible = [named[n] if named != [""] else str(n) for n in numbers]
    words, skip = [], False
    for word in sys.argv[1:]:
        if skip or word.startswith("--devices="):
            skip = False
            continue
        skip = word == "--devices"
        if not skip:
            words.append(word)
    return launch([*words, "--device", "cuda"], len(numbers), ",".join(visible))
