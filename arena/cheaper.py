"""The search copy, made cheap: batch norms folded into what they follow, channels last, bf16.

None of it reaches the referee, which judges every point with an untouched eager copy in fp32. What is made here is
compared with the eager model on the first images, in every mode that the surface declares; where the two differ, the
attacks search on the eager model, and the record says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arena.attack import Query
from arena.check import PROBE
from arena.selection import Mode
from arena.surface import Reader, Reading, Surface, selects, submodule
from arena.surrogate import Surrogate, posing
from arena.target import PAD, Target, pad
from arena.threads import SMALL_IMAGE

#: Folding may move a score by this share of the scores' spread, a gate by as much of one: half of what the referee
#: calls borderline. Measured on the built-in defenses: at most 5e-6.
TOLERANCE = 5e-5
#: And the image's gradient by this share of its length.
GRADIENT_TOLERANCE = 1e-2
#: In bf16, which keeps 8 bits, this share of the images may differ by more than ``BF16_TOLERANCE`` of the spread.
BF16_SHARE, BF16_TOLERANCE = 0.1, 0.1

_NORMS: dict[type, type] = {nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm1d: nn.Linear}


@dataclass(frozen=True)
class Cheaper:
    """What was done to a search copy."""

    folded: int = 0
    """Batch norms folded into the layer before."""
    channels_last: bool = False
    precision: str = "fp32"
    """Of the passes: ``fp32`` or ``bf16``."""
    gap: float = 0.0
    """Largest difference to the eager model's scores on the probe, as a share of their spread, without bf16's."""
    note: str = ""
    """Why less was done than could be."""

    def record(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def make_cheaper(
    build: Callable[[], nn.Module], surface: Surface, x: Tensor, precision: str = "fp32"
) -> tuple[nn.Module, Cheaper]:
    """Build a search copy whose passes cost less, and say what was done to it.

    Args:
        build: makes a fresh model, in eval mode.
        surface: what attackers may use; what it names is left as it is.
        x: clean images (N, C, H, W), of which ``PROBE`` are compared on.
        precision: ``bf16`` if the passes are to run in it.

    Random models are left as they are: their draws hide what rounding does.
    """
    x = pad(x[:PROBE])
    eager = build().eval().requires_grad_(False)
    if surface.random:
        done = Cheaper(note="not folded: a random model's copy cannot be compared with it")
        return eager, _in_fp32(done, "the model is random") if precision == "bf16" else done
    wide = x[0].numel() > SMALL_IMAGE
    if precision == "bf16":
        model, done = _made(build, eager, surface, x, wide or _has_tiles(x.device))
        if model is eager:
            model = build().eval().requires_grad_(False)
        _score_in_fp32(model, x)
        why = _bf16_differs(eager, model, surface, x)
        if not why:
            return model, replace(done, precision="bf16")
    # On small pictures oneDNN's plain layout is the faster one, but for the tiles of AMX (docs/speed.md).
    model, done = _made(build, eager, surface, x, wide)
    return model, _in_fp32(done, why) if precision == "bf16" else done


def _in_fp32(done: Cheaper, why: str) -> Cheaper:
    note = "; ".join(n for n in (done.note, f"searched in fp32, not bf16: {why}") if n)
    return replace(done, note=note)


def _made(
    build: Callable[[], nn.Module], eager: nn.Module, surface: Surface, x: Tensor, last: bool
) -> tuple[nn.Module, Cheaper]:
    """Return the cheapest copy that is as good as the eager model, channels last if ``last``; else that itself."""
    done = Cheaper()
    for layout in (True, False) if last else (False,):
        made, made_of, why = _attempt(build, eager, surface, x, layout)
        if made is not None:
            return made, made_of
        done = replace(done, note=why)
    return eager, done


class _Scores(nn.Linear):
    """A linear layer in fp32 that computes in fp32 also where its input is bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


def _score_in_fp32(model: nn.Module, x: Tensor) -> None:
    """Keep linear layers that give a score a class in fp32: with 8 bits near scores tie, and climbs see no slope."""
    with torch.no_grad():
        classes = model(x).shape[-1]
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == classes and module.weight.dtype == torch.float32:
            module.__class__ = _Scores


def _has_tiles(device: torch.device) -> bool:
    """Tell whether passes run on a CPU that multiplies matrices in bf16 by tiles (AMX)."""
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch have none
    return device.type == "cpu" and bool(known.get("amx_bf16"))


def _attempt(
    build: Callable[[], nn.Module], eager: nn.Module, surface: Surface, x: Tensor, last: bool
) -> tuple[nn.Module | None, Cheaper, str]:
    what = "folded" + (" and channels-last" if last else "")
    try:
        model = build().eval().requires_grad_(False)
        folded = fold(model, surface, x[:PAD])
        if last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        gap, slope = differences(eager, model, surface, x)
    except Exception as e:  # foreign code may mind; then it is left alone
        said = (str(e).strip().splitlines() or [""])[0]
        return None, Cheaper(), f"the {what} copy failed: {type(e).__name__}: {said}"
    if not gap <= TOLERANCE:
        return None, Cheaper(), f"the {what} copy differs from the eager model by {gap:.2g} of the scores' spread"
    if not slope <= GRADIENT_TOLERANCE:
        return (
            None,
            Cheaper(),
            f"the {what} copy's gradient differs from the eager model's by {slope:.2g} of its length",
        )
    return model, Cheaper(folded, last, gap=gap), ""


# -- folding ----------------------------------------------------------------------------------------------------


def fold(model: nn.Module, surface: Surface, x: Tensor) -> int:
    """Fold batch norms into the convolution or linear layer before, in place; return how many.

    A pair is folded where, in every mode of the surface, each of the two is called once a pass, the norm takes exactly
    what the layer gave and nobody else takes it, nobody else reads their numbers, and neither is named by the surface.
    ``x`` (N, C, H, W) are images to look at; N is a multiple of 8.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    kept = {id(m) for m in _named_by(model, surface)}
    places = Counter(id(m) for m in named.values())
    norms = [m for m in model.modules() if _foldable(m) and id(m) not in kept and places[id(m)] == 1]
    if not norms:
        return 0
    pairs: set[tuple[nn.Module, nn.Module]] | None = None
    for mode in modes(model, surface, len(x)):
        seen = _pairs(model, surface, mode, x, norms)
        pairs = seen if pairs is None else pairs & seen
    parents = {id(m): path for path, m in named.items()}
    count = 0
    for layer, norm in pairs or ():
        if id(layer) in kept or places[id(layer)] != 1:
            continue
        _merge(layer, norm)
        parent, _, name = parents[id(norm)].rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
        count += 1
    return count


def _named_by(model: nn.Module, surface: Surface) -> Iterator[nn.Module]:
    for group in (surface.heads, surface.gates, surface.knobs):
        for point in group.values():
            yield submodule(model, point.path)
    yield from selects(model, surface).values()


def _foldable(module: nn.Module) -> bool:
    """Tell whether a module is an untouched batch norm with statistics of its own."""
    return (
        type(module) in _NORMS
        and _plain(module)
        and not module.training
        and isinstance(module.running_mean, Tensor)
        and isinstance(module.running_var, Tensor)
    )


def _plain(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Uses(TorchDispatchMode):
    """Notes which module is at work whenever a tensor is used by an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work: list[nn.Module] = []
        self.users: dict[int, list[nn.Module | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.users.setdefault(id(leaf), []).append(self.at_work[-1] if self.at_work else None)
        return func(*args, **(kwargs or {}))


def _pairs(
    model: nn.Module, surface: Surface, mode: Surrogate | None, x: Tensor, norms: list[nn.Module]
) -> set[tuple[nn.Module, nn.Module]]:
    """Return (layer, norm) pairs that may be folded as far as one pass in one mode shows."""
    uses = _Uses()
    calls: Counter[int] = Counter()
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    taken: list[tuple[nn.Module, Any]] = []
    wanted = {id(m) for m in norms}
    layers = {t for m in norms for k, t in _NORMS.items() if type(m) is k}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        uses.at_work.append(module)
        calls[id(module)] += 1
        if id(module) in wanted and inputs:
            taken.append((module, inputs[0]))

    def after(module: nn.Module, _inputs: Any, out: Any) -> None:
        uses.at_work.pop()
        if type(module) in layers and isinstance(out, Tensor):
            made[id(out)] = module, out  # held, so that no later tensor takes its id
            uses.users[id(out)] = []

    plain = {id(m): _plain(m) for m in model.modules()}
    with _looking(model, surface, mode) as read, ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after).remove)
        with torch.no_grad(), uses:
            read(x).scores()  # so that a head that is read is a head that is used
    found = set()
    for norm, tensor in taken:
        layer = made.get(id(tensor), (None, None))[0]
        if layer is None or type(layer) is not _NORMS[type(norm)] or not plain[id(layer)]:
            continue
        own = ((layer, _numbers(layer)), (norm, _numbers(norm)))
        alone = all(set(uses.users.get(id(t), ())) <= {m} for m, tensors in own for t in tensors)
        if calls[id(layer)] == calls[id(norm)] == 1 and uses.users[id(tensor)] == [norm] and alone:
            found.add((layer, norm))
    return found


def _numbers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _merge(layer: Any, norm: Any) -> None:
    """Put a norm's scale and shift into a layer's weights, in float64 and rounded once."""
    weight, dtype = layer.weight.double(), layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


# -- comparing --------------------------------------------------------------------------------------------------


def modes(model: nn.Module, surface: Surface, rows: int) -> list[Surrogate | None]:
    """Return every way of posing that the surface offers, one at a time: choices, held gates, knobs; first none."""
    found: list[Surrogate | None] = [None]
    first = torch.zeros(rows, dtype=torch.int64, device=next((p.device for p in model.parameters()), None))
    for name in selects(model, surface):
        for mode in (Mode("soft"), Mode("straight_through"), Mode("forced", classes=first)):
            found.append(Surrogate(modes={name: mode}))
    found += [Surrogate(gates={name: value}) for name in surface.gates for value in (0.0, 1.0)]
    found += [Surrogate(knobs={name: value}) for name, knob in surface.knobs.items() for value in knob.values]
    return found


@contextmanager
def _looking(model: nn.Module, surface: Surface, mode: Surrogate | None) -> Iterator[Reader]:
    with Reader(model, surface) as read, posing(model, surface, mode):
        yield read


def differences(one: nn.Module, other: nn.Module, surface: Surface, x: Tensor) -> tuple[float, float]:
    """Return the largest differences of scores and gates, as shares of their spread, and of the image's gradient, as a
    share of its length, over all modes of a surface; of the models' plain outputs too."""
    gap = slope = 0.0
    with torch.no_grad():
        gap = float(_apart(one(x), other(x)).max())
    for mode in modes(one, surface, len(x)):
        (a, grad_a), (b, grad_b) = (_seen(model, surface, mode, x) for model in (one, other))
        parts = [_apart(a.logits, b.logits), *(_apart(a.heads[k], b.heads[k]) for k in a.heads)]
        parts += [(a.gates[k] - b.gates[k]).abs().flatten() for k in a.gates]
        gap = _worse(gap, float(torch.cat(parts).max()))
        if grad_a is not None and grad_b is not None:
            apart = (grad_a - grad_b).double().norm() / grad_a.double().norm().clamp_min(1e-30)
            slope = _worse(slope, float(apart))
    return gap, slope


def _seen(model: nn.Module, surface: Surface, mode: Surrogate | None, x: Tensor) -> tuple[Reading, Tensor | None]:
    leaf = x.detach().clone().requires_grad_(True)
    with _looking(model, surface, mode) as read, torch.enable_grad():
        seen = read(leaf)
        total = seen.scores().logsumexp(2).sum()
        grad = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return (
        Reading(
            seen.logits.detach(),
            {k: v.detach() for k, v in seen.heads.items()},
            {k: v.detach() for k, v in seen.gates.items()},
        ),
        grad,
    )


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Return by how much of their spread two sets of scores (N, K) differ, (N,)."""
    return (a - b).abs().amax(1) / (a.amax(1) - a.amin(1)).clamp_min(1e-12)


def _worse(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a


def _bf16_differs(eager: nn.Module, model: nn.Module, surface: Surface, x: Tensor) -> str:
    """Return why a copy cannot search in bf16; empty if it can."""
    target = Target(model, surface, 0, PROBE, precision="bf16")
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    weights = x.new_ones(len(x), 1 + len(surface.heads))
    try:
        with torch.no_grad(), Reader(eager, surface) as read:
            expected, seen = read(x).scores(), target.clean(x)
        for mode in modes(model, surface, len(x)):  # that it runs in each is enough
            target.answer(Query(x.unsqueeze(1), "ce", weights, grad=True, surrogate=mode), y)
        apart = _apart(expected.flatten(0, 1), (seen if seen.dim() == 3 else seen.unsqueeze(1)).flatten(0, 1))
    except Exception as e:  # foreign code may mind bf16; then it is searched in fp32, and the record says why
        return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
    finally:
        target.close()
    share = float((~(apart <= BF16_TOLERANCE)).float().mean())
    return f"{share:.0%} of the probe's scores differ by a tenth of their spread" if share > BF16_SHARE else ""
