"""One match in progress: check, natural accuracy, attacks in cascade, referee, record."""

from __future__ import annotations

import copy
import hashlib
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from arena.arrangement import Arrangement, evaluation_of
from arena.attack import Setup, Unsupported, bound
from arena.audit import statuses, verdict
from arena.auditing.observing import Observed
from arena.auditing.run import audit_match
from arena.budget import Prices, said, within
from arena.check import check_defense
from arena.contender import Contender, seeded
from arena.cost import Bill, Forecast, bill_of
from arena.datasets import to_float
from arena.diagnosis import diagnose
from arena.engine import Outcome, run_iterated, run_plain
from arena.heading import heading
from arena.journal import AttackKeeper, Journal
from arena.lending import lend
from arena.limit import Limit
from arena.lineup import Group, Planned, line_up
from arena.paper import as_paper, paper_row
from arena.plugins import Registry
from arena.question import Running
from arena.referee import DRAWS, Judgement, Referee
from arena.results import (
    Played,
    attack_row,
    keep_examples,
    provenance,
    roster_row,
    share,
    sweep_rows,
    unique_breaks,
    worst_case,
)
from arena.rng import Stream
from arena.search import Search
from arena.specs import Indicator, load
from arena.store import Outcomes
from arena.trained import near_chance
from arena.watch import Watch


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
        device, images = running.device, arranged.images
        self.x = to_float(images.x_test[arranged.index]).to(device)
        self.y = images.y_test[arranged.index].to(device)
        self.index = arranged.index.to(device)
        self.surface = contender.surface
        self.referee = Referee(self.build(), arranged.threat, self.surface.random, device)
        self.n_classes = images.n_classes
        """Width of the logits, known after the check; at least the data set's classes."""
        self._search: Search | None = None
        self.examples: dict[int, Tensor] = {}
        """The first verified break of each point, by position."""
        self.paper = arranged.question.protocol == "paper"
        """All attacks meet all points, and what counts is where they end (``arena.paper``)."""
        self.limit = Limit(running.time_limit)
        self.stopped = False
        """The time limit left something undone."""

    def build(self) -> torch.nn.Module:
        return self.contender.build().to(self.running.device)

    def search(self) -> Search:
        """Return what the attacks query; it is made, and its pace measured, when first asked for."""
        if self._search is None:
            met = torch.ones_like(self.correct) if self.paper else self.correct
            self._search = Search(self.build, self.surface, self.n_classes, self.x, met, self.running)
        return self._search

    def prepare(self, trained: bool = True) -> tuple[list[Group], Bill, list[Indicator]]:
        """Check the model, score the clean points, line up the attacks; return them, their bill, and the findings.

        Of a model that is not ``trained`` all points count as naturally correct: it may become that good.
        """
        arranged = self.arranged
        self.n_classes, findings = check_defense(self.build, self.surface, self.x, self.y, arranged.images.n_classes)
        self.correct = torch.ones(len(self.y), dtype=torch.bool)
        if trained:
            self.correct = (self.referee.score(self.x, self.y, self.index).predicted == self.y).cpu()
        own = evaluation_of(arranged.plan)
        groups = line_up(arranged.entries, self.registry, self.surface, arranged.threat, self.n_classes, own)
        seed = arranged.question.seed
        tries = 2 if self.running.precision == "bf16" and not self.surface.random else 1
        prices = Prices(lambda p: self._setup(Stream.of(seed, p.name), lambda name: None), self._draws(), tries)
        groups = [within(group, arranged.question.budget, prices.cost) for group in groups]
        for text in filter(None, map(said, groups)):
            self.watch.say(text)
        points = len(self.y) if self.paper else int(self.correct.sum())
        alone = self.paper or self.running.matrix
        return groups, bill_of(groups, lambda p: prices.played(p, arranged.threat), points, alone), findings

    def run(self) -> tuple[dict[str, Any], Outcomes]:
        """Play everything; return the record and what became of each point."""
        groups, bill, findings = self.prepare()
        record = heading(self.arranged, self.contender, *share(self.correct))
        record["cost"] = bill.record()
        self.registry.announce("arena_match_started", record=copy.deepcopy(record))
        rows: list[tuple[Group, Played]] = []
        if not any(i.flag and i.fatal for i in findings):
            search = self.search()
            pace = search.pace
            if what := search.guard.changed():
                findings.append(_changes(f"while its passes were timed, the model changed: {what}"))
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
        at, began = rows.to(self.x.device), time.monotonic()
        x, y, index = self.x[rows], self.y[rows], self.index[rows]
        try:
            outcome, played.seconds = self.search().attack(
                planned,
                y,
                lambda some, keeper: self._attack(planned, at[some.to(at.device)], keeper, len(rows)),
                lambda added: self.journal.keeper(f"{number:03d}-{name}{added}"),
                lambda found: self.referee.judge(x, found.x_adv, y, index).broken,
                lambda: self.limit.up,
            )
        except Unsupported as e:
            played.status, played.error = "unsupported", str(e)
            return played
        except (Exception, SystemExit) as e:  # code of a plugin that cannot be loaded or made: contained and named
            played.status, played.error = "failed", f"{type(e).__name__}: {e}"
            played.trace = traceback.format_exc()
            return played
        if played.seconds < 1.5 * (time.monotonic() - began):  # most of it is this run's
            self.forecast.took(int(outcome.forwards.sum()), int(outcome.backwards.sum()), played.seconds)
        self.stopped |= not outcome.error and not bool(outcome.attempted.all())
        verdict = self.referee.judge(x, outcome.x_adv, y, index)
        self._enter(played, rows, outcome, verdict)
        self._still_the_same(planned, played, findings)
        return played

    def _attack(self, planned: Planned, rows: Tensor, keeper: AttackKeeper, met: int) -> Outcome:
        """Attack points, by position, of the ``met`` ones that the attack meets in all."""
        arranged, spec, target = self.arranged, planned.spec.spec, self.search().target
        x, y, index = self.x[rows], self.y[rows], self.index[rows]
        stream = Stream.of(arranged.question.seed, planned.name)
        if spec.iterate:
            setup = self._setup(stream, self._lend)
            # A minimal attack is nearly always at a mistake, so looking at each one would cost 8 % of its time.
            attack = Observed(
                load(spec.iterate)(setup, **planned.options), arranged.threat, 8 if spec.kind == "minimal" else 1
            )
            draws = self._draws()
            self._phase(planned, len(x) * bound(attack, draws), "forwards", met)
            # A random model draws from the global generator: the same match draws the same numbers.
            with seeded(int(stream.bits(self.index[:1], 0, 0, 1)[0, 0])):
                return run_iterated(
                    attack,
                    target,
                    x,
                    y,
                    index,
                    None,
                    keeper,
                    lambda forwards, done: self.watch.advance(forwards, f"{done} of {len(x)} points done"),
                    self.limit.after_step,
                    draws,
                )
        assert spec.run is not None
        options = dict(planned.options)
        self._phase(planned, len(x), "points", met)
        function: Callable[..., Any] = load(spec.run)
        return run_plain(
            function,
            target,
            x,
            y,
            index,
            arranged.threat,
            stream,
            options,
            keeper,
            lambda _, done: self.watch.advance(done),
            spec.chunk,
            self.limit.after_step,
        )

    def _phase(self, planned: Planned, total: int, unit: str, points: int) -> None:
        self.watch.phase(planned.name, total, unit)
        self.watch.ahead(*self.forecast.ahead(self.place, points))

    def _setup(self, stream: Stream, lend: Callable[[str], None]) -> Setup:
        arranged = self.arranged
        return Setup(arranged.threat, self.n_classes, self.surface, arranged.images.shape, stream, lend)

    def _draws(self) -> int:
        return DRAWS if self.surface.random else 1

    def _lend(self, name: str) -> None:
        """Put another defense's model at the target's disposal."""
        sources = self.search().target.sources
        if name not in sources:
            sources[name] = lend(name, self.arranged, self.registry, self.running.device, self.watch)

    def _enter(self, played: Played, rows: Tensor, outcome: Outcome, verdict: Judgement) -> None:
        """Write the referee's word into the row; verified breaks always count."""
        wrong = verdict.broken.cpu()
        broken = wrong & self.correct[rows]  # a point misclassified without an attack is broken by none
        # A random model may let a point leave early at lucky draws: without the majority's word it was not attempted.
        early = outcome.forwards.cpu() < outcome.most
        unlucky = early & ~wrong & self.surface.random
        lucky = int(unlucky.sum())
        played.attempted[rows] = outcome.attempted.cpu() & ~unlucky
        played.broken[rows] = broken
        played.right[rows] = verdict.valid.cpu() & ~wrong
        played.nonfinite = verdict.nonfinite
        if not self.surface.random:
            played.silent = int((outcome.seen & self.correct[rows] & ~broken).sum())
        played.forwards, played.backwards = int(outcome.forwards.sum()), int(outcome.backwards.sum())
        played.borderline = verdict.borderline
        played.violations = dict(verdict.violations)
        for kind, count in (outcome.malformed or {}).items():
            played.violations[kind] = played.violations.get(kind, 0) + count
        false_claims = int(((outcome.claim.cpu() == 1) & ~wrong & (verdict.margin.cpu().abs() >= 1e-4)).sum())
        if false_claims:
            played.violations["false_claim"] = false_claims
        for k in broken.nonzero().squeeze(1).tolist():
            self.examples.setdefault(int(rows[k]), outcome.x_adv[k].detach().cpu().clone())
        if outcome.error:
            played.status, played.error, played.trace = "failed", outcome.error, outcome.trace
        elif played.violations:
            kinds = ", ".join(f"{count} {kind}" for kind, count in played.violations.items())
            played.status, played.error = "failed", f"of {len(rows)} points returned: {kinds}"
        elif lucky:
            played.status = "partial"
            played.error = f"{lucky} points left at draws that the majority does not confirm: the model is random"
        elif not bool(outcome.attempted.all()):
            played.status = "partial"
            played.error = f"{self.limit} was up after {int(outcome.attempted.sum())} of {len(rows)} points"
        elif not outcome.moved:
            played.status, played.error = "no_effect", "no query and no returned point differed from its image"

    def _still_the_same(self, planned: Planned, played: Played, findings: list[Indicator]) -> None:
        """Check that the search copy is what it was. An ask/tell attack cannot touch it: then the defense did it."""
        what = self.search().guard.changed()
        if not what:
            return
        if planned.spec.spec.run:
            played.status, played.error = "failed", f"the attack changed the model: {what}"
        else:
            findings.append(_changes(f"while {planned.name} attacked, the model changed: {what}"))
        self.search().renew()

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
        places = sorted(self.examples)
        x_adv = torch.stack([self.examples[k] for k in places]) if places else self.x[:0].cpu()
        name = self.journal.stopped if self.stopped else record["id"]
        record["examples"] = keep_examples(name, x_adv, self.arranged.index[places])
        record["diagnosis"] = self._diagnosis(findings, x_adv)
        record["stopped"] = self.stopped
        origins = [self.contender.origin, *(p.planned.spec.origin for p in rows)]
        record["provenance"] = provenance(origins, self.running.device, self.running.precision, self.started)
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
        if self._search is not None:
            self._search.enter(record)
        record["provenance"]["seconds"] = round(time.monotonic() - self.clock, 3)
        outcomes = Outcomes.of(self.arranged.index, self.correct, self.correct & ~standing)
        return record, outcomes

    def _diagnosis(self, findings: list[Indicator], x_adv: Tensor) -> dict[str, Any] | None:
        if self.stopped or any(i.flag and i.fatal for i in findings):
            return None
        model = self.build()
        return diagnose(model, self.surface, self.x, self.y, x_adv.to(self.x.device), self.n_classes)


def _changes(evidence: str) -> Indicator:
    remedy = "make forward in eval mode free of side effects, then play again"
    return Indicator("defense_changes", True, evidence=evidence, remedy=remedy, fatal=True)
