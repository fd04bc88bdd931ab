"""Attacks the points of a match, a shard at a time: what one device does of a match."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from arena.arrangement import Arrangement
from arena.attack import Setup, bound
from arena.auditing.observing import Observed
from arena.contender import Contender, seeded
from arena.engine import Outcome, run_iterated, run_plain
from arena.journal import AttackKeeper, Journal
from arena.lending import lend
from arena.limit import Limit
from arena.lineup import Planned
from arena.plugins import Registry
from arena.points import Points, Pool, Shard
from arena.question import Running
from arena.referee import DRAWS, Referee
from arena.rng import Stream
from arena.search import Search
from arena.specs import load
from arena.watch import Watch

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
        referee: Referee,
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
            referee: says which of the breaks that a search in lower precision saw are none.
            pool: all points.
            n_classes: width of the logits.
            met: (n,) bool, the points that attacks can meet.
            limit: the clock that stops attacks.
            watch: told of the progress of what has begun.
            begun: told that work begins.
        """
        self.arranged, self.running, self.registry, self.contender = arranged, running, registry, contender
        self.referee, self.pool, self.n_classes, self.met = referee, pool, n_classes, met
        self.limit, self.watch, self.begun = limit, watch, begun
        self.surface = contender.surface
        self._search: Search | None = None
        self._told = ("", 0)

    def build(self) -> nn.Module:
        """Make a fresh model on the device."""
        return self.contender.build().to(self.running.device)

    @property
    def search(self) -> Search:
        """What the attacks query; it is made, and its pace measured, when first asked for."""
        if self._search is None:
            self._search = Search(self.build, self.surface, self.n_classes, self.pool.x, self.met, self.running)
        return self._search

    @property
    def searched(self) -> bool:
        """Whether anything was queried."""
        return self._search is not None

    def setup(self, stream: Stream, lend: Callable[[str], None]) -> Setup:
        """Return what an attack is made from."""
        arranged = self.arranged
        return Setup(arranged.threat, self.n_classes, self.surface, arranged.images.shape, stream, lend)

    @property
    def draws(self) -> int:
        """Passes that the model's logits are averaged over at least."""
        return DRAWS if self.surface.random else 1

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

        def once(some: Tensor | None, kept: AttackKeeper) -> Outcome:
            if some is None:
                return self._run(planned, shard, points, kept)
            rows = shard.rows[some]
            return self._run(planned, Shard(shard.number, rows, 0, len(rows)), self.pool.take(rows), kept)

        return self.search.attack(
            planned,
            points.y,
            once,
            lambda added: journal.keeper(f"{name}{shard.suffix}{added}"),
            lambda found: self.referee.judge(points.x, found.x_adv, points.y, points.index).broken,
            lambda: self.limit.up,
        )

    def _run(self, planned: Planned, shard: Shard, points: Points, keeper: AttackKeeper) -> Outcome:
        arranged, spec, target = self.arranged, planned.spec.spec, self.search.target
        stream = Stream.of(arranged.question.seed, planned.name)
        if spec.iterate:
            # A minimal attack is nearly always at a mistake, so looking at each one would cost 8 % of its time.
            attack = Observed(
                load(spec.iterate)(self.setup(stream, self._lend), **planned.options),
                arranged.threat,
                8 if spec.kind == "minimal" else 1,
            )
            most = bound(attack, self.draws)
            self._begin(planned, shard, most, "forwards")
            # A random model draws from the global generator: the same shard of the same match draws the same numbers.
            with seeded(int(stream.bits(self.pool.index[:1], 0, shard.number, 1)[0, 0])):
                return run_iterated(
                    attack,
                    target,
                    points.x,
                    points.y,
                    points.index,
                    None,
                    keeper,
                    lambda forwards, done: self._advance(shard, forwards + shard.before * most, done),
                    self.limit.after_step,
                    self.draws,
                )
        assert spec.run is not None
        options = dict(planned.options)
        self._begin(planned, shard, 1, "points")
        function: Callable[..., Any] = load(spec.run)
        return run_plain(
            function,
            target,
            points.x,
            points.y,
            points.index,
            arranged.threat,
            stream,
            options,
            keeper,
            lambda _, done: self.watch.advance(shard.before + done),
            spec.chunk,
            self.limit.after_step,
        )

    def _begin(self, planned: Planned, shard: Shard, each: int, unit: str) -> None:
        """Tell the watch, once for all shards of an attack, and once for a second try on some of one."""
        if not shard.before or self._told != (planned.name, shard.met):  # after a second try the shards go on
            self.begun(planned, shard.met * each, unit, shard.met)
        self._told = (planned.name, shard.met)

    def _advance(self, shard: Shard, forwards: int, done: int) -> None:
        self.watch.advance(forwards, f"{shard.before + done} of {shard.met} points done")

    def _lend(self, name: str) -> None:
        """Put another defense's model at the target's disposal."""
        sources = self.search.target.sources
        if name not in sources:
            sources[name] = lend(name, self.arranged, self.registry, self.running.device, self.watch)
