"""``arena train``: train a defense and keep its weights."""

from __future__ import annotations

import click

from arena.cli import options
from arena.cli.answer import spoken


@click.command("train")
@click.argument("defense")
@options.question
@options.train_seed
@options.device
@options.retrain
@options.quiet
def command(
    defense: str,
    dataset: str | None,
    backbone: str | None,
    norm: str | None,
    eps: str | None,
    train_seed: int | None,
    device: str,
    retrain: bool,
    quiet: bool,
) -> int:
    """Train a defense and keep its weights.

    Recipes with an inner attack train against the threat model; it is part of the model's identity, and a match finds
    such a model by --train-norm and --train-eps. A model that is
    kept already is reported, not trained again; a training that was stopped goes on.

    \b
    Examples:
      arena train fgaa_sat
      arena train 'ewas_sat(lam=0.05)' --train-seed 1
    """
    from arena.errors import ArenaError

    if ":" in defense.partition("(")[0]:
        raise ArenaError(
            f"'{defense}' is a model of your own: arena trains listed defenses only; see 'arena list defenses'"
        )
    options.refuse_bare_file(defense)
    from arena.arrangement import threat_model
    from arena.cli.console import cell, clock, foreign, installed, out, percent
    from arena.cli.progress import watching
    from arena.datasets import describe, open_images
    from arena.models import TrainedPlan, plan

    found = installed()
    name = dataset or "digits"
    spec = describe(name, found)
    threat = threat_model(spec, norm, eps)
    with spoken(), foreign(), watching(quiet) as watch:
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
        )
        assert isinstance(planned, TrainedPlan)
        folder = planned.folder
        kept = planned.cached() and not retrain
        contender = planned.obtain(train=True, retrain=retrain, device=options.resolve(device), watch=watch)
    trained = contender.trained
    held = trained.get("held_out") or {}
    console = out()
    console.print(
        cell(f"{contender.name} · {name} · {contender.backbone} · {contender.parameters:,} parameters", "bold")
    )
    if kept:
        console.print("kept already; --retrain trains again")
    if "seconds" in trained:
        epochs = f"{trained.get('epochs')} epochs, the best is {trained.get('best_epoch')}"
        console.print(f"trained     {epochs}, {clock(trained['seconds'])} on {trained.get('device')}")
    if held:
        marks = [f"{k} {percent(held[k])} %" for k in ("natural", "pgd") if held.get(k) is not None]
        console.print(f"validation  {', '.join(marks)} on {held.get('images')} held-out training images")
    console.print(f"weights     {folder / 'best.safetensors'}", soft_wrap=True)
    console.print(f"model.id    {contender.id}", soft_wrap=True)
    return 0
