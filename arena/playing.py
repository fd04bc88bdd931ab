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

from arena.arrangement import Arrangement, indices_hash, threat_model
from arena.attack import Setup, Unsupported, bound
from arena.audit import statuses, verdict
from arena.auditing.observing import Observed
from arena.auditing.run import audit_match
from arena.cheaper import make_cheaper
from arena.check import PROBE, changed_parts, check_defense, state_hash
from arena.contender import Contender, seeded
from arena.datasets import describe, to_float
from arena.diagnosis import diagnose
from arena.engine import Outcome, confirm, run_iterated, run_plain
from arena.errors import ArenaError
from arena.journal import AttackKeeper, Journal
from arena.lineup import Group, Planned, line_up
from arena.models import plan
from arena.pace import Pace, measure
from arena.plugins import Registry
from arena.question import Running
from arena.referee import DRAWS, Judgement, Referee
from arena.results import (
    SCHEMA,
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
from arena.specs import Indicator, load, text
from arena.store import Outcomes, new_id
from arena.target import Target
from arena.trained import near_chance
from arena.usermodels import OwnPlan
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
        self.pace: Pace | None = None
        """What bare passes of the search copy cost, known once there is one."""
        self.again = 0
        """Points attacked once more in fp32, because only bf16 saw them broken."""
        self.examples: dict[int, Tensor] = {}
        """The first verified break of each point, by position."""

    def build(self) -> torch.nn.Module:
        return self.contender.build().to(self.running.device)

    def _search_copy(self) -> None:
        """Give the attacks a fresh copy of the model, and note what it looks like."""
        running = self.running
        model, self.cheaper = make_cheaper(self.build, self.surface, self.x, running.precision)
        precision = self.cheaper.precision
        self.target = Target(model, self.surface, self.n_classes, device=running.device, precision=precision)
        self.original = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.fingerprint = state_hash(model)
        if self.pace is None:
            met = self.x[self.correct.to(self.x.device)]
            self.pace = measure(self.target, met if len(met) else self.x, running.batch_size)
        self.target.batch_size = self.pace.batch_size
        self.probe = self.target.clean(self.x[:PROBE])

    def run(self) -> tuple[dict[str, Any], Outcomes]:
        """Play everything; return the record and what became of each point."""
        arranged, images = self.arranged, self.arranged.images
        self.n_classes, findings = check_defense(self.build, self.surface, self.x, self.y, images.n_classes)
        self.correct = (self.referee.score(self.x, self.y, self.index).predicted == self.y).cpu()
        natural, interval = share(self.correct)
        groups = line_up(arranged.entries, self.registry, self.surface, arranged.threat, self.n_classes)
        record = self._head(natural, interval)
        self.registry.announce("arena_match_started", record=copy.deepcopy(record))
        rows: list[tuple[Group, Played]] = []
        if not any(i.flag and i.fatal for i in findings):
            self._search_copy()
            for group in groups:
                for played in self._play_group(group, findings):
                    rows.append((group, played))
                    row = attack_row(played, self.correct)
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
        if planned.spec.spec.norms and self.arranged.threat.norm not in planned.spec.spec.norms:
            played.status = "unsupported"
            played.error = f"works under {', '.join(planned.spec.spec.norms)}, not {self.arranged.threat.norm}"
            return played
        if self.arranged.threat.radius == 0 or not len(rows):
            # The clean score is the answer: nothing may be moved, or nothing is left to attack.
            played.attempted = met.clone()
            return played
        name = hashlib.sha256(f"{group.name}\n{planned.name}".encode()).hexdigest()[:12]
        try:
            outcome, played.seconds = self._search(planned, rows.to(self.x.device), f"{number:03d}-{name}")
        except Unsupported as e:
            played.status, played.error = "unsupported", str(e)
            return played
        except (Exception, SystemExit) as e:  # code of a plugin that cannot be loaded or made: contained and named
            played.status, played.error = "failed", f"{type(e).__name__}: {e}"
            played.trace = traceback.format_exc()
            return played
        verdict = self.referee.judge(self.x[rows], outcome.x_adv, self.y[rows], self.index[rows])
        self._enter(played, rows, outcome, verdict)
        self._still_the_same(planned, played, findings)
        return played

    def _search(self, planned: Planned, rows: Tensor, name: str) -> tuple[Outcome, float]:
        """Attack in the search's precision, and in fp32 once more what bf16 alone saw broken; return the seconds too.

        Plain attacks run in fp32: they do not say which points they let go early.
        """
        target, keeper = self.target, self.journal.keeper(name)
        if target.precision == "fp32" or planned.spec.spec.run:
            with target.in_fp32():
                return self._attack(planned, rows, keeper), keeper.seconds()
        outcome, seconds = self._attack(planned, rows, keeper), keeper.seconds()
        x, y, index = self.x[rows], self.y[rows], self.index[rows]
        broken = self.referee.judge(x, outcome.x_adv, y, index).broken
        keeper = self.journal.keeper(f"{name}-fp32")
        again = confirm(outcome, target, y, broken, lambda k: self._attack(planned, rows[k.to(rows.device)], keeper))
        self.again += again
        return outcome, seconds + keeper.seconds() * (again > 0)

    def _attack(self, planned: Planned, rows: Tensor, keeper: AttackKeeper) -> Outcome:
        arranged, spec = self.arranged, planned.spec.spec
        x, y, index = self.x[rows], self.y[rows], self.index[rows]
        stream = Stream.of(arranged.question.seed, planned.name)
        if spec.iterate:
            setup = Setup(arranged.threat, self.n_classes, self.surface, arranged.images.shape, stream, self._lend)
            # A minimal attack is nearly always at a mistake, so looking at each one would cost 8 % of its time.
            attack = Observed(
                load(spec.iterate)(setup, **planned.options), arranged.threat, 8 if spec.kind == "minimal" else 1
            )
            draws = DRAWS if self.surface.random else 1
            self.watch.phase(planned.name, len(x) * bound(attack, draws), "forwards")
            # A random model draws from the global generator: the same match draws the same numbers.
            with seeded(int(stream.bits(self.index[:1], 0, 0, 1)[0, 0])):
                return run_iterated(
                    attack,
                    self.target,
                    x,
                    y,
                    index,
                    None,
                    keeper,
                    lambda forwards, done: self.watch.advance(forwards, f"{done} of {len(x)} points done"),
                    draws=draws,
                )
        assert spec.run is not None
        options = dict(planned.options)
        self.watch.phase(planned.name, len(x), "points")
        function: Callable[..., Any] = load(spec.run)
        return run_plain(
            function,
            self.target,
            x,
            y,
            index,
            arranged.threat,
            stream,
            options,
            keeper,
            lambda _, done: self.watch.advance(done),
        )

    def _lend(self, name: str) -> None:
        """Put another defense's model, trained as this match's question says, at the target's disposal."""
        if name in self.target.sources:
            return
        question, images = self.arranged.question, self.arranged.images
        spec = describe(question.dataset, self.registry)
        try:
            planned = plan(
                name,
                dataset=question.dataset,
                images=images,
                backbone=None if isinstance(self.arranged.plan, OwnPlan) else question.backbone,
                train_seed=question.train_seed,
                threat=threat_model(spec, question.train_norm, question.train_eps),
                checkpoint=None,
                surface=None,
                registry=self.registry,
            )
            if isinstance(planned, OwnPlan):
                raise Unsupported(f"'{name}': expected a registered defense")
            other = planned.obtain(train=spec.cpu, retrain=False, device=self.running.device, watch=self.watch)
        except ArenaError as error:
            raise Unsupported(str(error)) from None
        self.target.sources[name] = other.build().to(self.running.device)

    def _enter(self, played: Played, rows: Tensor, outcome: Outcome, verdict: Judgement) -> None:
        """Write the referee's word into the row; verified breaks always count."""
        broken = verdict.broken.cpu()
        # A random model may let a point leave early at lucky draws: without the majority's word it was not attempted.
        early = outcome.forwards.cpu() < outcome.most
        unlucky = early & ~broken & self.surface.random
        lucky = int(unlucky.sum())
        played.attempted[rows] = outcome.attempted.cpu() & ~unlucky
        played.broken[rows] = broken
        played.nonfinite = verdict.nonfinite
        if not self.surface.random:
            played.silent = int((outcome.seen & ~broken).sum())
        played.forwards, played.backwards = int(outcome.forwards.sum()), int(outcome.backwards.sum())
        played.borderline = verdict.borderline
        played.violations = dict(verdict.violations)
        for kind, count in (outcome.malformed or {}).items():
            played.violations[kind] = played.violations.get(kind, 0) + count
        false_claims = int(((outcome.claim.cpu() == 1) & ~broken & (verdict.margin.cpu().abs() >= 1e-4)).sum())
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
        elif not outcome.moved:
            played.status, played.error = "no_effect", "no query and no returned point differed from its image"

    def _still_the_same(self, planned: Planned, played: Played, findings: list[Indicator]) -> None:
        """Check that the search copy is what it was. An ask/tell attack cannot touch it: then the defense did it."""
        model = self.target.model
        same = state_hash(model) == self.fingerprint
        what = "" if same else changed_parts(model, self.original)
        if same and not self.surface.random and not torch.equal(self.target.clean(self.x[:PROBE]), self.probe):
            same, what = False, "what it returns for the same images"
        if same:
            return
        if planned.spec.spec.run:
            played.status, played.error = "failed", f"the attack changed the model: {what}"
        else:
            findings.append(
                Indicator(
                    "defense_changes",
                    True,
                    evidence=f"while {planned.name} attacked, the model changed: {what}",
                    remedy="make forward in eval mode free of side effects, then play again",
                    fatal=True,
                )
            )
        self._search_copy()

    # -- the record ---------------------------------------------------------------------------------------------

    def _head(self, natural: float, interval: list[float]) -> dict[str, Any]:
        arranged, contender, question = self.arranged, self.contender, self.arranged.question
        return {
            "schema": SCHEMA,
            "id": new_id(),
            "defense": contender.name,
            "protocol": question.protocol,
            "asked": {
                "vs": list(arranged.entries),
                "dataset": question.dataset,
                "backbone": contender.backbone,
                "threat": {
                    "norm": arranged.threat.norm,
                    "eps": arranged.threat.eps,
                    "eps_value": arranged.threat.radius,
                },
                "n": len(arranged.index),
                "seed": question.seed,
                "train_seed": question.train_seed,
                "train_norm": question.train_norm,
                "train_eps": question.train_eps,
                "checkpoint": None if question.checkpoint is None else str(question.checkpoint),
                "surface": None if question.surface is None else str(question.surface),
                "indices_sha256": indices_hash(arranged.index),
                "data_sha256": arranged.images.sha256,
                "subset_rule": arranged.images.subset_rule,
                "card": question.card,
            },
            "model": {
                "id": contender.id,
                "parameters": contender.parameters,
                "options": {k: text(v) for k, v in contender.options.items()},
                "eval_options": {k: text(v) for k, v in contender.eval_options.items()},
                "trained": contender.trained,
                "twin": contender.twin,
                "origin": contender.origin,
                "surface": self.surface.describe(),
            },
            "natural": {"accuracy": natural, "ci95": interval},
        }

    def _sum_up(
        self,
        record: dict[str, Any],
        groups: list[Group],
        played: list[tuple[Group, Played]],
        findings: list[Indicator],
    ) -> tuple[dict[str, Any], Outcomes]:
        rows = [p for _, p in played]
        unique: list[int | None] = [*unique_breaks(rows)] if self.running.matrix else [None] * len(rows)
        record["attacks"] = [attack_row(p, self.correct, u) for p, u in zip(rows, unique, strict=True)]
        record["rosters"] = [roster_row(g, [p for h, p in played if h is g], self.correct) for g in groups]
        record["sweeps"] = sweep_rows(rows, self.correct)
        worst, standing = worst_case(rows, self.correct)
        record["worst_case"] = worst
        places = sorted(self.examples)
        x_adv = torch.stack([self.examples[k] for k in places]) if places else self.x[:0].cpu()
        record["examples"] = keep_examples(record["id"], x_adv, self.arranged.index[places])
        record["diagnosis"] = self._diagnosis(findings, x_adv)
        problems = [f"{g.name}: {problem}" for g in groups for problem in g.problems]
        indicators = [*findings, *statuses(record, problems)]
        audited = audit_match(self, record, rows, indicators, standing)
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
        origins = [self.contender.origin, *(p.planned.spec.origin for p in rows)]
        record["provenance"] = provenance(origins, self.running.device, self.running.precision, self.started)
        if self.pace is not None:
            for row in record["rosters"]:
                row["bare"] = round(self.pace.bare(row["forwards"], row["backwards"]), 6)
            record["provenance"]["bare_seconds"] = round(sum(row["bare"] for row in record["rosters"]), 6)
            search = {"batch_size": self.target.batch_size, "again": self.again}
            record["provenance"]["search"] = {**self.cheaper.record(), **search}
        record["provenance"]["seconds"] = round(time.monotonic() - self.clock, 3)
        outcomes = Outcomes.of(self.arranged.index, self.correct, self.correct & ~standing)
        return record, outcomes

    def _diagnosis(self, findings: list[Indicator], x_adv: Tensor) -> dict[str, Any] | None:
        if any(i.flag and i.fatal for i in findings):
            return None
        model = self.build()
        return diagnose(model, self.surface, self.x, self.y, x_adv.to(self.x.device), self.n_classes)
