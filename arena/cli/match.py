"""``arena match``: the main job."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arena.cli import options
from arena.cli.answer import answer, check_destination, judge, write
from arena.cli.paper import refuse_threshold
from arena.cli.plan import refuse_with, show_plan
from arena.errors import ArenaError
from arena.question import PROTOCOLS

if TYPE_CHECKING:
    from arena.question import Question, Running


@click.command("match")
@click.argument("defense", metavar="DEFENSE|CARD.toml")
@click.option(
    "--vs",
    metavar="ENTRY[,ENTRY...]",
    help=f"Attacks and rosters.  [default: {','.join(PROTOCOLS['standard'])}; protocol paper: papers]",
)
@click.option(
    "--protocol",
    type=click.Choice(tuple(PROTOCOLS)),
    help="paper replays a paper's own evaluation: final iterates, all points; not robust accuracy.  "
    "[default: standard]",
)
@options.question
@click.option("-n", type=int, metavar="N", help="Points; a smaller n is inside a larger one.  [default: 500]")
@click.option("--seed", type=int, metavar="SEED", help="Seed of the attacks' random numbers.  [default: 0]")
@click.option(
    "--budget",
    type=int,
    metavar="PASSES",
    help="Most passes a roster may cost an example; what has no room is named, plain attacks count nothing.  "
    "[default: the roster's own]",
)
@options.training
@options.device
@options.crew
@click.option("--batch-size", default="auto", metavar="N", help="Rows a pass; changes no outcome.  [default: auto]")
@click.option(
    "--precision", type=click.Choice(("fp32", "bf16")), default="fp32", help="Of the search.  [default: fp32]"
)
@click.option(
    "--compile", is_flag=True, help="Search with compiled passes: for long matches on large pictures; needs a compiler."
)
@options.checkpoint
@options.surface
@click.option(
    "--json", "json_to", metavar="FILE|-", help="Write the record as JSON; - is stdout, instead of the screen."
)
@click.option("--fail-under", type=click.FloatRange(0, 100), metavar="PCT", help="Exit 1 if the worst case is lower.")
@click.option(
    "--fail-on",
    type=click.Choice(("point", "lower-ci")),
    default="point",
    help="What --fail-under looks at: the worst case or the lower end of its interval.  [default: point]",
)
@click.option("--replay", is_flag=True, help="Attack again although the result is stored.")
@options.retrain
@click.option(
    "--matrix", is_flag=True, help="Let all attacks meet all points: shows what only one breaks, costs passes."
)
@click.option(
    "--audit",
    type=click.Choice(("normal", "deep")),
    help="How much the audit looks at before it says a verdict; deep takes more points and time.  [default: normal]",
)
@click.option(
    "--time-limit",
    metavar="TIME",
    callback=options.time_limit,
    help="Stop the attacks after 90s, 10m or 1h30m; the same command then goes on.",
)
@click.option("--plan", is_flag=True, help="Say what would be played and what it can cost at most, and do nothing.")
@click.option("--no-audit", is_flag=True, help="Leave the audit out: the verdict is then never clear.")
@click.option("--all", "everything", is_flag=True, help="Give each row of a sweep its own line.")
@options.quiet
def command(
    defense: str,
    json_to: str | None,
    fail_under: float | None,
    fail_on: str,
    everything: bool,
    quiet: bool,
    plan: bool,
    **given: Any,
) -> int:
    """Play a defense against attacks and judge every claim.

    DEFENSE is a listed name, with options in brackets, or a callable that returns your own model:
    path/to/file.py:factory or package.module:factory. ENTRY is an attack or a roster; brackets need quotes in a shell.
    A CARD is a TOML file with a whole grid of matches; options given here win over it.

    The same command again continues an unfinished match and prints a finished one from the store. A match that
    --time-limit stops ends with exit code 3.

    \b
    Examples:
      arena match fgaa_sat
      arena match sat --vs 'pgd(steps=100,restarts=5),autoattack' -n 100
      arena match 'fgaa_sat(lam=1)' --eps 0.1 --json result.json
      arena match fgaa_sat --protocol paper
      arena match my.py:factory --checkpoint w.safetensors --dataset npz:my.npz
      arena match matches/digits.toml
      arena match fgaa_sat --plan
      arena match fgaa_sat --time-limit 10m
      arena match trades --dataset cifar10 --devices 0,1
    """
    check_destination(json_to)
    options.refuse_bare_file(defense)
    if fail_under is not None and math.isnan(fail_under):
        raise ArenaError("--fail-under nan: expected a percentage from 0 to 100")
    refuse_threshold((given["protocol"],), fail_under)
    given["batch_size"] = _batch_size(given["batch_size"])
    given["devices"] = given["devices"] and tuple(given["devices"].split(","))
    given["audit"] = _audit(given["audit"], given.pop("no_audit"))
    if plan:
        refuse_with(json=json_to, fail_under=fail_under)
    if defense.endswith(".toml"):
        from arena.cli.card import plan_card, play_card

        if plan:
            return plan_card(Path(defense), given)
        return play_card(Path(defense), given, json_to, fail_under, fail_on, quiet)
    if plan:
        show_plan(*_question(defense, given))
        return 0
    return _single(defense, given, json_to, fail_under, fail_on, everything, quiet)


def _single(
    defense: str,
    given: dict[str, Any],
    json_to: str | None,
    fail_under: float | None,
    fail_on: str,
    everything: bool,
    quiet: bool,
) -> int:
    from arena.cli.console import installed, out
    from arena.cli.result import draw
    from arena.store import open_store

    question, running = _question(defense, given)
    with open_store() as store:  # a store that cannot be opened is found before an hour of attacks
        record, stored = answer(question, running, installed(), quiet)
        if json_to:
            write(json_to, record)
        if json_to != "-":
            if stored:
                made = str(record.get("provenance", {}).get("started") or "")[:16].replace("T", " ")
                click.echo(f"stored result of {made}; --replay attacks again, --retrain trains again")
            draw(out(), record, store, everything=everything)
    return judge(record, fail_under, fail_on)


def _question(defense: str, given: dict[str, Any]) -> tuple[Question, Running]:
    """Make the question, and how it is to be answered, of the options; takes them out."""
    from arena.entries import split
    from arena.question import Question

    vs = given.pop("vs")
    running = how(given)
    entries = PROTOCOLS[given["protocol"] or "standard"] if vs is None else tuple(split(vs))
    return Question(defense, entries, **options.chosen(**given)), running


def how(given: dict[str, Any]) -> Running:
    """Take what says how to run out of the options."""
    from arena.question import Running

    names = ("device", "batch_size", "precision", "compile", "replay", "retrain", "matrix", "audit", "time_limit")
    taken = {k: given.pop(k) for k in (*names, "devices", "engine", "ray_address", "workers")}
    return Running(**{k: v for k, v in taken.items() if v is not None})


def _audit(level: str | None, without: bool) -> str | None:
    if level and without:
        raise ArenaError(f"--audit {level} and --no-audit: give one of them")
    return "none" if without else level


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ArenaError(f"--batch-size '{text}': expected auto or a whole number of at least 1")
    return int(text)
