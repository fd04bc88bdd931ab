"""Defenses that regularize gradients: DeepDefense's GFA, GNR, GAIE, and DeepDefense's mixture ADV (papers.md 6, 7).

All leave the network as it is: what is new is the training loss, differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arena.inner import evaluating
from arena.specs import Value
from arena.stages import Adversary, Context, Stage

#: Floor of norms: where the task loss has no gradient left a cosine is 0, and its own gradient stays below 1 / TINY.
TINY = 1e-6
#: Layers whose alignment is logged, counted from the image: DeepDefense's Table 1 has five.
REPORTED = 5
#: Rows a pass of the report.
CHUNK = 256


def task_losses(z: Tensor, y: Tensor, task: str) -> Tensor:
    """Return the task loss of each row, (N,): cross-entropy, or mean squared error against one-hot targets."""
    if task == "ce":
        return F.cross_entropy(z, y, reduction="none")
    if task != "mse":
        raise ValueError(f"task '{task}': expected mse or ce")
    return (z - F.one_hot(y, z.shape[1]).to(z.dtype)).square().mean(1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row's flattened tensors, (N,); 0 where one of them vanishes. Nothing is detached."""
    a, b = a.flatten(1), b.flatten(1)

    def norm(v: Tensor) -> Tensor:
        return (v.square().sum(1) + TINY**2).sqrt()

    return (a * b).sum(1) / (norm(a) * norm(b))


def norms(gradient: Tensor, norm: str) -> Tensor:
    """Return GNR's penalty of each row, (N,): the squared L2 norm, or the L1 norm."""
    flat = gradient.flatten(1)
    if norm == "l2":
        return flat.square().sum(1)
    if norm != "l1":
        raise ValueError(f"norm '{norm}': expected l2 or l1")
    return flat.abs().sum(1)


def filtered(x: Tensor, *kernels: Sequence[Sequence[float]]) -> Tensor:
    """Return each channel of (N, C, H, W) under 3x3 kernels, edges repeated: (kernels, N, C, H, W)."""
    n, c, h, w = x.shape
    weight = torch.tensor(kernels, dtype=x.dtype, device=x.device)[:, None]
    padded = F.pad(x.reshape(n * c, 1, h, w), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, weight).view(n, c, len(kernels), h, w).movedim(2, 0)


def sobel(x: Tensor) -> Tensor:
    """Return the Sobel magnitude of each channel, shape of ``x``."""
    across, down = filtered(x, ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)), ((-1, -2, -1), (0, 0, 0), (1, 2, 1)))
    return (across.square() + down.square()).sqrt()


def laplacian(x: Tensor) -> Tensor:
    """Return the signed Laplacian of each channel, shape of ``x``: negative on a bright spot."""
    return filtered(x, ((0, 1, 0), (1, -4, 1), (0, 1, 0)))[0]


@contextmanager
def layer_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the input of each convolution and linear layer at its first call, by path, in the order of the pass."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> object:
        def read(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(path, inputs[0])

        return read

    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_pre_hook(hook(p)) for p, m in layers]  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def alignments(losses: Tensor, inputs: Mapping[str, Tensor], graph: bool = False) -> dict[str, Tensor]:
    """Return GFA of each row at each layer, (N,): cos(h, dL/dh), from losses (N,) and ``layer_inputs``."""
    found = torch.autograd.grad(losses.sum(), list(inputs.values()), create_graph=graph)
    return {path: cosine(h, g) for (path, h), g in zip(inputs.items(), found, strict=True)}


def report(model: nn.Module, x: Tensor, y: Tensor, task: str = "mse", layers: int = REPORTED) -> dict[str, float]:
    """Return the mean GFA of images (N, C, H, W) with labels (N,) at the first ``layers`` layers, by path.

    DeepDefense's Table 1. In eval mode, so it is the alignment that an attacker meets; the model keeps its own.
    """
    sums: dict[str, float] = {}
    with evaluating(model):
        for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            with layer_inputs(model) as inputs:
                losses = task_losses(model(rows.detach().requires_grad_()), labels, task)
            for path, rows_ in alignments(losses, dict(list(inputs.items())[:layers])).items():
                sums[path] = sums.get(path, 0.0) + float(rows_.detach().sum())
    return {path: total / len(x) for path, total in sums.items()}


def freeze_norms(model: nn.Module) -> None:
    """Put batch norms in eval mode: with the statistics they have, each row's output is its own again."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@dataclass(frozen=True)
class Regularized(Stage):
    """Natural training on alpha * task loss + beta * mean over rows of a penalty on the loss's own gradient.

    ``gfa``: sum over layers l of 1 - cos(h_l, dL/dh_l), h_l the layer's input; ``gnr``: a norm of dL/dx; ``gaie``:
    1 - cos(|dL/dx|, Sobel magnitude of x), or with ``signed`` 1 - cos(dL/dx, -Laplacian of x). Gradients are of each
    row's own loss and stay in the graph.
    """

    penalty: str
    """``gfa``, ``gnr`` or ``gaie``."""
    task: str = "mse"
    """``mse`` (one-hot targets) or ``ce``."""
    alpha: float = 1.0
    beta: float = 1.0
    layers: int = 1
    """GFA: layers aligned, counted from the image."""
    form: str = ""
    """GNR: ``l2`` or ``l1``; GAIE: ``sobel`` or ``signed``."""
    norms: str = "batch"
    """``frozen``: batch norms keep mean 0 and variance 1 and learn scale and shift alone; ``batch``: they normalize by
    the batch in training, and a row's gradient is another one at test time."""

    @property
    def second_order(self) -> bool:
        """Always."""
        return True

    def score(self, entry: Mapping[str, Any]) -> tuple[float, ...]:
        """Return the epoch itself for GFA: accuracy on natural images comes long before alignment."""
        return (entry["epoch"],) if self.penalty == "gfa" else Stage.score(self, entry)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; logs the task loss and the penalty, or for GFA each layer's mean alignment."""
        if self.norms == "frozen":
            freeze_norms(model)
        x = x.detach().requires_grad_()
        with layer_inputs(model) as inputs:
            losses = task_losses(ctx.read(x).logits, y, self.task)
        task = losses.mean()
        log = {"task": task.detach()}
        if self.penalty == "gfa":
            seen = dict(list(inputs.items())[: max(self.layers, REPORTED)])
            means = {path: rows.mean() for path, rows in alignments(losses, seen, graph=True).items()}
            log |= {f"gfa_{path}": m.detach() for path, m in means.items()}
            penalty = torch.stack([1 - m for m in list(means.values())[: self.layers]]).sum()
        else:
            (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
            penalty = self._on_image(x.detach(), gradient).mean()
            log[self.penalty] = penalty.detach()
        return self.alpha * task + self.beta * penalty, log

    def _on_image(self, x: Tensor, gradient: Tensor) -> Tensor:
        if self.penalty == "gnr":
            return norms(gradient, self.form)
        if self.penalty != "gaie":
            raise ValueError(f"penalty '{self.penalty}': expected gfa, gnr or gaie")
        if self.form == "signed":
            return 1 - cosine(gradient, -laplacian(x))
        return 1 - cosine(gradient.abs(), sobel(x))


@dataclass(frozen=True)
class Mixture(Stage):
    """DeepDefense's ADV: (1 - share) * task loss on clean + share * task loss on PGD images of the same batch."""

    task: str = "mse"
    share: float = 0.5
    adversarial: bool = True

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return PGD from a uniform start on the task loss, in eval mode."""

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with evaluating(model):
                return ctx.climb(lambda point: task_losses(ctx.read(point).logits, y, self.task), x)

        return attack

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the two halves, each with a pass of its own."""
        assert ctx.x_adv is not None
        clean, attacked = (task_losses(ctx.read(p).logits, y, self.task).mean() for p in (x, ctx.x_adv))
        log = {"clean": clean.detach(), "attacked": attacked.detach()}
        return (1 - self.share) * clean + self.share * attacked, log


# -- recipes -----------------------------------------------------------------------------------------------------------


def gfa_first(
    task: Value = "mse", alpha: Value = 1.0, beta: Value = 0.03, norms: Value = "frozen", **options: Value
) -> Sequence[Stage]:
    """DeepDefense FIRST: gradient-feature alignment at the image."""
    return [Regularized("gfa", str(task), float(alpha), float(beta), layers=1, norms=str(norms))]


def gfa_deep(
    task: Value = "mse",
    alpha: Value = 1.0,
    beta: Value = 0.01,
    layers: Value = 3,
    norms: Value = "frozen",
    **options: Value,
) -> Sequence[Stage]:
    """DeepDefense DEEP: gradient-feature alignment at the inputs of the first ``layers`` layers."""
    return [Regularized("gfa", str(task), float(alpha), float(beta), int(layers), norms=str(norms))]


def gnr(task: Value = "ce", beta: Value = 0.3, norm: Value = "l2", **options: Value) -> Sequence[Stage]:
    """Gradient norm regularization (Ross & Doshi-Velez, AAAI 2018)."""
    return [Regularized("gnr", str(task), beta=float(beta), form=str(norm))]


def gaie(task: Value = "mse", beta: Value = 0.1, edges: Value = "sobel", **options: Value) -> Sequence[Stage]:
    """Gradients aligned with image edges: a reconstruction."""
    return [Regularized("gaie", str(task), beta=float(beta), form=str(edges))]


def advmix(task: Value = "mse", share: Value = 0.5, **options: Value) -> Sequence[Stage]:
    """DeepDefense's ADV: clean and PGD images mixed."""
    return [Mixture(str(task), float(share))]
