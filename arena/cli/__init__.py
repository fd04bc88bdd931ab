"""The command line. Commands load on demand, and what they need loads inside them: help imports no torch."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from arena.errors import ArenaError, nearest, unknown

#: Name, module and one line for the overview, in the order of the overview.
COMMANDS = {
    "match": "Play a defense against attacks and judge every claim.",
    "train": "Train a defense and keep its weights.",
    "leaderboard": "Rank all results of the store.",
    "show": "Show a stored result again.",
    "verify": "Re-score a result's adversarial examples, or somebody's file.",
    "figure": "Draw a figure of what was measured.",
    "list": "List defenses, attacks, rosters, data sets, backbones.",
    "data": "Download public data sets, and see which are there.",
    "plugins": "See what is installed and what is wrong with it.",
}
_MODULES = {"list": "listing"}

INTERRUPTED = "interrupted; the same command continues"


class Interrupted(Exception):  # noqa: N818 (what happened is no error)
    """The user pressed Ctrl-C; click would print a line of its own."""


class Closed(Exception):  # noqa: N818 (what happened is no error)
    """The reader of stdout has gone, as in ``arena list | head``."""


#: A group without a command: click 8.2 and later raise the help instead of printing it.
_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


class Commands(click.Group):
    """Loads each command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"arena.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None
        except BrokenPipeError:
            raise Closed from None


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"arena {version('adversarial-arena')}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def arena() -> None:
    """Where defenses against adversarial examples are put to the test.

    \b
    Begin with:
      arena match fgaa_sat --vs autoattack,adaptive
      arena leaderboard

    \b
    Exit codes: 0 done; 1 a threshold failed, 'verify' disagrees or the
    verdict is void; 2 something you can fix (one line says what);
    3 interrupted or out of time, the same command continues.
    """


def run(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; what the user can fix becomes one line on stderr."""
    try:
        code = arena.main(args=args, prog_name="arena", standalone_mode=False)
    except _HELP as error:
        error.show()
        return int(error.exit_code)
    except Closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has nowhere to go
        return 128 + int(signal.SIGPIPE)
    except click.exceptions.NoSuchOption as error:
        return _refuse(f"unknown option '{error.option_name}'{_hint(error)}")
    except click.ClickException as error:
        return _refuse(error.format_message())
    except ArenaError as error:
        return _refuse(str(error))
    except (Interrupted, KeyboardInterrupt, click.Abort):
        click.echo(f"arena: {INTERRUPTED}", err=True)
        return 3
    return code if isinstance(code, int) else 0


def _hint(error: click.exceptions.NoSuchOption) -> str:
    options = [] if error.ctx is None else [o for p in error.ctx.command.params for o in p.opts if o.startswith("--")]
    return nearest(error.option_name, options) or "; see --help"


def _refuse(message: str) -> int:
    click.echo(f"arena: error: {' '.join(message.split()).rstrip('.')}", err=True)
    return 2


def main() -> None:
    """Entry point of the ``arena`` command."""
    # Threads that wait by spinning starve each other: beside busy processes on two cores, passes on two threads took
    # 4 to 13 times as long as on one; with waiting threads asleep, about as long. OpenMP reads this when torch is
    # first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run()
    if code == 3:  # an impatient second Ctrl-C would print a traceback of the interpreter's own ending
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
