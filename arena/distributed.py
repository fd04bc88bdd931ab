"""Training on several devices at once: one process a device, each with its share of every batch.

The processes sum their gradients after each backward pass and stay equal from then on. That is done here on one flat
tensor and not by ``DistributedDataParallel``, which follows one forward and one backward pass a step: recipes make many
(inner attacks, natural and adversarial passes, gradients of gradients), and one exchange a step, after about eleven
passes, costs too little to be hidden behind them. Batch-norm statistics are each device's own and are averaged
once an epoch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arena.errors import ArenaError


@dataclass(frozen=True)
class World:
    """The processes that train one model together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch, (N,) -> (about N / size,)."""
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def sum_gradients(self, parameters: Sequence[Tensor], weight: float) -> None:
        """Replace each gradient by the sum over processes of ``weight`` times it; one that no process has stays None.

        With losses that are means over rows and ``weight`` the process's part of the batch, that is the gradient of the
        whole batch.
        """
        if self.size == 1:
            return
        wanted = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad * weight for p in wanted]
        there = torch.tensor([float(p.grad is not None) for p in wanted], device=wanted[0].device)
        flat = torch.cat([there, *(g.reshape(-1).float() for g in grads)])
        dist.all_reduce(flat)
        seen, at = flat[: len(wanted)].tolist(), len(wanted)
        for p, grad, some in zip(wanted, grads, seen, strict=True):
            p.grad = flat[at : at + grad.numel()].view_as(grad).to(grad.dtype) if some else None
            at += grad.numel()

    def sum_values(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers over processes."""
        if self.size == 1:
            return dict(values)
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(flat)
        return dict(zip(values, flat.tolist(), strict=True))

    def average_buffers(self, model: nn.Module) -> None:
        """Average what batch norm has learned; whole numbers are the same everywhere already."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


#: Seconds that the first process has for saying what went wrong, before another one says it.
FIRST_WORD = 2.0


@contextmanager
def joined(device: str) -> Iterator[tuple[World, str]]:
    """Join the processes that ``torchrun`` or ``launch`` started, if any did; yields the world and this one's device.

    What the user can fix is mostly found by all of them: the others hold such an error back for a moment, and are
    stopped by ``launch`` or ``torchrun`` where the first has said it.

    Raises:
        ArenaError: more processes on this machine than devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ArenaError(
                f"process {rank} of {size} has no device of its own: this machine has {torch.cuda.device_count()}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(rank, size), device
    except ArenaError:
        time.sleep(FIRST_WORD if rank else 0.0)
        raise
    finally:
        dist.destroy_process_group()


def parse(text: str, available: int) -> tuple[int, ...]:
    """Read ``--devices``: numbers of CUDA devices, ``0,1``.

    Raises:
        ArenaError: not such a list, one named twice, or one that is not there.
    """
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArenaError(f"--devices '{text}': expected numbers of CUDA devices, such as 0,1") from None
    if len(set(numbers)) < len(numbers):
        raise ArenaError(f"--devices '{text}': one device twice")
    if any(not 0 <= n < available for n in numbers):
        raise ArenaError(f"--devices '{text}': this machine has {available} CUDA devices")
    return numbers


def shared(parts: Sequence[str], available: int) -> tuple[str, ...]:
    """Read the ``--devices`` of a match, split at its commas: numbers of CUDA devices, or ``cpu`` as often as wanted.

    Raises:
        ArenaError: as ``parse``.
    """
    if parts and set(parts) == {"cpu"}:
        return tuple(parts)
    return tuple(f"cuda:{n}" for n in parse(",".join(parts), available))


def launch(arguments: Iterable[str], size: int, visible: str | None = None) -> int:
    """Run ``arena ARGUMENTS`` in ``size`` processes that know of each other; returns the first failure's exit code.

    As soon as one fails the others are stopped: they would wait for it for ever. ``visible`` is what
    CUDA_VISIBLE_DEVICES should be.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if visible is not None:
        shared["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-m", "arena", *arguments]
    before = signal.signal(signal.SIGTERM, _stop)  # else the others outlive this process and hold the model's lock
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            running.append(subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        while True:
            codes = [process.poll() for process in running]
            failed = [code for code in codes if code]
            if failed:
                return 3 if failed[0] < 0 else failed[0]  # killed: the same command goes on
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.1)
    except KeyboardInterrupt:
        for process in running:  # Ctrl-C reached them too: let them say so and leave
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
        raise
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
