"""What the search costs beside its bare passes: PGD-20 and AutoAttack on small nets, cheaper passes on and off.

    python benchmarks/speed.py                           digits, a minute or two; trains 'sat' where it is not yet there
    python benchmarks/speed.py --nets cifar --share 0.1 --pairs 3 -o speed.md
    python benchmarks/speed.py --nets cifar --device cuda

Four ways to search take turns on the same points: the eager model at 256 rows a pass; the eager model at the batch size
that is measured best; the copy that arena searches on, its batch norms folded and, on wide pictures, its channels last;
the same in bf16. ``forwards`` and ``backwards`` are rows and exact. ``seconds`` are of one run, the median of the
pairs; ``bare`` is what as many passes cost with nothing around them at the same batch size, the median of passes made
right before each run. On a CPU both are CPU seconds of the process on one thread, which other work on the machine
disturbs little; on a GPU they are wall seconds with the device waited for. ``broken`` is the referee's word.

The digits nets are ``sat``, trained; the CIFAR-sized net is a ResNet-18 of width 16 with random weights, attacked at an
eps at which its points stand: what a pass costs does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import arena
from arena.attack import Setup
from arena.auditing.observing import Observed
from arena.cheaper import make_cheaper
from arena.datasets import describe, open_images, to_float
from arena.engine import run_iterated
from arena.errors import ArenaError
from arena.home import atomic_write
from arena.lineup import Planned, line_up
from arena.models import plan
from arena.pace import bare_pass, measure
from arena.plugins import registry
from arena.referee import Referee
from arena.rng import Stream
from arena.specs import load
from arena.surface import Surface
from arena.target import DEFAULT_BATCH, Target
from arena.threat import Threat
from arena.watch import Silent

#: Ways to search: (name, search copy or eager, precision, batch size or None for the best).
WAYS = (
    ("eager, batch 256", False, "fp32", DEFAULT_BATCH),
    ("eager", False, "fp32", None),
    ("cheaper", True, "fp32", None),
    ("cheaper, bf16", True, "bf16", None),
)
#: Options that count steps; ``--share`` scales them.
STEPS = ("steps", "queries")


@dataclass(frozen=True)
class Case:
    """A net and the points that it classifies right."""

    name: str
    build: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    index: Tensor
    threat: Threat
    classes: int


def digits(backbone: str, n: int, device: str) -> Case:
    """Return ``sat`` on digits with a backbone."""
    found = registry()
    images, spec = open_images("digits", found), describe("digits", found)
    threat = Threat.parse(spec.norm, spec.eps)
    planned = plan(
        "sat",
        dataset="digits",
        images=images,
        backbone=backbone,
        train_seed=0,
        threat=threat,
        checkpoint=None,
        surface=None,
        registry=found,
    )
    contender = planned.obtain(train=True, retrain=False, device=device, watch=Silent())
    index = images.subset(min(n, len(images.y_test)))
    x, y = to_float(images.x_test[index]).to(device), images.y_test[index].to(device)
    return _right(f"digits {backbone}", lambda: contender.build().to(device), x, y, index.to(device), threat)


def cifar(n: int, device: str, eps: str) -> Case:
    """Return a CIFAR-sized net with random weights, on random pictures that it names itself."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        spec = registry().get("backbone", "resnet18").spec
        model: nn.Module = load(spec.build)((3, 32, 32), 10, width=16)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator, union-attr]
                m.running_var.uniform_(0.5, 2.0)  # type: ignore[operator, union-attr]
        return model.eval().requires_grad_(False).to(device)

    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        y = build()(x).argmax(1)
    index = torch.arange(n, device=device)
    return _right("3x32x32 resnet18 of width 16", build, x, y, index, Threat.parse("Linf", eps))


def _right(name: str, build: Callable[[], nn.Module], x: Tensor, y: Tensor, index: Tensor, threat: Threat) -> Case:
    with torch.no_grad():
        right = build()(x).argmax(1) == y
    return Case(name, build, x[right], y[right], index[right], threat, 10)


@dataclass
class Run:
    """One entry played one way, once."""

    seconds: float
    bare: float
    forwards: int
    backwards: int
    broken: int
    batch_size: int


def clock(device: str) -> float:
    """Return CPU seconds of the process; where a GPU works, wall seconds with the GPU waited for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def searcher(case: Case, way: tuple[str, bool, str, int | None], device: str) -> Target:
    """Make the target of one way to search."""
    _, cheaper, precision, size = way
    model, made = (make_cheaper(case.build, Surface(), case.x, precision)) if cheaper else (case.build(), None)
    target = Target(model, Surface(), case.classes, device=device, precision=made.precision if made else "fp32")
    measure(target, case.x, size)
    return target


def play(case: Case, attacks: Sequence[Planned], target: Target, referee: Referee, device: str) -> Run:
    """Play attacks in a cascade and time them and as many bare passes."""
    forward, both = bare(target, case.x, device)
    standing = torch.ones(len(case.y), dtype=torch.bool, device=device)
    target.meter.forwards = target.meter.backwards = 0
    seconds = 0.0
    shape = (int(case.x.shape[1]), int(case.x.shape[2]), int(case.x.shape[3]))
    for planned in attacks:
        spec = planned.spec.spec
        assert spec.iterate is not None
        setup = Setup(case.threat, case.classes, Surface(), shape, Stream.of(0, planned.name))
        attack = load(spec.iterate)(setup, **planned.options)
        attack = Observed(attack, case.threat, 8 if spec.kind == "minimal" else 1)  # as a match does
        x, y, index = case.x[standing], case.y[standing], case.index[standing]
        began = clock(device)
        outcome = run_iterated(attack, target, x, y, index)
        seconds += clock(device) - began
        if outcome.error:
            raise ArenaError(f"{planned.name}: {outcome.error}")
        standing[standing.clone()] = ~referee.judge(x, outcome.x_adv, y, index).broken
    forwards, backwards = target.meter.forwards, target.meter.backwards
    cost = (forwards - backwards) * forward + backwards * both
    return Run(seconds, cost, forwards, backwards, int((~standing).sum()), target.batch_size)


def bare(target: Target, x: Tensor, device: str, passes: int = 7) -> tuple[float, float]:
    """Return the median seconds a row of a forward, and of a forward and its backward."""
    rows = x[torch.arange(min(target.batch_size, -(-len(x) // 8) * 8), device=x.device) % len(x)]
    found = []
    for grad in (False, True):
        times = []
        for _ in range(1 + passes):
            began = clock(device)
            bare_pass(target, rows, grad)
            times.append((clock(device) - began) / len(rows))
        found.append(statistics.median(times[1:]))
    return found[0], found[1]


def lined_up(entry: str, case: Case, share: float) -> list[Planned]:
    """Return the attacks of an entry; of a roster's, the steps are scaled."""
    (group,) = line_up((entry,), registry(), Surface(), case.threat, case.classes)
    if group.roster is None:
        return list(group.attacks)
    made = []
    for planned in group.attacks:
        steps = {k: max(1, round(int(v) * share)) for k, v in planned.options.items() if k in STEPS}  # type: ignore[call-overload]
        made.append(Planned(planned.name, planned.spec, {**planned.options, **steps}))
    return made


def table(case: Case, entry: str, share: float, pairs: int, device: str, say: Callable[[str], None]) -> list[str]:
    """Play an entry all ways, taking turns, and return the rows of a Markdown table."""
    referee = Referee(case.build(), case.threat, device=device)
    attacks = lined_up(entry, case, share)
    targets = {way[0]: searcher(case, way, device) for way in WAYS}
    runs: dict[str, list[Run]] = {name: [] for name in targets}
    for turn in range(pairs):
        names = list(targets) if turn % 2 == 0 else list(targets)[::-1]
        for name in names:
            runs[name].append(play(case, attacks, targets[name], referee, device))
            say(f"{case.name}, {entry}, {name}: {runs[name][-1]}")
    base = WAYS[0][0]
    lines = []
    for name, found in runs.items():
        first = found[0]
        faster = statistics.median(b.seconds / f.seconds for b, f in zip(runs[base], found, strict=True))
        cells = [
            case.name,
            entry if share == 1 or len(attacks) == 1 else f"{entry}, {share:g} of the steps",
            name,
            str(first.batch_size),
            str(first.forwards),
            str(first.backwards),
            f"{statistics.median(f.seconds for f in found):.2f}",
            f"{statistics.median(f.bare for f in found):.2f}",
            f"{statistics.median(f.seconds / f.bare for f in found):.2f}",
            f"{faster:.2f}",
            f"{first.broken} of {len(case.y)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def settings(pairs: int, device: str) -> list[str]:
    """Say on what the figures were measured."""
    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{processor()}, {torch.get_num_threads()} thread, CPU seconds"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    return [
        f"{machine}; medians of {pairs} runs that take turns.",
        f"arena {arena.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {today}.",
    ]


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="cnn,resnet_small", help="of cnn, resnet_small and cifar, joined by commas")
    parser.add_argument("--entries", default="pgd,autoattack", help="attacks and rosters, joined by commas")
    parser.add_argument("--share", type=float, default=1.0, help="share of the steps that a roster's attacks make")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each way")
    parser.add_argument("-n", type=int, default=500, help="points")
    parser.add_argument("--eps", default="4/255", help="radius for the net of random weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("-o", metavar="FILE", type=Path, help="write the table there, else print it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    lines = [
        "| net | entry | search | batch | forwards | backwards | seconds | bare | over bare | times faster | broken |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    try:
        for net in given.nets.split(","):
            case = cifar(given.n, given.device, given.eps) if net == "cifar" else digits(net, given.n, given.device)
            for entry in given.entries.split(","):
                lines += table(case, entry, given.share, given.pairs, given.device, lambda s: print(s, file=sys.stderr))
    except ArenaError as e:
        print(e, file=sys.stderr)
        return 2
    head = [textwrap.fill(line, 120) for line in settings(given.pairs, given.device)]
    report = "\n".join([*head, "", *lines, ""])
    if given.o:
        atomic_write(given.o, report.encode())
    else:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
