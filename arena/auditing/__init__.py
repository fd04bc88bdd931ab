"""What the audit sees for itself: indicators of attack failure, their thresholds, and the probe they look through.

``run`` is where a match comes in; the verdict, and what the attacks' own rows say, are in ``arena.audit``.
"""
