"""Workers as processes of this machine, one a device."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from arena.workers.messages import Lost

#: Seconds that a process gets to end after it was told to.
GRACE = 5.0


@dataclass(frozen=True)
class _Hired:
    process: SpawnProcess
    pipe: Connection
    device: str


class Processes:
    """Spawned processes with pipes (``arena.workers.crew.Staff``)."""

    engine = "local"

    def __init__(self, devices: Sequence[str]) -> None:
        """Take one worker a device."""
        self.devices = tuple(devices)
        self.size = len(self.devices)
        self._order = b""
        self._hired: dict[int, _Hired] = {}
        self._count = 0

    def begin(self, order: bytes) -> None:
        """Take in what every worker is told first."""
        self._order = order

    def hire(self) -> int:
        """Start a worker on a device that has none."""
        free = list(self.devices)
        for hired in self._hired.values():
            free.remove(hired.device)
        context = get_context("spawn")  # a forked process cannot use CUDA, and inherits the others' pipes
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self._order, free[0]), name="arena-worker", daemon=True)
        # Ctrl-C reaches all of them, and from its first moment on a worker is not to hear it.
        with _deaf():
            process.start()
        theirs.close()  # so that reading ends when the process does
        self._count += 1
        self._hired[self._count] = _Hired(process, ours, free[0])
        return self._count

    def send(self, worker: int, message: bytes) -> None:
        """Send a message; one to a lost worker is dropped."""
        with suppress(OSError):
            self._hired[worker].pipe.send_bytes(message)

    def receive(self, timeout: float) -> list[tuple[int, bytes | Lost]]:
        """Return what workers said, at most one message each."""
        numbers = {hired.pipe: number for number, hired in self._hired.items()}
        said: list[tuple[int, bytes | Lost]] = []
        for pipe in wait(list(numbers), timeout):
            assert isinstance(pipe, Connection)
            number = numbers[pipe]
            try:
                said.append((number, pipe.recv_bytes()))
            except (EOFError, OSError):
                said.append((number, Lost(self._end(number))))
        return said

    def _end(self, number: int) -> str:
        """See a process off and say how it ended."""
        hired = self._hired.pop(number)
        hired.pipe.close()
        hired.process.join(GRACE)
        if hired.process.exitcode is None:
            hired.process.kill()
            hired.process.join()
        code = hired.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
        return f"on {hired.device}, {how}"

    def processes(self) -> list[int]:
        """Return the process ids of the workers there are."""
        return [hired.process.pid for hired in self._hired.values() if hired.process.pid is not None]

    def close(self) -> None:
        """End all workers, whatever they are at: what counts of it is here or will be done again."""
        for hired in self._hired.values():
            hired.process.terminate()
        for number in list(self._hired):
            self._end(number)


@contextmanager
def _deaf() -> Iterator[None]:
    """Hold Ctrl-C back for a moment; what is started meanwhile never hears it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # the first process starts it, and starting it lets Ctrl-C in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _lock_by_thread() -> None:
    """Give progress bars, which torch's compiler makes, a lock of this process alone.

    Their own is a semaphore of the system; a worker that is ended cannot give it back, and Python says so at the end.
    """
    with suppress(ImportError):  # without them there is no lock either
        import_module("tqdm").tqdm.set_lock(threading.RLock())


def work(pipe: Connection, order: bytes, device: str) -> None:
    """Be a worker, until the process at the other end of the pipe is gone or ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the match says what is to be done after Ctrl-C
    os.dup2(2, 1)  # stdout is for results
    from arena.workers.worker import Desk

    _lock_by_thread()
    desk = Desk(order, device, pipe.send_bytes)

    def read() -> None:
        try:
            while True:
                desk.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)  # the match is gone: nobody would take what is found

    threading.Thread(target=read, daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        desk.serve()
    sys.exit(1)
