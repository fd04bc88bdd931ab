"""Arena's side: a roster or attack played as a match plays it, and the roster's attacks driven plainly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena.arrangement import Arrangement
from arena.attack import Setup
from arena.errors import ArenaError
from arena.examples import drop_examples
from arena.journal import Journal
from arena.lineup import Planned, check_entries, line_up
from arena.playing import Playing
from arena.plugins import Registry
from arena.question import Question
from arena.referee import Referee
from arena.results import packed
from arena.rng import Stream
from arena.search import Search
from arena.specs import load
from arena.surface import Surface
from arena.target import Target
from arena.threads import one_thread, small
from arena.watch import Silent
from arena.workers.staff import engaged

from .bare import SHARE, Bare, Looking, timed
from .cases import Subject
from .plain import BATCH, asking_all, drive
from .style import Style

#: In fp32, eagerly, by one process.
EAGERLY = Style()
#: Passes for which a batch size is chosen with care.
LONG = 10**9, 10**9


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Run the block on so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def play(
    subject: Subject,
    entry: str,
    style: Style,
    seed: int,
    threads: int,
    registry: Registry,
    batch_size: int | None = None,
    watch: Silent | None = None,
) -> dict[str, Any]:
    """Play an entry of ``--vs`` as ``arena match`` does, without the audit, the store or anything left from before.

    ``threads`` are torch's; a match of a small model takes one, whatever they are.

    Raises:
        ArenaError: an attack failed, or the model cannot be attacked.
    """
    contender, entries = subject.obtain(), check_entries((entry,), registry)
    asked = Question(subject.case.defense, entries, n=len(subject.index), seed=seed, train_seed=subject.seed)
    arranged = Arrangement(asked, entries, subject.images, subject.threat, subject.index, subject.plan, "")
    running = replace(style.running(), batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder, on_threads(threads):
        match = Playing(arranged, running, registry, contender, Journal(Path(folder)), watch or Silent())
        few = small(style.device, contender.parameters, subject.images.shape)
        cpu = time.process_time()
        with engaged(running) as staff, one_thread(few):
            record, outcomes = match.run(staff)
        cpu = time.process_time() - cpu
    drop_examples(record["id"])
    bad = [f"{r['name']}: {r['status']} {r['error'] or ''}".strip() for r in record["attacks"] if r["status"] != "ok"]
    if bad or record["audit"]["verdict"] == "void":
        raise ArenaError(f"{subject.case.name}, {entry}: {'; '.join(bad) or 'the match is void'}")
    (row,) = record["rosters"]
    kept = ("name", "attempted", "broken", "forwards", "backwards", "seconds")
    return {
        **masks(torch.tensor(outcomes.natural), torch.tensor(outcomes.broken)),
        **{k: row[k] for k in ("forwards", "backwards", "seconds", "bare")},
        "whole": record["provenance"]["seconds"],
        "cpu": round(cpu, 6),
        "threads": record["provenance"]["threads"],
        "search": record["provenance"]["search"],
        "batch_size": record["provenance"]["search"]["batch_size"],
        "model": contender.id,
        "git": record["provenance"]["git"],
        "attacks": [{k: r[k] for k in kept} for r in record["attacks"]],
        "violations": {},
    }


def play_plainly(
    subject: Subject, entry: str, seed: int, threads: int, registry: Registry, device: str = "cpu"
) -> dict[str, Any]:
    """Drive a roster's attacks over the survivors, one after the other, on the eager model in fp32."""
    contender = subject.obtain()
    x, y, index = (part.to(device) for part in (subject.x, subject.y, subject.index))
    (group,) = line_up((entry,), registry, Surface(), subject.threat, subject.images.n_classes)
    with on_threads(threads):
        began = timed(lambda: None)
        whole = time.perf_counter()
        target = Target(contender.build().to(device), Surface(), subject.images.n_classes, BATCH, device)
        referee = Referee(contender.build().to(device), subject.threat, device=device)
        bare = Bare.of(target, x, BATCH)
        bare.look()
        natural = referee.score(x, y, index).predicted == y
        standing, rows, seconds, cpu = natural.clone(), [], began.seconds, began.cpu
        for planned in group.attacks:
            met = standing.nonzero().squeeze(1)
            row, broken = _drive(subject, planned, target, referee, (x[met], y[met], index[met]), seed)
            standing[met[broken]] = False
            rows.append(row)
            seconds, cpu = seconds + row["seconds"], cpu + row["cpu"]
        whole = time.perf_counter() - whole
        bare.look()
    forwards, backwards = (sum(r[k] for r in rows) for k in ("forwards", "backwards"))
    return {
        **masks(natural, natural & ~standing),
        "forwards": forwards,
        "backwards": backwards,
        "seconds": round(seconds, 6),
        "bare": round(bare.seconds(forwards, backwards), 6),
        "whole": round(whole, 6),
        "cpu": round(cpu, 6),
        "threads": threads,
        "batch_size": BATCH,
        "model": contender.id,
        "attacks": rows,
        "violations": {},
    }


def _drive(
    subject: Subject,
    planned: Planned,
    target: Target,
    referee: Referee,
    points: tuple[Tensor, Tensor, Tensor],
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    spec, (x, y, index) = planned.spec.spec, points
    if spec.iterate is None:
        raise ArenaError(f"attack '{planned.name}': the plain driver knows ask/tell attacks only")
    stream = Stream.of(seed, planned.name)
    setup = Setup(subject.threat, subject.images.n_classes, Surface(), subject.images.shape, stream)
    attack, made = asking_all(load(spec.iterate)(setup, **planned.options)), []
    took = timed(lambda: made.append(drive(attack, spec.name, target, x, y, index)))
    word = referee.judge(x, made[0].x_adv, y, index)
    if word.violations:
        raise ArenaError(f"{planned.name}, driven plainly: {word.violations}")
    row = {
        "name": planned.name,
        "attempted": len(y),
        "broken": int(word.broken.sum()),
        "forwards": made[0].forwards,
        "backwards": made[0].backwards,
        **took.record(),
    }
    return row, word.broken


def play_in_turn(
    subject: Subject,
    entry: str,
    seed: int,
    threads: int,
    registry: Registry,
    style: Style = EAGERLY,
) -> dict[str, Any]:
    """Play an entry, and time bare passes of the same search copy at the same batch size before and after."""
    contender, x = subject.obtain(), subject.x
    few = small("cpu", contender.parameters, subject.images.shape)
    met = subject.right()
    with on_threads(threads), one_thread(few):
        running = style.running(shared=False)
        search = Search(contender.build, contender.surface, subject.images.n_classes, x, met, running)
        chosen = Bare.of(search.target, x, search.target.batch_size)
        chosen.look()
    made = play(subject, entry, style, seed, threads, registry)
    with on_threads(threads), one_thread(few):
        if made["batch_size"] != search.target.batch_size:  # the match measured another size to be the best
            chosen = Bare.of(search.target, x, made["batch_size"])
            chosen.look()
        chosen.look()
    return {**made, "bare": round(chosen.seconds(made["forwards"], made["backwards"]), 6), "pace_bare": made["bare"]}


def play_among_looks(
    subject: Subject, entry: str, seed: int, threads: int, registry: Registry, share: float = SHARE
) -> dict[str, Any]:
    """Play an entry in fp32, and time bare passes of the same search copy and batch size again and again meanwhile.

    The batch size is chosen beforehand, as a long match chooses it. The looks, about this share of all, are taken off
    the entry's seconds.
    """
    contender, x = subject.obtain(), subject.x
    few = small("cpu", contender.parameters, subject.images.shape)
    met = subject.right()
    with on_threads(threads), one_thread(few):
        running = EAGERLY.running()
        search = Search(contender.build, contender.surface, subject.images.n_classes, x, met, running, LONG)
        bare = Bare.of(search.target, x, search.target.batch_size)
        bare.look()
    looking = Looking(bare, share)
    made = play(subject, entry, EAGERLY, seed, threads, registry, search.target.batch_size, looking)
    with on_threads(threads), one_thread(few):
        bare.look()
    less = {key: round(made[key] - looking.took, 6) for key in ("seconds", "whole")}
    less["cpu"] = round(made["cpu"] - looking.cpu, 6)
    known = {"bare": round(bare.seconds(made["forwards"], made["backwards"]), 6), "pace_bare": made["bare"]}
    return {**made, **less, **known}


def masks(natural: Tensor, broken: Tensor) -> dict[str, Any]:
    """Return the part of a cell that holds the points' fates."""
    return {"n": len(natural), "natural": packed(natural), "broken": packed(broken)}
