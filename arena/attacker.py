"""Attacks the points of a match, a shard at a time: what one device does of a match."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from arena.arrangement import Arrangement
from arena.batches import padded
from arena.check import PROBE
from arena.compiling import unfit
from arena.contender import Contender
from arena.engine import Keeper, Outcome
from arena.ground import Ground
from arena.journal import EVERY, Journal, Keepers
from arena.lending import lend
from arena.limit import Limit
from arena.lineup import Planned
from arena.plugins import Registry
from arena.points import SHARD, Points, Pool, Shard, shards
from arena.question import Running
from arena.search import Search
from arena.watch import Watch
from arena.workers.crew import Crew
from arena.workers.messages import Order
from arena.workers.staff import Staff
from arena.workers.task import Task

#: Told that work begins: (attack, steps, their unit, points that it meets).
Begun = Callable[[Planned, int, str, int], None]


class Attacker:
    """Attacks shards of a match's points; between two calls nothing is kept but the search copy."""

    def __init__(
        self,
        arranged: Arrangement,
        running: Running,
        registry: Registry,
        contender: Contender,
        pool: Pool,
        n_classes: int,
        met: Tensor,
        limit: Limit,
        watch: Watch,
        begun: Begun,
    ) -> None:
        """Take in what all attacks of a match share.

        Args:
            arranged, running, registry, contender: the match, how it is run, what there is, and the model.
            pool: all points.
            n_classes: width of the logits.
            met: (n,) bool, the points that attacks can meet.
            limit: the clock that stops attacks.
            watch: told of the progress of what has begun.
            begun: told that work begins.
        """
        self.arranged, self.running, self.registry, self.contender = arranged, running, registry, contender
        self.pool, self.n_classes, self.met = pool, n_classes, met
        self.limit, self.watch, self.begun = limit, watch, begun
        self.surface = contender.surface
        self.passes = (0, 0)
        """The most forwards and backwards of all attacks, once it is known."""
        self.shared = False
        """Workers will make the passes."""
        self._search: Search | None = None
        self.crew: Crew | None = None
        """The workers, where there are several devices."""
        self._changed = ""
        self._lent: dict[str, Contender] = {}
        self._asked: list[str] = []
        """Models that the attack at hand has asked for, by name."""

    def build(self) -> nn.Module:
        """Make a fresh model on the device."""
        return self.contender.build().to(self.running.device)

    @property
    def search(self) -> Search:
        """What the attacks query; it is made, and its pace measured, when first asked for."""
        if self._search is None:
            passes = (0, 0) if self.shared else self.passes
            x, met = self.pool.x, self.met
            if self.running.compile and not unfit(self.surface, x):
                self.watch.say("compiling the passes: up to a minute or two, less the next time")
            self._search = Search(self.build, self.surface, self.n_classes, x, met, self.running, passes)
        return self._search

    @property
    def searched(self) -> bool:
        """Whether anything was queried."""
        return self._search is not None

    @property
    def ground(self) -> Ground:
        """What all attacks of the match share."""
        arranged = self.arranged
        shape, seed, first = arranged.images.shape, arranged.question.seed, int(arranged.index[0])
        return Ground(arranged.threat, self.n_classes, self.surface, shape, seed, first)

    def muster(self, staff: Staff | None) -> None:
        """Start the workers, if there are any: they then do the attacks' passes.

        Raises:
            ArenaError: they cannot begin.
        """
        if staff is None:
            return
        if self.surface.random:
            self.watch.say("the model is declared random: what it draws depends on its batch, so one device attacks it")
            return
        target, running = self.search.target, self.running
        most = padded(min(-(-int(self.met.sum()) // staff.size), SHARD))
        self.crew = Crew(staff)
        self.crew.begin(
            Order(
                contender=self.contender,
                ground=self.ground,
                probe=self.pool.x[:PROBE].cpu().numpy(),
                most=most,
                precision=target.precision,
                compile=self.search.cheaper.compiled,
                batch_size=running.batch_size,
                every=EVERY,
                passes=(self.passes[0] // staff.size, self.passes[1] // staff.size),
                threads=max(1, torch.get_num_threads() // staff.size) if staff.engine == "local" else 1,
            )
        )
        self.search.pace = self.crew.pace

    def changed(self) -> str:
        """Name what of the search copy, or of a worker's, is no longer what it was; empty if nothing is."""
        what, self._changed = self._changed, ""
        return what or self.search.guard.changed()

    def shards(self, planned: Planned, rows: Tensor) -> list[Shard]:
        """Cut the positions (N,) that an attack meets into what is played at a time: a shard for each device."""
        spec = planned.spec.spec
        return shards(rows, spec.chunk if spec.run else 1, self.crew.staff.size if self.crew else 1)

    def attack(self, planned: Planned, shard: Shard, journal: Journal, name: str) -> tuple[Outcome, float]:
        """Play an attack on one shard; return what it handed over, by row of the shard, and the seconds it took.

        Args:
            planned: the attack.
            shard: the points, by position.
            journal: where progress is kept.
            name: the attack's in the journal; the shard has a name of its own there.

        Raises:
            Unsupported: the attack does not work here.
            Exception: whatever the attack's code raises when it is loaded or made; not what it raises at work.
        """
        points = self.pool.take(shard.rows)

        index = points.index.tolist()
        own = [(journal.keeper(f"{name}{suffix}"), index[span]) for suffix, span in shard.parts]
        keeper = own[0][0] if len(own) == 1 else Keepers(own)
        outcome = self.search.attack(planned, lambda: self._run(planned, shard, points, keeper))
        return outcome, keeper.seconds()

    def _run(self, planned: Planned, shard: Shard, points: Points, keeper: Keeper) -> Outcome:
        ground, target, until = self.ground, self.search.target, self.limit.after_step
        x, y, index = points.x, points.y, points.index
        if planned.spec.spec.iterate:
            self._asked = []
            attack = ground.make(planned, self._lend)
            most = ground.most(attack)
            self._begin(planned, shard, most, "forwards")

            def said(forwards: int, done: int) -> None:
                self._advance(shard, forwards + shard.before * most, done)

            if self.crew:
                return self._share(Task(planned, x, y, index, keeper, most), said)
            return ground.climb(attack, planned, target, x, y, index, keeper, said, until, shard.number)
        self._asked, call = [], ground.load(planned)
        self._begin(planned, shard, 1, "points")

        def counted(_: int, done: int) -> None:
            self.watch.advance(shard.before + done)

        if self.crew:
            return self._share(Task(planned, x, y, index, keeper, 0), counted)
        return ground.call(call, planned, target, x, y, index, keeper, counted, until)

    def _share(self, task: Task, said: Callable[[int, int], None]) -> Outcome:
        assert self.crew is not None
        lent = tuple((name, self._lent[name]) for name in self._asked)
        try:
            return self.crew.run(
                task,
                fp32=bool(task.planned.spec.spec.run),
                lent=lent,
                said=said,
                until=self.limit.after_step,
            )
        finally:
            self._changed = self._changed or task.changed

    def _begin(self, planned: Planned, shard: Shard, each: int, unit: str) -> None:
        """Tell the watch, once for all shards of an attack."""
        if not shard.before:
            self.begun(planned, shard.met * each, unit, shard.met)

    def _advance(self, shard: Shard, forwards: int, done: int) -> None:
        self.watch.advance(forwards, f"{shard.before + done} of {shard.met} points done")

    def _lend(self, name: str) -> None:
        """Put another defense's model at the target's disposal."""
        if name not in self._lent:
            self._lent[name] = lend(name, self.arranged, self.registry, self.running.device, self.watch)
        self._asked.append(name)
        sources = self.search.target.sources
        if name not in sources and self.crew is None:
            sources[name] = self._lent[name].build().to(self.running.device)
