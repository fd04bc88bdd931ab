"""Several workers attack the points of a match: who gets which, and what becomes of a lost one's work.

This process alone writes the journal. What a worker finished or snapshot is here before anybody relies on it, so the
points of a lost worker go on from there with another one.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

from arena.contender import Contender
from arena.engine import Outcome
from arena.errors import ArenaError
from arena.pace import Pace
from arena.workers.messages import Done, Kept, Lost, Order, Ready, Refused, Stop, Told, versions
from arena.workers.staff import Staff
from arena.workers.task import TRIES, Piece, Task

#: Seconds between two looks at the clock while nobody says anything.
TICK = 0.2
#: Seconds that workers have for a last snapshot after Ctrl-C.
LAST_WORD = 30.0


class Crew:
    """Workers, and what each of them has in hand."""

    def __init__(self, staff: Staff) -> None:
        self.staff = staff
        self.devices: dict[int, str] = {}
        """Devices, in words, of the workers that are ready."""
        self.batch = 0
        """Rows from which on a batch costs no less a row."""
        self.pace: Pace | None = None
        """What bare passes cost a worker."""
        self.lost = 0
        """Workers lost so far."""
        self._hands: dict[int, tuple[Task, Piece]] = {}
        """What each worker has in hand."""
        self._starting: set[int] = set()
        """Workers that are not ready yet."""
        self._compile = False
        self._jobs = self._stillborn = 0
        self._why = ""
        """What the last worker said that never began, or how it was lost."""

    def begin(self, order: Order) -> None:
        """Start all workers and wait until one of them is ready.

        Raises:
            ArenaError: what a worker needs cannot be sent, a worker says why it cannot begin, or none does.
        """
        try:
            message = pickle.dumps(order)
        except (pickle.PicklingError, AttributeError, TypeError) as e:
            raise ArenaError(f"'{order.contender.name}' cannot be sent to other processes: {e}") from None
        self._compile = order.compile
        self.staff.begin(message)
        for _ in range(self.staff.size):
            self._starting.add(self.staff.hire())
        while not self.devices:
            self._listen()
            self._check()

    def run(
        self,
        task: Task,
        *,
        fp32: bool,
        lent: tuple[tuple[str, Contender], ...],
        said: Callable[[int, int], None],
        until: Callable[[], bool],
    ) -> Outcome:
        """Play an attack on one shard.

        Args:
            task: the attack and its points.
            fp32: search in fp32, whatever the match's precision is.
            lent: models of other defenses that it asks for.
            said: told of (forwards, points finished) now and then.
            until: asked once something was done; True stops the work with what is known.

        Raises:
            Unsupported: the attack does not work here.
            ArenaError: no worker begins any more.
        """
        task.cut(self.staff.size, self.batch)
        worked = stopping = False
        try:
            while task.waiting or self._hands:
                self._check()
                self._give(task, fp32, lent)
                worked |= self._listen()
                said(*task.progress)
                if stopping:
                    task.waiting.clear()  # the piece of a worker that was lost since
                elif task.over or (worked and until()):
                    stopping = True
                    self._stop(task)
        except KeyboardInterrupt:
            self._stop(task)
            deadline = time.monotonic() + LAST_WORD
            while self._hands and time.monotonic() < deadline:
                self._listen()
            raise
        finally:
            task.snapshot()
        return task.outcome()

    def close(self) -> None:
        """End all workers."""
        self.staff.close()

    def record(self) -> dict[str, Any]:
        """Return what the provenance says of the workers."""
        return {"engine": self.staff.engine, "workers": sorted(self.devices.values()), "lost": self.lost}

    def _give(self, task: Task, fp32: bool, lent: tuple[tuple[str, Contender], ...]) -> None:
        for worker in self.devices:
            if worker not in self._hands and task.waiting:
                piece = task.waiting.popleft()
                self._jobs += 1
                self._hands[worker] = task, piece
                self.staff.send(worker, pickle.dumps(task.job(piece, self._jobs, fp32, lent)))

    def _stop(self, task: Task) -> None:
        task.waiting.clear()
        for worker, (_, piece) in self._hands.items():
            self.staff.send(worker, pickle.dumps(Stop(piece.number)))

    def _listen(self) -> bool:
        """Take in what workers say, for a moment; return whether any work was done."""
        worked = False
        for worker, message in self.staff.receive(TICK):
            heard = message if isinstance(message, Lost) else pickle.loads(message)
            if isinstance(heard, Ready):
                self._welcome(worker, heard)
            elif isinstance(heard, Refused):
                self._why = heard.text
                if not self.devices:
                    raise ArenaError(heard.text)
            elif isinstance(heard, Lost):
                self._replace(worker, heard.reason)
            elif isinstance(heard, Told | Kept | Done) and worker in self._hands:
                worked = True
                task, piece = self._hands[worker]
                task.take(piece, heard)
                if isinstance(heard, Done):
                    del self._hands[worker]
        return worked

    def _welcome(self, worker: int, ready: Ready) -> None:
        here = versions()
        for name, version in ready.versions.items():
            if version != here[name]:
                raise ArenaError(f"a worker runs {name} {version}, this process {here[name]}: outcomes may differ")
        if self._compile and not ready.compiled:
            raise ArenaError(f"a worker on {ready.device} cannot compile its passes as this process did: {ready.note}")
        self._starting.discard(worker)
        self.devices[worker] = ready.device
        self.batch, self.pace = ready.batch_size, ready.pace
        self._stillborn, self._why = 0, ""

    def _replace(self, worker: int, reason: str) -> None:
        self.lost += 1
        if worker in self._starting:
            self._starting.discard(worker)
            self._stillborn += 1
            self._why = self._why or reason
        self.devices.pop(worker, None)
        if worker in self._hands:
            task, piece = self._hands.pop(worker)
            task.lose(piece, reason)
        if self._stillborn < TRIES:
            self._starting.add(self.staff.hire())

    def _check(self) -> None:
        """See that there is anybody.

        Raises:
            ArenaError: no worker is left, and too many in a row were lost before they began.
        """
        if not self.devices and not self._starting:
            raise ArenaError(f"{self._stillborn} workers in a row were lost before they began: {self._why}")
