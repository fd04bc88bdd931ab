"""The attack of roster ``quick``: a look at every point, then rounds for those that may still fall.

Most passes of an attack go to points that never fall. ``staged`` looks at each point with a few short targeted climbs
(Auto-PGD on the targeted DLR) and a few random proposals, and gives rounds only to points that may still fall. A round
is longer climbs and then a local random search from the best point found so far, over corners of the ball: there the
best points of an Linf ball lie, and gradients lead past many of them.

Whether a point may still fall is judged by itself alone. Its gap is how much the best point lacks to a mistake, its
gain how much the attack has won so far, both in the margin of the logits; the next round is played while
gap <= hope * fade^(round - 1) * gain. A point leaves the look before its end where even ``YET`` times that for each
step still to come is less than its gap. So the scale of the logits, the radius and the data set play no part.

The climbs of a round go side by side, and so do proposals: few points get rounds, and one at a time would make
batches of a few rows, whose passes cost a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from arena.attack import SURE, Answer, Query, Setup, State
from arena.objectives import margin

from .apgd import FIRST_STEP, Apgd
from .steps import TINY, lengths, rows, surface_start

#: By how much more may be hoped for each step of the look that is still to come, its proposals counted as one.
YET = 1.6
#: The first step of the look, from 0, at which a point may leave.
SETTLED = 2
#: First step of the climb that starts at the best point, as a multiple of eps.
WARM_STEP = 0.25
#: Random numbers of proposals are drawn under this restart, which no climb reaches.
PROPOSALS = 1 << 20
#: What a climb keeps of itself; in the state (N, L, ...), a climb a lane.
CLIMB = (
    "point",
    "before",
    "peak",
    "peak_grad",
    "peak_value",
    "checked_value",
    "last_value",
    "rises",
    "halved",
    "size",
)


class Staged(Apgd):
    """Rounds of L climbs side by side and a local search from the best point; the first round is a short look.

    From the second round on, the first climb starts at the best point and aims at the class nearest there. All others
    start anywhere on the ball's surface and take the targets in turn. A row is climbing, or, while ``left`` is above 0,
    asked for L proposals at a time.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        lanes: int,
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
        self.lanes = lanes
        self.look, self.glance, self.search = min(look, steps), glance, search
        self.rounds, self.hope, self.fade = rounds, hope, fade

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows with climbs at the highest wrong classes of the clean image."""
        begun = super().start(index, x, y, clean)
        zero = torch.zeros_like(y)
        led = margin(clean[:, 0], y)
        return {
            **self._climbs(index, x, zero),
            "targets": begun["targets"],
            "step": zero,
            "best": x.clone(),
            "done": begun["done"],
            "begun": led,  # margin at the image
            "led": torch.full_like(led, -torch.inf),  # at the best point
            "rival": zero,  # class nearest at the best point
            "aim": zero,  # what it was when the round began
            "left": zero,  # proposals left of this search, L at a time
            "tried": zero,  # proposals of all searches
            "round": zero,
        }

    def ask(self, state: State) -> Query:
        """Ask for the objective's gradient at climbing rows, for the logits alone at proposals."""
        return Query(points=state["point"], objective=self.loss, targets=self._aims(state), grad=state["left"] == 0)

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the best point; climb on, or propose the next corners; after a search judge what may still be won."""
        y, wrong = state["y"], answer.errors >= SURE
        broken = wrong.any(1)
        led = margin(answer.logits.flatten(0, 1), y.repeat_interleave(self.lanes)).view_as(wrong)
        led = led.nan_to_num(nan=-torch.inf).masked_fill(wrong, torch.inf)
        led, lane = led.max(1)
        better = led > state["led"]
        new = self._climbed(state, answer)
        every = torch.arange(len(y), device=y.device)
        new["best"] = state["point"][every, lane].where(rows(better, state["best"]), state["best"])
        new["led"] = led.where(better, state["led"])
        logits = answer.logits[every, lane].scatter(1, y.view(-1, 1), -torch.inf)
        new["rival"] = logits.argmax(1).where(better, state["rival"])
        climbing, first = state["left"] == 0, state["round"] == 0
        ended = climbing & (state["step"] >= torch.where(first, self.look, self.steps))
        new["step"] = (state["step"] + climbing).masked_fill(ended, 0)
        new["left"] = torch.where(climbing, torch.where(first, self.glance, self.search) * ended, state["left"] - 1)
        new["tried"] = state["tried"] + (new["left"] > 0)
        over = ~climbing & (new["left"] == 0)
        new["round"] = state["round"] + over
        new["done"] = broken | (over & ~self._promising(new)) | (climbing & first & self._hopeless(new, state["step"]))
        self._put(new, over & ~new["done"], self._begin)
        self._put(new, (new["left"] > 0) & ~new["done"], self._propose)
        return new

    def _climbed(self, state: State, answer: Answer) -> State:
        """Return the state in which the rows that climb have climbed."""
        if answer.grad is None:
            return dict(state)
        which = (state["left"] == 0).nonzero().squeeze(1)
        whole = len(which) == len(state["y"])

        def lanes(part: Tensor) -> Tensor:
            return (part if whole else part.index_select(0, which)).flatten(0, 1)

        def each(part: Tensor) -> Tensor:
            return (part if whole else part.index_select(0, which)).repeat_interleave(self.lanes, 0)

        climbs = {k: lanes(state[k]) for k in CLIMB} | {k: each(state[k]) for k in ("x", "step")}
        seen = (lanes(part).unsqueeze(1) for part in (answer.values, answer.grad, answer.logits, answer.errors))
        taken = super().tell(climbs, Answer(*seen))
        new = {k: taken[k].unflatten(0, (-1, self.lanes)) for k in CLIMB}
        return {**state, **(new if whole else {k: state[k].index_copy(0, which, v) for k, v in new.items()})}

    def _close(self, new: State, point: Tensor, broken: Tensor, ended: Tensor) -> None:
        """Leave the end of a climb to ``tell``: all climbs of a row end together."""

    def _promising(self, state: State) -> Tensor:
        """Tell (N,) which rows get another round."""
        hope = self.hope * self.fade ** (state["round"] - 1).to(torch.float32)
        return (-state["led"] <= hope * self._gain(state)) & (state["round"] <= self.rounds)

    def _hopeless(self, state: State, step: Tensor) -> Tensor:
        """Tell (N,) which rows of the look may leave at the ``step`` (N,) of it just seen, from 0."""
        hope = self.hope * YET ** (self.look + 1 - step).to(torch.float32)
        return (-state["led"] > hope * self._gain(state)) & (step >= SETTLED)

    @staticmethod
    def _gain(state: State) -> Tensor:
        """Return the margin (N,) won so far, above 0 so that all the hope is enough for any gap."""
        return (state["led"] - state["begun"]).clamp_min(TINY)

    @staticmethod
    def _put(new: State, mask: Tensor, make: Callable[[State], State]) -> None:
        """Put into the rows of a mask what is made of them."""
        which = mask.nonzero().squeeze(1)
        if len(which):
            for key, value in make({k: new[k][which] for k in _MADE_OF}).items():
                new[key] = new[key].index_copy(0, which, value)

    def _begin(self, state: State) -> State:
        """Begin the climbs of a later round."""
        made = self._climbs(state["index"], state["x"], state["round"])
        for key in ("point", "before", "peak"):
            made[key][:, 0] = state["best"]
        made["size"][:, 0] = WARM_STEP * self.setup.threat.radius
        return {**made, "aim": state["rival"]}

    def _climbs(self, index: Tensor, x: Tensor, number: Tensor) -> State:
        """Return L fresh climbs a row, for the round of that ``number`` (N,)."""
        size = (-1, self.lanes)
        lane = torch.arange(self.lanes, device=x.device).repeat(len(x))
        each = [t.repeat_interleave(self.lanes, 0) for t in (index, number, x)]
        point = surface_start(self.setup, each[0], each[1] * self.lanes + lane, each[2]).unflatten(0, size)
        lowest = torch.full((len(x), self.lanes), -torch.inf, device=x.device)
        return {
            "point": point,
            "before": point.clone(),
            "peak": point.clone(),
            "peak_grad": torch.zeros_like(point),
            "peak_value": lowest,
            "checked_value": lowest.clone(),
            "last_value": lowest.clone(),
            "rises": torch.zeros_like(lowest),
            "halved": torch.zeros_like(lowest, dtype=torch.bool),
            "size": torch.full_like(lowest, FIRST_STEP * self.setup.threat.radius),
        }

    def _aims(self, state: State) -> Tensor:
        """Return the class (N, L) that each climb aims at."""
        first = (state["round"] == 0).unsqueeze(1)
        lane = torch.arange(self.lanes, device=first.device)
        turn = state["round"].unsqueeze(1) * (self.lanes - 1) + lane
        aims = state["targets"].gather(1, turn % self.targets)
        return torch.where(first | (lane > 0), aims, state["aim"].unsqueeze(1))

    def _propose(self, state: State) -> State:
        """Change a random square of the best point, L times each for itself; small squares come more often.

        Linf: the square goes to a corner of the ball, one sign a channel; L2: a share of eps is spent on it, and the
        whole is brought back to the ball's rim.
        """
        threat, (channels, height, width) = self.setup.threat, self.setup.shape
        x, best = (state[k].repeat_interleave(self.lanes, 0) for k in ("x", "best"))
        count = 3 + channels
        words = self.setup.stream.bits(state["index"], PROPOSALS, state["tried"], self.lanes * count)
        words = words.reshape(-1, count)
        share = (words[:, 0] >> 8).to(torch.float32) * 2.0**-24
        largest = max(min(height, width) // 2, 1)
        side = torch.exp2(share.square() * math.log2(largest + 0.5)).long().clamp(1, largest)
        square = _interval(words[:, 1], side, height).unsqueeze(2) & _interval(words[:, 2], side, width).unsqueeze(1)
        square = square.unsqueeze(1)
        signs = ((words[:, 3:] & 1) * 2 - 1).to(torch.float32)[:, :, None, None]
        if threat.norm == "Linf":
            made = (x + signs * threat.radius).clamp(0, 1).where(square, best)
        else:
            spent = share / (side * math.sqrt(channels)) * threat.radius
            moved = (best - x + (signs * rows(spent, x)).masked_fill(~square, 0.0)).flatten(1)
            rim = (moved / lengths(moved).clamp_min(TINY)).view_as(x) * threat.radius
            made = threat.project(x, x + rim)
        return {"point": made.unflatten(0, (-1, self.lanes))}

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        climbs = self.look + 1 + self.rounds * (self.steps + 1)
        return self.lanes * (climbs + self.glance + self.rounds * self.search), self.lanes * climbs


#: What climbs and proposals are made of.
_MADE_OF = ("x", "index", "best", "rival", "round", "tried")


def _interval(word: Tensor, side: Tensor, length: int) -> Tensor:
    """Place intervals of ``side`` (N,) among ``length`` places by 32 random bits each, bool (N, length)."""
    start = ((word * (length - side + 1)) >> 32).unsqueeze(1)
    place = torch.arange(length, device=word.device)
    return (place >= start) & (place < start + side.unsqueeze(1))


def staged(
    setup: Setup,
    *,
    lanes: int = 5,
    look: int = 7,
    glance: int = 3,
    steps: int = 20,
    search: int = 10,
    rounds: int = 5,
    hope: float = 0.27,
    fade: float = 0.55,
) -> Staged:
    """Make the staged attack; below 4 classes its loss is the targeted margin, as ``apgd_t`` has it."""
    return Staged(
        setup,
        lanes=lanes,
        look=look,
        glance=glance,
        steps=steps,
        search=search,
        rounds=rounds,
        hope=float(hope),
        fade=float(fade),
    )
