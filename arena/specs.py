"""What a plugin author writes: frozen descriptions of defenses, attacks, rosters, data sets and backbones.

Specs name code as ``"package.module:attribute"``, so that registering imports no torch; ``load`` fetches the code when
it is needed. All specs may gain fields; none will be renamed or removed.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from arena.errors import ArenaError, PluginError, nearest

if TYPE_CHECKING:
    from arena.surface import Surface
    from arena.threat import Threat

#: An option's value: what may stand in brackets after a name.
Value = int | float | bool | str | Fraction
Options = Mapping[str, Value]

NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


def load(reference: str) -> Any:
    """Import ``package.module:attribute``.

    Raises:
        PluginError: malformed reference, or the module lacks the attribute. Errors inside the module pass through.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute:
        raise PluginError(f"'{reference}': expected package.module:attribute")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(f"'{reference}': {found.__name__} has no attribute '{part}'")
        found = getattr(found, part)
    return found


@dataclass(frozen=True)
class Option:
    """One option of a defense, backbone or attack."""

    default: Value
    """Value when the user gives none; its type is the option's type."""
    help: str
    """One line, with range and unit."""
    choices: tuple[str, ...] = ()
    """Allowed names, for options that take a bare name."""
    low: float = -math.inf
    """Smallest allowed number."""
    high: float = math.inf
    """Largest allowed number."""

    def check(self, owner: str, name: str, value: Value) -> Value:
        """Return ``value`` in the option's type.

        Raises:
            ArenaError: wrong type, out of range or not among the choices.
        """
        where = f"{owner}: option '{name}'"
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ArenaError(f"{where}: expected true or false, got '{text(value)}'")
            return value
        if isinstance(self.default, int | float | Fraction):
            if isinstance(value, bool | str):
                raise ArenaError(f"{where}: expected a number, got '{text(value)}'")
            if isinstance(self.default, int):
                if isinstance(value, Fraction) or value != value or math.isinf(value) or int(value) != value:
                    raise ArenaError(f"{where}: expected a whole number, got '{text(value)}'")
                value = int(value)
            if not self.low <= value <= self.high:
                raise ArenaError(f"{where}: expected {self.low:g} to {self.high:g}, got '{text(value)}'")
            return value if isinstance(value, int | Fraction) and isinstance(self.default, int) else _number(value)
        value = text(value)
        if self.choices and value not in self.choices:
            raise ArenaError(
                f"{where}: expected {' or '.join(self.choices)}, got '{value}'{nearest(value, self.choices)}"
            )
        return value


def _number(value: int | float | Fraction) -> int | float | Fraction:
    return value if isinstance(value, Fraction) and value.denominator != 1 else float(value)


def text(value: Value) -> str:
    """Write a value the way the command line reads it: ``true``, ``inf``, ``8/255``, ``0.1``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        value += 0.0  # -0.0 is 0
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def canonical(name: str, given: Options) -> str:
    """Write ``name(option=value,...)`` with options sorted; just ``name`` without options."""
    inner = ",".join(f"{k}={text(given[k])}" for k in sorted(given))
    return f"{name}({inner})" if inner else name


def complete(owner: str, declared: Mapping[str, Option], given: Options) -> dict[str, Value]:
    """Fill in defaults and check what was given.

    Raises:
        ArenaError: unknown option (nearest name given) or a bad value.
    """
    for name in given:
        if name not in declared:
            known = ", ".join(sorted(declared)) or "none"
            raise ArenaError(f"{owner}: unknown option '{name}'{nearest(name, declared) or f'; it takes: {known}'}")
    return {k: o.check(owner, k, given[k]) if k in given else o.default for k, o in declared.items()}


def chosen(declared: Mapping[str, Option], options: Options) -> dict[str, Value]:
    """Keep only the options that differ from their defaults: what the canonical name shows."""
    return {k: v for k, v in options.items() if k not in declared or v != declared[k].default}


@dataclass(frozen=True)
class AttackSpec:
    """An attack: ``iterate`` names an ask/tell class (see ``arena.attack``), ``run`` a plain function.

    A plain function is ``run(target, x, y, threat, budget, rng, **options) -> x_adv``, or ``-> (x_adv, claims)``.
    Exactly one of the two is given.
    """

    name: str
    summary: str
    """One line for ``arena list attacks``."""
    norms: tuple[str, ...]
    """Norms it works under, of ``Linf, L2, L1, L0``."""
    iterate: str | None = None
    """``package.module:factory``; ``factory(setup, **options)`` returns an ``arena.attack.IteratedAttack``."""
    run: str | None = None
    """``package.module:function`` of a plain attack."""
    paper: str = ""
    knowledge: str = "white-box"
    """``white-box | score-based | decision-based | transfer``."""
    kind: str = "budget"
    """``budget`` (stays in the ball) or ``minimal`` (looks for the nearest break, judged at eps)."""
    options: Mapping[str, Option] = field(default_factory=dict)
    standalone: bool = False
    """Never cascaded: always starts from all naturally correct points (rows of a sweep)."""
    sweep: str = ""
    """Name under which rows of this attack are also reported as one per-example minimum."""
    chunk: int = 128
    """Rows a plain attack gets at once; it matters to attacks whose rows share a loss."""
    gives_up: bool = False
    """An ask/tell attack that may give up a point that it has not broken, for want of hope, before its end."""
    version: str = ""
    """Changes whenever the attack finds something else with the same options: results stored before are then of another
    question."""


#: One line of a roster: an attack's name and its options.
Entry = tuple[str, Options]


@dataclass(frozen=True)
class RosterSpec:
    """A named, ordered list of attacks: ``expand(surface, threat, n_classes) -> list[(attack, options)]``."""

    name: str
    summary: str
    expand: str
    """``package.module:function``."""
    version: str = "1"
    """Changes whenever the list or a setting changes."""
    budget: int = 0
    """Most passes (forwards and backwards) it may cost an example unless the user says otherwise; 0: no limit. Attacks
    that do not fit are left out and named."""
    from_surface: bool = False
    """The list depends on the surface; entries of plugins' ``arena_adaptive_attacks`` hook are added to it."""
    from_evaluation: bool = False
    """The list is the defense's own ``DefenseSpec.evaluation``, before what ``expand`` returns."""


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: ``load() -> arena.datasets.Images``."""

    name: str
    summary: str
    load: str
    """``package.module:function``, no arguments."""
    norm: str = "Linf"
    eps: str = "8/255"
    """Default threat model."""
    backbone: str = "resnet18"
    """Default backbone."""
    cpu: bool = False
    """Small enough that ``arena match`` may train on it without being asked."""


@dataclass(frozen=True)
class BackboneSpec:
    """An undefended network with named insertion slots.

    ``build(shape=(C, H, W), n_classes=K, **options) -> nn.Module`` with an ``nn.Identity`` at each slot.
    """

    name: str
    summary: str
    build: str
    slots: tuple[str, ...]
    """Dotted module paths of the ``nn.Identity`` points, in forward order."""
    options: Mapping[str, Option] = field(default_factory=dict)
    paper: str = ""


@dataclass(frozen=True)
class Preset:
    """Training settings for one data set (and backbone); every field is part of the model's identity."""

    epochs: int
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[float, ...] = ()
    """Epochs at which the rate is multiplied by ``decay``; empty: one-cycle over all steps."""
    decay: float = 0.1
    steps: int = 10
    """Steps of the inner attack."""
    step_size: str = "1/4"
    """Step of the inner attack as a fraction of eps."""
    augment: str = "none"
    """``none | shift | crop_flip``."""


@dataclass(frozen=True)
class Exposed:
    """The names on a surface, for lists that must not build a model."""

    heads: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    selections: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()
    random: bool = False
    """The model draws random numbers at test time."""

    @classmethod
    def of(cls, surface: Surface) -> Exposed:
        """Return the names on a surface that a model's ``surface(model)`` made."""
        return cls(
            tuple(surface.heads),
            tuple(surface.gates),
            tuple(surface.selections),
            tuple(surface.knobs),
            surface.random,
        )


@dataclass(frozen=True)
class DefenseSpec:
    """A defense: feature module x recipe, named ``<module>_<recipe>``; a bare recipe is a defense too.

    ``build(backbone: nn.Module, dataset: DatasetInfo, **options) -> nn.Module`` whose ``forward`` in eval mode maps
    (N, C, H, W) in [0, 1] to logits (N, K), normalisation inside. ``surface(model) -> Surface``.
    ``recipe(**options) -> Sequence[arena.training.Stage]``; an empty sequence is a post-hoc defense.
    """

    name: str
    summary: str
    build: str
    recipe: str
    surface: str | None = None
    """None: nothing beyond the logits."""
    exposes: Exposed | None = None
    """What ``surface`` declares with default options on digits, for lists; None: not said."""
    paper: str = ""
    module: str = ""
    """Feature module's name; empty for a bare recipe."""
    twin: str = ""
    """The same recipe without the module (``sat`` for ``fgaa_sat``): shown beside the result."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What changes the trained weights."""
    eval_options: Mapping[str, Option] = field(default_factory=dict)
    """What changes only the use of them; set with ``apply(model, **eval_options)``."""
    apply: str | None = None
    """``package.module:function(model, **eval_options)``, run on the trained model; needed with eval options."""
    defaults: Mapping[str, Options] = field(default_factory=dict)
    """Option defaults that differ on a data set: ``{"svhn": {"lam": 0.05}}``."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """By data set (``digits``) or data set and backbone (``cifar10/wrn34_10``); ``*`` is the fallback."""
    training_version: int = 1
    """Raise it when a change of code changes the trained weights."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Published percentages by column, for display only."""
    published_on: str = ""
    """Data set and backbone of the published percentages, and whose paper prints them."""
    evaluation: tuple[str, ...] = ()
    """The attacks of the paper that prints them, ``"paper_pgd(steps=20)"``: the roster ``papers`` of this defense."""
    evaluation_flaws: tuple[str, ...] = ()
    """What is wrong with that evaluation, or other than there; a few words each."""

    @property
    def recipe_name(self) -> str:
        """The recipe by the grammar of names: ``sat`` of ``fgaa_sat``; of a bare recipe its own name."""
        return self.name.removeprefix(f"{self.module}_") if self.module else self.name

    @property
    def exposed(self) -> Exposed | None:
        """What the surface declares: nothing without a surface, None where the author does not say."""
        return Exposed() if self.surface is None else self.exposes


def on_dataset(spec: DefenseSpec, dataset: str) -> DefenseSpec:
    """Return the spec with the option defaults of a data set in place.

    Raises:
        PluginError: ``defaults`` name an option that the defense lacks.
        ArenaError: a default that its option does not allow.
    """
    own = spec.defaults.get(dataset, {})
    for name in own:
        if name not in spec.options:
            raise PluginError(f"defense '{spec.name}': defaults of '{dataset}': no option '{name}'")
    checked = {k: spec.options[k].check(f"defense '{spec.name}'", k, v) for k, v in own.items()}
    return replace(spec, options={k: replace(o, default=checked.get(k, o.default)) for k, o in spec.options.items()})


@dataclass(frozen=True)
class Indicator:
    """One sign that a number may not be believed; ``arena_audit`` hooks return these."""

    name: str
    flag: bool
    """True: this speaks against the number."""
    value: float | str | None = None
    threshold: float | str | None = None
    evidence: str = ""
    """What was seen, in one sentence."""
    remedy: str = ""
    """What to do or run next."""
    fatal: bool = False
    """With ``flag``: the number means nothing (verdict ``void``), not just doubt (``suspect``)."""

    def record(self) -> dict[str, Any]:
        """Return the JSON form."""
        keys = ("name", "flag", "value", "threshold", "evidence", "remedy")
        plain = {k: _plain(getattr(self, k)) for k in keys}
        # JSON has no NaN or infinity
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def _plain(value: Any) -> Any:
    """Turn a number of torch or numpy into Python's own; anything else that JSON does not know into text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return str(value)


def expand(roster: RosterSpec, surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Call a roster's ``expand`` and make the result a list."""
    return list(load(roster.expand)(surface, threat, n_classes))
