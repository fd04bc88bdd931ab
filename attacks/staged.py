"""The attack of roster ``quick``: a look at every point, then rounds for those that may still fall.

Most passes of an attack go to points that never fall. ``staged`` looks at each point with a few short targeted climbs
(Auto-PGD on the targeted DLR) and a few random proposals, and gives rounds only to points that may still fall. A round
is a longer climb and then a local random search from the best point found so far, over corners of the ball: there the
best points of an Linf ball lie, and gradients lead past many of them.

Whether a point may still fall is judged by itself alone. Its gap is how much the best point lacks to a mistake, its
gain how much the attack has won so far, both in the margin of the logits; the next round is played while
gap <= hope * fade^round * gain. So the scale of the logits, the radius and the data set play no part. Measured on
sixteen digits nets, docs/speed.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State
from arena.objectives import margin

from .apgd import Apgd
from .steps import TINY, lengths, rows, surface_start, wrong

#: First step of a climb that starts at the best point, as a multiple of eps; other climbs start with 2.
WARM_STEP = 0.25
#: Random numbers of proposals are drawn under this restart, which no climb reaches.
PROPOSALS = 1 << 20


class Staged(Apgd):
    """Short targeted climbs, then rounds of a climb and a local search from the best point.

    Every second climb of the rounds starts at the best point and aims at the class nearest there; the others start
    anywhere on the ball's surface and take the targets in turn. A row is climbing, or, while ``left`` is above 0, asked
    for proposals.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        targets: int,
        look: int,
        glance: int,
        steps: int,
        search: int,
        rounds: int,
        hope: float,
        fade: float,
    ) -> None:
        super().__init__(
            setup,
            loss="dlr_targeted",
            steps=steps,
            restarts=1,
            rho=0.75,
            head="logits",
            targets=setup.n_classes - 1,
        )
        self.looks = min(targets, self.targets)
        self.look, self.glance, self.search = min(look, steps), glance, search
        self.rounds, self.hope, self.fade = rounds, hope, fade

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows at the highest wrong class of the clean image."""
        zero = torch.zeros_like(y)
        led = margin(clean[:, 0], y)
        return {
            **super().start(index, x, y, clean),
            "begun": led,  # margin at the image
            "led": torch.full_like(led, -torch.inf),  # at the best point
            "rival": zero,  # class nearest at the best point
            "left": zero,  # proposals left of this search
            "tried": zero,  # proposals of all searches
            "round": zero,
        }

    def ask(self, state: State) -> Query:
        """Ask for the objective's gradient at climbing rows, for the logits alone at proposals."""
        return Query(
            points=state["point"].unsqueeze(1), objective=self.loss, target=self._target(state), grad=state["left"] == 0
        )

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the best point; climb on, or propose the next corner; at the end of a search judge what may be won."""
        point, logits, broken = state["point"], answer.logits[:, 0], wrong(answer)
        led = margin(logits, state["y"])
        better = (led > state["led"]) | broken
        climbing = state["left"] == 0
        new = self._climbed(state, answer, climbing)
        new["best"] = point.where(rows(better, point), state["best"])
        new["led"] = led.where(better, state["led"])
        hidden = logits.scatter(1, state["y"].view(-1, 1), -torch.inf)
        new["rival"] = hidden.argmax(1).where(better, state["rival"])
        ended = climbing & self._ended(state)
        size = torch.where(state["run"] + 1 == self.looks, self.glance, self.search)
        begins = ended & (state["run"] + 1 >= self.looks)
        left = torch.where(climbing, size * begins, state["left"] - 1)
        over = ~climbing & (left == 0)
        new["tried"] = state["tried"] + (left > 0)
        new["left"], new["round"] = left, state["round"] + over
        new["done"] = broken | (over & ~self._promising(new))
        self._go_on(new, over & ~new["done"], left > 0)
        return new

    def _climbed(self, state: State, answer: Answer, climbing: Tensor) -> State:
        """Return the state in which the rows that climb have climbed."""
        if answer.grad is None:
            return dict(state)
        if climbing.all():
            return super().tell(state, answer)
        which = climbing.nonzero().squeeze(1)
        part = {k: v[which] for k, v in state.items()}
        taken = Answer(answer.values[which], answer.grad[which], answer.logits[which], answer.errors[which])
        climbed = super().tell(part, taken)
        return {k: v if climbed[k] is part[k] else v.index_copy(0, which, climbed[k]) for k, v in state.items()}

    def _promising(self, state: State) -> Tensor:
        """Tell (N,) which rows get another round."""
        hope = self.hope * self.fade ** (state["round"] - 1).to(torch.float32)
        gain = (state["led"] - state["begun"]).clamp_min(TINY)  # so that all the hope is enough for any gap
        within = -state["led"] <= hope * gain
        return within & (state["round"] <= self.rounds)

    def _go_on(self, new: State, again: Tensor, asked: Tensor) -> None:
        """Put rows that begin a round where it starts, and rows that are ``asked`` for one at their next proposal."""
        warm = again & self._warm(new)
        if warm.any():
            here = rows(warm, new["point"])
            for key in ("point", "before"):
                new[key] = new["best"].where(here, new[key])
            new["size"] = new["size"].masked_fill(warm, WARM_STEP * self.setup.threat.radius)
        if asked.any():
            which = asked.nonzero().squeeze(1)
            made = self._proposal(*(new[k][which] for k in ("x", "best", "index", "tried")))
            new["point"] = new["point"].index_copy(0, which, made)
        cold = (again & ~warm).nonzero().squeeze(1)
        if len(cold):
            fresh = surface_start(self.setup, new["index"][cold], new["run"][cold], new["x"][cold])
            for key in ("point", "before"):
                new[key] = new[key].index_copy(0, cold, fresh)

    def _warm(self, state: State) -> Tensor:
        """Tell (N,) whose climb starts at the best point."""
        return (state["run"] >= self.looks) & ((state["run"] - self.looks) % 2 == 0)

    def _target(self, state: State) -> Tensor:
        place = (state["run"] % self.targets).view(-1, 1)
        return state["rival"].where(self._warm(state), state["targets"].gather(1, place).squeeze(1))

    def _ended(self, state: State) -> Tensor:
        return state["step"] >= torch.where(state["run"] < self.looks, self.look, self.steps)

    def _last(self, state: State) -> Tensor:
        return torch.zeros_like(state["done"])

    def _proposal(self, x: Tensor, best: Tensor, index: Tensor, tried: Tensor) -> Tensor:
        """Change a random square of the best points (N, C, H, W), one sign a channel; small squares come more often.

        Linf: the square goes to a corner of the ball; L2: a share of eps is spent on it, and the whole brought back to
        the ball's rim.
        """
        threat, (channels, height, width) = self.setup.threat, self.setup.shape
        words = self.setup.stream.bits(index, PROPOSALS, tried, 3 + channels)
        share = (words[:, 0] >> 8).to(torch.float32) * 2.0**-24
        largest = max(min(height, width) // 2, 1)
        side = torch.exp2(share.square() * math.log2(largest + 0.5)).long().clamp(1, largest)
        down = self._inside(words[:, 1], side, height).unsqueeze(2)
        along = self._inside(words[:, 2], side, width).unsqueeze(1)
        square = (down & along).unsqueeze(1)
        signs = ((words[:, 3:] & 1) * 2 - 1).to(torch.float32)[:, :, None, None]
        if threat.norm == "Linf":
            return (x + signs * threat.radius).clamp(0, 1).where(square, best)
        spent = share / (side * math.sqrt(channels)) * threat.radius
        moved = (best - x + (signs * rows(spent, x)).masked_fill(~square, 0.0)).flatten(1)
        return threat.project(x, x + (moved / lengths(moved).clamp_min(TINY)).view_as(x) * threat.radius)

    @staticmethod
    def _inside(word: Tensor, side: Tensor, length: int) -> Tensor:
        """Place intervals of ``side`` (N,) by 32 random bits each; bool (N, length)."""
        start = ((word * (length - side + 1)) >> 32).unsqueeze(1)
        place = torch.arange(length, device=word.device)
        return (place >= start) & (place < start + side.unsqueeze(1))

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        climbs = self.looks * (self.look + 1) + self.rounds * (self.steps + 1)
        return climbs + self.glance + self.rounds * self.search, climbs


def staged(
    setup: Setup,
    *,
    targets: int = 4,
    look: int = 7,
    glance: int = 10,
    steps: int = 40,
    search: int = 25,
    rounds: int = 20,
    hope: float = 0.27,
    fade: float = 0.86,
) -> Staged:
    """Make the staged attack; below 4 classes its loss is the targeted margin, as ``apgd_t`` has it."""
    return Staged(
        setup,
        targets=targets,
        look=look,
        glance=glance,
        steps=steps,
        search=search,
        rounds=rounds,
        hope=float(hope),
        fade=float(fade),
    )
