"""Built-in defenses and backbones. Registration only: nothing here, nor in the ``catalog_*`` modules, imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.hookspecs import hookimpl
from arena.specs import BackboneSpec, DefenseSpec

from . import catalog_backbones, catalog_conditional, catalog_masks, catalog_plain


@hookimpl
def arena_register_backbones() -> Iterable[BackboneSpec]:
    """Offer the built-in backbones."""
    return catalog_backbones.backbones()


@hookimpl
def arena_register_defenses() -> Iterable[DefenseSpec]:
    """Offer the built-in defenses."""
    for catalog in (catalog_plain, catalog_masks, catalog_conditional):
        yield from catalog.defenses()
