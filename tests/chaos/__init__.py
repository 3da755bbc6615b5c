"""Faults on purpose: servers killed, networks cut, processes shot, calls cancelled.

``pytest tests/chaos`` runs it, and prints a line of figures for each scenario; plain ``pytest``
leaves it out. ``HYBRID_STORAGE_CHAOS_SECONDS`` says for how long each scenario injects faults: 3
seconds by default, 1 for a short run.
"""
