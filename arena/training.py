"""The training loop: held-out validation, best and last checkpoints, resume after a kill, progress.

Everything random is a function of (train seed, stage, epoch): generators are seeded anew for every epoch, and the
global one is forked for the duration. So an interrupted run continues from its last saved epoch to the very weights an
uninterrupted one reaches, without any generator's state on disk.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.checkpoints import write_weights
from arena.datasets import Images, stratified, to_float
from arena.errors import ArenaError
from arena.home import atomic_write
from arena.inner import ascend, check_norm, evaluating, step_of
from arena.selection import training_step
from arena.specs import Preset
from arena.stages import Context, Stage, Usual
from arena.surface import Reader, Reading, Surface
from arena.threads import one_thread
from arena.threat import Threat
from arena.watch import Watch

__all__ = ["Context", "Fitted", "Stage", "Usual", "fit", "split", "supports"]

#: Share of the training images held out to choose the best epoch.
HELD_OUT = 0.1
#: About so many times in a stage is the model judged on the held-out images.
LOOKS = 20
#: Rows a pass outside training.
CHUNK = 512
#: Parameters up to which training on the CPU runs on one thread. Sums then come out the same on any number of cores, so
#: equal keys mean equal weights.
ONE_THREAD = 1_000_000


@dataclass(frozen=True)
class Fitted:
    """What came of training."""

    history: list[dict[str, Any]]
    """One entry an epoch: stage, epoch, mean loss terms, and accuracies on the held-out images where judged."""
    best: dict[str, Any]
    """The entry of the epoch in ``best.safetensors``."""
    seconds: float
    """Time spent training, over all sittings."""
    held_out: int
    """Images held out."""
    threads: int
    """CPU threads used."""


def split(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (training, validation) indices of the training images: a fixed, stratified tenth is held out.

    Raises:
        ArenaError: fewer than two images.
    """
    if len(y) < 2:
        raise ArenaError(f"training needs at least 2 images, the data set has {len(y)} for training")
    order = torch.from_numpy(stratified(y.numpy()))
    held = max(1, round(HELD_OUT * len(y)))
    return order[held:].sort().values, order[:held].sort().values


def supports(owner: str, stages: Sequence[Stage], threat: Threat) -> None:
    """Refuse a threat model that a recipe's inner attack cannot follow.

    Raises:
        ArenaError: see ``arena.inner.check_norm``.
    """
    if any(stage.adversarial for stage in stages):
        check_norm(owner, threat)


def fit(
    model: nn.Module,
    stages: Sequence[Stage],
    images: Images,
    preset: Preset,
    threat: Threat,
    *,
    name: str,
    surface: Surface,
    train_seed: int,
    folder: Path,
    device: torch.device,
    watch: Watch,
    start: Callable[[str], Mapping[str, Tensor]] | None = None,
    save_every: float = 5.0,
) -> Fitted:
    """Train ``model`` through ``stages`` and leave ``best.safetensors`` and ``last.safetensors`` in ``folder``.

    ``start`` fetches the weights of a defense that a stage starts from. The state to resume from is saved at the end
    of an epoch, at most every ``save_every`` seconds. Without epochs both files hold the model as it came.

    Raises:
        ArenaError: the loss is not finite, or the data set or norm cannot be trained on.
    """
    supports(name, stages, threat)
    model.to(device)
    train, held = split(images.y_train)
    data = _Data(*(t.to(device) for t in (images.x_train[train], images.y_train[train])))
    check = _Data(*(t.to(device) for t in (images.x_train[held], images.y_train[held])))
    totals = [stage.epochs(preset) for stage in stages]
    state = _resume(folder)
    history: list[dict[str, Any]] = state["history"] if state else []
    best: dict[str, Any] = state["best"] if state else {}
    done, offset = len(history), 0
    spent, begun, saved = float(state["seconds"]) if state else 0.0, time.monotonic(), time.monotonic()
    watch.phase(f"train {name}", sum(totals), "epochs")
    if state:
        model.load_state_dict(state["model"])
        watch.advance(done, "resumed")
    modes = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with Reader(model, surface) as read, _own_randomness(device), one_thread(_small(model, device)) as threads:
            for s, (stage, total) in enumerate(zip(stages, totals, strict=True)):
                offset, before = offset + total, offset
                if before + max(total, 1) <= done:
                    continue  # finished in an earlier sitting
                if done <= before:
                    _begin(model, stage, start)
                    best = {}
                optimizers: list[torch.optim.Optimizer] = []
                for epoch in range(max(done - before, 0), total):
                    generator = _seed_epoch(device, train_seed, s, epoch)
                    own = settings(stage, preset)
                    ctx = Context(own, threat, images.n_classes, surface, read, generator, epoch)
                    if not optimizers:
                        _freeze(model, stage)
                        optimizers = stage.optimizers(model, ctx)
                        if state and done > before:
                            for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
                                optimizer.load_state_dict(old)
                    losses = _epoch(model, stage, ctx, optimizers, data, total, name)
                    entry: dict[str, Any] = {"stage": s, "epoch": epoch + 1, **losses}
                    if _looks(epoch, total):
                        entry |= judge(model, read, ctx, check, adversarial=stage.adversarial)
                        if not best or _score(entry) >= _score(best):
                            best = entry
                            write_weights(folder / "best.safetensors", model.state_dict())
                    history.append(entry)
                    watch.advance(len(history), _note(entry, best))
                    if time.monotonic() - saved >= save_every:
                        _save(folder, model, optimizers, history, best, spent + time.monotonic() - begun)
                        saved = time.monotonic()
    finally:
        for p, mode in modes:
            p.requires_grad_(mode)
    model.eval()
    write_weights(folder / "last.safetensors", model.state_dict())
    if not best:
        write_weights(folder / "best.safetensors", model.state_dict())
    return Fitted(history, best, spent + time.monotonic() - begun, len(held), threads)


def _small(model: nn.Module, device: torch.device) -> bool:
    return device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= ONE_THREAD


@dataclass(frozen=True)
class _Data:
    x: Tensor
    y: Tensor


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Leave the caller's global generators untouched; on a GPU also ask for repeatable, full-precision kernels."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed made of the texts of ``parts``."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def _seed_epoch(device: torch.device, train_seed: int, stage: int, epoch: int) -> torch.Generator:
    torch.manual_seed(seed_of("model", train_seed, stage, epoch))
    return torch.Generator(device).manual_seed(seed_of("loop", train_seed, stage, epoch))


def settings(stage: Stage, preset: Preset) -> Preset:
    """Return what a stage makes of the preset, if it has a method ``preset(preset)``: its own rate or milestones."""
    change: Callable[[Preset], Preset] | None = getattr(stage, "preset", None)
    return change(preset) if change else preset


def _begin(model: nn.Module, stage: Stage, start: Callable[[str], Mapping[str, Tensor]] | None) -> None:
    if stage.start_from is None:
        return
    if start is None:
        raise ArenaError(f"a stage starts from '{stage.start_from}', whose weights are not at hand")
    own = model.state_dict()
    given = {k: v for k, v in start(stage.start_from).items() if k in own and own[k].shape == v.shape}
    if not given:
        raise ArenaError(f"a stage starts from '{stage.start_from}', but no tensor of it fits this model")
    model.load_state_dict({**own, **given})


def _freeze(model: nn.Module, stage: Stage) -> None:
    wanted = {id(p) for p in stage.trainable(model)}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)


def _epoch(
    model: nn.Module,
    stage: Stage,
    ctx: Context,
    optimizers: list[torch.optim.Optimizer],
    data: _Data,
    total: int,
    name: str,
) -> dict[str, float]:
    """Pass once over the data; returns the mean of each loss term."""
    model.train()
    preset, n = ctx.preset, len(data.y)
    batches = list(torch.randperm(n, generator=ctx.generator, device=ctx.generator.device).split(preset.batch))
    if len(batches) > 1 and len(batches[-1]) < 8:
        batches.pop()  # too few rows for batch statistics
    adversary = stage.adversary(ctx)
    sums: dict[str, Tensor] = {}
    for i, rows in enumerate(batches):
        factor = rate((ctx.epoch + i / len(batches)) / total, ctx.epoch, preset)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * factor
        x, y = augment(to_float(data.x[rows]), preset.augment, ctx.generator), data.y[rows]
        with training_step():
            x_adv = adversary(model, x, y) if adversary else None
            loss, log = stage.loss(model, x, y, replace(ctx, x_adv=x_adv))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        for key, value in {"loss": loss.detach(), **log}.items():
            sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value
    means = {k: float(v) / len(batches) for k, v in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ArenaError(
            f"training of '{name}' diverged: the loss was {means['loss']:g} in epoch {ctx.epoch + 1} of {total} "
            f"(learning rate {preset.lr:g})"
        )
    return means


def rate(progress: float, epoch: int, preset: Preset) -> float:
    """Return the factor on the learning rate.

    With milestones a staircase; else one cycle over ``progress`` in [0, 1]: linear rise to 1 in the first fifth, then a
    half cosine to 0.
    """
    if preset.milestones:
        return float(preset.decay ** sum(epoch >= m for m in preset.milestones))
    if progress < 0.2:
        return 0.05 + 0.95 * progress / 0.2
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def augment(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, zeros moving in; ``crop_flip`` also mirrors half of them."""
    if kind == "none":
        return x
    if kind not in ("shift", "crop_flip"):
        raise ValueError(f"augment '{kind}': expected none, shift or crop_flip")
    n, _, h, w = x.shape
    up, left = max(1, round(h / 8)), max(1, round(w / 8))

    def offsets(side: int, reach: int) -> Tensor:
        first = torch.randint(0, 2 * reach + 1, (n, 1), generator=generator, device=x.device)
        return first + torch.arange(side, device=x.device)

    rows, columns = offsets(h, up), offsets(w, left)
    if kind == "crop_flip":
        flip = torch.rand(n, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(x, (left, left, up, up)).permute(0, 2, 3, 1)
    each = torch.arange(n, device=x.device).view(n, 1, 1)
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def judge(
    model: nn.Module, read: Callable[[Tensor], Reading], ctx: Context, data: _Data, adversarial: bool
) -> dict[str, float]:
    """Return percentages in eval mode, without labels: ``natural`` and, if ``adversarial``, ``pgd``.

    The attack is the preset's number of uniform-start steps of eps/4 on CE(logits) + mean CE(heads): the heads are in
    it because a mask chosen by a head hides the logits' gradient from the decision.
    """

    def objective(point: Tensor, y: Tensor) -> Tensor:
        seen = read(point)
        value = F.cross_entropy(seen.logits, y, reduction="none")
        heads = [F.cross_entropy(z, y, reduction="none") for z in seen.heads.values()]
        return value + torch.stack(heads).mean(0) if heads else value

    right = {"natural": 0, "pgd": 0} if adversarial else {"natural": 0}
    generator = torch.Generator(data.x.device).manual_seed(0)
    with evaluating(model):
        for rows in torch.arange(len(data.y), device=data.x.device).split(CHUNK):
            x, y = to_float(data.x[rows]), data.y[rows]
            with torch.no_grad():
                right["natural"] += int((model(x).argmax(1) == y).sum())
            if adversarial:
                point = ascend(
                    lambda p, y=y: objective(p, y),  # type: ignore[misc]
                    x,
                    ctx.threat,
                    steps=max(ctx.preset.steps, 1),
                    step=step_of(ctx.threat, "1/4"),
                    generator=generator,
                )
                with torch.no_grad():
                    right["pgd"] += int((model(point).argmax(1) == y).sum())
    return {k: 100 * v / len(data.y) for k, v in right.items()}


def _looks(epoch: int, total: int) -> bool:
    """Judge every ``total / LOOKS`` epochs and after the last."""
    return (total - 1 - epoch) % max(1, total // LOOKS) == 0


def _score(entry: Mapping[str, Any]) -> tuple[float, float]:
    return (entry.get("pgd", 0.0), entry["natural"])


def _note(entry: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    seen = entry if "natural" in entry else best
    figures = [f"{k} {seen[k]:.1f}" for k in ("natural", "pgd") if k in seen]  # on held-out images
    return ", ".join([*figures, f"loss {entry['loss']:.2f}"])  # a narrow screen cuts the end


def _save(
    folder: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    history: list[dict[str, Any]],
    best: dict[str, Any],
    seconds: float,
) -> None:
    buffer = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "history": history,
        "best": best,
        "seconds": seconds,
    }
    torch.save(state, buffer)
    atomic_write(folder / "resume.pt", buffer.getvalue())


def _resume(folder: Path) -> dict[str, Any] | None:
    path = folder / "resume.pt"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged state costs a fresh start, never the run
        path.unlink(missing_ok=True)
        return None
    return state
