"""The search copy, made cheap: batch norms folded into what they follow, channels last, bf16.

None of it reaches the referee, which judges every point with an untouched eager copy in fp32. What is made here is
compared with the eager model on the first images, in every mode that the surface declares; where the two differ, the
attacks search on the eager model, and the record says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.attack import Query
from arena.batches import PAD, pad
from arena.check import PROBE
from arena.comparing import apart, differences, modes
from arena.folding import fold
from arena.surface import Reader, Surface
from arena.target import Target
from arena.threads import SMALL_IMAGE

#: Folding may move a score by this share of the scores' spread, a gate by as much of one: half of what the referee
#: calls borderline. Measured on the built-in defenses: at most 5e-6.
TOLERANCE = 5e-5
#: And the image's gradient by this share of its length.
GRADIENT_TOLERANCE = 1e-2
#: In bf16, which keeps 8 bits, this share of the images may differ by more than ``BF16_TOLERANCE`` of the spread.
BF16_SHARE, BF16_TOLERANCE = 0.1, 0.1


@dataclass(frozen=True)
class Cheaper:
    """What was done to a search copy."""

    folded: int = 0
    """Batch norms folded into the layer before."""
    channels_last: bool = False
    precision: str = "fp32"
    """Of the passes: ``fp32`` or ``bf16``."""
    compiled: bool = False
    """Passes are compiled code (``arena.compiling``)."""
    recorded: bool = False
    """Passes are replayed CUDA graphs (``arena.graphs``)."""
    gap: float = 0.0
    """Largest difference to the eager model's scores on the probe, as a share of their spread, without bf16's."""
    note: str = ""
    """Why less was done than could be."""

    def and_compiled(self, why: str) -> Cheaper:
        """Return this with its passes compiled; or, with ``why`` they are not, with that said."""
        return replace(self, compiled=not why, note=self._and_not("compiled", why))

    def and_recorded(self, why: str) -> Cheaper:
        """Return this with its passes recorded; or, with ``why`` they are not, with that said."""
        return replace(self, recorded=not why, note=self._and_not("recorded", why))

    def _and_not(self, what: str, why: str) -> str:
        return "; ".join(n for n in (self.note, f"not {what}: {why}" if why else "") if n)

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
    # On small pictures oneDNN's plain layout is the faster one, but for the tiles of AMX; in fp32 cuDNN's on all
    # (docs/speed.md).
    wide = x[0].numel() > SMALL_IMAGE
    if precision == "bf16":
        model, done = _made(build, eager, surface, x, wide or _has_tiles(x.device))
        if model is eager:
            model = build().eval().requires_grad_(False)
        _score_in_fp32(model, x)
        why = _bf16_differs(eager, model, surface, x)
        if not why:
            return model, replace(done, precision="bf16")
    model, done = _made(build, eager, surface, x, wide and x.device.type != "cuda")
    return model, _in_fp32(done, why) if precision == "bf16" else done


def in_a_line(error: Exception) -> str:
    """Return the kind of an error, and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


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
        return None, Cheaper(), f"the {what} copy failed: {in_a_line(e)}"
    if not gap <= TOLERANCE:
        return None, Cheaper(), f"the {what} copy differs from the eager model by {gap:.2g} of the scores' spread"
    if not slope <= GRADIENT_TOLERANCE:
        return (
            None,
            Cheaper(),
            f"the {what} copy's gradient differs from the eager model's by {slope:.2g} of its length",
        )
    return model, Cheaper(folded, last, gap=gap), ""


def _bf16_differs(eager: nn.Module, model: nn.Module, surface: Surface, x: Tensor) -> str:
    """Return why a copy cannot search in bf16; empty if it can."""
    target = Target(model, surface, 0, PROBE, device=x.device.type, precision="bf16")
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    weights = x.new_ones(len(x), 1 + len(surface.heads))
    try:
        with torch.no_grad(), Reader(eager, surface) as read:
            expected, seen = read(x).scores(), target.clean(x)
        for mode in modes(model, surface, len(x)):  # that it runs in each is enough
            target.answer(Query(x.unsqueeze(1), "ce", weights, grad=True, surrogate=mode), y)
        gaps = apart(expected.flatten(0, 1), (seen if seen.dim() == 3 else seen.unsqueeze(1)).flatten(0, 1))
    except Exception as e:  # foreign code may mind bf16; then it is searched in fp32, and the record says why
        return in_a_line(e)
    finally:
        target.close()
    share = float((~(gaps <= BF16_TOLERANCE)).float().mean())
    return f"{share:.0%} of the probe's scores differ by a tenth of their spread" if share > BF16_SHARE else ""
