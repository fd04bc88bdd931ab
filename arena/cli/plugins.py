"""``arena plugins``: what is installed, from where, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import click

from arena.errors import unknown


class _Verbs(click.Group):
    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown("command", f"plugins {args[0]}", [f"plugins {c}" for c in self.commands])
        return super().resolve_command(ctx, args)


@click.group("plugins", cls=_Verbs)
def command() -> None:
    """See what is installed and what is wrong with it.

    Plugins are packages with an entry point of the group 'arena'. ARENA_PLUGINS_OFF=1 leaves all but the built-in out.

    \b
    Examples:
      arena plugins list
      arena plugins doctor
    """


@command.command("list")
def list_() -> int:
    """List plugins: where they come from and what they register.

    \b
    Examples:
      arena plugins list
      ARENA_PLUGINS_OFF=1 arena plugins list
    """
    from arena.cli.console import cell, installed, out, problems, table

    found = installed()
    made = table("distribution", "=version", "entry point", "registers")
    for plugin in found.plugins:
        kinds: dict[str, int] = {}
        for entry in plugin.registered:
            kind = entry.partition(" ")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        offers = ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in kinds.items())
        others = [h for h in plugin.hooks if not h.startswith("arena_register_")]
        made.add_row(
            cell(plugin.distribution),
            cell(plugin.version),
            cell(f"{plugin.entry_point} = {plugin.value}"),
            cell("; ".join(filter(None, (offers, ", ".join(others)))) or "nothing"),
        )
    out().print(made)
    if found.problems:
        click.echo(f"arena: {problems(len(found.problems))}", err=True)
    return 0


@command.command("doctor")
def doctor() -> int:
    """Examine all plugins; exit code 1 if something is wrong.

    Finds imports that fail, hooks that are misspelt or raise, what is refused and why, entry points that hide each
    other, names that several packages offer, and plugins whose import brings in torch (they slow every command down).

    \b
    Examples:
      arena plugins doctor
      arena plugins doctor && arena match fgaa_sat
    """
    from arena.cli.console import cell, installed, out

    found = installed()
    console = out()
    problems = list(dict.fromkeys(found.problems))
    wrong = 0
    for plugin in found.plugins:
        name = f"{plugin.distribution} {plugin.version}"
        mine = [p for p in problems if (p.distribution, p.entry_point) == (name, plugin.entry_point)]
        problems = [p for p in problems if p not in mine]
        word = "problem" if mine else "slow" if plugin.imports_torch else "ok"
        console.print(cell(f"{word:<8}{name} ({plugin.entry_point})"))
        lines = [p.what for p in mine]
        if plugin.imports_torch:
            lines.append("importing it imports torch; name code as text in the specs, so that help and list stay fast")
        for line in lines:
            console.print(cell(f"! {line}"), soft_wrap=True)
        wrong += len(lines)
    rest = [*map(str, problems), *found.clashes()]
    for line in rest:
        console.print(cell(f"! {line}"), soft_wrap=True)
    wrong += len(rest)
    console.print("nothing is wrong" if not wrong else f"{wrong} problem{'s' if wrong > 1 else ''}")
    return 1 if wrong else 0
