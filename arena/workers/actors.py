"""Workers as actors of a Ray cluster: one for each GPU, or, where there is none, for each CPU.

Ray is an extra, ``pip install adversarial-arena[ray]``, and is imported only here.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

from arena.errors import ArenaError
from arena.workers.messages import Lost

#: Where Ray is not there.
MISSING = "--engine ray: Ray is not installed; pip install 'adversarial-arena[ray]'"

#: Seconds that a cluster has to answer.
KNOCK = 10.0


class Actors:
    """Actors, each with one outstanding call for its next messages (``arena.workers.staff.Staff``)."""

    engine = "ray"

    def __init__(self, address: str | None, workers: int | None, device: str) -> None:
        """Join a cluster, or start one here, and see what it has.

        Args:
            address: of the cluster, ``auto`` for the one of this machine; None starts one here.
            workers: how many actors; None: as many as have room.
            device: ``auto``, or ``cpu`` or ``cuda`` where actors must be on such a device.

        Raises:
            ArenaError: Ray is not installed, no cluster answers, or the actors could never all have room.
        """
        self._order: Any = None
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}
        """The outstanding call of each actor."""
        self._count = 0
        self._ray, self._own = _join(address)
        try:
            self._gpu, self.size = plan(self._ray.cluster_resources(), workers, device)
        except ArenaError:
            self.close()
            raise

    def begin(self, order: bytes) -> None:
        """Put what every worker is told first where all machines find it."""
        self._order = self._ray.put(order)

    def hire(self) -> int:
        """Ask for one more actor; it says that it is ready when it has found room."""
        actor = self._ray.remote(Actor).options(num_cpus=1, num_gpus=int(self._gpu), max_concurrency=2, max_restarts=0)
        self._count += 1
        made = actor.remote(sys.path, self._order, "cuda" if self._gpu else "cpu")
        self._actors[self._count] = made
        self._calls[made.take.remote()] = self._count
        return self._count

    def send(self, worker: int, message: bytes) -> None:
        """Send a message; one to a lost worker is dropped."""
        if worker in self._actors:
            self._actors[worker].put.remote(message)

    def receive(self, timeout: float) -> list[tuple[int, bytes | Lost]]:
        """Return what workers said."""
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout)
        said: list[tuple[int, bytes | Lost]] = []
        for call in ready:
            worker = self._calls.pop(call)
            try:
                said += [(worker, message) for message in self._ray.get(call)]
                self._calls[self._actors[worker].take.remote()] = worker
            except self._ray.exceptions.RayError as e:
                self._kill(self._actors.pop(worker))
                said.append((worker, Lost(_why(e))))
        return said

    def _kill(self, actor: Any) -> None:
        with suppress(Exception):  # it is gone already, or the cluster is
            self._ray.kill(actor)

    def processes(self) -> list[int]:
        """Return the process ids of the workers there are."""
        return list(self._ray.get([actor.process.remote() for actor in self._actors.values()]))

    def close(self) -> None:
        """End all workers, and the cluster if it was started here."""
        for actor in self._actors.values():
            self._kill(actor)
        self._actors, self._calls = {}, {}
        if self._own:
            self._own = False
            self._ray.shutdown()


class Actor:
    """A worker in a process of Ray's: works in one thread, talks in others."""

    def __init__(self, path: list[str], order: bytes, device: str) -> None:
        """Begin; ``path`` is the import path of the match's process, where plugins and models lie."""
        sys.path += [p for p in path if p not in sys.path]
        from arena.workers.worker import Desk

        self._said: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._desk = Desk(order, device, self._said.put)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._desk.serve()
        os._exit(1)  # what it could say is said; it is never at a loss for work otherwise

    def put(self, message: bytes) -> None:
        """Take a message in."""
        self._desk.put(message)

    def take(self) -> list[bytes]:
        """Wait for messages and hand over all there are."""
        found = [self._said.get()]
        with suppress(queue.Empty):
            while True:
                found.append(self._said.get_nowait())
        return found

    def process(self) -> int:
        """Return the process id."""
        return os.getpid()


def plan(resources: dict[str, float], workers: int | None, device: str) -> tuple[bool, int]:
    """Return whether workers get a GPU each, and how many there are to be, from what a cluster has.

    Ray would let a request that can never be met wait without a word.

    Raises:
        ArenaError: the cluster has not enough.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    has = f"the cluster has {gpus} GPUs and {cpus} CPUs"
    if device == "cuda" and not gpus:
        raise ArenaError(f"--engine ray --device {device}: {has}")
    use = bool(gpus) and device != "cpu"
    room = min(gpus, cpus) if use else cpus
    if (workers or 1) > room:
        each = "a GPU and a CPU" if use else "a CPU"
        raise ArenaError(f"--engine ray: {workers or 1} workers need {each} each, {has}")
    return use, workers or room


def _join(address: str | None) -> tuple[Any, bool]:
    """Join a cluster, or start one; return Ray, and whether this process is to leave it again."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns about it
    if address is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own default here; said, it needs no warning
    try:
        import ray
    except ImportError:
        raise ArenaError(MISSING) from None
    if ray.is_initialized():
        return ray, False
    where = f"--ray-address '{address}'" if address else "--engine ray"
    try:
        _knock(address)
        ray.init(address=address or "local", include_dashboard=False if address is None else None, **_QUIET)
    except (OSError, ValueError, RuntimeError, AssertionError) as e:
        line = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ArenaError(f"{where}: no Ray cluster answers ({line})") from None
    return ray, True


def _knock(address: str | None) -> None:
    """See whether anybody is at ``host:port``: Ray itself would knock for longer than ten minutes.

    Raises:
        OSError: nobody is.
    """
    host, _, port = (address or "").rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
