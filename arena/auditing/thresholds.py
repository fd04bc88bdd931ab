"""Where the audit's indicators begin to speak: every threshold, with its reason, in one place.

A share is a share of the points looked at. A rule about points also asks for ``FEWEST`` of them, so that one odd point
of a small sample is no finding.
"""

from __future__ import annotations

#: Points an indicator looks at: enough that ``FEWEST`` of them are a tenth, few enough to cost percents of a match.
SAMPLE = 32
#: The same with ``--audit deep``.
SAMPLE_DEEP = 128
#: Points that must agree before a share counts.
FEWEST = 3
#: Passes averaged for each look at a random model; a look is no verdict, so fewer than the referee's 20.
DRAWS = 8

#: Share of points whose gradient is exactly zero. The literature flags any (Pintor et al. 2022, unavailable gradients);
#: a ReLU network may have a dead corner, a twentieth of all points is none.
ZERO_GRADIENT = 0.05
#: Smallest and largest median spread of the logits. Below, a change of 1e-4 of the spread drowns in the rounding of
#: exp near 1; above, fp32 softmax is exactly one-hot (exp(-104) is 0) and the cross-entropy has no gradient.
SMALLEST_SPREAD, LARGEST_SPREAD = 1e-2, 1e3
#: Share of points at which the cross-entropy's gradient underflows to zero while the margin's does not.
UNDERFLOW = 0.05

#: Share of points that one step breaks and twenty steps on the same loss do not. Twenty steps contain the one.
ONE_STEP = 0.05
#: Share of points that random search, or noise, breaks and gradients do not.
BLACK_BOX = 0.05
#: Share of points at which random points come closer to a mistake than gradient steps. Climbs from the image end in
#: local optima, so an honest model may have a few (at most 6 % on the half of the gallery that thresholds were set on).
NOISE = 0.2
#: Share of points that a smaller ball breaks and a larger one, which contains it, does not.
CURVE = 0.08
#: Share of points that stand with the whole box to move in. There every image is allowed, so nothing can stand
#: (Pintor et al. 2022, unconstrained attack failure).
BOX = 0.05
#: A run has not settled where its best loss gains more than this share of its range in the last tenth of the steps
#: (Pintor et al. 2022, incomplete optimization: 0.05 in the last ten).
UNSETTLED_GAIN = 0.05
#: Share of unsettled runs.
UNSETTLED = 0.5
#: Angle in degrees at the knee of a long climb's curve: 90 settles at once, 180 gains evenly to the last step.
#: Medians of honest models were 130 to 141 on the half of the gallery that thresholds were set on.
ANGLE = 150.0
#: Share of climbs without a knee.
ANGLES = 0.5
#: A run slips where its last point gives back more than this share of what its best point had gained.
SLIP = 0.5
#: Share of runs that slip.
SLIPPED = 0.25
#: Share of standing points that the audit's own short attacks break, the referee agreeing.
STILL_BREAKS = 0.03
#: Median agreement (cosine) of the changes that the gradient predicts with those that finite differences see.
AGREEMENT = 0.5
#: Jump of the relative margin across a decision boundary that counts. A continuous model's gap, after ``HALVINGS``
#: halvings of the way between two images, is below 1e-3 unless it is steeper than 60 of its logits' spreads a picture.
JUMP = 0.02
#: Share of boundaries that are jumps.
JUMPS = 0.1
#: Halvings of the way between two images.
HALVINGS = 16
#: Share of planted examples that gradient steps find (Zimmermann et al. 2022 ask for nearly all).
PLANTED = 0.8
#: Share of points broken only by ``adaptive`` above which ``autoattack`` was blind.
ADAPTIVE = 0.03
#: Share of points broken only by attacks without gradients, in the match itself, above which gradients were blind.
#: An honest model loses a point or two of a hundred to random search alone (1.6 % once on the half that thresholds were
#: set on).
GRADIENT_FREE = 0.03
#: Change of an answer, as a share of the logits' spread, that rounding does not explain.
SAME = 1e-3
