"""Built-in defenses and backbones. Registration only: nothing here, nor in the ``catalog_*`` modules, imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.hookspecs import hookimpl
from arena.specs import BackboneSpec, DefenseSpec

from . import (
    catalog_backbones,
    catalog_conditional,
    catalog_denoise,
    catalog_fsr,
    catalog_gradients,
    catalog_masks,
    catalog_pcl,
    catalog_plain,
    catalog_sap,
    catalog_training,
)

#: In the order of listing.
CATALOGS = (
    catalog_plain,
    catalog_training,
    catalog_masks,
    catalog_fsr,
    catalog_denoise,
    catalog_sap,
    catalog_gradients,
    catalog_pcl,
    catalog_conditional,
)


@hookimpl
def arena_register_backbones() -> Iterable[BackboneSpec]:
    """Offer the built-in backbones."""
    return catalog_backbones.backbones()


@hookimpl
def arena_register_defenses() -> Iterable[DefenseSpec]:
    """Offer the built-in defenses."""
    for catalog in CATALOGS:
        yield from catalog.defenses()
