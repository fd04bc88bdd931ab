"""The gallery's modules: wrappers around a trained backbone, and one small network with a hard mask."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arena.backbones import DatasetInfo
from arena.selection import Select, supervise
from arena.specs import Preset, Value
from arena.stages import Context, Usual
from arena.surface import Surface
from arena.training import Stage


class Over(nn.Module):
    """A backbone with something in front of it and behind it; its weights keep their names."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_backbone", backbone)
        for name, child in backbone.named_children():
            self.add_module(name, child)
        for name, parameter in backbone.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def net(self, x: Tensor) -> Tensor:
        return self._backbone(x)  # type: ignore[operator, union-attr, no-any-return]

    def train(self, mode: bool = True) -> Over:
        self._backbone.train(mode)  # type: ignore[operator, union-attr]
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, z: Tensor) -> Tensor:
        return z


class Quantised(Over):
    def before(self, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4


class Jpeg(Over):
    """Rounds the cosine transform of the whole picture; coarser for higher frequencies."""

    def before(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        a, b = _cosines(h).to(x), _cosines(w).to(x)
        step = 0.1 * (1 + torch.arange(h).view(-1, 1) + torch.arange(w)).to(x) / 2
        coefficients = torch.round((a @ (x - 0.5) @ b.T) / step) * step
        return (a.T @ coefficients @ b + 0.5).clamp(0, 1)


def _cosines(n: int) -> Tensor:
    k, i = torch.arange(n).view(-1, 1), torch.arange(n)
    rows = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Zeroed(Over):
    def before(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, 0.0)  # type: ignore[no-any-return, no-untyped-call]


class Reversed(Over):
    def before(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, -1.0)  # type: ignore[no-any-return, no-untyped-call]


class Huge(Over):
    def after(self, z: Tensor) -> Tensor:
        return z * 1e6


class Tiny(Over):
    def after(self, z: Tensor) -> Tensor:
        return z * 1e-6


class Saturating(Over):
    def after(self, z: Tensor) -> Tensor:
        return 10 * (30 * z).softmax(1) - 3


class OneHot(Over):
    def after(self, z: Tensor) -> Tensor:
        return 10.0 * F.one_hot(z.argmax(1), z.shape[1]).to(z.dtype)


RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu_)


class _OnRelu(TorchFunctionMode):
    """Does something to the result of every ReLU inside."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.change(out) if func in RELUS else out


class WinnersTakeAll(Over):
    """k-winners-take-all (Xiao et al. 2020) put behind trained ReLUs: a quarter of each map passes."""

    def net(self, x: Tensor) -> Tensor:
        def largest(h: Tensor) -> Tensor:
            flat = h.flatten(1)
            kept = flat.topk(max(1, flat.shape[1] // 4), dim=1).values[:, -1:]
            return (flat * (flat >= kept)).view_as(h)

        with _OnRelu(largest):
            return super().net(x)


class Noise(Over):
    def before(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Resize(Over):
    """One affine map for each image: up to half a pixel of shift, up to a tenth of scale."""

    def before(self, x: Tensor) -> Tensor:
        n = len(x)
        scale = 1 + 0.1 * (2 * torch.rand(n, 1, 1) - 1)
        shift = (2 * torch.rand(n, 2, 1) - 1) / x.shape[-1]
        theta = torch.cat((torch.eye(2).expand(n, 2, 2) * scale, shift), dim=2).to(x)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


class HashedNoise(Over):
    """The same image always gets the same noise, and its neighbour another."""

    def before(self, x: Tensor) -> Tensor:
        def noise(row: Tensor) -> Tensor:
            seed = int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:7], "little")  # type: ignore[attr-defined]
            return torch.randn(row.shape, generator=torch.Generator().manual_seed(seed))

        return x + 0.1 * torch.stack([noise(row) for row in x.detach().cpu().numpy()]).to(x)


class HardMask(nn.Module):
    """Features, a head, and a mask of the head's class: the decoder reads the class off the mask."""

    def __init__(self, shape: Sequence[int], n_classes: int) -> None:
        super().__init__()
        d, m = math.prod(shape), 96
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, m), nn.ReLU())
        self.guess = nn.Linear(m, n_classes)
        self.table = nn.Parameter(torch.randn(n_classes, m))
        self.select = Select()
        self.decoder = nn.Sequential(nn.Linear(m, 96), nn.ReLU(), nn.Linear(96, n_classes))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and guess, (N, K) each."""
        h = self.encoder(x)
        guess = self.guess(h)
        return self.decoder(h * torch.sigmoid(4 * self.select(guess, self.table))), guess

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[0]


class Detector(Over):
    """Clean digits have 17 grey levels, up to rounding; an image with others is looked at in black and white."""

    LEVELS = 16

    def forward(self, x: Tensor) -> Tensor:
        off = (x * self.LEVELS - (x * self.LEVELS).round()).abs().flatten(1).amax(1) > 0.05
        return torch.where(off.view(-1, 1), self.net((x > 0.5).to(x.dtype)), self.net(x))


class Branch(Over):
    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        top = z.topk(2, dim=1).values
        unsure = top[:, 0] - top[:, 1] < 0.6 * (z.amax(1) - z.amin(1)) / 2
        return torch.where(unsure.view(-1, 1), self.net((x > 0.5).to(x.dtype)), z)


class BatchStatistics(Over):
    def before(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        return x + 0.5 * (0.3 - mean)


class Memory(Over):
    """Answers an image within 0.5 (Linf) of one seen in an earlier call as it answered then."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.images: Tensor | None = None
        self.answers: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.images is None or self.answers is None:
            self.images, self.answers = x.detach().clone(), out.detach().clone()
            return out
        far = torch.stack([(self.images - row).abs().flatten(1).amax(1) for row in x.detach()])
        nearest, which = far.min(1)
        new = nearest > 0.5
        old = self.answers[which] + 0 * out
        self.images = torch.cat((self.images, x.detach()[new]))
        self.answers = torch.cat((self.answers, out.detach()[new]))
        return torch.where(new.view(-1, 1), out, old)


class Pruning(Over):
    def net(self, x: Tensor) -> Tensor:
        with _OnRelu(lambda h: h * (torch.rand_like(h) > 0.3) / 0.7):
            return super().net(x)


class InnerLoop(Over):
    """Five signed steps that raise the largest softmax score; the gradient is passed straight through."""

    def before(self, x: Tensor) -> Tensor:
        point = x.detach()
        with torch.enable_grad():
            for _ in range(5):
                leaf = point.detach().requires_grad_()
                sure = self.net(leaf).log_softmax(1).amax(1).sum()
                (grad,) = torch.autograd.grad(sure, leaf)
                point = (leaf + 0.03 * grad.sign()).clamp(0, 1).detach()
        return point + (x - x.detach())


def _builder(cls: type[Over]) -> Callable[..., nn.Module]:
    def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
        return cls(backbone)

    return build


build_quantised, build_jpeg, build_zeroed, build_reversed = map(_builder, (Quantised, Jpeg, Zeroed, Reversed))
build_huge, build_tiny, build_saturating, build_onehot = map(_builder, (Huge, Tiny, Saturating, OneHot))
build_winnerstakeall, build_noise, build_resize = map(_builder, (WinnersTakeAll, Noise, Resize))
build_hashednoise, build_detector, build_branch = map(_builder, (HashedNoise, Detector, Branch))
build_batchstatistics, build_memory, build_pruning = map(_builder, (BatchStatistics, Memory, Pruning))
build_innerloop = _builder(InnerLoop)


def build_hardmask(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Make the masked network; the backbone is not used."""
    return HardMask(dataset.shape, dataset.n_classes)


def random(model: nn.Module) -> Surface:
    """Declare the randomness and nothing else."""
    return Surface(random=True)


@dataclass(frozen=True)
class PostHoc(Usual):
    """Take the weights of ``rt`` and train nothing."""

    def epochs(self, preset: Preset) -> int:
        return 0

    def trainable(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return ()


@dataclass(frozen=True)
class Masked(Usual):
    """Train guess and output; the mask is the true label's, which is the leak."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, HardMask)
        with supervise(model, y):
            out, guess = model.both(x)
        total = F.cross_entropy(out, y) + F.cross_entropy(guess, y)
        return total, {"loss": total.detach()}


def post_hoc(**options: Value) -> Sequence[Stage]:
    """The weights of ``rt``."""
    return [PostHoc("rt", start_from="rt")]


def masked(**options: Value) -> Sequence[Stage]:
    """Natural training with masks by true labels."""
    return [Masked("rt")]
