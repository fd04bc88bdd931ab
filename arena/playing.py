"""One match in progress: check, natural accuracy, attacks in cascade, referee, record."""

from __future__ import annotations

import copy
import hashlib
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from arena.arrangement import Arrangement, evaluation_of
from arena.attack import Unsupported
from arena.attacker import Attacker
from arena.audit import statuses, verdict
from arena.auditing.run import audit_match
from arena.budget import Prices, said, within
from arena.check import PROBE, check_defense
from arena.contender import Contender
from arena.cost import Bill, Forecast, bill_of
from arena.diagnosis import diagnose
from arena.examples import Breaks, keep_examples
from arena.heading import heading
from arena.journal import Journal
from arena.limit import Limit
from arena.lineup import Group, Planned, line_up
from arena.paper import as_paper, paper_row
from arena.plugins import Registry
from arena.points import Pool
from arena.question import Running
from arena.referee import Referee
from arena.results import (
    Played,
    attack_row,
    provenance,
    roster_row,
    share,
    sweep_rows,
    unique_breaks,
    worst_case,
)
from arena.specs import Indicator
from arena.store import Outcomes
from arena.tally import Tally
from arena.trained import near_chance
from arena.watch import Watch
from arena.workers.staff import Staff


class Playing:
    """One match in progress."""

    def __init__(
        self,
        arranged: Arrangement,
        running: Running,
        registry: Registry,
        contender: Contender,
        journal: Journal,
        watch: Watch,
    ) -> None:
        self.arranged, self.running, self.registry = arranged, running, registry
        self.contender, self.journal, self.watch = contender, journal, watch
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.clock = time.monotonic()
        self.pool = Pool.of(arranged.images, arranged.index, running.device)
        self.surface = contender.surface
        self.referee = Referee(self.build(), arranged.threat, self.surface.random, running.device)
        self.breaks = Breaks(journal.folder, arranged.images.shape)
        """The first verified break of each point, by position."""
        self.paper = arranged.question.protocol == "paper"
        """All attacks meet all points, and what counts is where they end (``arena.paper``)."""
        self.limit = Limit(running.time_limit)
        self.again = 0
        """Forwards that a search in lower precision made once more in fp32."""
        self.stopped = False
        """The time limit left something undone."""

    def build(self) -> torch.nn.Module:
        return self.contender.build().to(self.running.device)

    def prepare(self, trained: bool = True) -> tuple[list[Group], Bill, list[Indicator]]:
        """Check the model, score the clean points, line up the attacks; return them, their bill, and the findings.

        Of a model that is not ``trained`` all points count as naturally correct: it may become that good.
        """
        arranged, pool = self.arranged, self.pool
        n_classes, findings = check_defense(
            self.build, self.surface, pool.x[:PROBE], pool.y[:PROBE], arranged.images.n_classes
        )
        self.correct = pool.correct(self.referee) if trained else torch.ones(len(pool), dtype=torch.bool)
        self.attacker = Attacker(
            arranged,
            self.running,
            self.registry,
            self.contender,
            pool,
            n_classes,
            torch.ones_like(self.correct) if self.paper else self.correct,
            self.limit,
            self.watch,
            self._begun,
        )
        own = evaluation_of(arranged.plan)
        groups = line_up(arranged.entries, self.registry, self.surface, arranged.threat, n_classes, own)
        looks = 2 if self.running.precision == "bf16" and not self.surface.random else 1
        ground = self.attacker.ground
        prices = Prices(lambda p: ground.setup(p, lambda name: None), ground.draws, looks)
        groups = [within(group, arranged.question.budget, prices.cost) for group in groups]
        for text in filter(None, map(said, groups)):
            self.watch.say(text)
        points = len(pool) if self.paper else int(self.correct.sum())
        alone = self.paper or self.running.matrix
        bill = bill_of(groups, lambda p: prices.played(p, arranged.threat), points, alone)
        self.attacker.passes = bill.forwards, bill.backwards
        return groups, bill, findings

    def run(self, staff: Staff | None = None) -> tuple[dict[str, Any], Outcomes]:
        """Play everything, with the workers of a ``staff`` if there is one; return the record and what became of each
        point."""
        groups, bill, findings = self.prepare()
        record = heading(self.arranged, self.contender, *share(self.correct))
        record["cost"] = bill.record()
        self.registry.announce("arena_match_started", record=copy.deepcopy(record))
        rows: list[tuple[Group, Played]] = []
        if not any(i.flag and i.fatal for i in findings):
            self.attacker.shared = staff is not None and not self.surface.random
            search = self.attacker.search
            if what := search.guard.changed():
                findings.append(_changes(f"while its passes were timed, the model changed: {what}"))
            self.attacker.muster(staff)
            pace = search.pace
            if pace and staff and self.attacker.crew:
                pace = pace.shared(staff.size)
            self.forecast, self.place = Forecast(bill, pace), -1
            self.watch.say(bill.line(pace))
            for group in groups:
                for played in self._play_group(group, findings):
                    rows.append((group, played))
                    if not played.begun:
                        continue
                    row = self._row(played)
                    self.watch.row(row)
                    self.registry.announce(
                        "arena_attack_finished", record=copy.deepcopy(record), attack=copy.deepcopy(row)
                    )
        return self._sum_up(record, groups, rows, findings)

    # -- one attack ---------------------------------------------------------------------------------------------

    def _play_group(self, group: Group, findings: list[Indicator]) -> Any:
        standing = self.correct.clone()
        for number, planned in enumerate(group.attacks):
            if any(i.flag and i.fatal for i in findings):
                return
            met = self.correct if planned.standalone or self.running.matrix else standing
            met = torch.ones_like(met) if self.paper else met
            self.place += 1
            played = self._play(group, number, planned, met.clone(), findings)
            if not planned.standalone:
                standing &= ~played.broken
            played.cumulative = standing.clone()
            yield played

    def _play(self, group: Group, number: int, planned: Planned, met: Tensor, findings: list[Indicator]) -> Played:
        rows = met.nonzero().squeeze(1)
        nothing = torch.zeros_like(met)
        played = Played(
            planned, group.name, group.name if group.roster else None, "ok", met, nothing, nothing.clone(), met
        )
        played.right = self.correct.clone()
        if planned.spec.spec.norms and self.arranged.threat.norm not in planned.spec.spec.norms:
            played.status = "unsupported"
            played.error = f"works under {', '.join(planned.spec.spec.norms)}, not {self.arranged.threat.norm}"
            return played
        if self.arranged.threat.radius == 0 or not len(rows):
            # The clean score is the answer: nothing may be moved, or nothing is left to attack.
            played.attempted = met.clone()
            return played
        if self.limit.up:
            self.stopped = True
            played.begun, played.status, played.error = False, "partial", f"not played: {self.limit} was up"
            return played
        name = hashlib.sha256(f"{group.name}\n{planned.name}".encode()).hexdigest()[:12]
        tally = Tally(played, self.correct, self.surface.random)
        began = time.monotonic()
        self._play_shards(tally, rows, f"{number:03d}-{name}")
        if played.seconds < 1.5 * (time.monotonic() - began):  # most of it is this run's
            self.forecast.took(played.forwards, played.backwards, played.seconds)
        self.again += tally.again
        self.stopped |= tally.unfinished
        tally.close(str(self.limit))
        self._still_the_same(planned, played, findings)
        return played

    def _play_shards(self, tally: Tally, rows: Tensor, name: str) -> None:
        """Attack positions (N,) shard by shard, judge what comes back, put the breaks away and forget the rest."""
        played = tally.played
        planned = played.planned
        for shard in self.attacker.shards(planned, rows):
            if shard.number and self.limit.up:
                return
            try:
                outcome, seconds = self.attacker.attack(planned, shard, self.journal, name)
            except Unsupported as e:
                played.status, played.error = "unsupported", str(e)
                return
            except (Exception, SystemExit) as e:  # code of a plugin that cannot be loaded or made: contained and named
                played.status, played.error = "failed", f"{type(e).__name__}: {e}"
                played.trace = traceback.format_exc()
                return
            points = self.pool.take(shard.rows)
            verdict = self.referee.judge(points.x, outcome.x_adv, points.y, points.index)
            broken = tally.enter(shard, outcome, verdict, seconds)
            self.breaks.add(shard.rows[broken], outcome.x_adv[broken.to(outcome.x_adv.device)])
            if played.status != "ok":
                return

    def _begun(self, planned: Planned, total: int, unit: str, points: int) -> None:
        self.watch.phase(planned.name, total, unit)
        self.watch.ahead(*self.forecast.ahead(self.place, points))

    def _still_the_same(self, planned: Planned, played: Played, findings: list[Indicator]) -> None:
        """Check that the search copy is what it was. An ask/tell attack cannot touch it: then the defense did it."""
        what = self.attacker.changed()
        if not what:
            return
        if planned.spec.spec.run:
            played.status, played.error = "failed", f"the attack changed the model: {what}"
        else:
            findings.append(_changes(f"while {planned.name} attacked, the model changed: {what}"))
        self.attacker.search.renew()

    def _row(self, played: Played, unique: int | None = None) -> dict[str, Any]:
        row = attack_row(played, self.correct, unique)
        return paper_row(row, played, self.correct) if self.paper else row

    # -- the record ---------------------------------------------------------------------------------------------

    def _sum_up(
        self,
        record: dict[str, Any],
        groups: list[Group],
        played: list[tuple[Group, Played]],
        findings: list[Indicator],
    ) -> tuple[dict[str, Any], Outcomes]:
        rows = [p for _, p in played]
        unique: list[int | None] = [*unique_breaks(rows)] if self.running.matrix or self.paper else [None] * len(rows)
        record["attacks"] = [self._row(p, u) for p, u in zip(rows, unique, strict=True)]
        record["rosters"] = [roster_row(g, [p for h, p in played if h is g], self.correct) for g in groups]
        record["sweeps"] = sweep_rows(rows, self.correct)
        worst, standing = worst_case(rows, self.correct)
        record["worst_case"] = worst
        name = self.journal.stopped if self.stopped else record["id"]
        record["examples"] = keep_examples(name, self.breaks, self.arranged.index[self.breaks.points])
        record["diagnosis"] = self._diagnosis(findings)
        record["stopped"] = self.stopped
        origins = [self.contender.origin, *(p.planned.spec.origin for p in rows)]
        record["provenance"] = provenance(origins, self.running.device, self.running.precision, self.started)
        record["provenance"]["crew"] = self.attacker.crew.record() if self.attacker.crew else None
        record["provenance"]["time_limit"] = self.running.time_limit
        problems = [f"{g.name}: {problem}" for g in groups for problem in g.problems]
        indicators = [*findings, *statuses(record, problems)]
        if self.paper:
            indicators += as_paper(record, rows, groups, self.arranged.plan)
        audited = None if self.paper or self.stopped else audit_match(self, record, rows, indicators, standing)
        indicators += audited.indicators if audited else ()
        record["audit"] = {
            "verdict": verdict(indicators, audited is not None),
            "level": self.running.audit if audited else "none",
            "indicators": [i.record() for i in indicators],
            "forwards": audited.forwards if audited else 0,
            "backwards": audited.backwards if audited else 0,
            "seconds": audited.seconds if audited else 0.0,
        }
        record["notes"] = [*self.arranged.notes, *map(str, self.registry.problems)]
        natural, k = record["natural"]["accuracy"], self.arranged.images.n_classes
        if near_chance(natural, k):
            record["notes"].append(f"natural accuracy {natural:.1f} % is near chance ({100 / k:.1f} %): is it trained?")
        if self.attacker.searched:
            self.attacker.search.enter(record, self.again)
        record["provenance"]["seconds"] = round(time.monotonic() - self.clock, 3)
        outcomes = Outcomes.of(self.arranged.index, self.correct, self.correct & ~standing)
        return record, outcomes

    def _diagnosis(self, findings: list[Indicator]) -> dict[str, Any] | None:
        if self.stopped or any(i.flag and i.fatal for i in findings):
            return None
        pool = self.pool
        return diagnose(self.build(), self.surface, pool.x, pool.y, self.breaks, self.attacker.n_classes)


def _changes(evidence: str) -> Indicator:
    remedy = "make forward in eval mode free of side effects, then play again"
    return Indicator("defense_changes", True, evidence=evidence, remedy=remedy, fatal=True)
