"""``arena verify``: re-score adversarial examples in a process that loads no attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arena.cli import options

if TYPE_CHECKING:
    from arena.plugins import Registry


@click.command("verify")
@click.argument("what", metavar="RESULT|FILE")
@click.option("--against", metavar="DEFENSE", help="The defense; needed for .npz files and for models of your own.")
@options.checkpoint
@options.surface
@options.question
@options.training
@options.device
@click.option("--plugin", "plugins", multiple=True, metavar="PACKAGE", help="Load this package, too; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
@options.quiet
def command(
    what: str,
    against: str | None,
    checkpoint: Path | None,
    surface: Path | None,
    dataset: str | None,
    backbone: str | None,
    norm: str | None,
    eps: str | None,
    train_seed: int | None,
    train_norm: str | None,
    train_eps: str | None,
    device: str,
    plugins: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> int:
    """Re-score a result's adversarial examples, or somebody's file.

    RESULT is a result's id or the beginning of one; FILE is a JSON result, or an .npz with x_adv (float32, N x C x H
    x W) and index (int64, into the test split). The model is rebuilt and every example is judged anew; claims are not
    used. Exit code 1 if anything disagrees.

    Of the installed packages only the built-in one and the defense's own are loaded, so that no other package's code
    can touch the scoring; --plugin adds one, for its data set or backbone.

    \b
    Examples:
      arena verify 3f9a
      arena verify submission.npz --against fgaa_sat
      arena verify 3f9a --against my.py:factory --checkpoint w.safetensors
    """
    from arena.cli.console import foreign
    from arena.cli.progress import watching
    from arena.verify import verify

    with foreign(), watching(quiet) as watch:
        found = verify(
            what,
            trusted(what, against, plugins),
            watch,
            against=against,
            checkpoint=checkpoint,
            dataset=dataset,
            backbone=backbone,
            norm=norm,
            eps=eps,
            train_seed=train_seed,
            train_norm=train_norm,
            train_eps=train_eps,
            surface=surface,
            device=options.resolve(device),
        )
    if as_json:
        click.echo(json.dumps(found.record(), indent=2, ensure_ascii=False))
        return 0 if found.agrees else 1
    from arena.cli.console import cell, interval, out, percent

    console = out()
    word = "confirmed" if found.agrees else "DISAGREES"
    console.print(cell(f"{word}: {found.confirmed} of {found.claimed} examples break the model", style="bold"))
    parts = [f"{found.refuted} refuted", f"{found.borderline} borderline"]
    parts += [f"{n} {kind}" for kind, n in found.violations.items()]
    parts += [f"{found.natural_errors} of points misclassified anyway"] if found.natural_errors else []
    console.print(cell(", ".join(parts)))
    if found.robust_accuracy is not None:
        numbers = f"worst case {percent(found.robust_accuracy)} % (95 %: {interval(found.ci95)})"
        console.print(cell(f"{numbers}   natural {percent(found.natural)} %"))
    for line in found.lines:
        console.print(cell(f"! {line}"))
    console.print(cell(f"model.id {found.model}"))
    return 0 if found.agrees else 1


def trusted(what: str, against: str | None, plugins: tuple[str, ...]) -> Registry:
    """Load the built-in plugins except the attacks, those named, and the defense's package.

    That is the package of the result's record, or of ``package/name``.

    Raises:
        ArenaError: unknown result, unreadable file, or a package that is not installed.
    """
    from importlib import metadata

    from arena.cli.show import read
    from arena.errors import unknown
    from arena.plugins import BUILT_IN, BUILT_IN_ATTACKS, GROUP, discover
    from arena.store import open_store

    wanted = {BUILT_IN, *plugins}
    if against:
        wanted.add(against.partition("(")[0].rpartition("/")[0])
    elif not what.endswith(".npz"):
        if what.endswith(".json"):
            record = read(Path(what))
        else:
            with open_store() as store:
                record = store.get(what)
        wanted.add(str(record["model"].get("origin") or "").partition(" ")[0])
    offered = {d.name for d in metadata.distributions() if any(e.group == GROUP for e in d.entry_points)}
    for name in plugins:
        if name not in offered:
            raise unknown("package with plugins", name, offered)
    return discover(lambda distribution: distribution in wanted, leave_out={BUILT_IN_ATTACKS})
