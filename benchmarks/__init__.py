"""Measures the storage side by side with others and with bare drivers: ``python -m benchmarks``.

* ``contenders.py`` opens the storages, ``bare_drivers.py`` has those without SQLAlchemy,
* ``work.py`` has what they do, ``bots.py`` the bots that do it through a dispatcher,
* ``updates.py`` measures whole updates, ``measure.py`` single operations,
* ``turns.py`` has the contenders take turns, ``proxy.py`` counts round trips and delays them,
* ``results.py`` holds the figures, ``goals.py``, ``report.py`` and ``plots.py`` show them.
"""
