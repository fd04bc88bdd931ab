"""Bare recipes, as specs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.specs import DefenseSpec, Option

from .evaluations import fgaa
from .presets import PLAIN, presets

#: No numbers of their own are published here: the evaluation is that of FGAA's tables, where they are the baselines.
_EVALUATION = fgaa(lam=0, masks=False)


def _bare(name: str, summary: str, paper: str, **options: Option) -> DefenseSpec:
    return DefenseSpec(
        name,
        summary,
        build="arena_defenses.plain:build",
        recipe=f"arena_defenses.recipes:{name}",
        paper=paper,
        options=options,
        presets=presets(PLAIN[name]),
        evaluation=_EVALUATION.entries,
        evaluation_flaws=_EVALUATION.flaws,
    )


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses that are a recipe and nothing else."""
    yield _bare("rt", "regular training: no defense", "")
    yield _bare(
        "sat",
        "standard adversarial training on PGD images",
        "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    )
    yield _bare(
        "trades",
        "cross-entropy plus divergence between natural and adversarial outputs",
        "Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019",
        beta=Option(6.0, "weight of the divergence, at least 0", low=0),
    )
    yield _bare(
        "mart",
        "boosted cross-entropy with misclassification-aware divergence",
        "Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020",
        beta=Option(5.0, "weight of the divergence, at least 0 (papers: 5 for ResNet-18, 6 for WRN)", low=0),
    )
