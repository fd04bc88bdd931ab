"""The screen of one result, drawn the same after a match, by ``show`` and from a file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.cli.console import WIDE, cell, clock, count, installed, interval, percent, plain, problems, table
from arena.cli.paper import UNAUDITED, WHAT, draw_attacks, is_paper
from arena.question import PROTOCOLS

if TYPE_CHECKING:
    from rich.console import Console

    from arena.store import Store

VERDICTS = {
    "not_audited": "not audited: no attack failed, and nothing else was looked at",
    "clear": "clear: no flag is raised; that is no proof",
    "suspect": "suspect: the number may be too high",
    "void": "void: the number means nothing",
}
_STYLES = {"clear": "green", "suspect": "yellow", "void": "red"}
Record = Mapping[str, Any]


def draw(
    console: Console,
    record: Record,
    store: Store | None = None,
    *,
    everything: bool = False,
    indicators: bool = False,
) -> None:
    """Print a result.

    ``store`` is searched for the twin's result; ``everything`` gives each row of a sweep its own line;
    ``indicators`` lists the audit's silent ones too.
    """
    _headline(console, record, store)
    if record.get("attacks"):
        console.print()
        if is_paper(record):
            draw_attacks(console, record, spaced)
        else:
            _attacks(console, record, everything)
    if record.get("rosters") and not is_paper(record):
        console.print()
        _rosters(console, record)
    _audit(console, record, indicators)
    _remarks(console, record)
    _handles(console, record, store)


def beside(record: Record, store: Store | None) -> list[str]:
    """Return what belongs beside the worst case: the main logits alone, the same recipe without the module."""
    found = []
    alone = [a["robust_accuracy"] for a in record.get("attacks", ()) if _lam(a) == 0]
    known = [v for v in alone if v is not None]
    if known:
        found.append(f"λ = 0 (main logits) {percent(min(known))} %")
    if found:
        found.append(f"worst case {percent(record['worst_case']['robust_accuracy'])} %")
    other = twin(record, store)
    if other is not None:
        found.append(f"{plain(other['defense'])} (no module) {percent(other['worst_case']['robust_accuracy'])} %")
    elif record["model"].get("twin") and store is not None:
        found.append(f"{plain(record['model']['twin'])} (no module) not played here")
    return found


def replay(record: Record) -> str:
    """Write the command that asks the twin the same question."""
    from arena.errors import ArenaError

    asked, threat = record["asked"], record["asked"]["threat"]
    words = ["arena", "match", record["model"]["twin"]]
    protocol = record.get("protocol", "standard")
    words += ["--protocol", protocol] if protocol != "standard" else []
    words += ["--vs", ",".join(asked["vs"])] if tuple(asked["vs"]) != PROTOCOLS[protocol] else []
    words += ["--dataset", asked["dataset"]] if asked["dataset"] != "digits" else []
    try:
        spec = installed().get("dataset", asked["dataset"]).spec
        usual = {"backbone": spec.backbone, "norm": spec.norm, "eps": spec.eps}
    except ArenaError:  # a file, or a package that is gone: nothing is known to be the default
        usual = {}
    given = {"backbone": asked.get("backbone"), "norm": threat["norm"], "eps": threat["eps"]}
    if given["norm"] != usual.get("norm"):
        usual.pop("eps", None)  # a norm of one's own needs its eps
    words += [w for k, v in given.items() if v and v != usual.get(k) for w in (f"--{k}", str(v))]
    words += ["-n", str(asked["n"])] if asked["n"] != 500 else []
    for key in ("seed", "train_seed", "train_norm", "train_eps", "budget"):
        if asked.get(key):
            words += [f"--{key.replace('_', '-')}", str(asked[key])]
    return shlex.join(words)


def twin(record: Record, store: Store | None) -> dict[str, Any] | None:
    """Find the newest comparable result of the twin.

    That is one with the same protocol, attacks, budget, data, points, threat model, backbone and training.
    """
    name = record["model"].get("twin")
    if not name or store is None:
        return None
    asked, threat = record["asked"], record["asked"]["threat"]
    candidates = store.all(defense=name, dataset=asked["dataset"], norm=threat["norm"], eps=threat["eps"], n=asked["n"])
    same = ("data_sha256", "indices_sha256", "backbone", "train_seed", "train_norm", "train_eps", "budget")
    fits = [
        r
        for r in candidates
        if all(r["asked"].get(k) == asked.get(k) for k in same)
        and set(r["asked"]["vs"]) == set(asked["vs"])
        and is_paper(r) == is_paper(record)
        and (is_paper(r) or r["worst_case"]["robust_accuracy"] is not None)
    ]
    return fits[-1] if fits else None


def _headline(console: Console, record: Record, store: Store | None) -> None:
    asked, worst = record["asked"], record["worst_case"]
    threat = asked["threat"]
    words = [record["defense"], asked["dataset"], asked.get("backbone") or "", f"{threat['norm']} eps {threat['eps']}"]
    words += [f"n {asked['n']}", f"seed {asked.get('seed', 0)}"]
    if asked.get("train_seed"):
        words.append(f"train seed {asked['train_seed']}")
    console.print(cell(" · ".join(plain(w) for w in words if w), style="bold"))
    verdict = str((record.get("audit") or {}).get("verdict") or "not_audited")
    if is_paper(record):
        text = WHAT
    elif worst["robust_accuracy"] is None:
        text = "worst case: none, nothing was played"
    elif verdict == "void":
        text = "worst case: none, the match is void"
    else:
        text = f"worst case {percent(worst['robust_accuracy'])} % (95 %: {interval(worst['ci95'])})"
    said = UNAUDITED if is_paper(record) and verdict == "not_audited" else VERDICTS.get(verdict, verdict)
    shown = [
        cell(f"{text}   natural {_natural(record)}", style="bold"),
        cell(f"verdict {said}", style=_STYLES.get(verdict, "")),
    ]
    for line in reversed(shown) if verdict == "void" else shown:
        console.print(line)
    if verdict == "void" or is_paper(record):
        return
    if record.get("stopped"):
        console.print(cell("stopped by its time limit: this is the worst case so far, and the same command goes on"))
    lines = beside(record, store)
    if lines:
        console.print(cell("beside " + " | ".join(lines)))


def _natural(record: Record) -> str:
    return f"{percent(record['natural']['accuracy'])} %"


def _lam(attack: Mapping[str, Any]) -> float | None:
    """Return the weight of the heads of a row of a sweep; None for other attacks, the papers' own among them."""
    if "lam" not in (attack.get("options") or {}) or attack.get("standalone") is False:
        return None
    try:
        return float(attack["options"]["lam"])
    except (TypeError, ValueError):
        return None


def _attacks(console: Console, record: Record, everything: bool) -> None:
    rows = list(record["attacks"])
    unique = any(a.get("unique_broken") is not None for a in rows)
    rules = any(a.get("violations") for a in rows)
    columns = ["attack", "=status", ">tried", ">broken", ">alone", ">left"]
    columns += [">only"] if unique else []
    columns += [">forw.", ">backw.", ">time"]
    columns += ["violations"] if rules else []
    made = table(*columns, tight=console.width < WIDE)
    sweeps = [] if everything else [s for s in record.get("sweeps") or () if len(s["members"]) > 1]
    folded = {m: s for s in sweeps for m in s["members"]}
    hidden = 0
    for place, attack in enumerate(rows):
        sweep = folded.get(attack["name"])
        if sweep is None or attack["status"] != "ok" or _lam(attack) == 0:
            made.add_row(*_cells(attack, unique, rules))
        else:
            hidden += 1
        if sweep is not None and not any(a["name"] in sweep["members"] for a in rows[place + 1 :]):
            members = [a for a in rows if a["name"] in sweep["members"]]
            made.add_row(*_cells(_minimum(sweep, members), unique, rules))
    console.print(made)
    console.print(cell("alone: % of n standing against it alone; left: % standing in its roster", "dim"))
    for attack in rows:
        if attack.get("given_up"):
            shown = f"{attack['given_up']} of {attack['attempted'] - attack['broken']} points it left standing"
            console.print(cell(f"{spaced(attack['name'])}: saw nothing more to win on {shown}", "dim"))
    if hidden:
        console.print(
            cell(
                f"{hidden} row{'s' if hidden > 1 else ''} of sweeps only in the per-example minimum: --all shows all",
                "dim",
            )
        )


def _minimum(sweep: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bad = [a["status"] for a in members if a["status"] != "ok"]
    total: dict[str, int] = {}
    for a in members:
        for kind, number in (a.get("violations") or {}).items():
            total[kind] = total.get(kind, 0) + number
    return {
        "name": f"{sweep['name']} minimum ({len(members)})",
        "status": bad[0] if bad else "ok",
        "attempted": max((a["attempted"] for a in members), default=0),
        "broken": None,
        "robust_accuracy": sweep["robust_accuracy"],
        **{k: sum(a.get(k) or 0 for a in members) for k in ("forwards", "backwards", "seconds")},
        "violations": total,
    }


def _cells(attack: Mapping[str, Any], unique: bool, rules: bool) -> list[Any]:
    broken, only = attack["broken"], attack.get("unique_broken")
    cells = [
        cell(spaced(attack["name"])),
        cell(attack["status"], style="" if attack["status"] == "ok" else "yellow"),
        str(attack["attempted"]),
        "-" if broken is None else str(broken),
        percent(attack.get("robust_accuracy")),
        percent(attack.get("cumulative_accuracy")),
    ]
    if unique:
        cells.append("-" if only is None else str(only))
    cells += [count(attack.get("forwards")), count(attack.get("backwards")), clock(attack.get("seconds") or 0.0)]
    if rules:
        cells.append(cell(", ".join(f"{n} {kind}" for kind, n in (attack.get("violations") or {}).items())))
    return cells


def _rosters(console: Console, record: Record) -> None:
    made = table("entry", ">worst (95 %)", ">attacks", "=complete", ">forw.", ">backw.", ">time")
    for row in record["rosters"]:
        made.add_row(
            cell(spaced(row["name"])),
            f"{percent(row['robust_accuracy'])} ({interval(row.get('ci95'))})",
            str(len(row["members"])),
            "yes" if row.get("complete") else "no",
            count(row.get("forwards")),
            count(row.get("backwards")),
            clock(row.get("seconds") or 0.0),
        )
    console.print(made)
    for row in record["rosters"]:
        if row.get("left_out"):
            names = ", ".join(f"{name} ({passes})" for name, passes in row["left_out"].items())
            console.print(cell(f"left out of {row['name']}, budget {row['budget']} passes an example: {names}"))


def _audit(console: Console, record: Record, everything: bool) -> None:
    """Print what speaks against the number, each remedy once, and what the audit cost."""
    audit = record.get("audit") or {}
    found = audit.get("indicators", ())
    lines, told = [], set()
    for i in (i for i in found if i.get("flag")):
        remedy = (i.get("remedy") or "").replace("RESULT", record["id"])
        command = remedy[max(0, remedy.find("arena match ")) :]  # words differ, what to run is the same
        lines.append(
            f"! {i['name']}: {i.get('evidence') or 'flagged'}"
            + (f" ({remedy})" if remedy and command not in told else "")
        )
        told.add(command)
    if audit.get("seconds"):
        cost = f"{count(audit.get('forwards'))} forwards, {count(audit.get('backwards'))} backwards"
        level = "" if audit.get("level") == "normal" else f" ({audit.get('level')})"
        flags = sum(bool(i.get("flag")) for i in found)
        lines.append(f"audit{level}: {flags} of {len(found)} indicators flagged; {cost}, {clock(audit['seconds'])}")
    if lines:
        console.print()
    for line in lines:
        console.print(cell(line))
    if everything and found:
        made = table("indicator", "=flag", ">value", ">threshold", tight=console.width < WIDE)
        for i in found:
            shown = [_figure(i.get("value")), _figure(i.get("threshold"))]
            made.add_row(cell(i["name"]), cell("!" if i.get("flag") else "", style="yellow"), *map(cell, shown))
        console.print(made)
        for i in found:
            if i.get("evidence") and not i.get("flag") and i["name"] != "unread_parameters":  # that one is a note
                console.print(cell(f"{i['name']}: {i['evidence']}", "dim"))


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _remarks(console: Console, record: Record) -> None:
    lines = []
    diagnosis = record.get("diagnosis") or {}
    for name, head in (diagnosis.get("heads") or {}).items():
        text = f"head {name}: accuracy {percent(head['accuracy'])} %, agrees with the output on "
        text += f"{percent(head['agreement_clean'])} % of clean"
        if head.get("agreement_broken") is not None:
            text += f" and {percent(head['agreement_broken'])} % of broken"
        lines.append(text + " points")
    for name, choice in (diagnosis.get("selections") or {}).items():
        lines.append(
            f"selection {name}: forced to a class, the output is that class on {percent(choice['forced_output'])} % of "
            f"points; accuracy then {percent(choice['forced_accuracy'])} %"
        )
    notes = [str(n) for n in record.get("notes") or ()]
    plugins = [n for n in notes if n.startswith("plugin ")]
    indicators = (record.get("audit") or {}).get("indicators", ())
    notes += [i["evidence"] for i in indicators if i["name"] == "unread_parameters" and i.get("evidence")]
    lines += [f"note: {n}" for n in notes if n not in plugins]
    lines += [f"note: {problems(len(plugins))}"] if plugins else []
    if lines:
        console.print()
    for line in lines:
        console.print(cell(line))


def _handles(console: Console, record: Record, store: Store | None) -> None:
    from arena.home import home

    seconds = (record.get("provenance") or {}).get("seconds")
    console.print()
    kept = ", not stored: the match was stopped" if record.get("stopped") else ""
    console.print(cell(f"result    {record['id']}{kept}" + (f"   ({clock(seconds)})" if seconds else "")))
    passes = _passes(record)
    if passes:
        console.print(cell(passes))
    file = (record.get("examples") or {}).get("file")
    if file:
        path = Path(file) if Path(file).is_absolute() else home() / file
        console.print(f"examples  {plain(path)}", soft_wrap=True)
    words = ["arena", "verify", record["id"]]
    if ":" in record["defense"].partition("(")[0]:
        words += ["--against", plain(record["defense"])]
    if record["asked"].get("checkpoint"):
        words += ["--checkpoint", plain(record["asked"]["checkpoint"])]
    if record["model"].get("twin") and store is not None and twin(record, store) is None:
        console.print(f"no module {plain(replay(record))}", soft_wrap=True)
    if kept:
        return
    console.print(f"re-score  {shlex.join(words)}", soft_wrap=True)


def _passes(record: Record) -> str:
    """Say how the search's seconds compare with those of its bare passes, and what the passes were."""
    provenance = record.get("provenance") or {}
    bare, search = provenance.get("bare_seconds"), provenance.get("search") or {}
    if not bare:
        return ""
    seconds = sum(row.get("seconds") or 0.0 for row in record["rosters"])
    words = [f"passes    {seconds / bare:.2f} times their bare cost of {clock(bare)}"]
    crew = provenance.get("crew")
    several = f"{len(crew['workers'])} worker{'s' * (len(crew['workers']) != 1)} ({crew['engine']})" if crew else ""
    words += [several] if several else []
    words += [f"batch {search['batch_size']}"] if search.get("batch_size") else []
    words += [f"{search['folded']} batch norms folded"] if search.get("folded") else []
    words += ["channels last"] if search.get("channels_last") else []
    words += ["bf16"] if search.get("precision") == "bf16" else []
    words += ["compiled"] if search.get("compiled") else []
    words += ["recorded"] if search.get("recorded") else []
    words += [f"{search['again']} mistakes looked at once more in fp32"] if search.get("again") else []
    words += [str(search["note"])] if search.get("note") else []
    return ", ".join(words)


def spaced(name: str) -> str:
    """Write a canonical name so that a narrow table wraps it between options; still a valid entry."""
    return name.replace(",", ", ")
