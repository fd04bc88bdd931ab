"""The handle through which attacks see a defense: queries in, answers out, every pass counted.

The target works on its own copy of the model, the search copy; the referee has another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.attack import Answer, GateTerm, Query
from arena.batches import GATED_STEP, PAD, STEP, out_of_memory, pad, padded, piece
from arena.counted import CountedModule, Meter, plainly
from arena.heap import keep_freed_memory
from arena.objectives import objective
from arena.surface import Reader, Reading, Surface, selects
from arena.surrogate import posing

DEFAULT_BATCH = 256
LIVE = 512


class Compilation(Protocol):
    """A model's pass in compiled code."""

    given_up: str

    def __call__(self, x: Tensor, /) -> Reading: ...


class Recording(Compilation, Protocol):
    """A model's passes, recorded."""

    def at_once(self, x: Tensor, /) -> Reading: ...

    def forget(self) -> None: ...


@dataclass
class Target:
    """A search copy of a model, its surface, and a meter."""

    model: nn.Module
    """In eval mode; the target switches off gradients of its parameters."""
    surface: Surface
    n_classes: int
    batch_size: int = DEFAULT_BATCH
    """Largest physical batch, rows; rounded up to a multiple of 8, at least 16."""
    device: str = "cpu"
    meter: Meter = field(default_factory=Meter)
    sources: dict[str, nn.Module] = field(default_factory=dict)
    """Other models by name, for surrogates that are one of them; in eval mode, without gradients of parameters."""
    precision: str = "fp32"
    """``fp32``, or ``bf16``: passes under autocast; what is read of them is brought to fp32. A mistake that bf16 sees
    where it counts is looked at once more in fp32, so no attack lets a point go for one that is none."""
    compiled: Compilation | None = None
    """Reads the model as ``reader`` does, in compiled code (``arena.compiling``); surrogates and what is looked at in
    fp32 are read eagerly."""
    graphs: Recording | None = None
    """Reads the model as ``compiled`` or ``reader`` does, by recorded passes (``arena.graphs``), where these do."""
    live: int = LIVE
    """Rows of an attack at work at a time where a batch is smaller, so that few survivors make whole batches."""

    def __post_init__(self) -> None:
        keep_freed_memory()
        self.batch_size = padded(self.batch_size)
        self.model.eval().requires_grad_(False)
        self.step = GATED_STEP if self.surface.gates else STEP
        """What the sizes of its physical batches are multiples of."""
        self.lazy = torch.device(self.device).type == "cuda"
        """To wait for an answer's numbers costs more than to go on without them."""
        self.reader = Reader(self.model, self.surface)
        """Reads the model eagerly."""
        selects(self.model, self.surface)  # a declared choice that is none is said before the first pass
        self.module = CountedModule(self)

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.reader.close()

    @contextmanager
    def in_fp32(self) -> Iterator[None]:
        """Make all passes inside in fp32, eagerly."""
        before = self.precision, self.compiled, self.graphs
        self.precision, self.compiled, self.graphs = "fp32", None, None
        try:
            yield
        finally:
            self.precision, self.compiled, self.graphs = before

    def logits(self, x: Tensor) -> Tensor:
        """Return main logits (N, K) of images (N, C, H, W), without gradient."""
        none = x.new_zeros(len(x), dtype=torch.int64)
        return self.answer(Query(x.unsqueeze(1), counts=none.bool()), none).logits[:, 0]

    def clean(self, x: Tensor) -> Tensor:
        """Return logits and head scores (N, terms, K), without gradient and without counting."""
        before = Meter(self.meter.forwards, self.meter.backwards)
        weights = x.new_ones(len(x), 1 + len(self.surface.heads))
        none = x.new_zeros(len(x), dtype=torch.int64)
        answer = self.answer(Query(x.unsqueeze(1), weights=weights, counts=none.bool()), none)
        self.meter = before
        return answer.logits if answer.scores is None else answer.scores[:, 0]

    def read(self, x: Tensor) -> Reading:
        """Return logits, heads and gates of images (N, C, H, W), with gradient, for plain attacks that climb heads.

        One pass, counted as one of ``module``; a gradient call counts once, however many of the scores it comes from.
        """
        self.module.note(x)
        count = len(x)
        self.meter.forwards += count
        seen = plainly(x)
        if seen.requires_grad:
            seen.register_hook(lambda _grad: self._counted(count))
        reading = self.reader(pad(seen))
        heads = {name: scores[:count] for name, scores in reading.heads.items()}
        return Reading(reading.logits[:count], heads, {name: gate[:count] for name, gate in reading.gates.items()})

    def _counted(self, count: int) -> None:
        self.meter.backwards += count

    def answer(self, query: Query, y: Tensor) -> Answer:
        """Make the passes a query asks for.

        Args:
            query: points (N, m, C, H, W) and what is wanted of them.
            y: true labels (N,).
        """
        return self.settled(query, y, self.guessed(query, y))

    def settled(self, query: Query, y: Tensor, answer: Answer) -> Answer:
        """Put fp32's word in the place of what was seen of mistakes that count, and say how many forwards it took.

        Under a surrogate that is only what is the model's own, logits and errors. Gradients stay as they are.
        """
        doubt = answer.doubt
        if doubt is None:
            return answer
        which = doubt.flatten().nonzero().squeeze(1)
        if not len(which):
            return answer
        rows = which // doubt.shape[1]
        asked = _rows(Query(query.points) if query.surrogate else query, rows, False)
        if asked.targets is not None:
            asked = replace(asked, target=asked.targets.gather(1, (which % doubt.shape[1]).unsqueeze(1)).squeeze(1))
        points = query.points.flatten(0, 1).index_select(0, which).unsqueeze(1)
        with self.in_fp32():
            seen = self.answer(replace(asked, points=points, targets=None, draws=1), y.index_select(0, rows))
        fields: dict[str, Any] = {"doubt": None, "again": doubt.sum(1)}
        for key in ("logits", "errors") if query.surrogate else ("values", "logits", "errors", "scores", "gates"):
            before, now = getattr(answer, key), getattr(seen, key)
            if before is not None and now is not None:
                fields[key] = before.flatten(0, 1).index_copy(0, which, now.flatten(0, 1)).view_as(before)
        return replace(answer, **fields)

    def guessed(self, query: Query, y: Tensor) -> Answer:
        """Answer a query without looking at mistakes once more: the answer says in ``doubt`` which wait for that."""
        n, m = query.points.shape[:2]
        wants = query.grad
        if isinstance(wants, Tensor) and query.climbs:
            many = int(wants.sum())
            if 0 < many < n:
                return self._mixed(query, y, wants)
            wants = many > 0
        rows = torch.arange(n, device=y.device).repeat_interleave(m) if m > 1 else None
        flat = query.points.flatten(0, 1)
        parts, start, total = [], 0, n * m
        while start < total:
            stop = start + piece(total - start, self.batch_size, self.step)
            try:
                parts.append(self._batch(query, flat, y, rows, slice(start, stop), bool(wants) and query.climbs))
                start = stop
            except Exception as e:  # only a full memory is met here; all else goes on
                if not out_of_memory(e) or self.batch_size == PAD:
                    raise
                full = True
            else:
                full = False
            if full:  # outside the handler, where nothing holds the failed pass any more
                self.shrink()
        whole = parts[0] if len(parts) == 1 else tuple(_joined([p[k] for p in parts]) for k in range(6))
        values, logits, errors, grads, scores, gates = whole
        assert values is not None
        assert logits is not None
        assert errors is not None
        errors = errors.view(n, m)
        return Answer(
            values.view(n, m),
            None if grads is None else grads.view_as(query.points),
            logits.view(n, m, -1),
            errors,
            None if scores is None else scores.view(n, m, *scores.shape[1:]),
            None if gates is None else gates.view(n, m, -1),
            doubt=self._doubt(errors, query),
        )

    def _doubt(self, errors: Tensor, query: Query) -> Tensor | None:
        if self.precision == "fp32":
            return None
        doubt = errors > 0
        return doubt if query.counts is None else doubt & query.counts.unsqueeze(1)

    def shrink(self) -> None:
        """Halve the batch size, because the device's memory is full; outcomes do not depend on it."""
        self.batch_size = padded(self.batch_size // 2)
        if self.graphs is not None:
            self.graphs.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _mixed(self, query: Query, y: Tensor, wants: Tensor) -> Answer:
        """Answer a query some of whose rows want a gradient: two groups, so that no gradient is wasted."""
        n = len(query.points)
        grad = torch.zeros_like(query.points)
        merged: dict[str, Tensor | None] = dict.fromkeys(("values", "logits", "errors", "scores", "gates"))
        for group, with_grad in ((wants, True), (~wants, False)):
            index = group.nonzero().squeeze(1)
            answer = self.guessed(replace(_rows(query, index, with_grad), points=query.points[index]), y[index])
            for key in merged:
                part = getattr(answer, key)
                if part is None:
                    continue
                whole = merged[key]
                if whole is None:
                    whole = part.new_zeros(n, *part.shape[1:])
                whole[index] = part
                merged[key] = whole
            if answer.grad is not None:
                grad[index] = answer.grad
        values, logits, errors, scores, gates = merged.values()
        assert values is not None
        assert logits is not None
        assert errors is not None
        return Answer(values, grad, logits, errors, scores, gates, doubt=self._doubt(errors, query))

    def _batch(
        self, query: Query, flat: Tensor, y: Tensor, rows: Tensor | None, cut: slice, grad: bool
    ) -> tuple[Tensor | None, ...]:
        count = cut.stop - cut.start
        size = padded(count, self.step)
        if rows is None and count == size == flat.shape[0]:
            x, labels, part = flat, y, query
        else:  # the last row is repeated
            index = torch.arange(cut.start, cut.start + size, device=y.device).clamp_(max=cut.stop - 1)
            x = flat[cut] if count == size else flat.index_select(0, index)
            index = index if rows is None else rows.index_select(0, index)
            labels, part = y.index_select(0, index), _rows(query, index, grad)
        if query.targets is not None:
            each = query.targets.flatten()[cut]
            part = replace(part, target=torch.cat((each, each[-1:].expand(size - count))), targets=None)
        totals: list[Tensor | None] = [None] * 6
        draws = [query.draws] * 6
        for _ in range(query.draws):
            _add(totals, self._pass(part, x, labels, grad), count)
        if query.surrogate:
            totals[1:3], draws[1:3] = [None, None], [query.looks, query.looks]
            for _ in range(query.looks):
                with torch.no_grad():
                    logits = self._cast(self.reader, x).logits
                _add(totals, (None, logits, _errors(logits, labels)), count)
        found = [t / n if n > 1 and t is not None else t for t, n in zip(totals, draws, strict=True)]
        # Counted last: a batch that the memory does not hold is asked again.
        self.meter.forwards += query.forwards // query.points.shape[1] * count
        self.meter.backwards += count * query.draws * grad
        return tuple(found)

    def _pass(self, query: Query, x: Tensor, y: Tensor, grad: bool) -> tuple[Tensor | None, ...]:
        """Return values, logits, errors, gradient, scores and gates of one pass: the surrogate's, if there is one."""
        gradient = None
        with torch.set_grad_enabled(grad), posing(self.model, self.surface, query.surrogate):
            leaf = x.detach().requires_grad_(grad)
            reading = self._read(leaf, query)
            scores = reading.scores() if query.weights is not None and reading.heads else None
            gates = gate_values(reading) if query.gates is not None else None
            value = _value(query, reading.logits, scores, gates, y)
            if grad:
                if not value.requires_grad:  # the objective does not depend on x: a gradient of exact zeros
                    gradient = torch.zeros_like(leaf)
                else:
                    gradient = torch.autograd.grad(value, leaf, torch.ones_like(value))[0].contiguous()
        logits = reading.logits
        if grad:
            value, logits = value.detach(), logits.detach()
            scores, gates = (None if t is None else t.detach() for t in (scores, gates))
        return value, logits, _errors(logits, y), gradient, scores, gates

    def bare(self, x: Tensor) -> Tensor:
        """Return logits (N, K) of images (N, C, H, W) by the model's pass with nothing around it: not counted."""
        return self._cast(self.graphs.at_once if self.graphs else self.compiled or self.reader, x).logits

    def _read(self, x: Tensor, query: Query) -> Reading:
        source = query.surrogate.source if query.surrogate else ""
        if source:
            return Reading(self.sources[source](x), {}, {})
        return self._cast(self.reader if query.surrogate else self.graphs or self.compiled or self.reader, x)

    def _cast(self, read: Callable[[Tensor], Reading], x: Tensor) -> Reading:
        if self.precision == "fp32":
            return read(x)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # a recorded pass casts for itself
            seen = read(x)
        heads, gates = ({k: v.float() for k, v in part.items()} for part in (seen.heads, seen.gates))
        return Reading(seen.logits.float(), heads, gates)


def _errors(logits: Tensor, y: Tensor) -> Tensor:
    """Return 1 where the referee would say wrong: another class, or logits that are not finite."""
    finite = logits.abs().amax(1) < torch.inf  # a maximum over anything that is no number is none either
    return ((logits.argmax(1) != y) | ~finite).to(logits.dtype)


def _add(totals: list[Tensor | None], parts: tuple[Tensor | None, ...], count: int) -> None:
    """Add the first ``count`` rows of what a pass showed; the others were padding."""
    for k, part in enumerate(parts):
        if part is not None:
            before, seen = totals[k], part if part.shape[0] == count else part[:count]
            totals[k] = seen if before is None else before + seen


def _value(query: Query, logits: Tensor, scores: Tensor | None, gates: Tensor | None, y: Tensor) -> Tensor:
    if query.objective is None:
        value = logits.new_zeros(logits.shape[0])
    else:
        function = objective(query.objective)
        if scores is None or query.weights is None:
            value = function(logits, y, query.target)
            value = value if query.weights is None else value * query.weights[:, 0]
        else:
            each = [function(logits, y, query.target).unsqueeze(1)]
            terms = scores.shape[1] - 1
            many, labels = scores[:, 1:].flatten(0, 1), y.repeat_interleave(terms)
            targets = None if query.target is None else query.target.repeat_interleave(terms, dim=0)
            each.append(objective(query.heads_objective or query.objective)(many, labels, targets).view(-1, terms))
            # A weight of 0 switches a term off, also where its value is infinite.
            value = (torch.cat(each, 1) * query.weights).masked_fill(query.weights == 0, 0.0).sum(1)
    if query.gates is not None and gates is not None:
        value = value - _gate_cost(query.gates, gates)
    return value


def gate_values(reading: Reading) -> Tensor:
    """Return the gates' values in the surface's order, a gate with many values a row by their mean: (N, G)."""
    return torch.stack([g if g.dim() == 1 else g.flatten(1).mean(1) for g in reading.gates.values()], dim=1)


def _gate_cost(term: GateTerm, gates: Tensor) -> Tensor:
    cost = F.binary_cross_entropy(gates.clamp(0, 1), term.wanted, reduction="none")
    reached = (gates - term.wanted).abs() <= term.tolerance
    off = (term.weights == 0) | (reached & (term.tolerance > 0))
    return (cost * term.weights).masked_fill(off, 0.0).sum(1)


def _rows(query: Query, index: Tensor, grad: bool) -> Query:
    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, index)

    return replace(
        query,
        weights=part(query.weights),
        target=part(query.target),
        targets=part(query.targets),
        grad=grad,
        surrogate=query.surrogate.rows(index) if query.surrogate else None,
        gates=query.gates.rows(index) if query.gates is not None else None,
        counts=part(query.counts),
    )


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [p for p in parts if p is not None]
    if not found:
        return None
    return found[0] if len(found) == 1 else torch.cat(found)
