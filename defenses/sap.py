"""SAP, stochastic activation pruning (Dhillon et al., ICLR 2018): random pruning behind every ReLU, at test time only.

Nothing is trained: the weights are those of a finished ``sat`` model. With p_j = |h_j| / sum |h| over a map,
r = frac n units are drawn with replacement; those drawn are kept, times 1 / (1 - (1 - p_j)^r), all others are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arena.backbones import DatasetInfo
from arena.specs import Preset, Value
from arena.stages import Usual
from arena.surface import Knob, Surface
from arena.training import Stage

RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_)


def prune(h: Tensor, frac: float) -> Tensor:
    """Prune maps (N, ...) by one draw from the global generator; a map of zeros stays.

    The scale carries no gradient: the expected gradient is then that of the expected output, h itself.
    """
    flat = h.detach().flatten(1).abs()
    n = flat.shape[1]
    r = max(1, round(frac * n))
    total = flat.sum(1, keepdim=True)
    p = torch.where(total > 0, flat / total.clamp_min(torch.finfo(flat.dtype).tiny), 1 / n)
    drawn = torch.zeros_like(p).scatter_(1, torch.multinomial(p, r, replacement=True), 1.0)
    chance = -torch.expm1(r * torch.log1p(-p))
    return h * (drawn / chance.clamp_min(torch.finfo(p.dtype).tiny)).view_as(h)


class _Pruning(TorchFunctionMode):
    """Prunes the result of every ReLU that runs inside, however the network writes it."""

    def __init__(self, frac: float) -> None:
        super().__init__()
        self.frac = frac

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return prune(out, self.frac) if func in RELUS else out


class Sampler(nn.Module):
    """How a network prunes; no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frac = 1.0
        self.draws = 1
        self.on = True


class Pruned(nn.Module):
    """A backbone whose ReLUs are pruned in eval mode; logits are means over ``draws`` passes.

    The backbone's parts are this module's own, under their own names, so that its weights fit and are fitted.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_backbone", backbone)
        for name, child in backbone.named_children():
            self.add_module(name, child)
        for name, parameter in backbone.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.sampler = Sampler()

    def forward(self, x: Tensor) -> Tensor:
        backbone: nn.Module = self._backbone  # type: ignore[assignment]
        if self.training or not self.sampler.on:
            return backbone(x)  # type: ignore[no-any-return]
        with _Pruning(self.sampler.frac):
            logits = [backbone(x) for _ in range(self.sampler.draws)]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]

    def train(self, mode: bool = True) -> Pruned:
        self._backbone.train(mode)  # type: ignore[operator, union-attr]
        super().train(mode)
        return self


def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Wrap the backbone."""
    return Pruned(backbone)


def apply(model: nn.Module, frac: Value = 1.0, draws: Value = 1, **options: Value) -> None:
    """Set the share of units drawn and the passes a forward averages."""
    sampler = model.get_submodule("sampler")
    assert isinstance(sampler, Sampler)
    sampler.frac, sampler.draws = float(frac), int(draws)


def surface(model: nn.Module) -> Surface:
    """Declare the randomness and, for search copies, more passes, milder pruning, or none."""
    return Surface(
        knobs={
            "frac": Knob("sampler", "frac", "constant", (2.0, 10.0)),
            "draws": Knob("sampler", "draws", "constant"),  # no values: the attacks average over draws themselves
            "on": Knob("sampler", "on", "constant", (False,)),
        },
        random=True,
    )


@dataclass(frozen=True)
class PostHoc(Usual):
    """Take another defense's weights and train nothing. Counts as adversarial where that defense is."""

    def epochs(self, preset: Preset) -> int:
        """Return 0."""
        return 0

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Train nothing."""
        return ()


def sat(**options: Value) -> Sequence[Stage]:
    """The weights of ``sat``."""
    return [PostHoc("sat", start_from="sat")]
