"""Enters what the referee says about an attack's shards into the attack's row; verified breaks always count."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from arena.engine import Outcome
from arena.points import Shard
from arena.referee import Judgement
from arena.results import Played


class Tally:
    """One attack's row in the making. Shards come in any order."""

    def __init__(self, played: Played, correct: Tensor, random: bool) -> None:
        """Begin with an attack of which nothing is known.

        Args:
            played: the row; what it met is set.
            correct: (n,) bool, the naturally correct points.
            random: the model is declared random.
        """
        self.played, self.correct, self.random = played, correct, random
        self.done = 0
        """Points that the attack finished, whatever the referee says of them."""
        self.moved = False
        self.again = 0
        """Forwards that a search in lower precision made once more in fp32; they are among ``played.forwards``."""
        self.lucky = 0
        """Points that left at draws which the majority does not confirm."""

    @property
    def unfinished(self) -> bool:
        """Whether the attack did not come to its end, and yet did not crash."""
        return self.played.status == "ok" and self.done < int(self.played.met.sum())

    def enter(self, shard: Shard, outcome: Outcome, verdict: Judgement, seconds: float) -> Tensor:
        """Write the referee's word on one shard into the row; return which of its points are broken, (M,) bool."""
        played, rows = self.played, shard.rows
        wrong = verdict.broken.cpu()
        broken = wrong & self.correct[rows]  # a point misclassified without an attack is broken by none
        # A random model may let a point leave early at lucky draws: without the majority's word it was not attempted.
        unlucky = outcome.early & ~wrong & self.random
        self.lucky += int(unlucky.sum())
        self.done += int(outcome.attempted.sum())
        self.moved |= outcome.moved
        played.seconds += seconds
        played.attempted[rows] = outcome.attempted.cpu() & ~unlucky
        played.broken[rows] = broken
        played.right[rows] = verdict.valid.cpu() & ~wrong
        played.nonfinite += verdict.nonfinite
        if not self.random:
            played.silent += int((outcome.seen & self.correct[rows] & ~broken).sum())
        if outcome.gives_up:
            left = outcome.attempted.cpu() & (outcome.forwards.cpu() < outcome.most)
            played.given_up += int((left & ~outcome.early & ~wrong).sum())
        played.forwards += int(outcome.forwards.sum() + outcome.again.sum())
        self.again += int(outcome.again.sum())
        played.backwards += int(outcome.backwards.sum())
        played.borderline += verdict.borderline
        self._violated(verdict.violations)
        self._violated(outcome.malformed or {})
        false_claims = (outcome.claim.cpu() == 1) & ~wrong & (verdict.margin.cpu().abs() >= 1e-4)
        self._violated({"false_claim": int(false_claims.sum())})
        if outcome.error:
            played.status, played.error, played.trace = "failed", outcome.error, outcome.trace
        return broken

    def _violated(self, kinds: Mapping[str, int]) -> None:
        violations = self.played.violations
        for kind, count in kinds.items():
            if count:
                violations[kind] = violations.get(kind, 0) + count

    def close(self, limit: str) -> None:
        """Say how the attack ended, unless it crashed; ``limit`` is the time limit in words."""
        played, met = self.played, int(self.played.met.sum())
        if played.status != "ok":
            return
        if played.violations:
            kinds = ", ".join(f"{count} {kind}" for kind, count in played.violations.items())
            played.status, played.error = "failed", f"of {met} points returned: {kinds}"
        elif self.lucky:
            played.status = "partial"
            played.error = f"{self.lucky} points left at draws that the majority does not confirm: the model is random"
        elif self.unfinished:
            played.status = "partial"
            played.error = f"{limit} was up after {self.done} of {met} points"
        elif not self.moved:
            played.status, played.error = "no_effect", "no query and no returned point differed from its image"
