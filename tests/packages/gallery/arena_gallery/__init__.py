"""Defenses broken by construction, all over the undefended ``rt``: none adds any robustness. Imports no torch.

Each breaks the attacks by another mechanism. They declare nothing, as an author who does not know better would, except
where the summary says ``declared``. The undefended twin of each is its ``twin``.
"""

from __future__ import annotations

from collections.abc import Iterable

from arena.hookspecs import hookimpl
from arena.specs import DefenseSpec, Preset

#: Class in ``arena_gallery.broken``, what is broken.
MEMBERS = {
    "quantised": ("Quantised", "the input is rounded to five levels: the gradient is zero everywhere"),
    "jpeg": ("Jpeg", "the input's cosine transform is rounded: the gradient is zero everywhere"),
    "zeroed": ("Zeroed", "the backward pass returns zeros"),
    "reversed": ("Reversed", "the backward pass returns minus the gradient: attacks walk away from mistakes"),
    "huge_logits": ("Huge", "logits x 1e6: the cross-entropy underflows"),
    "tiny_logits": ("Tiny", "logits x 1e-6: the cross-entropy is flat"),
    "saturating": ("Saturating", "the output is a saturated softmax, scaled and shifted: its gradient underflows"),
    "one_hot": ("OneHot", "the output is one-hot: there is no gradient"),
    "kwta": ("WinnersTakeAll", "only the largest activations pass: the model jumps everywhere"),
    "noise": ("Noise", "declared: normal noise on the input, so that single passes mislead"),
    "resize": ("Resize", "declared: the image is shifted and scaled at random"),
    "undeclared_noise": ("Noise", "normal noise on the input that is not declared"),
    "hashed_noise": ("HashedNoise", "noise that is a hash of the image: deterministic, and shattered everywhere"),
    "hard_mask": ("HardMask", "a mask chosen by an undeclared head, its decoder trained with true labels"),
    "detector": ("Detector", "images off the clean grid of grey levels go to a second, blunt model"),
    "branch": ("Branch", "unsure answers are replaced by those for a thresholded image"),
    "batch_statistics": ("BatchStatistics", "the input is normalised by the batch it comes in"),
    "memory": ("Memory", "images near an earlier one get the earlier answer"),
    "pruning": ("Pruning", "declared: activations are dropped at random at test time"),
    "inner_loop": ("InnerLoop", "the image is first moved to where the model is surest, by gradient steps"),
}
#: Members that say so on their surface.
RANDOM = ("noise", "resize", "pruning")


@hookimpl
def arena_register_defenses() -> Iterable[DefenseSpec]:
    """Offer the gallery."""
    for name, (cls, summary) in MEMBERS.items():
        trained = name == "hard_mask"
        yield DefenseSpec(
            f"broken_{name}",
            summary,
            build=f"arena_gallery.broken:build_{cls.lower()}",
            recipe="arena_gallery.broken:masked" if trained else "arena_gallery.broken:post_hoc",
            surface="arena_gallery.broken:random" if name in RANDOM else None,
            module=name,
            twin="rt",
            presets={"*": Preset(20, batch=64, lr=0.1, weight_decay=5e-4) if trained else Preset(0)},
        )
