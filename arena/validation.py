"""How a model in training is judged: on held-out images, in fp32 and eval mode, without labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.datasets import to_float
from arena.distributed import World
from arena.inner import ascend, evaluating, step_of
from arena.stages import Context
from arena.surface import Reading

#: About so many times in a stage is the model judged.
LOOKS = 20
#: Rows a pass.
CHUNK = 512


def looks(epoch: int, total: int) -> bool:
    """Tell whether to judge after ``epoch`` (from 0): every ``total / LOOKS`` epochs and after the last."""
    return (total - 1 - epoch) % max(1, total // LOOKS) == 0


def judge(
    model: nn.Module,
    read: Callable[[Tensor], Reading],
    ctx: Context,
    x: Tensor,
    y: Tensor,
    *,
    adversarial: bool,
    world: World | None = None,
) -> dict[str, float]:
    """Return percentages over images ``x`` (N, C, H, W), as stored, with labels ``y``: ``natural`` and, if
    ``adversarial``, ``pgd``. Processes of a ``world`` take turns at the chunks and all return the same.

    The attack is the preset's number of uniform-start steps of eps/4 on CE(logits) + mean CE(heads that answer):
    those are in it because a mask chosen by a head hides the logits' gradient from the decision.
    """
    world = world or World()

    def objective(point: Tensor, labels: Tensor) -> Tensor:
        seen = read(point)
        value = F.cross_entropy(seen.logits, labels, reduction="none")
        heads = [F.cross_entropy(seen.heads[name], labels, reduction="none") for name in answering]
        return value + torch.stack(heads).mean(0) if heads else value

    answering = [name for name, head in ctx.surface.heads.items() if head.answers]
    right = {"natural": 0.0, "pgd": 0.0} if adversarial else {"natural": 0.0}
    with evaluating(model):
        for number, rows in enumerate(torch.arange(len(y), device=x.device).split(CHUNK)):
            if number % world.size != world.rank:
                continue
            clean, labels = to_float(x[rows]), y[rows]
            with torch.no_grad():
                right["natural"] += int((model(clean).argmax(1) == labels).sum())
            if adversarial:
                point = ascend(
                    lambda p, labels=labels: objective(p, labels),  # type: ignore[misc]
                    clean,
                    ctx.threat,
                    steps=max(ctx.preset.steps, 1),
                    step=step_of(ctx.threat, "1/4"),
                    generator=torch.Generator(x.device).manual_seed(number),
                )
                with torch.no_grad():
                    right["pgd"] += int((model(point).argmax(1) == labels).sum())
    return {k: 100 * v / len(y) for k, v in world.sum_values(right).items()}
