"""Discovery: which defenses, attacks, rosters, data sets and backbones are installed, and from where.

The loop is arena's own. Stock entry-point loading loses all plugins to one error, keeps generators unevaluated and
swallows misspelt hooks; here each entry point is loaded, and each implementation called, inside its own ``try``. One
bad plugin is named and left out; the tool goes on.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Generic, TypeVar

import pluggy

from arena import hookspecs
from arena.errors import ArenaError, unknown
from arena.specs import NAME, AttackSpec, BackboneSpec, DatasetSpec, DefenseSpec, Entry, Indicator, RosterSpec

GROUP = "arena"
BUILT_IN = "adversarial-arena"

Spec = TypeVar("Spec", AttackSpec, RosterSpec, DefenseSpec, DatasetSpec, BackboneSpec)

KINDS: dict[str, type] = {
    "defense": DefenseSpec,
    "attack": AttackSpec,
    "roster": RosterSpec,
    "dataset": DatasetSpec,
    "backbone": BackboneSpec,
}
_HOOK_KINDS = {
    "defenses": (DefenseSpec,),
    "attacks": (AttackSpec, RosterSpec),
    "datasets": (DatasetSpec,),
    "backbones": (BackboneSpec,),
}


@dataclass(frozen=True)
class Registered(Generic[Spec]):
    """A spec and where it comes from."""

    spec: Spec
    distribution: str
    version: str

    @property
    def name(self) -> str:
        """Name for records: bare for built-ins, ``distribution/name`` for others."""
        return self.spec.name if self.distribution == BUILT_IN else f"{self.distribution}/{self.spec.name}"

    @property
    def origin(self) -> str:
        """``distribution version``."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a plugin, for ``arena plugins doctor``."""

    distribution: str
    entry_point: str
    what: str
    """One sentence: what is wrong and, where known, the mend."""

    def __str__(self) -> str:
        return f"plugin {self.distribution} ({self.entry_point}): {self.what}"


@dataclass
class Plugin:
    """One entry point, loaded or not."""

    distribution: str
    version: str
    entry_point: str
    value: str
    module: Any = None
    imports_torch: bool = False
    hooks: list[str] = field(default_factory=list)
    registered: list[str] = field(default_factory=list)


@dataclass
class Registry:
    """All that is installed."""

    plugins: list[Plugin] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    _specs: dict[str, dict[str, list[Registered]]] = field(default_factory=lambda: {k: {} for k in KINDS})
    _manager: pluggy.PluginManager | None = None

    def all(self, kind: str) -> list[Registered]:
        """Return all of a kind (``defense, attack, roster, dataset, backbone``), built-ins first, then by name."""
        found = [r for entries in self._specs[kind].values() for r in entries]
        return sorted(found, key=lambda r: (r.distribution != BUILT_IN, r.name))

    def names(self, kind: str) -> list[str]:
        """Return every name by which something of ``kind`` can be asked for."""
        return sorted(set(self._specs[kind]) | {f"{r.distribution}/{r.spec.name}" for r in self.all(kind)})

    def has(self, kind: str, name: str) -> bool:
        """Tell whether ``get`` would find something."""
        return name in self.names(kind)

    def get(self, kind: str, name: str) -> Registered:
        """Find by bare name or ``distribution/name``.

        Raises:
            ArenaError: unknown (nearest name given) or ambiguous.
        """
        distribution, slash, bare = name.rpartition("/")
        found = self._specs[kind].get(bare if slash else name, [])
        if slash:
            found = [r for r in found if r.distribution == distribution]
        built_in = [r for r in found if r.distribution == BUILT_IN]
        if len(found) == 1 or built_in:
            return (built_in or found)[0]
        if found:
            ways = " or ".join(sorted(f"{r.distribution}/{bare or name}" for r in found))
            raise ArenaError(f"{kind} '{name}' is offered by several packages: say {ways}")
        error = unknown(kind, name, [n for n in self.names(kind) if "/" not in n or slash])
        if self.problems:
            raise ArenaError(f"{error} ({len(self.problems)} plugin problems: see 'arena plugins doctor')")
        raise error

    def calls(self, hook: str, **arguments: Any) -> Iterator[tuple[Plugin, Any]]:
        """Call every implementation of ``hook`` on its own; errors become problems and the loop goes on."""
        if self._manager is None:
            return
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            plugin = next(p for p in self.plugins if p.module is implementation.plugin)
            given = {k: arguments[k] for k in implementation.argnames if k in arguments}
            try:
                yield plugin, implementation.function(**given)
            except (Exception, SystemExit) as e:  # a plugin's code: named, never fatal
                self.problems.append(self._problem(plugin, f"{hook} raised {type(e).__name__}: {e}"))

    def adaptive(self, surface: Any, threat: Any, n_classes: int) -> list[Entry]:
        """Collect what plugins add to the roster ``adaptive``."""
        entries: list[Entry] = []
        for plugin, made in self.calls("arena_adaptive_attacks", surface=surface, threat=threat, n_classes=n_classes):
            entries += self._listed(plugin, "arena_adaptive_attacks", made)
        return entries

    def audit(self, context: Any) -> list[Indicator]:
        """Collect plugins' indicators."""
        found: list[Indicator] = []
        for plugin, made in self.calls("arena_audit", context=context):
            for one in self._listed(plugin, "arena_audit", made):
                if isinstance(one, Indicator):
                    found.append(one)
                else:
                    what = f"arena_audit returned a {type(one).__name__}, expected Indicators"
                    self.problems.append(self._problem(plugin, what))
        return found

    def announce(self, hook: str, **arguments: Any) -> None:
        """Fire a life-cycle hook."""
        for _ in self.calls(hook, **arguments):
            pass

    def _problem(self, plugin: Plugin, what: str) -> Problem:
        return Problem(f"{plugin.distribution} {plugin.version}", plugin.entry_point, " ".join(what.split()))

    def _listed(self, plugin: Plugin, hook: str, made: Any) -> list[Any]:
        if made is None or isinstance(made, str) or not isinstance(made, Iterable):
            got = "nothing (None)" if made is None else type(made).__name__
            self.problems.append(self._problem(plugin, f"{hook} returned {got}, expected an iterable"))
            return []
        try:
            return list(made)  # a generator runs here, inside this try
        except (Exception, SystemExit) as e:
            self.problems.append(self._problem(plugin, f"{hook} raised {type(e).__name__}: {e}"))
            return []

    def _register(self, plugin: Plugin, group: str, spec: Any) -> None:
        if not isinstance(spec, _HOOK_KINDS[group]):
            expected = " or ".join(t.__name__ for t in _HOOK_KINDS[group])
            what = f"arena_register_{group} returned a {type(spec).__name__}, expected {expected}"
            self.problems.append(self._problem(plugin, what))
            return
        kind = next(k for k, t in KINDS.items() if isinstance(spec, t))
        if not isinstance(spec.name, str) or not NAME.match(spec.name):
            self.problems.append(self._problem(plugin, f"{kind} name '{spec.name}': expected lower snake_case"))
            return
        if isinstance(spec, AttackSpec) and (spec.run is None) == (spec.iterate is None):
            self.problems.append(self._problem(plugin, f"attack '{spec.name}': give exactly one of run and iterate"))
            return
        here = self._specs[kind].setdefault(spec.name, [])
        if any(r.distribution == plugin.distribution for r in here):
            self.problems.append(self._problem(plugin, f"{kind} '{spec.name}' is registered twice; the first is kept"))
            return
        here.append(Registered(spec, plugin.distribution, plugin.version))
        plugin.registered.append(f"{kind} {spec.name}")

    def clashes(self) -> list[str]:
        """Describe names that several packages offer."""
        lines = []
        for kind, by_name in self._specs.items():
            for name, entries in sorted(by_name.items()):
                if len(entries) > 1:
                    owners = ", ".join(r.origin for r in entries)
                    built_in = any(r.distribution == BUILT_IN for r in entries)
                    result = "the built-in keeps the bare name" if built_in else "the bare name is refused"
                    lines.append(f"{kind} '{name}' comes from {owners}: {result}")
        return lines


#: Entry point of the built-in attacks, which a verification leaves out.
BUILT_IN_ATTACKS = "arena-builtin-attacks"


def discover(wanted: Callable[[str], bool] = lambda distribution: True, leave_out: Collection[str] = ()) -> Registry:
    """Load every installed plugin of distributions that ``wanted`` accepts and return the registry.

    Entry points named in ``leave_out`` are not loaded.

    ``ARENA_PLUGINS_OFF=1`` leaves third-party plugins out.
    """
    registry = Registry()
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    registry._manager = manager
    built_in_only = os.environ.get("ARENA_PLUGINS_OFF", "") not in ("", "0")
    points = [(dist, ep) for dist in metadata.distributions() for ep in dist.entry_points if ep.group == GROUP]
    points.sort(key=lambda p: (p[0].name != BUILT_IN, p[0].name, p[1].name))
    seen: dict[tuple[str, str], str] = {}
    for dist, ep in points:
        plugin = Plugin(dist.name, dist.version, ep.name, ep.value)
        if (dist.name, ep.name) in seen:
            continue  # the same distribution twice on the path
        if not wanted(dist.name) or ep.name in leave_out or (built_in_only and dist.name != BUILT_IN):
            continue
        seen[dist.name, ep.name] = ep.value
        if manager.has_plugin(ep.name):
            owner = next(p for p in registry.plugins if p.module is manager.get_plugin(ep.name))
            what = f"the entry point's name is taken by {owner.distribution}; name it after the distribution"
            registry.problems.append(registry._problem(plugin, what))
            continue
        registry.plugins.append(plugin)
        _load(registry, manager, plugin, ep)
    return registry


def _load(registry: Registry, manager: pluggy.PluginManager, plugin: Plugin, ep: metadata.EntryPoint) -> None:
    torch_before = "torch" in sys.modules
    try:
        plugin.module = ep.load()
    except BaseException as e:  # an import may even call sys.exit
        if isinstance(e, KeyboardInterrupt):
            raise
        registry.problems.append(registry._problem(plugin, f"import of {ep.value} raised {type(e).__name__}: {e}"))
        return
    plugin.imports_torch = not torch_before and "torch" in sys.modules
    names = [n for n in dir(plugin.module) if n.startswith("arena_")]
    known = [n for n in vars(hookspecs) if n.startswith("arena_")]
    try:
        manager.register(plugin.module, ep.name)
        manager.check_pending()
    except Exception as e:
        # mostly PluginValidationError; ValueError where two entry points name one module
        if manager.has_plugin(ep.name):
            manager.unregister(name=ep.name)
        bad = [n for n in names if n not in known and callable(getattr(plugin.module, n))]
        hint = f"; {unknown('hook', bad[0], known)}" if bad else ""
        why = (str(e).splitlines() or [type(e).__name__])[-1].strip()
        registry.problems.append(registry._problem(plugin, f"hook refused: {why}{hint}"))
        return
    plugin.hooks = sorted(h.name for h in manager.get_hookcallers(plugin.module) or [])
    for name in sorted(set(names) & set(known) - set(plugin.hooks)):
        registry.problems.append(registry._problem(plugin, f"{name} is never called: mark it with @hookimpl"))
    for group, hook in hookspecs.REGISTRATION.items():
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            if implementation.plugin is not plugin.module:
                continue
            try:
                made = implementation.function()
            except (Exception, SystemExit) as e:
                registry.problems.append(registry._problem(plugin, f"{hook} raised {type(e).__name__}: {e}"))
                continue
            for spec in registry._listed(plugin, hook, made):
                registry._register(plugin, group, spec)


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, made once."""
    return discover()
