"""What workers cost: one match played by this process alone, by two processes, and by two actors of a Ray cluster.

    python benchmarks/devices.py                                  trains 'sat' where it is not yet there
    python benchmarks/devices.py --vs pgd -n 100 --runs 3 --engines alone,local
    python benchmarks/devices.py --dataset cifar10 --defense trades --devices 0,1

``ready`` is the time from starting the workers until the first of them has a search copy; most of it is the import of
torch. ``attacks`` is the sum of what the record says of them, ``match`` the whole match, workers included; all three
are wall seconds, medians over the runs. ``CPU`` is the CPU seconds of this process and, behind the plus, those of the
workers from their birth to their end, Ray's own processes not counted. The outcomes of all ways are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from arena.cli.options import settle
from arena.entries import split
from arena.match import play
from arena.plugins import registry
from arena.question import Question, Running
from arena.watch import Silent
from arena.workers import staff
from arena.workers.crew import Crew


@dataclass
class Seen:
    """What was measured of one match."""

    match: float = 0.0
    own: float = 0.0
    workers: float = 0.0
    ready: list[float] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def attacks(self) -> float:
        """Seconds of all attacks."""
        return sum(row["seconds"] for row in self.record["rosters"])


def cpu(number: int) -> float:
    """Return the CPU seconds of a process of this machine; 0 where nobody says."""
    try:
        words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def measure(question: Question, running: Running) -> Seen:
    """Play a match and look at the clocks."""
    seen, begin, engaged = Seen(), Crew.begin, staff._staff

    def begun(self: Crew, order: Any) -> None:
        at = time.perf_counter()
        begin(self, order)
        seen.ready.append(time.perf_counter() - at)

    def engage(how: Running) -> Any:
        made = engaged(how)
        if made is not None:
            close = made.close

            def closed() -> None:
                seen.workers = sum(map(cpu, made.processes()))
                close()

            made.close = closed
        return made

    Crew.begin, staff._staff = begun, engage  # type: ignore[method-assign]
    try:
        wall, own = time.perf_counter(), time.process_time()
        seen.record = play(question, running, registry(), Silent()).record
        seen.match, seen.own = time.perf_counter() - wall, time.process_time() - own
    finally:
        Crew.begin, staff._staff = begin, engaged  # type: ignore[method-assign]
    return seen


def outcome(record: dict[str, Any]) -> list[Any]:
    """Return what must not depend on the workers."""
    rows = [[row[k] for k in ("name", "attempted", "broken", "forwards", "backwards")] for row in record["attacks"]]
    return [record["worst_case"], record["examples"]["sha256"], rows]


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--defense", default="sat")
    made.add_argument("--dataset", default="digits")
    made.add_argument("--vs", default="autoattack")
    made.add_argument("-n", type=int, default=200)
    made.add_argument("--devices", default="cpu,cpu")
    made.add_argument("--engines", default="alone,local,ray")
    made.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    made.add_argument("--runs", type=int, default=1)
    given = made.parse_args(argv)
    parts = tuple(given.devices.split(","))
    usual = {"replay": True, "audit": "none", "precision": given.precision}
    first = "cpu" if parts[0] == "cpu" else "auto"
    ways = {
        "alone": Running(device=first, **usual),
        "local": Running(devices=parts, **usual),
        "ray": Running(device=first, engine="ray", workers=len(parts), **usual),
    }
    question = Question(given.defense, tuple(split(given.vs)), dataset=given.dataset, n=given.n)
    play(question, settle(Running(device=first, audit="none")), registry(), Silent())  # trains what is not there
    found = {name: [measure(question, settle(ways[name])) for _ in range(given.runs)] for name in split(given.engines)}
    print(f"{given.defense} on {given.dataset}, n {given.n}, {given.vs}, {given.precision}; {given.runs} runs,")
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n")
    print("| played by | ready, s | attacks, s | match, s | CPU, s | lost | outcomes |")
    print("|---|---|---|---|---|---|---|")
    usual_outcome = outcome(next(iter(found.values()))[0].record)
    equal = True
    for name, runs in found.items():
        same = all(outcome(run.record) == usual_outcome for run in runs)
        equal &= same
        ready, attacks, whole, own, theirs = (
            statistics.median(values)
            for values in zip(*((sum(r.ready), r.attacks, r.match, r.own, r.workers) for r in runs), strict=True)
        )
        lost = sum((run.record["provenance"]["crew"] or {"lost": 0})["lost"] for run in runs)
        who = "this process" if name == "alone" else f"{len(parts)} workers, {name}"
        print(
            f"| {who} | {ready:.1f} | {attacks:.1f} | {whole:.1f} | {own:.1f} + {theirs:.1f} | {lost} | "
            f"{'equal' if same else 'DIFFERENT'} |"
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
