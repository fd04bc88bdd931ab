"""Parts of ``benchmarks/findings.py``: what is measured, by family, and how it is judged, drawn and written.

``bench`` trains and attacks, ``judging`` holds the law by which a prediction is confirmed or refuted, ``masks``,
``oddities``, ``knobs``, ``gate`` and ``alignment`` hold the findings, ``figures`` and ``page`` show them.
"""
