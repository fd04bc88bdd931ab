"""``arena data``: download public data sets, and see which are there."""

from __future__ import annotations

from typing import Any

import click

from arena.errors import unknown


class _Verbs(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown("command", f"data {args[0]}", [f"data {c}" for c in self.commands])
        return super().resolve_command(ctx, args)


@click.group("data", cls=_Verbs)
def command() -> None:
    """Download public data sets, and see which are there.

    They live in the folder ARENA_DATA, or in 'data' under ARENA_HOME, in torchvision's layout. Nothing else downloads.

    \b
    Examples:
      arena data list
      arena data get cifar10
    """


@command.command("list")
def list_() -> int:
    """List the data sets that can be downloaded and whether they are there."""
    from arena.cli.console import cell, out
    from arena.downloads import SOURCES, present, root

    console = out()
    console.print(cell(f"folder  {root()}"), soft_wrap=True)
    for name in SOURCES:
        console.print(cell(f"{name:<15}{'there' if present(name) else f'missing: arena data get {name}'}"))
    return 0


@command.command("get")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def get_(names: tuple[str, ...]) -> int:
    """Download data sets that are not there yet; what is there is only checked."""
    from arena.cli.console import cell, out
    from arena.downloads import SOURCES, get

    for name in names:
        if name not in SOURCES:
            raise unknown("data set to download", name, SOURCES)
    for name in names:
        folder, new = get(name)
        out().print(cell(f"{name}: {'downloaded to' if new else 'already in'} {folder}"), soft_wrap=True)
    return 0
