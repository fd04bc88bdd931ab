"""A worker of a match: a search copy of its own, on a device of its own, that attacks the points it is given.

It writes nothing: finished points and snapshots go to the match's own process, which keeps the journal. So a worker may
be lost at any moment.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from arena.attack import State, Unsupported
from arena.check import PROBE
from arena.engine import Outcome, Row
from arena.errors import ArenaError
from arena.journal import packed, unpacked
from arena.question import Running
from arena.results import device_name
from arena.search import Search
from arena.tf32 import without_tf32
from arena.workers.messages import Done, Job, Kept, Order, Ready, Refused, Stop, Told, arrays, tensors, versions

Say = Callable[[Any], None]


class Relay:
    """A keeper (``arena.engine.Keeper``) whose rows lie with the match's own process."""

    def __init__(self, job: Job, every: float, say: Say) -> None:
        self.job, self.every, self.say = job, every, say
        self.pending: dict[int, Row] = {}
        self._last = time.monotonic()

    def restore(self) -> tuple[dict[int, Row], State | None, bool]:
        """Return what came with the job."""
        return unpacked(self.job.rows), tensors(self.job.state), self.job.moved

    def finished(self, rows: dict[int, Row], moved: bool) -> None:
        """Hold finished rows until the next snapshot."""
        self.pending.update(rows)

    def due(self) -> bool:
        """Tell whether it is time for a snapshot."""
        return time.monotonic() - self._last >= self.every

    def snapshot(self, state: State | None, moved: bool) -> None:
        """Send finished rows and the state of active ones, in one message: it arrives whole or not at all."""
        self.say(Kept(self.job.number, packed(self.pending), arrays(state), moved))
        self.pending = {}
        self._last = time.monotonic()


class Worker:
    """Attacks the points of one job after the other."""

    def __init__(self, order: Order, device: str, say: Say) -> None:
        """Make a search copy, and find the batch size that is best on this device."""
        self.order, self.device, self.say = order, device, say
        self.stopped = 0
        """Number of the last job that is to be left; set from another thread."""
        x = torch.from_numpy(order.probe)
        if len(x) >= PROBE:  # else the match has no more points than these
            x = x[torch.arange(max(order.most, PROBE)) % PROBE]
        running = Running(device=device, batch_size=order.batch_size, precision=order.precision, compile=order.compile)
        met = torch.ones(len(x), dtype=torch.bool)
        ground = order.ground
        self.search = Search(self._build, ground.surface, ground.n_classes, x.to(device), met, running, order.passes)

    def _build(self) -> nn.Module:
        return self.order.contender.build().to(self.device)

    def play(self, job: Job) -> None:
        """Attack the points of a job; the last word on it is ``Done``."""
        relay = Relay(job, self.order.every, self.say)
        try:
            outcome = self._attack(job, relay)
            done = Done(job.number, {}, outcome.moved, outcome.malformed, error=outcome.error, trace=outcome.trace)
        except Unsupported as e:
            done = Done(job.number, {}, False, unsupported=str(e))
        except (Exception, SystemExit) as e:  # code of a plugin that cannot be loaded or made: named by the match
            done = Done(job.number, {}, False, error=f"{type(e).__name__}: {e}", trace=traceback.format_exc())
        changed = self.search.guard.changed()
        if changed:
            self.search.renew()
        self.say(replace(done, rows=packed(relay.pending), changed=changed))

    def _attack(self, job: Job, relay: Relay) -> Outcome:
        ground, target = self.order.ground, self.search.target
        x, y, index = (torch.from_numpy(a).to(self.device) for a in (job.x, job.y, job.index))

        def lend(name: str) -> None:
            if name not in target.sources:
                target.sources[name] = dict(job.lent)[name].build().to(self.device)

        def progress(forwards: int, finished: int) -> None:
            self.say(Told(job.number, forwards, finished))

        def until() -> bool:
            return self.stopped >= job.number

        with target.in_fp32() if job.fp32 else nullcontext():
            if job.planned.spec.spec.iterate:
                attack = ground.make(job.planned, lend)
                return ground.climb(attack, job.planned, target, x, y, index, relay, progress, until)
            return ground.call(ground.load(job.planned), job.planned, target, x, y, index, relay, progress, until)


class Desk:
    """Where a worker's messages arrive, from another thread, while it is at work."""

    def __init__(self, order: bytes, device: str, say: Callable[[bytes], None]) -> None:
        """Args: ``order``, pickled; ``device`` to work on; ``say`` sends a message."""
        self._order, self._device, self._send = order, device, say
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._worker: Worker | None = None

    def put(self, message: bytes) -> None:
        """Take a message in."""
        found = pickle.loads(message)
        if isinstance(found, Job):
            self._jobs.put(found)
        elif isinstance(found, Stop) and self._worker is not None:
            self._worker.stopped = found.number

    def _say(self, message: Any) -> None:
        self._send(pickle.dumps(message))

    @without_tf32()
    def serve(self) -> None:
        """Begin, and work for ever."""
        try:
            order: Order = pickle.loads(self._order)
            torch.set_num_threads(order.threads)
            worker = Worker(order, self._device, self._say)
        except ArenaError as e:
            return self._say(Refused(str(e)))
        except Exception as e:  # whatever a plugin, or what was sent of it, raises here: the match says it
            return self._say(Refused(f"{type(e).__name__}: {e}"))
        self._worker = worker
        search = worker.search
        ready = Ready(device_name(self._device), search.target.batch_size, search.pace, versions())
        self._say(replace(ready, compiled=search.cheaper.compiled, note=search.cheaper.note))
        while True:
            worker.play(self._jobs.get())
