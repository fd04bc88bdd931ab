"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arena.errors import ArenaError

if TYPE_CHECKING:
    from arena.question import Running

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FILE = click.Path(path_type=Path)


def _dataset(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and value.endswith(".npz") and not value.startswith("npz:"):
        raise ArenaError(f"unknown dataset '{value}'; did you mean npz:{value}?")
    return value


def refuse_bare_file(defense: str) -> None:
    """Refuse a Python file without the name of its factory.

    Raises:
        ArenaError: it is one.
    """
    if defense.endswith(".py"):
        raise ArenaError(f"unknown defense '{defense}'; for a model of your own: {defense}:FACTORY")


def question(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what names a data set, a backbone and a threat model."""
    for option in reversed(
        (
            click.option(
                "--dataset",
                metavar="NAME",
                callback=_dataset,
                help="Data set: a listed name, npz:FILE or folder:DIR.  [default: digits]",
            ),
            click.option("--backbone", metavar="NAME", help="Network; its options in brackets: 'resnet18(width=32)'."),
            click.option("--norm", metavar="NORM", help="Linf, L2, L1 or L0.  [default: the data set's]"),
            click.option("--eps", metavar="EPS", help="Radius in pixels of 1: 8/255, 0.2.  [default: the data set's]"),
        )
    ):
        command = option(command)
    return command


train_seed = click.option(
    "--train-seed", type=int, metavar="SEED", help="Seed of the training; part of the model's identity.  [default: 0]"
)


def training(command: Any) -> Any:
    """Add what makes the model another one: seed and threat model of its training."""
    for option in reversed(
        (
            train_seed,
            click.option("--train-norm", metavar="NORM", help="Norm trained against.  [default: the data set's]"),
            click.option(
                "--train-eps",
                metavar="EPS",
                help="Radius trained against, whatever --eps is.  [default: the data set's]",
            ),
        )
    ):
        command = option(command)
    return command


retrain = click.option("--retrain", is_flag=True, help="Train again although weights are kept.")
quiet = click.option("--quiet", "-q", is_flag=True, help="No progress.")
checkpoint = click.option(
    "--checkpoint", type=FILE, metavar="FILE", help="Weights (safetensors, or a state dict) instead of training."
)
surface = click.option("--surface", type=FILE, metavar="FILE", help="What an attacker may use, as TOML.")


def _device(_: click.Context, __: click.Parameter, value: str) -> str:
    return check_device(value)


def check_device(name: str) -> str:
    """Return the name of a device.

    Raises:
        ArenaError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ArenaError(f"--device '{name}': expected auto, cpu, cuda, cuda:N or mps")
    return name


device = click.option(
    "--device", default="auto", metavar="DEVICE", callback=_device, help="auto, cpu, cuda, cuda:N.  [default: auto]"
)


def resolve(name: str) -> str:
    """Turn ``auto`` into a device that is there; refuse one that is not.

    Raises:
        ArenaError: no such device on this machine.
    """
    import torch

    check_device(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        raise ArenaError(f"--device '{name}': this machine has {there} of kind {kind}; use auto or cpu")
    return name


def crew(command: Any) -> Any:
    """Add what lets several devices share the points of a match."""
    for option in reversed(
        (
            click.option(
                "--devices",
                metavar="N,N,...",
                help="Share the points among these CUDA devices: 0,1; or among processes: cpu,cpu. Changes no outcome.",
            ),
            click.option(
                "--engine", type=click.Choice(("local", "ray")), help="ray: on a Ray cluster.  [default: local]"
            ),
            click.option(
                "--ray-address",
                metavar="ADDRESS",
                help="Of the cluster; auto: of this machine's.  [default: start one here]",
            ),
            click.option(
                "--workers",
                type=click.IntRange(1),
                metavar="N",
                help="With --engine ray.  [default: one for each GPU, or else for each CPU, of the cluster]",
            ),
        )
    ):
        command = option(command)
    return command


def settle(running: Running) -> Running:
    """Turn what is said of devices into those that are there.

    Raises:
        ArenaError: one is not there, or what is said does not go together.
    """
    from dataclasses import replace

    import torch

    from arena.distributed import shared

    if running.engine == "ray":
        if running.devices:
            raise ArenaError("--devices names devices of this machine: with --engine ray say --workers")
        kind = check_device(running.device)
        if kind not in ("auto", "cpu", "cuda"):
            raise ArenaError(f"--engine ray --device {kind}: expected auto, cpu or cuda")
        # The referee works here, where there need not be a GPU.
        own = resolve("cpu" if kind == "cpu" else "auto")
        return replace(running, device=own, devices=() if kind == "auto" else (kind,))
    for name, value in (("--ray-address", running.ray_address), ("--workers", running.workers)):
        if value is not None:
            raise ArenaError(f"{name} {value}: only with --engine ray")
    if not running.devices:
        return replace(running, device=resolve(running.device))
    if running.device != "auto":
        raise ArenaError(f"--devices {','.join(running.devices)} and --device {running.device}: give one of them")
    devices = shared(running.devices, torch.cuda.device_count())
    return replace(running, device=devices[0], devices=devices)


def time_limit(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Read ``--time-limit``; seconds."""
    from arena.limit import seconds_of

    return None if value is None else seconds_of(value)


def chosen(**values: Any) -> dict[str, Any]:
    """Keep what the user gave on the command line."""
    return {k: v for k, v in values.items() if v is not None}
