"""Measures what the papers' numbers raised as suspicions, on digits, and writes docs/findings.md with its figures.

    python benchmarks/findings.py -n 200 --train-seeds 0,1,2 --out docs/findings.md
    python benchmarks/findings.py -n 64 --train-seeds 0 --only batch-gate     # one finding, printed

Models that are missing are trained first. What was measured is kept under ``findings/`` in the arena's home, a file a
measurement and train seed, and not measured again; a run that was killed goes on. The parts are in ``findings/`` beside
this file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from findings import alignment, gate, knobs, masks, oddities, page
from findings.bench import Bench
from findings.judging import Finding

from arena.errors import ArenaError
from arena.plugins import registry
from arena.threads import one_thread
from arena.watch import Silent

FINDINGS: tuple[Finding, ...] = (
    *masks.FINDINGS,
    *oddities.FINDINGS,
    *knobs.FINDINGS,
    *gate.FINDINGS,
    *alignment.FINDINGS,
)


class Spoken(Silent):
    """Says on stderr what is being trained."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write."""
    names = [f.name for f in FINDINGS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200, help="test points")
    parser.add_argument("--train-seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--only", choices=names, help="measure this finding alone and print it")
    parser.add_argument("--out", type=Path, help="where the page goes; figures go to figures/ beside it")
    parser.add_argument("--again", action="store_true", help="measure again what is known")
    parser.add_argument("--known", action="store_true", help="train and measure nothing, write what is known")
    given = parser.parse_args()
    if given.only and given.out:
        parser.error("--only prints one finding; --out writes them all")
    if not given.only and not given.out:
        parser.error("expected --out, or --only with the name of a finding")
    chosen = [f for f in FINDINGS if given.only in (None, f.name)]
    seeds = [int(s) for s in given.train_seeds.split(",")]
    try:
        with one_thread(True):
            measure(chosen, seeds, given)
    except ArenaError as error:
        raise SystemExit(str(error)) from None


def measure(chosen: list[Finding], seeds: list[int], given: argparse.Namespace) -> None:
    """Measure the findings ``chosen`` and write or print them."""
    found, answers, done = registry(), {}, {}
    for seed in seeds:
        bench = Bench(found, Spoken(), given.n, seed)
        for finding in chosen:
            if bench.missing(finding) or (given.known and not bench.known(finding).exists()):
                continue
            shared = (finding.measured or finding.name, seed)
            clock = time.monotonic()
            if shared not in done:
                done[shared] = bench.answer(finding, given.again)
                print(f"{shared[0]}, train seed {seed}: {time.monotonic() - clock:.0f} s", file=sys.stderr, flush=True)
            answers.setdefault(finding.name, {})[seed] = done[shared]
    command = f"python benchmarks/findings.py -n {given.n} --train-seeds {given.train_seeds} --out {given.out}"
    settings = {"command": command, "n": given.n, "seeds": given.train_seeds, "eps": bench.threat.eps}
    if given.out:
        verdicts = page.write(given.out, chosen, answers, settings)
        print("\n".join(f"{name}: {word}" for name, word in verdicts.items()))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "finding.md"
        page.write(out, chosen, answers, settings)
        print(out.read_text().partition("## 1. ")[2].partition("## Settings")[0].strip())


if __name__ == "__main__":
    main()
