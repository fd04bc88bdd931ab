"""docs/attacks.md names every attack of arena, with the passes it really takes."""

import re
from pathlib import Path

from arena.attack import Setup
from arena.plugins import registry
from arena.rng import Stream
from arena.specs import complete, load
from arena.surface import Gate, Head, Knob, Selection, Surface
from arena.threat import Threat

PAGE = (Path(__file__).parent.parent.parent / "docs" / "attacks.md").read_text()
FULL = Surface(
    {"head": Head("h")}, {"gate": Gate("g")}, {"m": Selection("m", scores="head")}, {"t": Knob("", "t", values=(1.0,))}
)


def test_each_attack_is_documented_with_its_passes():
    found = {name: (int(f), int(b)) for name, f, b in re.findall(r"^\| `(\w+)` \|.*\| (\d+) / (\d+) \|", PAGE, re.M)}
    found |= {name: (int(f), int(b)) for name, f, b in re.findall(r"^`(\w+)` \((\d+) / (\d+)\)", PAGE, re.M)}
    expected = {}
    for known in registry().all("attack"):
        if known.distribution == "adversarial-arena" and known.spec.iterate:
            stream = Stream.of(0, known.spec.name)
            setup = Setup(Threat.parse("Linf", "0.1"), 10, FULL, (1, 8, 8), stream, lend=lambda name: None)
            attack = load(known.spec.iterate)(setup, **complete("", known.spec.options, {}))
            expected[known.spec.name] = attack.passes()
    assert found == expected
