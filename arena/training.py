"""The training loop: held-out validation, best and last checkpoints, resume after a kill, progress.

Everything random is a function of (train seed, stage, epoch): generators are seeded anew for every epoch, and the
global one is forked for the duration. So an interrupted run continues from its last saved epoch to the very weights an
uninterrupted one reaches, without any generator's state on disk.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arena import trace
from arena.augment import augment
from arena.checkpoints import write_weights
from arena.datasets import Images, stratified, to_float
from arena.distributed import World
from arena.errors import ArenaError
from arena.inner import check_norm
from arena.schedule import Schedule
from arena.selection import training_step
from arena.specs import Preset
from arena.stages import Context, Stage, Usual
from arena.surface import Reader, Surface
from arena.threads import one_thread, small
from arena.threat import Threat
from arena.validation import judge, looks
from arena.watch import Watch

__all__ = ["Context", "Fitted", "Stage", "Usual", "fit", "split", "supports"]

#: Share of the training images held out to choose the best epoch.
HELD_OUT = 0.1


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
    schedule: Schedule | None = None,
    world: World | None = None,
    save_every: float = 5.0,
) -> Fitted:
    """Train ``model`` through ``stages`` and leave ``best.safetensors`` and ``last.safetensors`` in ``folder``.

    Beside them go a log (``arena.trace``) and the state to resume from, which is saved at the end of an epoch, at most
    every ``save_every`` seconds. ``start`` fetches the weights of a defense that a stage starts from. Of ``schedule``
    precision and patience are used; its preset and epochs are in ``preset`` already. In a ``world`` of several
    processes each calls this with the same arguments and its own device. Without epochs both files hold the model as
    it came.

    Raises:
        ArenaError: the loss is not finite, or the data set, norm or precision cannot be trained with.
    """
    schedule, world = schedule or Schedule(), world or World()
    supports(name, stages, threat)
    _precision(name, stages, schedule.precision)
    little = small(device.type, sum(p.numel() for p in model.parameters()), images.shape)
    model.to(device)
    if not little:
        model.to(memory_format=torch.channels_last)
    train, held = split(images.y_train)
    data = _Data(*(t.to(device) for t in (images.x_train[train], images.y_train[train])))
    check = _Data(*(t.to(device) for t in (images.x_train[held], images.y_train[held])))
    totals = [stage.epochs(preset) for stage in stages]
    state = trace.resume(folder)
    world.wait()  # until every process has read it
    history: list[dict[str, Any]] = state["history"] if state else []
    best: dict[str, Any] = state["best"] if state else {}
    log = trace.Log.open(folder, history)
    spent, begun, saved = float(state["seconds"]) if state else 0.0, time.monotonic(), time.monotonic()
    watch.phase(f"train {name}", sum(totals), "epochs")
    if state:
        model.load_state_dict(state["model"])
        watch.advance(len(history), "resumed")
    modes = [(p, p.requires_grad) for p in model.parameters()]
    precise = schedule.precision == "fp32"
    try:
        with Reader(model, surface) as read, _own_randomness(device, precise), one_thread(little) as threads:
            for s, (stage, total) in enumerate(zip(stages, totals, strict=True)):
                mine = [h for h in history if h["stage"] == s]
                if any(h["stage"] > s for h in history) or (mine and (len(mine) >= total or mine[-1].get("stopped"))):
                    continue  # finished in an earlier sitting
                if not mine:
                    _begin(model, stage, start)
                    best = {}
                optimizers: list[torch.optim.Optimizer] = []
                for epoch in range(len(mine), total):
                    clock = time.monotonic()
                    generator = _seed_epoch(device, train_seed, s, epoch)
                    own = settings(stage, preset)
                    ctx = Context(own, threat, images.n_classes, surface, read, generator, epoch)
                    if not optimizers:
                        _freeze(model, stage)
                        optimizers = stage.optimizers(model, ctx)
                        if state and mine:
                            for optimizer, old in zip(optimizers, state["optimizers"], strict=True):
                                optimizer.load_state_dict(old)
                    passing = nullcontext if precise else _bf16(device)
                    losses = _epoch(model, stage, ctx, optimizers, data, total, name, world, passing)
                    took = time.monotonic() - clock
                    entry: dict[str, Any] = {"stage": s, "epoch": epoch + 1, **losses}
                    if looks(epoch, total):
                        entry |= judge(model, read, ctx, check.x, check.y, adversarial=stage.adversarial, world=world)
                        if not best or stage.score(entry) >= stage.score(best):
                            best = entry
                            if world.first:
                                write_weights(folder / "best.safetensors", model.state_dict())
                    history.append(entry)
                    if best and schedule.patience and _looks_since(best, history, s) >= schedule.patience:
                        entry["stopped"] = True
                    if world.first:
                        lr = optimizers[0].param_groups[0]["lr"]
                        log.add({**entry, "lr": lr, "seconds": took, "images_per_second": len(data.y) / took})
                        watch.advance(len(history), _note(entry, best))
                        if time.monotonic() - saved >= save_every:
                            log.write()
                            elapsed = spent + time.monotonic() - begun
                            trace.save(folder, model, optimizers, history, best, elapsed)
                            saved = time.monotonic()
                    if entry.get("stopped"):
                        watch.say(f"stopped after {epoch + 1} of {total} epochs: no better since epoch {best['epoch']}")
                        break
    finally:
        for p, mode in modes:
            p.requires_grad_(mode)
    model.eval()
    if world.first:
        log.write()
        write_weights(folder / "last.safetensors", model.state_dict())
        if not best:
            write_weights(folder / "best.safetensors", model.state_dict())
    world.wait()
    return Fitted(history, best, spent + time.monotonic() - begun, len(held), threads)


def _precision(name: str, stages: Sequence[Stage], precision: str) -> None:
    """Refuse mixed precision for gradients of gradients: what a loss says of their direction is lost in 8 bits."""
    if precision != "fp32" and any(stage.second_order for stage in stages):
        raise ArenaError(f"--precision {precision}: '{name}' differentiates gradients, which takes fp32")


def _looks_since(best: Mapping[str, Any], history: Sequence[Mapping[str, Any]], stage: int) -> int:
    """Count the looks of a stage after its best one."""
    return sum(h["stage"] == stage and h["epoch"] > best["epoch"] and "natural" in h for h in history)


def _bf16(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: torch.autocast(device.type, torch.bfloat16)


@dataclass(frozen=True)
class _Data:
    x: Tensor
    y: Tensor


@contextmanager
def _own_randomness(device: torch.device, precise: bool) -> Iterator[None]:
    """Leave the caller's global generators untouched; on a GPU in fp32 also ask for repeatable kernels without TF32."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=not precise, deterministic=precise, allow_tf32=not precise),
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
    world: World,
    passing: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Pass once over the data; returns the mean of each loss term."""
    model.train()
    preset, n = ctx.preset, len(data.y)
    batches = list(torch.randperm(n, generator=ctx.generator, device=ctx.generator.device).split(preset.batch))
    if len(batches) > 1 and len(batches[-1]) < 8 * world.size:
        batches.pop()  # too few rows for batch statistics
    if not world.first:  # the batches are everyone's, the noise on them each one's own
        torch.manual_seed(seed_of(torch.initial_seed(), world.rank))
        ctx.generator.manual_seed(seed_of(ctx.generator.initial_seed(), world.rank))
    adversary = stage.adversary(ctx)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        factor = rate((ctx.epoch + i / len(batches)) / total, ctx.epoch, preset)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] = group["initial_lr"] * factor
        rows = world.share(batch)
        part = len(rows) / len(batch)
        x, y = augment(to_float(data.x[rows]), preset.augment, ctx.generator), data.y[rows]
        with training_step(), passing():
            x_adv = adversary(model, x, y) if adversary else None
            loss, log = stage.loss(model, x, y, replace(ctx, x_adv=x_adv))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        world.sum_gradients(parameters, part)
        for optimizer in optimizers:
            optimizer.step()
        for key, value in {"loss": loss.detach(), **log}.items():
            sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value * part
    world.average_buffers(model)
    means = world.sum_values({k: float(v) / len(batches) for k, v in sums.items()})
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


def _note(entry: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    seen = entry if "natural" in entry else best
    figures = [f"{k} {seen[k]:.1f}" for k in ("natural", "pgd") if k in seen]  # on held-out images
    return ", ".join([*figures, f"loss {entry['loss']:.2f}"])  # a narrow screen cuts the end
