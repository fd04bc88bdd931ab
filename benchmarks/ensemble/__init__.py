"""Parts of ``benchmarks/ensemble.py``: arena's rosters against the reference, its members and peers.

``cases`` are the models, ``games`` plays arena's side of them, ``plain`` the same attacks without arena's engine,
``peers`` and ``peer`` the libraries in an environment of their own, ``bare`` times passes. ``cells`` keeps what was
measured, ``measuring`` says what is, ``tables``, ``frontier`` and ``page`` show it.
"""
