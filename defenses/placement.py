"""Where the papers put their modules in each backbone, and how a user names another place."""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo, slot_shapes
from arena.errors import ArenaError, unknown
from arena.specs import Value, text


def late(backbone: nn.Module, dataset: DatasetInfo, owner: str, slots: Value = "auto") -> list[str]:
    """Return the slots of a mask in each late layer, in forward order (papers.md 2.2; FGAA, CAS and their kin).

    ``auto``: the last two slots, which in ResNet-18 end the two layer4 blocks; in VGG16 the three of block5; in a wide
    residual network the branch of block3's last block, whose shortcut stays unmasked, and ``out`` before the pool.
    Else slot names joined by ``-``.

    Raises:
        ArenaError: a slot that the backbone lacks, one named twice, or a backbone with fewer than two slots.
    """
    reached = _reached(backbone, dataset, owner)
    wanted = text(slots)
    if wanted == "auto":
        if _wide(dataset):
            return [[s for s in reached if s.endswith(".branch")][-1], "out"]
        return reached[-3:] if dataset.backbone == "vgg16" else reached[-2:]
    names = [_named(name, reached, dataset) for name in wanted.split("-")]
    if len(set(names)) < len(names):
        raise ArenaError(f"{owner}: option 'slots': expected different slots, got '{wanted}'")
    return [s for s in reached if s in names]


def single(backbone: nn.Module, dataset: DatasetInfo, owner: str, slot: Value = "auto") -> str:
    """Return the slot of EWAS's one mask (papers.md 3.1).

    ``auto``: before the last block, ResNet-18's layer4.0.out (layer 15); in a wide residual network before the last
    three blocks of block3 (layer 25 of 32-10, layer 19 of 28-10). Else a slot's name, or EWAS's number of a layer.

    Raises:
        ArenaError: a slot or layer that the backbone lacks, or a backbone with fewer than two slots.
    """
    reached = _reached(backbone, dataset, owner)
    wanted = text(slot)
    if wanted == "auto":
        if _wide(dataset):
            blocks = [s for s in reached if s.startswith("block3.") and s.endswith(".out")]
            return blocks[max(0, len(blocks) - 4)]
        return reached[-2]
    if wanted.isdigit():
        numbers = layers(dataset, reached)
        if int(wanted) not in numbers:
            known = ", ".join(map(str, numbers)) or "none"
            raise ArenaError(
                f"{owner}: backbone '{dataset.backbone}' has no block that ends at layer {wanted}; it has: {known}"
            )
        return numbers[int(wanted)]
    return _named(wanted, reached, dataset)


def deep(backbone: nn.Module, dataset: DatasetInfo, owner: str, slot: Value = "auto") -> str:
    """Return the slot of FSR's one module (papers.md 4.1).

    ``auto``: the last slot, in ResNet-18 the end of layer4, in a wide residual network ``out`` behind block3 and its
    batch norm and ReLU; in VGG16 the end of block4, before its pool. Else a slot's name.

    Raises:
        ArenaError: a slot that the backbone lacks, or a backbone without slots.
    """
    reached = _reached(backbone, dataset, owner, least=1)
    wanted = text(slot)
    if wanted != "auto":
        return _named(wanted, reached, dataset)
    return [s for s in reached if s.startswith("block4.")][-1] if dataset.backbone == "vgg16" else reached[-1]


def ends(backbone: nn.Module, dataset: DatasetInfo, owner: str) -> list[str]:
    """Return the slots behind the last block of each stage (papers.md 7, FD), in forward order.

    Residual networks and VGG16 have stages ``NAME.BLOCK.out``; a stem is none, nor is a slot inside a branch. Elsewhere
    a stage is a run of slots with maps of equal shape.

    Raises:
        ArenaError: a backbone without slots.
    """
    reached = _reached(backbone, dataset, owner, least=1)
    if blocks := _blocks(reached):
        return list({s.split(".")[0]: s for s in blocks}.values())
    shapes = slot_shapes(backbone, dataset.shape, tuple(reached))
    return [a for a, b in zip(reached, [*reached[1:], None], strict=True) if b is None or shapes[b] != shapes[a]]


def first(backbone: nn.Module, dataset: DatasetInfo, owner: str, n: int) -> list[str]:
    """Return the first ``n`` slots outside branches, or as many as there are.

    Raises:
        ArenaError: a backbone without slots.
    """
    return [s for s in _reached(backbone, dataset, owner, least=1) if not s.endswith(".branch")][:n]


def last(backbone: nn.Module, dataset: DatasetInfo, owner: str, n: int) -> list[str]:
    """Return the last ``n`` slots.

    Raises:
        ArenaError: a backbone with fewer.
    """
    return _reached(backbone, dataset, owner, least=n)[-n:]


def layers(dataset: DatasetInfo, reached: list[str]) -> dict[int, str]:
    """Return the slot at the end of each residual block by EWAS's number of the layer: the stem is layer 1, each
    block adds two. Empty for backbones that EWAS does not number."""
    if not (_wide(dataset) or dataset.backbone in ("resnet18", "resnet34", "resnet_small")):
        return {}
    return {3 + 2 * i: s for i, s in enumerate(_blocks(reached))}


def _blocks(reached: list[str]) -> list[str]:
    return [s for s in reached if s.count(".") == 2 and s.endswith(".out")]


def _wide(dataset: DatasetInfo) -> bool:
    return dataset.backbone.startswith("wrn")


def _reached(backbone: nn.Module, dataset: DatasetInfo, owner: str, least: int = 2) -> list[str]:
    reached = list(slot_shapes(backbone, dataset.shape, dataset.slots))
    if len(reached) < least:
        raise ArenaError(f"{owner}: backbone '{dataset.backbone}' has {len(reached)} slots, expected at least {least}")
    return reached


def _named(name: str, reached: list[str], dataset: DatasetInfo) -> str:
    if name not in reached:
        raise unknown(f"slot of backbone '{dataset.backbone}'", name, reached)
    return name
